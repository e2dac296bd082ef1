"""Proven here, against real HTTP servers on loopback and other fsspec file systems:

- shards behind a URL give the same batches as the files, whatever the server does on the way
- connections that are refused, dropped, stalled or end early are tried again, then stop the run
- each file is fetched once by all processes of a machine, complete or not at all
- what is needed next is fetched ahead
- a small cache lets go of what was not used for the longest time; a full disk is named
- what is missing or is another file is said at once, and is skipped where that is asked for
- locations may have braces and globs; with `locality` a machine fetches its own part alone
"""

import errno
import hashlib
import itertools
import json
import logging
import multiprocessing
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import pytest
from faulty_server import FaultyServer, serving
from torch.utils.data import DataLoader

from blip2_train.data import remote as remote_module
from blip2_train.data import retries
from blip2_train.data.index import write_index
from blip2_train.data.pool import Reading, ShardPool
from blip2_train.data.remote import Cache, MissingFile, WrongSize
from blip2_train.data.shards import ShardError, write_shard
from blip2_train.data.source import open_source, open_unindexed
from blip2_train.data.stream import TrainStream
from blip2_train.errors import UserError

SHARDS, SAMPLES = 6, 8
ROOMY = 10**9


def as_list(samples, skipped):
    return [(sample.key, sample.text) for sample in samples], skipped


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    infos = []
    for shard in range(SHARDS):
        samples = [
            {"__key__": f"k{shard}{n}", "jpg": b"x" * 3000, "json": {"caption": f"{shard} {n}"}}
            for n in range(SAMPLES)
        ]
        infos.append(write_shard(folder / f"train-{shard:06d}.tar", samples))
    write_index(folder, infos)
    return folder


