"""What will be written where: records to numbered samples to shards, before any image is opened.

The plan depends on the annotations alone, so an image that turns out to be bad leaves a gap in its
shard and moves nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from blip2_train.data.annotations import Annotations
from blip2_train.errors import UserError

MISSING = "missing"
MAX_FILE_BYTES = 512 * 2**20  # an image file beyond this is not read at all


@dataclass(frozen=True)
class Source:
    """Annotations, the file they are from, and the folder that their image paths start at."""

    name: str
    captions: Path
    images: Path
    annotations: Annotations


@dataclass(frozen=True)
class Item:
    """One sample to be: a record, or the number of a synthetic scene."""

    key: str  # unique in its split, with nothing in it that a tar or WebDataset minds
    file: str  # what reports call it
    captions: list[str]
    payload: Any  # JSON; what the function that makes the sample needs
    skip: str | None = None  # the reason, where it is known beforehand


@dataclass(frozen=True)
class PlannedShard:
    """The items of one shard."""

    name: str
    split: str
    items: list[Item]


def plan_shards(
    items: Iterable[tuple[str, Item]], samples_per_shard: int, settings: dict[str, Any]
) -> tuple[list[PlannedShard], str]:
    """Cut (split, item) pairs into shards of `samples_per_shard` records, in their order.

    Args:
        items: pairs; the splits may be interleaved.
        samples_per_shard: records per shard, the last one of a split may have fewer.
        settings: whatever else decides the bytes of the shards.

    Returns:
        The shards, split by split in order of first appearance, and the SHA-256 of plan and
        settings: two runs write the same shards if and only if it is the same.
    """
    by_split: dict[str, list[Item]] = {}
    for split, item in items:
        by_split.setdefault(split, []).append(item)
    shards = [
        PlannedShard(f"{split}-{number:06d}.tar", split, rows[start : start + samples_per_shard])
        for split, rows in by_split.items()
        for number, start in enumerate(range(0, len(rows), samples_per_shard))
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for shard in shards:
        digest.update(json.dumps(asdict(shard)).encode())
    return shards, digest.hexdigest()


def file_items(sources: list[Source]) -> Iterator[tuple[str, Item]]:
    """Yield (split, item) for every record; images that are not there are marked.

    Raises:
        UserError: a split's name cannot be part of a file name, or an image folder does not exist.
    """
    counts: dict[str, int] = {}
    for source in sources:
        images = Path(os.path.abspath(source.images))  # the same data from any working directory
        skip = _skip_reasons(images)
        for record in source.annotations.records:
            if not re.fullmatch(r"[A-Za-z]\w*", record.split):
                raise UserError(f"{source.captions}: {record.split!r} cannot name a split")
            number = counts.get(record.split, 0)
            counts[record.split] = number + 1
            stem = re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(record.image).stem)
            payload = {
                "path": str(images / record.image),
                "image_id": record.image_id,
                "source": source.name,
            }
            if record.questions:
                payload["questions"] = record.questions
            if record.domain:
                payload["domain"] = record.domain
            key = f"{number:08d}_{stem[:64]}"
            yield (
                record.split,
                Item(key, record.image, record.captions, payload, skip(record.image)),
            )


def check_images(items: list[tuple[str, Item]], sources: list[Source]) -> list[str]:
    """Find out before any long work whether the captions and the images fit together.

    Args:
        items: all of `file_items(sources)`.
        sources: the same as there.

    Returns:
        A warning for each source that lacks some of its images.

    Raises:
        UserError: there is no record at all, or a source lacks all of its images.
    """
    if not items:
        captions = ", ".join(str(source.captions) for source in sources)
        raise UserError(f"nothing to write: no image of {captions} has a split and text")
    warnings = []
    rows = iter(items)
    for source in sources:
        count = len(source.annotations.records)
        missing = [item.file for _, item in itertools.islice(rows, count) if item.skip]
        if missing and len(missing) == count:
            raise UserError(
                f"none of the {count:,} images that {source.captions} names is in "
                f"{source.images}, for example {missing[0]}: give the folder with --images"
            )
        if missing:
            warnings.append(
                f"{len(missing):,} of the {count:,} images that {source.captions} names are not "
                f"in {source.images}, for example {missing[0]}"
            )
    return warnings


def make_from_file(item: Item, *, short_side: int, quality: int) -> tuple[bytes, dict[str, Any]]:
    """Read an item's image file and give its JPEG and its metadata.

    Args:
        item: one of `file_items`.
        short_side: as for `images.to_jpeg`, pixels.
        quality: as for `images.to_jpeg`.

    Raises:
        BadImage: the file is no usable image.
        OSError: the disk failed; says nothing about the image.
    """
    from blip2_train.data.images import BadImage, to_jpeg

    path = Path(item.payload["path"])
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadImage(f"too large: {size} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadImage(MISSING) from None
    except PermissionError as error:
        raise BadImage(f"unreadable: {error.strerror}") from None
    jpeg, width, height = to_jpeg(data, short_side=short_side, quality=quality)
    meta = {
        "image_id": item.payload["image_id"],
        "captions": item.captions,
        "source": item.payload["source"],
        "width": width,
        "height": height,
    }
    return jpeg, meta | {k: item.payload[k] for k in ("questions", "domain") if k in item.payload}


def questions_of(item: Item) -> list[dict[str, Any]]:
    """The questions about an item's image, as shards hold them; none as a rule."""
    return item.payload.get("questions", []) if isinstance(item.payload, dict) else []


def _skip_reasons(images: Path) -> Callable[[str], str | None]:
    """Give a function that says why an image of folder `images` cannot be read, None if it can.

    Folders are listed once each: asking for a hundred thousand files one by one takes minutes on a
    network file system.
    """
    if not images.is_dir():
        raise UserError(f"the image folder {images} does not exist")
    listed: dict[str, set[str]] = {}

    def reason(image: str) -> str | None:
        if os.path.isabs(image) or ".." in image.split("/") or "\0" in image:
            return "outside the image folder"
        folder, _, name = image.rpartition("/")
        if folder not in listed:
            try:
                with os.scandir(images / folder) as entries:
                    listed[folder] = {entry.name for entry in entries if entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                listed[folder] = set()
        return None if name in listed[folder] else MISSING

    return reason
