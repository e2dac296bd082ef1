"""Small splits of one's own, made of rendered scenes."""

from pathlib import Path
from typing import Any

from blip2_train.data.index import read_index, write_index
from blip2_train.data.shards import ShardReader, write_shard
from blip2_train.data.source import open_source
from blip2_train.data.stream import EvalStream

Change = dict[str, Any] | None


def make_split(shards: Path, folder: Path, changes: list[Change]) -> Path:
    """A folder with a split `test` of as many images of `shards`' val.

    Each has an entry: what of its json is other (a value of ... removes the key, `jpg` is the
    image's bytes); None: as it is.
    """
    folder.mkdir(parents=True)
    name = next(name for name, info in read_index(shards).items() if info.split == "val")
    reader = ShardReader(shards / name, read_index(shards)[name])
    samples = []
    for number, change in enumerate(changes):
        raw = reader.read(number % len(reader))
        meta = {**raw.meta, "image_id": f"bild {number}", **(change or {})}
        image = meta.pop("jpg", raw.image)
        meta = {key: value for key, value in meta.items() if value is not ...}
        samples.append({"__key__": f"s{number:03d}", "png": image, "json": meta})
    infos = []
    for n, start in enumerate(range(0, len(samples), 5)):
        infos.append(write_shard(folder / f"test-{n:06d}.tar", samples[start : start + 5]))
    write_index(folder, infos)
    return folder


def open_split(folder: Path, transform: Any, **options: Any) -> EvalStream:
    return EvalStream(open_source("own", folder, "test"), transform, **options)
