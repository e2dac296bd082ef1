"""What it costs to go on in the middle of an epoch: what it costs to start.

Proven on 100,000 samples: the first batch after 1 %, 50 % or 99 % of an epoch reads the samples of
that batch and no others, from as few shards as the window has; nothing is replayed. Printed: the
time to that batch through loader processes.
"""

import io
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from blip2_train.data import shards as shards_module
from blip2_train.data.batch import Sample, Skipped
from blip2_train.data.index import write_index
from blip2_train.data.shards import ShardReader, offsets_path, write_shard
from blip2_train.data.source import open_source
from blip2_train.data.stream import TrainStream
from blip2_train.data.transforms import TrainTransform

SHARDS = {"large": 90, "small": 10}
PER_SHARD = 1000
TOTAL = PER_SHARD * sum(SHARDS.values())
BATCH, WINDOW = 40, 8
PLACES = (0, 0.01, 0.5, 0.99)  # of an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All shards hold the same: which is which does not matter here."""
    folder = tmp_path_factory.mktemp("many")
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(buffer, "JPEG")
    samples = (
        {"__key__": f"{n:06d}", "jpg": buffer.getvalue(), "json": {"captions": [f"number {n}"]}}
        for n in range(PER_SHARD)
    )
    first = folder / "first.tar"
    made = write_shard(first, samples)
    infos = []
    for split, count in SHARDS.items():
        for number in range(count):
            path = folder / f"{split}-{number:06d}.tar"
            shutil.copy(first, path)
            shutil.copy(offsets_path(first), offsets_path(path))
            infos.append(replace(made, name=path.name, split=split))
    write_index(folder, infos)
    return folder


def keys_of(samples: list[Sample], skipped: list[Skipped]) -> list[str]:
    assert not skipped
    return [sample.key for sample in samples]


def stream_at(folder: Path, place: float) -> TrainStream:
    """As a run that starts or goes on opens it: sources by size, `place` epochs drawn before."""
    sources = [open_source(name, folder, name, count) for name, count in SHARDS.items()]
    return TrainStream(
        sources,
        dict.fromkeys(SHARDS, TrainTransform(16)),
        keys_of,
        contrastive_batch=BATCH,
        seed=0,
        shuffle_window=WINDOW,
        drawn={name: round(place * count * PER_SHARD) for name, count in SHARDS.items()},
    )


@pytest.mark.slow
def test_going_on_reads_what_starting_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []
    opened: list[str] = []
    pread, open_shard = os.pread, ShardReader._open

    def counted_pread(file: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(file, length, offset)

    def counted_open(reader: ShardReader) -> object:
        opened.append(reader.info.name)
        return open_shard(reader)

    batches = []
    with monkeypatch.context() as patch:
        patch.setattr(shards_module.os, "pread", counted_pread)
        patch.setattr(ShardReader, "_open", counted_open)
        for place in PLACES:
            read.clear()
            opened.clear()
            batches.append(next(iter(stream_at(folder, place))))
            assert len(read) == len(set(batches[-1])) == BATCH
            assert sum(read) < 4096 * BATCH
            assert len(opened) == len(set(opened)) <= 2 * (2 * WINDOW - 1)  # of two sources
    assert len({key for keys in batches for key in keys}) == len(PLACES) * BATCH

    lines = [
        f"seconds to the first batch of {BATCH}, {TOTAL} samples in {sum(SHARDS.values())} shards"
    ]
    for workers in (0, 2):
        times = dict.fromkeys(PLACES, float("inf"))
        for _ in range(3):
            for place, expected in zip(PLACES, batches, strict=True):
                started = time.perf_counter()
                loader = iter(
                    DataLoader(stream_at(folder, place), batch_size=None, num_workers=workers)
                )
                assert next(loader) == expected
                times[place] = min(times[place], time.perf_counter() - started)
                del loader
        lines.append(
            f"{workers} workers: "
            + ", ".join(f"at {place:.0%} {seconds:.3f}" for place, seconds in times.items())
        )
    with capsys.disabled():
        print("", *lines, sep="\n")
