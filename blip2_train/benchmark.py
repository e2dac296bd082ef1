"""Measure speed and memory against what others use, in one run on one machine.

    blip2-benchmark stage1         a training step against the reference's, on any device
    blip2-benchmark stage2         the same of stage 2
    blip2-benchmark tower          the frozen image tower against the reference's
    blip2-benchmark loader         images from shards to batches, on processors alone
    blip2-benchmark collectives    bytes that ranks exchange in a step of stage 1
    blip2-benchmark fit            the largest batch for a device: measured on a GPU, else estimated

Each prints one table and writes its numbers with --json FILE.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from blip2_train.errors import UserError

# Of what runs on any device: help, and presets (those of its module, which is slow to import).
MODELS = {
    "stage1": ("a training step of stage 1", ("small", "vitl", "vitg")),
    "stage2": (
        "a training step of stage 2",
        ("small", "small_t5", "vitg_opt2_7b", "vitg_flant5xl"),
    ),
    "tower": ("the frozen image tower alone", ("small", "vitl", "vitg")),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a mistake of the user)."""
    args = _parser().parse_args(argv)
    # torch warns of every enum that torchao registers when it is imported
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        records = args.run(args)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(records, indent=1) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_model(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A step, or the tower: see the module of `benchmarks` of this name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler reports that there is no GPU
    import torch

    from blip2_train.benchmarks import stage1, stage2, tower

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    subject: Any = {"stage1": stage1, "stage2": stage2, "tower": tower}[args.subject]
    given = [args.preset, args.batch, args.device, args.rounds, args.overrides]
    return subject.run(*given) if subject is tower else subject.run(*given, loader=args.loader)


def run_loader(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Loading images, see `benchmarks/loader.py`."""
    from blip2_train.benchmarks.loader import run

    return run(args.sizes, args.images, args.workers, args.batch, args.shards)


def run_collectives(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Traffic between ranks, see `benchmarks/collectives.py`."""
    from blip2_train.benchmarks.collectives import run

    return run(args.worlds, args.batch, args.tokens, args.width, args.steps)


def run_fit(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest batch that fits, see `benchmarks/fit.py`."""
    from blip2_train.benchmarks.fit import run

    return run(args.overrides, args.memory, args.world, args.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip2-benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="SUBJECT")
    for subject, (text, presets) in MODELS.items():
        command = commands.add_parser(subject, help=text)
        command.add_argument(
            "--preset", default="small", choices=presets,
            help="shapes: small ones are for processors (default %(default)s)",
        )  # fmt: skip
        command.add_argument("--batch", type=_count, help="samples (default: the preset's)")
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        command.add_argument("--threads", type=_count, help="of a processor (default: torch's)")
        command.add_argument(
            "--rounds", type=_count, default=10, help="of each side (default %(default)s)"
        )
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="of the configuration of blip2-train"
        )
        command.set_defaults(run=run_model, subject=subject)
        if subject != "tower":
            command.add_argument(
                "--loader", action="store_true",
                help="steps in a row are fed from the configuration's data (default: from memory)",
            )  # fmt: skip
    loader = commands.add_parser("loader", help="images from shards to batches")
    loader.add_argument(
        "--sizes", default="341x256,500x375,1365x1024",
        help="WIDTHxHEIGHT,... of the photographs that are drawn (default %(default)s)",
    )  # fmt: skip
    loader.add_argument("--images", type=int, default=1000, help="in all (default %(default)s)")
    loader.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    loader.add_argument("--batch", type=int, default=64, help="images (default %(default)s)")
    loader.add_argument(
        "--shards", type=Path, metavar="FOLDER",
        help="of blip2-prepare, in place of drawn photographs",
    )  # fmt: skip
    loader.set_defaults(run=run_loader)
    collectives = commands.add_parser("collectives", help="bytes between ranks")
    for name, default, text in (
        ("--batch", 16, "samples of each rank"),
        ("--tokens", 257, "image tokens of a sample"),
        ("--width", 1408, "numbers of a token, in bfloat16"),
        ("--steps", 5, "contrastive batches that are measured"),
    ):
        collectives.add_argument(
            name, type=_count, default=default, help=f"{text} (default %(default)s)"
        )
    collectives.add_argument(
        "--worlds", type=lambda text: [_count(number) for number in text.split(",")],
        default=[2, 4, 8], metavar="N,N,...", help="numbers of processes (default 2,4,8)",
    )  # fmt: skip
    collectives.set_defaults(run=run_collectives)
    fit = commands.add_parser("fit", help="the largest batch for a device")
    fit.add_argument(
        "overrides", nargs="+", metavar="key=value",
        help="experiment=NAME and further keys of the configuration of blip2-train",
    )  # fmt: skip
    fit.add_argument(
        "--memory", type=_memory, metavar="80GB", help="of a device (default: this GPU's)"
    )
    fit.add_argument(
        "--world", type=_count, default=16, metavar="N", help="devices (default %(default)s)"
    )
    fit.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="cpu: an estimate, also where there is a GPU (default %(default)s)",
    )  # fmt: skip
    fit.set_defaults(run=run_fit)
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    return parser


def _memory(text: str) -> float:
    """Bytes of "80GB" or "80G", which are 80e9."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)GB?", text, flags=re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no memory; give it in GB, such as 80GB or 24G")
    return float(found[1]) * 1e9


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
