"""Features of the tower computed before the training (`blip2-prepare features`).

Proven: a run from the cache is the run with the tower, bit for bit where they are kept in the
tower's dtype, validation, pictures and skipped samples included, and no tower is built; in 8 bits
it is close; another tower, transform or shard, and files that are missing or damaged, are refused
in one sentence; a command that was killed goes on, and several processes share the work.
"""

import errno
import json
import os
import resource
import shutil
import signal
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked, train
from PIL import Image
from tiny import tiny_run, tiny_stage_runs, train_in_process
from whole_runs import assert_same_end, rows

from blip2_train.checkpoint import io
from blip2_train.data import feature_files, features
from blip2_train.data.batch import EvalSample
from blip2_train.data.index import read_index, write_index
from blip2_train.data.pool import Reading
from blip2_train.data.shards import ShardReader, write_shard
from blip2_train.data.source import Source, open_source
from blip2_train.data.stream import EvalStream
from blip2_train.models.vision import VisionTower
from blip2_train.prepare import main as prepare

WHOLE = {"data.crop_scale": "null", "data.flip": 0, "data.decode": "exact"}
CACHED = WHOLE | {"data.features": "cached"}
Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
NO_TOWER = "the tower was built"


def compute(folder: Path, *options: str, code: int = 0, **changes: Any) -> None:
    """`blip2-prepare features` with the tower of `tiny_run`."""
    overrides = tiny_run(folder, folder, "none", **changes)
    command = ["features", str(folder), *overrides, "--workers", "1", "--batch", "16", *options]
    assert prepare(command) == code


