"""The log of a run that was killed between two of its lines is that of the undisturbed one."""

import shutil
from pathlib import Path

import pytest
from forked import train
from tiny import tiny_run, train_in_process
from whole_runs import assert_same_end, rows

from blip2_train.checkpoint import io
from blip2_train.data.index import read_index, write_index
from blip2_train.data.shards import ShardReader, write_shard
from blip2_train.prepare import main as prepare

# lines at 5, 10 and 12, checkpoints at 3, 6, 9 and 12, and after the validation at 8
CHANGES = {
    "trainer.log_every": 5,
    "checkpoint.every": 3,
    "checkpoint.keep_last": 9,
    "validation.every": 8,
    "data.max_skip_fraction": 0.9,
}


@pytest.fixture(scope="module")
def damaged_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which every ninth training picture is none."""
    folder = tmp_path_factory.mktemp("damaged")
    options = "--samples 54 --held-out 12 --size 32 --samples-per-shard 60 --workers 1"
    prepare(["synthetic", "--out", str(folder), *options.split(), "--tokenizer", "160"])
    index = read_index(folder)
    good = next(info for info in index.values() if info.split == "train")
    reader = ShardReader(folder / good.name, good)
    samples = []
    for number in range(len(reader)):
        raw = reader.read(number)
        image = b"no jpeg" if number % 9 == 3 else raw.image
        samples.append({"__key__": raw.key, "jpg": image, "json": raw.meta})
    index[good.name] = write_shard(folder / good.name, samples)
    write_index(folder, index.values())
    return folder


def stopped_at(step: int, whole: Path, run: Path) -> None:
    """Leaves in `run` what `whole` was after a kill that followed the checkpoint of `step`."""
    shutil.copytree(whole, run)
    for later in io.steps(run / "checkpoints"):
        if later > step:
            io.step_path(run / "checkpoints", later).unlink()


@pytest.fixture(scope="module")
def whole(damaged_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert train_in_process(tiny_run(damaged_shards, runs, "whole", **CHANGES)) == 0
    return runs / "whole"


@pytest.mark.parametrize("step", [3, 6, 8, 9])
def test_each_checkpoint_continues_the_log(
    step: int, damaged_shards: Path, whole: Path, tmp_path: Path
) -> None:
    skipped = (whole / "skipped.jsonl").read_text()
    assert len(skipped.splitlines()) > 10
    assert list(io.steps(whole / "checkpoints")) == [3, 6, 8, 9, 12]
    stopped_at(step, whole, tmp_path / "killed")
    assert train_in_process(tiny_run(damaged_shards, tmp_path, "killed", **CHANGES)) == 0
    assert_same_end(tmp_path / "killed", whole)
    assert (tmp_path / "killed" / "skipped.jsonl").read_text() == skipped


def test_on_fewer_processes_too(damaged_shards: Path, tmp_path: Path) -> None:
    changes = CHANGES | {
        "validation.every": "null",
        "trainer.precision": "64-true",
        "qformer.dropout": 0,
    }
    overrides = tiny_run(damaged_shards, tmp_path, "two", **changes)
    train(overrides, 2)
    stopped_at(9, tmp_path / "two", tmp_path / "one")
    assert train_in_process([*overrides, "run.name=one"]) == 0
    lines = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("two", "one")]
    assert sorted(lines[0].splitlines()) == sorted(lines[1].splitlines())
    for ours, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-9), name


def test_a_checkpoint_of_version_0_1_is_continued(
    damaged_shards: Path, whole: Path, tmp_path: Path
) -> None:
    stopped_at(6, whole, tmp_path / "old")
    path = io.step_path(tmp_path / "old" / "checkpoints", 6)
    content = io.load(path)
    del content["counted"]
    io.save(path, content)
    assert train_in_process(tiny_run(damaged_shards, tmp_path, "old", **CHANGES)) == 0
