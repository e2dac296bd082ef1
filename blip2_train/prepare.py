"""Turn data sets into shards.

    blip2-prepare coco ROOT --out OUT                  official COCO captions
    blip2-prepare karpathy ROOT --out OUT              dataset_{coco,flickr30k,flickr8k}.json
    blip2-prepare lavis --annotations FILE ... --images DIR --out OUT
    blip2-prepare flickr30k ROOT --out OUT
    blip2-prepare flickr8k ROOT --out OUT
    blip2-prepare nocaps ROOT --out OUT                images to caption, with their domains
    blip2-prepare folder ROOT --out OUT                images and captions.csv or .jsonl
    blip2-prepare vqa ROOT --out OUT                   questions of VQAv2 or OK-VQA
    blip2-prepare gqa ROOT --out OUT                   questions of GQA
    blip2-prepare synthetic --samples N --out OUT      rendered scenes, no data needed
    blip2-prepare index FOLDER                         index WebDataset tars from elsewhere
    blip2-prepare features FOLDER experiment=NAME      what the frozen tower makes of the images
    blip2-prepare verify FOLDER                        check shards against their index

The same command again goes on where it was killed. OUT/report.json lists all that was skipped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2_train.data.options import add_input_options, add_output_options, add_workers, whole
from blip2_train.errors import UserError

if TYPE_CHECKING:  # imported where they are used: `--help` should not wait for numpy and PIL
    from blip2_train.data.plan import Item, Source
    from blip2_train.data.writer import Make

DATA_SETS = {
    "coco": "official COCO captions: annotations/captions_{train,val}YEAR.json, {train,val}YEAR/",
    "karpathy": "a Karpathy-split JSON: dataset_coco.json, dataset_flickr30k.json, ...",
    "lavis": "JSON lists as LAVIS and BLIP publish them",
    "flickr30k": "Flickr30k: dataset_flickr30k.json, results_20130124.token or results.csv",
    "flickr8k": "Flickr8k: Flickr8k.token.txt or captions.txt, and the official split lists",
    "nocaps": "NoCaps: nocaps_val_4500_captions.json, nocaps_test_image_info.json, {val,test}/",
    "folder": "images with a table: captions.csv (image,caption) or captions.jsonl",
    "vqa": "VQAv2 or OK-VQA: [v2_]OpenEnded_mscoco_*_questions.json with *_annotations.json",
    "gqa": "GQA: {train,val,testdev,test}_balanced_questions.json, images/",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a mistake of the user)."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        return args.run(args, shlex.join(["blip2-prepare", *argv]))
    except (UserError, OSError) as error:  # the latter: a full or read-only disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130


def prepare_dataset(args: argparse.Namespace, command: str) -> int:
    """Write the shards of a data set with annotations and image files."""
    from functools import partial

    from blip2_train.data.layouts import LAYOUTS, Given
    from blip2_train.data.plan import file_items, make_from_file

    given = Given(
        root=args.root,
        images=args.images,
        annotations=args.annotations,
        questions=args.questions,
        split=args.split,
        split_lists=args.split_list,
        year=args.year,
        restval=args.restval,
        strip=args.strip,
    )
    sources = LAYOUTS[args.command](given)
    make = partial(make_from_file, short_side=args.resize, quality=args.quality)
    settings = {"resize": args.resize, "quality": args.quality}
    return _prepare(args, command, list(file_items(sources)), sources, make, settings)


def prepare_synthetic(args: argparse.Namespace, command: str) -> int:
    """Write the shards of rendered scenes."""
    from functools import partial

    from blip2_train.data.synthetic import WORLDS, make_scene, synthetic_items

    world = WORLDS[args.objects]
    settings = {"size": args.size, "quality": args.quality}
    try:
        items = list(synthetic_items(world, args.samples, args.seed, args.held_out, args.questions))
    except ValueError as error:
        raise UserError(f"--held-out {args.held_out} is too many: {error}") from None
    return _prepare(args, command, items, [], partial(make_scene, **settings), settings)


def _prepare(
    args: argparse.Namespace,
    command: str,
    items: list[tuple[str, Item]],
    sources: list[Source],
    make: Make,
    settings: dict[str, Any],
) -> int:
    """Plan, write, report."""
    from tqdm import tqdm

    from blip2_train.data.atomic import write_json
    from blip2_train.data.index import write_index
    from blip2_train.data.plan import check_images, plan_shards
    from blip2_train.data.report import make_report, print_report
    from blip2_train.data.writer import REPORT_NAME, claimed, write_shards

    start = time.monotonic()
    settings = {**settings, "data": args.command, "tokenizer": args.tokenizer}
    shards, fingerprint = plan_shards(items, args.samples_per_shard, settings)
    problems = [problem for source in sources for problem in source.annotations.problems]
    with claimed(args.out, fingerprint, command):
        report = make_report(command, shards, [], problems, time.monotonic() - start)
        try:
            warnings = check_images(items, sources) if sources else []
            if args.tokenizer and all(split != "train" for split, _ in items):
                raise UserError("--tokenizer learns from the captions of train: there are none")
        except (UserError, OSError) as error:  # the latter: a full or read-only disk
            write_json(args.out / REPORT_NAME, {**report, "error": str(error)})
            raise
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{len(items):,} records, {len(shards):,} shards, {args.workers} workers", flush=True)
        with tqdm(total=len(items), unit=" images", disable=None) as progress:
            written = write_shards(
                args.out,
                shards,
                make,
                fingerprint=fingerprint,
                command=command,
                workers=args.workers,
                done=progress.update,
            )
        if args.tokenizer:
            _train_tokenizer(args, items)
        # The index comes last: a folder that has one is finished.
        write_index(args.out, [result.shard for result in written if result.shard is not None])
        report = make_report(command, shards, written, problems, time.monotonic() - start)
        write_json(args.out / REPORT_NAME, report)
    print_report(report, args.out)
    return 0


def _train_tokenizer(args: argparse.Namespace, items: list[tuple[str, Item]]) -> None:
    from blip2_train.data.plan import questions_of
    from blip2_train.data.tokenizer import train_tokenizer

    train = [item for split, item in items if split == "train"]
    texts = [text for item in train for text in item.captions]
    asked = [question for item in train for question in questions_of(item)]
    texts += [text for one in asked for text in (one["question"], *one["answers"])]
    folder = args.out / "tokenizer"
    size = train_tokenizer(folder, texts, args.tokenizer)
    what = "captions, questions and answers" if asked else "captions"
    fewer = "" if size == args.tokenizer else f" (the {what} have no {args.tokenizer:,})"
    print(f"{folder}: {size:,} entries{fewer}, from {len(texts):,} {what} of split train")


def index(args: argparse.Namespace, command: str) -> int:
    """Index the tars that others wrote; exit code 1 if one cannot be read."""
    from blip2_train.data.check import index_folder

    shards, bad = index_folder(args.folder, args.split, args.workers)
    for message in bad:
        print(f"not in the index: {message}", file=sys.stderr)
    samples = sum(shard.samples for shard in shards)
    print(f"{len(shards):,} shards, {samples:,} samples in {args.folder / 'index.json'}")
    return 1 if bad else 0


def verify(args: argparse.Namespace, command: str) -> int:
    """Check every shard against the index, and features beside them; exit code 1 if one is bad."""
    from blip2_train.data.check import verify_features, verify_folder

    count, bad = verify_folder(args.folder, args.workers)
    files, damaged = verify_features(args.folder, args.workers)
    for message in bad + damaged:
        print(f"bad: {message}", file=sys.stderr)
    also = f" and {files:,} files of features" if files else ""
    print(f"{count:,} shards in the index of {args.folder}{also}, {len(bad + damaged):,} problems")
    return 1 if bad + damaged else 0


def features(args: argparse.Namespace, command: str) -> int:
    """Write what the frozen tower of a configuration makes of every image."""
    import logging

    import torch

    from blip2_train.config import launch, to_plain
    from blip2_train.train import compose
    from blip2_train.training.compiling import wants_compilation
    from blip2_train.training.features import write_features

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; take --device cpu")
    # torch warns of every enum that torchao registers when it is imported
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    cfg, started = to_plain(compose(args.overrides)), launch()
    if "vision" not in cfg:
        raise UserError(f"stage={cfg['stage']} has no frozen image tower; give another experiment=")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    done = write_features(
        args.folder,
        cfg["vision"],
        splits=args.split,
        store=args.store,
        batch=args.batch,
        device=torch.device("cuda", started.local_rank) if cuda else torch.device("cpu"),
        workers=args.workers or max(1, len(os.sched_getaffinity(0)) // started.local_world_size),
        launch=started,
        compiled=wants_compilation(cfg["trainer"], cuda=cuda),
    )
    print(done)
    print("train with data.features=cached data.crop_scale=null data.flip=0")
    return 0


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "blip2-prepare", description=__doc__, formatter_class=formatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in DATA_SETS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=prepare_dataset)
        add_input_options(command, name)
        command.add_argument(
            "--resize",
            type=whole(0),
            default=256,
            metavar="PX",
            help="shorter side of the stored images in pixels; smaller ones stay as they are, "
            "0 keeps all sizes (default: 256)",
        )
        add_output_options(command)
    text = "rendered scenes with exact captions, for tests and demonstrations"
    command = commands.add_parser("synthetic", help=text, description=text)
    command.set_defaults(run=prepare_synthetic)
    command.add_argument(
        "--samples", type=whole(1), default=15_000, metavar="N", help="of train (15000)"
    )
    command.add_argument(
        "--held-out",
        type=whole(2),
        default=500,
        metavar="N",
        help="scenes of novel and of compositional; val has half as many (500)",
    )
    command.add_argument(
        "--objects", type=int, choices=(1, 2), default=1, help="in a scene; 2: with a relation (1)"
    )
    command.add_argument(
        "--questions", action="store_true", help="with answers, beside the captions"
    )
    command.add_argument(
        "--size", type=whole(16, 4096), default=64, metavar="PX", help="side, pixels (64)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the scenes (0)")
    add_output_options(command)
    text = "index WebDataset tars that others wrote, so that training can read them"
    command = commands.add_parser("index", help=text, description=text)
    command.set_defaults(run=index)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="holds the .tar files")
    command.add_argument("--split", help="of all tars (default: from NAME-000000.tar, else train)")
    add_workers(command)
    text = "compute what the frozen image tower makes of every image, for data.features=cached"
    command = commands.add_parser("features", help=text, description=text)
    command.set_defaults(run=features)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="holds index.json")
    command.add_argument(
        "overrides", nargs="+", metavar="key=value",
        help="as of blip2-train, experiment=NAME and all that is said of vision",
    )  # fmt: skip
    command.add_argument("--split", nargs="+", default=[], help="whose images (default: all)")
    command.add_argument(
        "--store", choices=("float32", "bfloat16", "float8"),
        help="kept as (default: the tower's own; float8: e4m3 with a scale for each token)",
    )  # fmt: skip
    command.add_argument(
        "--batch", type=whole(1), default=128, metavar="N", help="images at a time (128)"
    )
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.add_argument(
        "--workers", type=whole(1), metavar="N",
        help="processes that decode (default: CPUs that this one may use, shared by all of them)",
    )  # fmt: skip
    text = "check size, SHA-256 and offsets of every shard against the index"
    command = commands.add_parser("verify", help=text, description=text)
    command.set_defaults(run=verify)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="holds index.json")
    add_workers(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
