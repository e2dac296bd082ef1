"""How much processor time it takes to load images: this package against what others use.

All pipelines read the same images from the page cache of one machine, each in a fresh process, and
put out batches of 224 x 224 random crops. What counts is the processor time of the loading
processes and their parent per image: unlike seconds on the clock it does not depend on what else
runs.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from blip2_train.benchmarks.machine import cpu_seconds, private_bytes, processor, versions
from blip2_train.benchmarks.photographs import Photographer
from blip2_train.benchmarks.pipelines import (
    CROP_SCALE,
    PIPELINES,
    SIDE,
    Stored,
    is_installed,
)
from blip2_train.data.images import encode_jpeg, load_rgb
from blip2_train.data.index import read_index, write_index
from blip2_train.data.shards import ShardReader, write_shard
from blip2_train.data.tokenizer import train_tokenizer
from blip2_train.data.transforms import TrainTransform, flip_images
from blip2_train.errors import UserError

_PRELOADED = ("torchvision.transforms", "transformers.models.bert.tokenization_bert", "webdataset")
OURS, BASELINE = "ours, fast", "WebDataset + torchvision"
ROUNDS = 2  # of each pipeline in turn; the least disturbed one counts
COMPARED = 32  # images whose pixels are compared between modes
MEBIBYTE = 2**20
_QUALITY = 90
_SHARDS = 16
_PACKAGES = (
    "torch", "torchvision", "pillow", "simplejpeg", "webdataset", "megatron-energon", "numpy",
)  # fmt: skip


def run(
    sizes: str, images: int, workers: int, batch: int, shards: Path | None
) -> list[dict[str, Any]]:
    """Measure and print a table.

    Args:
        sizes: "WIDTHxHEIGHT,..." of drawn photographs.
        images: to load with each pipeline.
        workers: loader processes of each.
        batch: images of a batch.
        shards: folder of shards to read instead of drawn photographs.

    Returns:
        A record for each size, or one for `shards`.

    Raises:
        UserError: a value is impossible, or `shards` holds no shards.
    """
    if min(images, workers, batch) < 1 or images < 2 * batch * workers:
        raise UserError(
            f"--images {images} --workers {workers} --batch {batch}: all must be at least 1, and "
            "there must be two batches of images for each worker."
        )
    console, records = Console(), []
    for size in [None] if shards is not None else _parse_sizes(sizes):
        with tempfile.TemporaryDirectory(prefix="blip2-benchmark-") as temp:
            if size is None:
                assert shards is not None
                stored, name = _given(shards, Path(temp), images, workers, batch), shards.name
            else:
                name = f"{size[0]}x{size[1]}"
                console.print(f"drawing {images} photographs of {name} pixels ...")
                stored = _drawn(size, Path(temp), images, workers, batch)
            records.append(_record(name, stored, console))
        console.print(_table(records[-1]))
    return records


def measure(name: str, stored: Stored) -> dict[str, float]:
    """Go through one pipeline; to be called in a process of its own.

    Args:
        name: of `PIPELINES`.
        stored: what to load.

    Returns:
        Of the `images` after the first batch: `cpu_ms_per_image`, `images_per_cpu_second`,
        `images_per_second` on the clock. Of all: `first_batch_seconds`; `worker_private_mib`, the
        largest that one worker had to itself; `same_shard_pairs`, pairs of samples of one shard
        within batches, in units of what a uniform shuffle of all images would give.
    """
    # Loaders inherit how this process was started; by default Linux forks their workers.
    multiprocessing.set_start_method("fork", force=True)
    batches = PIPELINES[name](stored)
    started = time.perf_counter()
    shards = [next(batches)[1]]
    first = time.perf_counter()
    memory = private_bytes()
    cpu = cpu_seconds()
    used = seconds = 0.0
    for image, names in batches:
        used, seconds = cpu_seconds() - cpu, time.perf_counter() - first
        assert image.shape[1:] == (3, SIDE, SIDE)
        if len(shards) % 8 == 0:
            memory = max(memory, private_bytes())
        shards.append(names)
    images = sum(map(len, shards[1:]))
    return {
        "images": images,
        "cpu_ms_per_image": 1000 * used / images,
        "images_per_cpu_second": images / used,
        "images_per_second": images / seconds,
        "first_batch_seconds": first - started,
        "worker_private_mib": memory / MEBIBYTE,
        "same_shard_pairs": _same_shard_pairs(shards),
    }


def _same_shard_pairs(batches: Sequence[Sequence[str]]) -> float:
    """Return pairs of one shard within batches over those of a uniform shuffle; 1 is uniform."""

    def pairs(names: Sequence[str]) -> int:
        return sum(n * (n - 1) // 2 for n in Counter(names).values())

    everything = [name for names in batches for name in names]
    possible = len(everything) * (len(everything) - 1) / 2
    within = sum(len(names) * (len(names) - 1) / 2 for names in batches)
    expected = within * pairs(everything) / possible if possible else 0.0
    return sum(map(pairs, batches)) / expected if expected else 1.0


# ---------------------------------------------------------------------------------- the images


def _parse_sizes(sizes: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"(\d{1,5})x(\d{1,5})", size.strip()) for size in sizes.split(",")]
    parsed = [(int(match[1]), int(match[2])) for match in found if match]
    if len(parsed) < len(found) or min(min(size) for size in parsed) < 1:
        raise UserError(f"--sizes {sizes} must be like 500x375,1365x1024.")
    return parsed


def _drawn(size: tuple[int, int], folder: Path, images: int, workers: int, batch: int) -> Stored:
    """Write shards of drawn photographs, and the same files unpacked."""
    photographer = Photographer(*size)
    random = np.random.default_rng(0)
    shards = folder / "shards"
    shards.mkdir()
    infos = []
    for number, part in enumerate(np.array_split(np.arange(images), min(_SHARDS, images))):
        samples = [
            {
                "__key__": f"{n:09d}",
                "jpg": encode_jpeg(photographer.shoot(), _QUALITY),
                "json": {"image_id": int(n), "captions": [_caption(random) for _ in range(5)]},
            }
            for n in part
        ]
        infos.append(write_shard(shards / f"train-{number:06d}.tar", samples))
    write_index(shards, infos)
    return _given(shards, folder, images, workers, batch)


_WORDS = "a the dog child man woman red blue old small runs sits plays on in with grass water"


def _caption(random: np.random.Generator) -> str:
    words = random.choice(_WORDS.split(), random.integers(8, 16))
    return " ".join(words).capitalize() + "."


def _given(shards: Path, folder: Path, images: int, workers: int, batch: int) -> Stored:
    """Unpack shards into files, and train a tokenizer on their captions."""
    index = read_index(shards)
    infos = [info for info in index.values() if info.samples]
    if not infos:
        raise UserError(f"--shards {shards} holds no samples.")
    infos = [info for info in infos if info.split == infos[0].split]
    captions: list[str] = []
    for info in infos:
        (folder / "files" / info.name).mkdir(parents=True)
        reader = ShardReader(shards / info.name, info)
        for raw in islice(map(reader.read, range(info.samples)), images - len(captions)):
            captions.append(raw.meta["captions"][0])
            path = folder / "files" / info.name / raw.key.replace("/", "_")
            path.with_suffix(".jpg").write_bytes(raw.image)
            path.with_suffix(".txt").write_text(captions[-1], encoding="utf-8")
        reader.close()
    train_tokenizer(folder / "tokenizer", captions, 2000)
    return Stored(
        shards, infos[0].split, folder / "files", folder / "tokenizer",
        len(captions), min(batch, len(captions)), workers,
    )  # fmt: skip


# -------------------------------------------------------------------------------- the comparison


def _record(name: str, stored: Stored, console: Console) -> dict[str, Any]:
    """Measure all pipelines on the same images."""
    found: dict[str, dict[str, float]] = {}
    with console.status("") as status:
        for turn in range(ROUNDS):
            for pipeline in filter(is_installed, PIPELINES):
                status.update(f"{name}: {pipeline}, {turn + 1} of {ROUNDS}")
                result = _in_a_fresh_process(pipeline, stored)
                best = found.setdefault(pipeline, result)
                if result["cpu_ms_per_image"] < best["cpu_ms_per_image"]:
                    found[pipeline] = result
    ours, baseline = found[OURS], found[BASELINE]
    others = {key: value for key, value in found.items() if key not in (OURS, BASELINE)}
    others |= {key: {} for key in PIPELINES if not is_installed(key)}
    return {
        "name": f"loader {name}",
        "device": processor(),
        "versions": versions(*_PACKAGES),
        "shapes": {
            "images": stored.images, "batch": stored.batch, "output": SIDE, "rounds": ROUNDS,
            "workers": stored.workers, "shards": len(list(stored.files.iterdir())),
            "bytes_per_image": _mean_bytes(stored),
        },
        "ours": ours,
        "baseline": baseline,
        "others": others,
        "speedup": baseline["cpu_ms_per_image"] / ours["cpu_ms_per_image"],
        "memory_ratio": _ratio(ours["worker_private_mib"], baseline["worker_private_mib"]),
        **_compare_pixels(stored),
    }  # fmt: skip


def _in_a_fresh_process(pipeline: str, stored: Stored) -> dict[str, float]:
    context = multiprocessing.get_context("forkserver")  # whose imports are made once
    context.set_forkserver_preload([__name__, *_PRELOADED])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, pipeline, stored).result()


def _compare_pixels(stored: Stored) -> dict[str, Any]:
    """Say whether the exact mode is torchvision's to the bit, and how far the fast one is off."""
    from torchvision import transforms

    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIDE, CROP_SCALE, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    equal, differences = True, []
    for seed, data in enumerate(islice(_image_files(stored), COMPARED)):
        torch.manual_seed(seed)
        expected = theirs(load_rgb(data))
        exact, fast = (
            _finished(TrainTransform(SIDE, CROP_SCALE, decode="exact"), data, seed),
            _finished(TrainTransform(SIDE, CROP_SCALE, decode="fast"), data, seed),
        )
        equal &= torch.equal(exact, expected)
        differences.append((fast.float() - exact.float()).abs().mean().item())
    return {"equal": equal, "mean_pixel_difference": float(np.mean(differences))}


