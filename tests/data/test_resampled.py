"""Proven here of `data.mode=stream`, over tars without an index:

- samples come from all tars in random order, sources in the share of their weights
- every batch is full, and epochs, ranks, workers and continued runs see other samples
- the rules of trust hold: what is not allowed is not looked at, bad samples are named
- a damaged tar stops the run or is skipped and named; what is missing is said before
- a command's output is a tar like others, where commands are allowed
- tars behind a URL are fetched through the cache
"""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from faulty_server import serving
from torch.utils.data import DataLoader

from blip2_train.data import retries
from blip2_train.data.pool import Reading
from blip2_train.data.remote import Cache
from blip2_train.data.resampled import ResampledStream
from blip2_train.data.shards import ShardError, offsets_path, write_shard
from blip2_train.data.source import open_unindexed
from blip2_train.errors import UserError


def as_list(samples, skipped):
    return [(sample.key, sample.text) for sample in samples], skipped


def write_tars(folder: Path, tars: int = 4, samples: int = 30, word: str = "a") -> Path:
    folder.mkdir()
    for tar in range(tars):
        rows = [
            {"__key__": f"k{n:02d}", "jpg": b"x" * 2000, "json": {"caption": f"{word} {tar} {n}"}}
            for n in range(samples)
        ]
        path = folder / f"{tar:05d}.tar"
        write_shard(path, rows)
        offsets_path(path).unlink()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tars(tmp_path / "tars")


def stream(*sources, **changes):
    arguments = {"contrastive_batch": 10, "seed": 1, "shuffle_window": 1}
    transforms = {source.name: None for source in sources}
    return ResampledStream(sources, transforms, as_list, **(arguments | changes))


def batches(stream, count=24, workers=0):
    return list(itertools.islice(DataLoader(stream, batch_size=None, num_workers=workers), count))


def keys(found):
    return [key for rows, _ in found for key, _ in rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_tars_are_drawn_from_in_random_order(folder, workers):
    found = keys(batches(stream(open_unindexed("a", folder, 1.0)), 60, workers))
    assert len(found) == 600
    assert set(found) == {f"a/{t:05d}.tar/k{n:02d}" for t in range(4) for n in range(30)}
    assert found[:30] != sorted(found[:30])


def test_sources_come_in_the_share_of_their_weights(folder, tmp_path):
    write_tars(tmp_path / "others", word="b")
    sources = [
        open_unindexed("a", folder, 3.0),
        open_unindexed("b", str(tmp_path / "others/{00000..00003}.tar"), 1.0),
    ]
    running = stream(*sources)
    shares = Counter(key[0] for key in keys(batches(running, 20)))
    assert shares == {"a": 150, "b": 50} == running.drawn_after(20)
    assert running.epochs_after(20) == {}


def test_ranks_workers_and_continued_runs_see_other_samples(folder):
    source = open_unindexed("a", folder, 1.0)
    seen = [
        tuple(keys(batches(stream(source, rank=rank, world=2, drawn={"a": drawn}), 8)))
        for rank, drawn in ((0, 0), (1, 0), (0, 40))
    ]
    assert len(set(seen)) == 3
    again = tuple(keys(batches(stream(source, rank=0, world=2), 8)))
    assert again == seen[0], "the same start draws the same"


def test_bad_samples_are_named_and_replaced(tmp_path):
    folder = write_tars(tmp_path / "some", tars=1, samples=3)
    rows = [{"__key__": "good", "jpg": b"x", "json": {"caption": "good"}}]
    rows += [{"__key__": f"bad{n}", "json": {"caption": "no picture"}} for n in range(3)]
    rows += [{"__key__": "pickled", "pkl": b"cos\nsystem\n", "jpg": b"x", "txt": b"fine"}]
    write_shard(folder / "00000.tar", rows)
    found = batches(stream(open_unindexed("a", folder, 1.0)))
    assert {key.rsplit("/", 1)[-1] for key in keys(found)} == {"good", "pickled"}
    skips = {(skip["shard"], skip["key"], skip["reason"]) for _, s in found for skip in s}
    assert skips == {("a/00000.tar", f"bad{n}", "no image") for n in range(3)}


def test_tars_of_bad_samples_alone_end_the_run(tmp_path):
    folder = write_tars(tmp_path / "none", tars=1)
    write_shard(folder / "00000.tar", [{"__key__": "x", "json": {"caption": "no picture"}}])
    with pytest.raises(ShardError, match=r"1000 samples in a row.*no image"):
        batches(stream(open_unindexed("a", folder, 1.0)), 1)


def test_a_damaged_tar_stops_the_run_or_is_skipped(folder):
    path = folder / "00002.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    source = open_unindexed("a", folder, 1.0)
    with pytest.raises(ShardError, match=r"00002\.tar"):
        batches(stream(source), 40)
    found = batches(stream(source, reading=Reading(on_bad_shard="skip")), 40)
    reasons = {(skip["shard"], skip["reason"][:9]) for _, skips in found for skip in skips}
    assert reasons == {("a/00002.tar", "bad shard")}
    assert all(len(rows) == 10 for rows, _ in found)


def test_what_is_missing_is_said_at_the_start(folder):
    with pytest.raises(UserError, match=r"there is no .*00004\.tar"):
        open_unindexed("a", str(folder / "{00003..00009}.tar"), 1.0)
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        open_unindexed("a", str(folder / "nowhere*.tar"), 1.0)


def test_a_command_that_is_allowed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    source = open_unindexed("a", f"pipe:cat {folder}/00001.tar", 1.0, allow_pipe=True)
    found = batches(stream(source))
    assert {text.split()[1] for rows, _ in found for _, text in rows} == {"1"}
    failing = open_unindexed("a", "pipe:cat /nowhere.tar 2>/dev/null", 1.0, allow_pipe=True)
    with pytest.raises(OSError, match="ended with status 1"):
        batches(stream(failing, reading=Reading(retry_seconds=0.05)), 1)


def test_tars_behind_a_url(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    reading = Reading(Cache(tmp_path / "cache", 10**9))
    with serving(folder) as server:
        server.faults["00001.tar"] = ["drop", "busy"]
        source = open_unindexed("a", f"{server.url}/{{00000..00003}}.tar", 1.0)
        remote = keys(batches(stream(source, reading=reading)))
        assert remote == keys(batches(stream(open_unindexed("a", folder, 1.0))))
        assert all(count <= 3 for count in server.requests.values())