def place(folder: Path) -> Path:
    (found,) = folder.glob("features-*")
    return found


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with an image that cannot be decoded in train and in val, and features of all."""
    folder = tmp_path_factory.mktemp("cached") / "shards"
    shutil.copytree(shards, folder)
    index = read_index(folder)
    for name in [min(n for n in index if n.startswith(split)) for split in ("train", "val")]:
        reader = ShardReader(folder / name, index[name])
        samples = []
        for number in range(len(reader)):
            raw = reader.read(number)
            image = b"no jpeg" if number == 3 else raw.image
            samples.append({"__key__": raw.key, "jpg": image, "json": raw.meta})
        index[name] = write_shard(folder / name, samples)
    write_index(folder, index.values())
    compute(folder)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return shutil.copytree(folder, tmp_path / "shards")


def refused(overrides: list[str], capsys: Capture, code: int = 2) -> str:
    """The sentence with which a training ends, before it begins (2) or later (3)."""
    capsys.readouterr()
    assert train_in_process(overrides) == code
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    return line


def without_tower(monkeypatch: Patch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError(NO_TOWER)

    monkeypatch.setattr(VisionTower, "__init__", refuse)


# -- the same training -----------------------------------------------------------------------------


def test_stage_1_from_the_cache_is_the_run_with_the_tower(
    folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    common = {"data.max_skip_fraction": 0.5, "data.num_workers": 1, "validation.rerank_k": 3}
    assert train_in_process(tiny_run(folder, tmp_path, "computed", **common, **WHOLE)) == 0
    without_tower(monkeypatch)
    assert train_in_process(tiny_run(folder, tmp_path, "cached", **common, **CACHED)) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "computed")
    skipped = [(tmp_path / run / "skipped.jsonl").read_text() for run in ("cached", "computed")]
    assert skipped[0] == skipped[1] and len(skipped[0].splitlines()) > 2
    sheets = [
        Image.open(tmp_path / run / "samples/step-00000012.png") for run in ("cached", "computed")
    ]
    assert sheets[0].tobytes() == sheets[1].tobytes()


def test_stage_2_from_the_cache_is_the_run_with_the_tower(
    folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    for run, changes in (("computed", WHOLE), ("cached", CACHED)):
        common = {"run.name": run, "data.max_skip_fraction": 0.5, "trainer.max_steps": 6}
        assert (
            train_in_process(tiny_stage_runs(folder, tmp_path, **common, **changes)["stage2"]) == 0
        )
        without_tower(monkeypatch)  # stage 2 takes the features that stage 1 takes
    assert_same_end(tmp_path / "cached", tmp_path / "computed")


@pytest.mark.slow
def test_ranks_share_a_cache(folder: Path, tmp_path: Path) -> None:
    changes = CACHED | {"data.max_skip_fraction": 0.5, "trainer.max_steps": 6}
    train(tiny_run(folder, tmp_path, "one", **changes))
    train(tiny_run(folder, tmp_path, "two", **changes), 2)
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for name, value in theirs.items():
            if name.startswith(("train/loss", "val/loss")) and value:
                assert float(ours[name]) == pytest.approx(float(value), abs=2e-4), name


@pytest.mark.parametrize(
    ("store", "close"),
    [pytest.param("bfloat16", 0.01, marks=pytest.mark.slow), ("float8", 0.05)],
)
def test_fewer_bits_change_little(
    store: str, close: float, copied: Path, tmp_path: Path, capsys: Capture
) -> None:
    compute(copied, "--store", store, code=2)  # those of float32 are there
    assert "holds these features as float32" in capsys.readouterr().err
    shutil.rmtree(place(copied))
    compute(copied, "--store", store)
    said = capsys.readouterr().out
    assert f"in {store}" in said and float(said.split("computed ")[1].split()[0]) > 0.998
    common = {"data.max_skip_fraction": 0.5, "trainer.max_steps": 6}
    for run, changes in (("computed", WHOLE), ("cached", CACHED)):
        assert train_in_process(tiny_run(copied, tmp_path, run, **common, **changes)) == 0
    differences = [
        abs(float(ours[name]) - float(theirs[name]))
        for ours, theirs in zip(rows(tmp_path / "cached"), rows(tmp_path / "computed"), strict=True)
        for name in ("train/loss", "val/loss")
        if theirs[name]
    ]
    assert 0 < max(differences) < close


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data.crop_scale": "[0.5,1.0]", "data.flip": 0.5},
            "set data.crop_scale=null data.flip=0",
        ),
        (
            {"data.sources.synthetic.randaugment": "true"},
            "data.sources.synthetic.randaugment=false",
        ),
        ({"data.mode": "stream"}, "data.mode=indexed"),
        ({"vision.seed": 1}, "of another tower or transform (features-"),
        ({"vision.image_size": 48}, "differs in vision.image_size"),
        ({"vision.weights": "/nowhere.pt"}, "vision.weights=/nowhere.pt is no file"),
    ],
)
def test_another_tower_or_transform_is_refused(
    changes: dict[str, Any],
    sentence: str,
    folder: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    assert sentence in refused(tiny_run(folder, tmp_path, "run", **(CACHED | changes)), capsys)


def test_a_transform_of_another_version_is_refused(
    folder: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(features, "TRANSFORM", "whole image, bilinear")
    said = refused(tiny_run(folder, tmp_path, "run", **CACHED), capsys)
    assert "differs in transform" in said


def test_stages_without_a_frozen_tower_have_no_cache(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for overrides in [
        tiny_stage_runs(folder, tmp_path, **CACHED)[stage] for stage in ("clip", "lm")
    ]:
        assert "has no frozen image tower" in refused(overrides, capsys)


def test_a_cache_of_other_shards_is_refused(copied: Path, tmp_path: Path, capsys: Capture) -> None:
    index = read_index(copied)
    name = min(index)
    reader = ShardReader(copied / name, index[name])
    raws = [reader.read(number) for number in range(len(reader))]
    samples = [{"__key__": raw.key, "jpg": raw.image, "json": raw.meta} for raw in raws]
    index[name] = write_shard(copied / name, samples[::-1])
    write_index(copied, index.values())
    overrides = tiny_run(copied, tmp_path, "run", **CACHED)
    if index[name].split != "train":
        overrides.append(f"data.validation.split={index[name].split}")
    assert f"{name} of {copied} is not as it was" in refused(overrides, capsys)
    compute(copied)  # computes what is no longer right, and nothing else
    assert train_in_process([*overrides, "trainer.max_steps=1", "validation.every=null"]) == 0


def test_missing_and_damaged_files_are_refused(
    copied: Path, tmp_path: Path, capsys: Capture
) -> None:
    overrides = tiny_run(copied, tmp_path, "run", **CACHED)
    path = min(place(copied).glob("train-*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert f"has damaged ones: {path} has" in refused(overrides, capsys)
    path.unlink()
    assert f"{path} does not exist" in refused(overrides, capsys)
    path.write_bytes(b"\xff" * len(whole))  # of the right size
    said = refused([*overrides, "data.max_skip_fraction=0.9"], capsys, code=3)
    assert f"{path} is damaged" in said
    (place(copied) / "features.json").write_text("{")
    assert "delete this file alone" in refused(overrides, capsys)
    (place(copied) / "features.json").unlink()
    compute(copied)  # the damaged file again, and a table of all
    assert train_in_process([*overrides, "data.max_skip_fraction=0.9", "trainer.max_steps=2"]) == 0


def test_verify_finds_other_numbers(copied: Path, capsys: Capture) -> None:
    verify = ["verify", str(copied), "--workers", "1"]
    assert prepare(verify) == 0
    assert "files of features, 0 problems" in capsys.readouterr().out
    path = min(place(copied).glob("train-*"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert prepare(verify) == 1
    assert f"bad: {path} has other numbers than were written" in capsys.readouterr().err


def test_a_folder_without_features_says_what_to_run(
    shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    said = refused(tiny_run(shards, tmp_path, "run", **CACHED), capsys)
    assert "there are no features beside the shards" in said
    assert f"blip2-prepare features {shards} experiment=" in said


def test_the_command_refuses_what_cannot_be(folder: Path, capsys: Capture) -> None:
    compute(folder, "--split", "trains", code=2)
    assert "--split trains: the splits of" in capsys.readouterr().err
    compute(folder, code=2, **{"vision.names": "x"})
    assert "did you mean vision.name?" in capsys.readouterr().err


# -- how it is made --------------------------------------------------------------------------------


def test_an_interrupted_command_goes_on(
    copied: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: Patch,
) -> None:
    whole = {path.name: path.read_bytes() for path in place(copied).iterdir()}
    shutil.rmtree(place(copied))
    written = []

    def interrupt(path: Path, *given: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        feature_files.write_file(path, *given)

    monkeypatch.setattr("blip2_train.training.features.write_file", interrupt)
    compute(copied, code=130)
    said = refused(tiny_run(copied, tmp_path, "run", **CACHED), capsys)
    assert "was begun and is not finished" in said
    times = {path: path.stat().st_mtime_ns for path in written[1:]}  # the first is the blank image
    monkeypatch.undo()
    compute(copied)
    assert {path.name: path.read_bytes() for path in place(copied).iterdir()} == whole
    assert times == {path: path.stat().st_mtime_ns for path in written[1:]}


def test_processes_share_the_shards(copied: Path) -> None:
    whole = {path.name: path.read_bytes() for path in place(copied).iterdir()}
    shutil.rmtree(place(copied))
    overrides = tiny_run(copied, copied, "none")
    options = ["features", str(copied), *overrides, "--workers", "1", "--batch", "16"]
    assert "images (2 unusable)" in Forked(prepare, options, 2).finish()
    assert {path.name: path.read_bytes() for path in place(copied).iterdir()} == whole


def test_processes_that_start_late_leave_nothing_out(copied: Path, monkeypatch: Patch) -> None:
    names = {path.name for path in place(copied).iterdir()}
    shutil.rmtree(place(copied))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("1", "0", "2"):  # each finds what those before have finished
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        compute(copied)
    assert {path.name for path in place(copied).iterdir()} == names


def test_some_splits_first(copied: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.rmtree(place(copied))
    compute(copied, "--split", "train")
    said = refused(tiny_run(copied, tmp_path, "run", **CACHED), capsys)
    assert "has no features" in said and "val-000000.tar" in said
    compute(copied, "--split", "val")
    table = json.loads((place(copied) / "features.json").read_text())
    assert {name.split("-")[0] for name in table["files"]} == {"train", "val"}


def test_a_disk_that_recovers_is_waited_for(folder: Path, monkeypatch: Patch) -> None:
    shard = source(folder).shards[0]
    found = features.open_features(table_of(folder)["tower"], [source(folder)], retry_seconds=9)
    wanted = found.read(shard, 5)
    pauses: list[float] = []
    monkeypatch.setattr("blip2_train.data.retries.time.sleep", pauses.append)
    failures = {"opened": 2, "read": 2}

    def failing(what: str, function: Any) -> Any:
        def attempt(*given: Any, **options: Any) -> Any:
            if failures[what]:
                failures[what] -= 1
                raise OSError(errno.ESTALE, "stale file handle")
            return function(*given, **options)

        return attempt

    monkeypatch.setattr(feature_files.os, "preadv", failing("read", os.preadv))
    monkeypatch.setattr(Path, "open", failing("opened", Path.open))
    assert found.read(shard, 5).equal(wanted)  # opened anew after the first failure
    assert len(pauses) == 4 and not any(failures.values())


def test_too_many_open_files_are_not_taken_for_a_missing_one(folder: Path) -> None:
    path = min(place(folder).glob("train-*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            feature_files.open_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_full_disk_is_an_os_error(folder: Path, tmp_path: Path) -> None:
    table = feature_files.read_table(place(folder))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written|File too large"):
            feature_files.write_file(tmp_path / "x", torch.zeros(9, 99, 9), table, "", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, usual)
    assert not list(tmp_path.iterdir())


def test_validation_leaves_a_damaged_shard_out_where_training_does(copied: Path) -> None:
    path = min(place(copied).glob("val-*"))
    path.write_bytes(b"\xff" * path.stat().st_size)
    held_out = open_source("validation", copied, "val")
    found = features.open_features(table_of(copied)["tower"], [held_out])
    images = EvalStream(held_out, None, features=found, reading=Reading(on_bad_shard="skip"))
    item = images[0]
    assert not isinstance(item, EvalSample) and "bad shard" in item["reason"]


def test_a_cache_in_fewer_bits_is_another_one_for_a_resumed_run(
    copied: Path, tmp_path: Path, capsys: Capture
) -> None:
    changes = CACHED | {"data.max_skip_fraction": 0.5, "validation.every": "null"}
    overrides = tiny_run(copied, tmp_path, "run", **changes)
    assert train_in_process(overrides) == 0
    newest = io.newest_valid(tmp_path / "run" / "checkpoints")
    assert newest is not None
    newest.unlink()
    shutil.rmtree(place(copied))
    compute(copied, "--store", "float8")
    assert "the cached features are stored in float8" in refused(overrides, capsys)


def test_features_are_those_of_the_whole_image(folder: Path) -> None:
    """Against the tower by hand: one image, decoded by PIL."""
    found = features.open_features(table_of(folder)["tower"], [source(folder)])
    shard = source(folder).shards[0]
    stored = found.read(shard, 5)
    raw = ShardReader(shard.location, shard).read(5)
    image = Image.open(BytesIO(raw.image)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    tower = VisionTower("test_vit", image_size=32, weights="random")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    torch.testing.assert_close(stored, tower(pixels)[0], rtol=1e-4, atol=1e-5)


def table_of(folder: Path) -> dict[str, Any]:
    return json.loads((place(folder) / "features.json").read_text())


def source(folder: Path) -> Source:
    return open_source("synthetic", folder, "train")