@pytest.fixture
def server(folder):
    with serving(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of milliseconds, and a connection stalls after a second."""
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retries, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(remote_module, "STALL_SECONDS", 1.0)


def stream(source, reading=None, **changes):
    arguments = {"contrastive_batch": 6, "seed": 1, "shuffle_window": 2, "reading": reading}
    return TrainStream([source], {source.name: None}, as_list, **(arguments | changes))


def batches(stream, count=16, workers=0):
    return list(itertools.islice(DataLoader(stream, batch_size=None, num_workers=workers), count))


def opened(server, tmp_path, limit=ROOMY, retry=1.0, **changes):
    source = open_source("a", server.url, "train", retry_seconds=retry)
    reading = Reading(Cache(tmp_path / "cache", limit), retry_seconds=retry, **changes)
    return source, reading


@pytest.fixture(scope="module")
def expected(folder):
    return batches(stream(open_source("a", folder, "train")))


@pytest.mark.parametrize("workers", [0, 3])
def test_the_same_batches_through_every_fault(folder, server, tmp_path, expected, workers):
    tars = [f"train-{shard:06d}.tar" for shard in range(SHARDS)]
    faults = ["drop", "truncate", "refuse", "busy", "stall"]
    for number, name in enumerate(tars):
        server.faults[name] = [faults[number % 5], faults[(number + 1) % 4]]
        server.faults[f"{name}.offsets.npy"] = [faults[(number + 2) % 4]]
    server.faults["index.json"] = ["drop", "truncate", "busy"]
    source, reading = opened(server, tmp_path, retry=60)
    assert batches(stream(source, reading), workers=workers) == expected
    assert not any(skipped for _, skipped in expected)
    assert not any(server.faults.values()), "not all faults were met"
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} <= {"", ".lock"}, "parts are left"


def test_files_are_fetched_once_and_again_only_when_they_are_gone(server, tmp_path, expected):
    source, reading = opened(server, tmp_path)
    assert batches(stream(source, reading), workers=4) == expected
    before = dict(server.requests)
    assert all(count == 1 for count in before.values()), before
    assert batches(stream(source, reading), workers=2) == expected
    assert dict(server.requests) == before
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    assert batches(stream(source, reading), workers=2) == expected


def test_the_run_stops_where_it_does_not_pass(server, tmp_path, caplog):
    source, reading = opened(server, tmp_path, retry=0.2)
    for shard in source.shards:
        server.faults[shard.name] = ["drop"] * 1000
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match=r"http://.*train-0"):
        batches(stream(source, reading))
    assert "trying again" in caplog.text


def test_what_is_needed_next_is_fetched_ahead(server, tmp_path):
    source, reading = opened(server, tmp_path)
    running = iter(stream(source, reading, contrastive_batch=1))
    next(running)
    for _ in range(200):
        if sum(name.endswith(".tar") for name in server.requests) >= 4:
            break  # two windows of two shards, after one sample
        time.sleep(0.05)
    assert sum(name.endswith(".tar") for name in server.requests) == 4


def fetch_slowly(url, folder, queue):
    cache = Cache(folder, ROOMY)
    with cache.open(url) as file:
        queue.put(hashlib.sha256(file.read()).hexdigest())


def test_processes_that_want_one_file_get_it_whole_and_fetch_it_once(folder, server, tmp_path):
    name = "train-000001.tar"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (f"{server.url}/{name}", tmp_path / "cache", queue)
    processes = [context.Process(target=fetch_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert found == {hashlib.sha256((folder / name).read_bytes()).hexdigest()}
    assert server.requests[name] == 1


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_the_file(server, tmp_path, monkeypatch):
    name = "train-000002.tar"
    server.faults[name] = ["stall"]
    monkeypatch.setattr(remote_module, "STALL_SECONDS", 60.0)
    context = multiprocessing.get_context("fork")
    arguments = (f"{server.url}/{name}", tmp_path / "cache", context.Queue())
    process = context.Process(target=fetch_slowly, args=arguments)
    process.start()
    parts = []
    while not parts:
        parts = list((tmp_path / "cache").glob("*.part"))
        time.sleep(0.02)
    process.kill()
    process.join()
    source, reading = opened(server, tmp_path)
    assert ShardPool(reading).read(source.shards[2], 0).key == "k20"
    assert parts[0].exists()
    monkeypatch.setattr(remote_module, "_LEFTOVER_SECONDS", 0.0)
    ShardPool(reading).read(source.shards[3], 0)
    assert not parts[0].exists()


def test_a_small_cache_lets_go_of_what_was_used_longest_ago(server, tmp_path):
    cache = Cache(tmp_path / "cache", 3 * 10)
    served = fsspec.filesystem("memory")
    for name in "abcd":
        served.pipe_file(f"/{name}", name.encode() * 10)

    def held():
        files = [p for p in (tmp_path / "cache").iterdir() if not p.suffix]
        return {p.read_bytes()[:1].decode() for p in files}

    for name in "abc":
        cache.open(f"memory://{name}", size=10).close()
        time.sleep(0.01)
    cache.open("memory://a", size=10).close()  # used again: b is the oldest now
    time.sleep(0.01)
    file = cache.open("memory://b", size=10)
    time.sleep(0.01)
    cache.open("memory://d", size=10).close()
    assert held() == {"a", "b", "d"}
    for name in "acd":
        cache.open(f"memory://{name}", size=10).close()
    assert held() == {"a", "c", "d"}
    assert file.read() == b"b" * 10, "an open file stays readable"


def test_a_small_cache_gives_the_same_batches(server, tmp_path, expected):
    size = max(path.stat().st_size for path in Path(server_folder(server)).glob("*.tar"))
    source, reading = opened(server, tmp_path, limit=2 * size, max_open_shards=2)
    assert batches(stream(source, reading)) == expected
    held = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert held <= 3 * size


def server_folder(server: FaultyServer) -> str:
    return server.RequestHandlerClass.keywords["directory"]  # type: ignore[attr-defined]


def test_a_full_disk_makes_room_and_is_named_where_that_is_not_enough(
    server, tmp_path, monkeypatch
):
    source, reading = opened(server, tmp_path, retry=0)
    pool = ShardPool(reading)
    pool.read(source.shards[0], 0)
    download = Cache._download
    full = {"on": True}

    def on_a_full_disk(cache, url, part, size):
        others = [path for path in cache.folder.iterdir() if not path.suffix]
        if url.endswith(".tar") and (full["on"] or others):
            part.write_bytes(b"begun")
            raise OSError(errno.ENOSPC, "No space left on device")
        download(cache, url, part, size)

    monkeypatch.setattr(Cache, "_download", on_a_full_disk)
    with pytest.raises(OSError, match=r"the disk of data.cache_dir=.* is full"):
        pool.read(source.shards[1], 0)
    full["on"] = False
    assert pool.read(source.shards[1], 0).key == "k10"
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_missing_or_replaced_shard(folder, server, tmp_path, expected):
    source, reading = opened(server, tmp_path, retry=0.2)
    index = json.loads((folder / "index.json").read_bytes())
    gone = source.shards[1]
    lost = type(gone)(**{**vars(gone), "name": "train-000009.tar"})
    with pytest.raises(ShardError, match=r"train-000009\.tar.* does not exist"):
        ShardPool(reading).read(lost, 0)
    other = type(gone)(**{**vars(gone), "bytes": gone.bytes + 512})
    pool = ShardPool(reading)
    with pytest.raises(ShardError, match=f"{gone.bytes} bytes came, the index says"):
        pool.read(other, 0)
    asked = server.requests[gone.name]
    with pytest.raises(ShardError):
        pool.read(other, 1)
    assert server.requests[gone.name] == asked, "asked for again for each sample"
    shards = [source.shards[0], other, *source.shards[2:]]
    wrong = type(source)(source.name, source.split, 1.0, shards)
    skipping = Reading(reading.cache, 0.2, "skip")
    found = batches(stream(wrong, skipping))
    for (before, _), (after, skipped) in zip(expected, found, strict=True):
        changed = [b for b, a in zip(before, after, strict=True) if a != b]
        assert len(changed) == len(skipped)
        assert all("/train-000001.tar/" in key for key, _ in changed)
    assert index


def test_the_index_of_a_url_is_asked_for_at_the_start(server, tmp_path):
    with pytest.raises(UserError, match=r"index.json does not exist.*blip2-prepare index"):
        open_source("a", f"{server.url}/nowhere", "train", retry_seconds=0)
    server.faults["index.json"] = ["refuse"] * 99
    with pytest.raises(UserError, match="the index cannot be fetched"):
        open_source("a", server.url, "train", retry_seconds=0.1)
    with pytest.raises(UserError, match=r"pip install 'blip2-train\[gs\]'"):
        open_source("a", "gs://bucket/shards", "train", retry_seconds=0)
    with pytest.raises(UserError, match="nosuch"):
        open_source("a", "nosuch://bucket/shards", "train", retry_seconds=0)


def test_braces_and_globs_choose_among_an_index(folder, server):
    def names(shards):
        return [int(s.name[6:12]) for s in open_source("a", shards, "train").shards]

    for base in (str(folder), f"file://{folder}", server.url):
        assert names(base) == names(f"{base}/") == [0, 1, 2, 3, 4, 5]
        assert names(f"{base}/train-{{000001..000003}}.tar") == [1, 2, 3]
        assert names(f"{base}/train-00000{{0,5}}.tar") == [0, 5]
        assert names(f"{base}/train-00000[24].tar") == [2, 4]
        assert names([f"{base}/train-000004.tar", f"{base}/*1.tar"]) == [1, 4]
        with pytest.raises(UserError, match=r"the index of .* has no train-000006\.tar"):
            names(f"{base}/train-0000{{05..17}}.tar")
    assert names(f"{folder.parent}/[s]{folder.name[1:]}/*.tar") == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="braces"):
        names(f"{folder}/train-{{0.tar")
    with pytest.raises(UserError, match="give a folder"):
        names([])


def test_two_folders_are_one_source_where_names_differ(folder, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    sample = {"__key__": "x", "jpg": b"x", "json": {"caption": "x"}}
    write_index(second, [write_shard(second / "train-000077.tar", [sample])])
    source = open_source("a", [str(folder), str(second)], "train")
    assert len(source.shards) == SHARDS + 1 and source.shards[-1].folder == str(second)
    write_index(second, [write_shard(second / "train-000001.tar", [sample])])
    with pytest.raises(UserError, match=r"both have a train-000001\.tar"):
        open_source("a", [str(folder), str(second)], "train")


def test_pipes_have_no_index_and_run_only_where_that_is_allowed(tmp_path):
    canary = tmp_path / "canary"
    command = f"pipe:touch {canary}"
    with pytest.raises(UserError, match="no index"):
        open_source("a", command, "train")
    with pytest.raises(UserError, match=r"data.allow_pipe=true"):
        open_unindexed("a", command, 1.0)
    assert not canary.exists()


def test_with_locality_a_machine_fetches_its_own_part(server, tmp_path):
    source, _ = opened(server, tmp_path)
    for rank in range(2):
        mine = Reading(Cache(tmp_path / f"node{rank}", ROOMY), 1.0)
        batches(stream(source, mine, locality=2, rank=rank, world=2), count=40)
    tars = {name: n for name, n in server.requests.items() if name.endswith(".tar")}
    assert len(tars) == SHARDS and set(tars.values()) == {1}


def test_a_cache_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module.os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to somebody else"):
        Cache(tmp_path, ROOMY).prepare()


def test_a_file_of_another_size_or_none_is_no_cached_file(server, tmp_path):
    cache = Cache(tmp_path / "cache", ROOMY)
    with pytest.raises(MissingFile):
        cache.open(f"{server.url}/nothing")
    with pytest.raises(WrongSize):
        cache.open(f"{server.url}/index.json", size=3)
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())


def test_threads_of_a_process_share_the_cache(server, tmp_path):
    cache, found = Cache(tmp_path / "cache", ROOMY), []
    fetch = partial(cache.open, f"{server.url}/train-000003.tar")
    threads = [threading.Thread(target=lambda: found.append(fetch().read())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