def _finished(transform: TrainTransform, data: bytes, seed: int) -> torch.Tensor:
    pixels, flip = transform(data, torch.Generator().manual_seed(seed))
    return flip_images(pixels[None], torch.tensor([flip]))[0]


def _image_files(stored: Stored) -> Iterator[bytes]:
    return (path.read_bytes() for path in sorted(stored.files.glob("*/*.jpg")))


def _mean_bytes(stored: Stored) -> int:
    return round(np.mean([path.stat().st_size for path in stored.files.glob("*/*.jpg")]))


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs else None


def _table(record: dict[str, Any]) -> Table:
    table = Table(title=f"{record['name']}, {record['device']}", title_justify="left")
    table.add_column("pipeline", no_wrap=True, min_width=max(map(len, PIPELINES)))
    missing = ""
    for column in (
        "CPU ms\nper image", "images per\nCPU second", "times\nplain", "first\nbatch, s",
        "MiB a\nworker", "pairs of\none shard",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    rows = {OURS: record["ours"], BASELINE: record["baseline"], **record["others"]}
    speed = record["baseline"]["images_per_cpu_second"]
    for name in PIPELINES:
        row = rows[name]
        if not row:
            table.add_row(name, *"-" * 6)
            missing += f"; {name} is not installed"
            continue
        table.add_row(
            name,
            f"{row['cpu_ms_per_image']:.2f}",
            f"{row['images_per_cpu_second']:.0f}",
            f"{row['images_per_cpu_second'] / speed:.2f}",
            f"{row['first_batch_seconds']:.2f}",
            f"{row['worker_private_mib']:.0f}",
            f"{row['same_shard_pairs']:.2f}",
        )
    same = "equal torchvision's" if record["equal"] else "DIFFER from torchvision's"
    table.caption = (
        f"pixels of exact {same} to the bit; fast is {record['mean_pixel_difference']:.2f} of 255 "
        f"away from exact on average; pairs: 1 is a uniform shuffle{missing}"
    )
    return table
