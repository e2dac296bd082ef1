"""A training is a function of its configuration, not of the machine: the real command line.

Proven: stage 1 on two sources ends with the same weights and goes through the same losses and
validations on 1, 2, 3 and 4 processes with different numbers of loader workers, also where a run on
3 processes is killed between two checkpoints and goes on with fewer; samples drawn are logged as
they are; a validation sees every image exactly once, in the same batches, for any ranks and
workers.

`slow`: all those numbers of processes, also in float32. It prints how far the runs are apart.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from tiny import tiny_run
from whole_runs import kill_in_the_middle, largest_differences, last_checkpoint, rows

from blip2_train.data.batch import collate_eval
from blip2_train.data.source import open_source
from blip2_train.data.stream import EvalStream
from blip2_train.data.text import load_text_tokenizer
from blip2_train.data.transforms import EvalTransform
from blip2_train.distributed import World
from blip2_train.training.validation import Validation

STEPS = 30
WORKERS = {1: 0, 2: 3, 3: 1, 4: 2}  # loader workers of each process, by the number of processes
SIZES = {"synthetic": 108, "small": 24}
SHARES = {"synthetic": 0.75, "small": 0.25}  # as the weights below say


def overrides(shards: Path, runs: Path, name: str, processes: int, precision: str) -> list[str]:
    """Crops, flips, drawn captions and drawn negatives: whatever is random, but for dropout."""
    small = f"{{shards: {shards}, split: novel, weight: 1, randaugment: false}}"
    changes: dict[str, Any] = {
        "data.sources.synthetic.weight": 3,
        "+data.sources.small": small,
        "data.num_workers": WORKERS[processes],
        "data.shuffle_window": 2,
        "data.caption": "uniform",
        "data.crop_scale": "[0.5,1.0]",
        "data.flip": 0.5,
        "qformer.dropout": 0.0,
        "schedule.warmup_steps": 5,
        "trainer.max_steps": STEPS,
        "trainer.log_every": 1,
        "trainer.precision": precision,
        "validation.every": 10,
        "checkpoint.every": 5,
    }
    return tiny_run(shards, runs, name, **changes)


def train(shards: Path, runs: Path, processes: int, precision: str, name: str = "") -> Path:
    """A whole run, or the rest of one."""
    name = name or f"{precision}-on-{processes}"
    forked.train(overrides(shards, runs, name, processes, precision), processes)
    return runs / name


def killed(shards: Path, runs: Path, precision: str, after: int) -> Path:
    """A run on 3 processes, killed after the checkpoint of step 15, that goes on with `after`."""
    name = f"{precision}-on-3-then-{after}"
    words = overrides(shards, runs, name, 3, precision)
    kill_in_the_middle(words, runs / name, 3, last=STEPS, step=17)
    assert last_checkpoint(runs / name)["world_size"] == 3
    train(shards, runs, after, precision, name)
    assert last_checkpoint(runs / name)["world_size"] == after
    return runs / name


def assert_same_in_double(ours: Path, theirs: Path) -> None:
    assert last_checkpoint(ours)["model"]["qformer.query_tokens"].dtype == torch.float64
    assert max(largest_differences(ours, theirs).values()) <= 1e-9


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def alone(shards: Path, runs: Path) -> Path:
    return train(shards, runs, 1, "64-true")


def test_three_processes_killed_and_two_that_go_on_train_as_one_does(
    shards: Path, runs: Path, alone: Path
) -> None:
    """So three processes do, up to the checkpoint, and two after it."""
    assert_same_in_double(killed(shards, runs, "64-true", 2), alone)


def test_it_learns_and_says_how_often_it_saw_each_source(alone: Path) -> None:
    """Or the other tests would compare runs in which nothing happens."""
    trained = [row for row in rows(alone) if row["train/loss"]]
    assert [int(row["step"]) for row in trained] == list(range(1, STEPS + 1))
    assert float(trained[-1]["train/loss"]) < float(trained[0]["train/loss"]) - 0.3
    drawn = last_checkpoint(alone)["drawn"]
    assert drawn == {name: STEPS * 12 * share for name, share in SHARES.items()}
    for step, row in enumerate(trained, start=1):
        for name, size in SIZES.items():
            assert float(row[f"epochs/{name}"]) == step * 12 * SHARES[name] / size


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_every_number_of_processes_trains_alike(shards: Path, runs: Path, precision: str) -> None:
    """In float32, too, up to its rounding."""
    whole = train(shards, runs, 1, precision)
    others = [train(shards, runs, processes, precision) for processes in (2, 3, 4)]
    others += [killed(shards, runs, precision, after) for after in (2, 1)]
    for other in others:
        if precision == "64-true":
            assert_same_in_double(other, whole)
        else:
            apart = largest_differences(other, whole)
            assert apart["losses"] <= 1e-5 and apart["weights"] <= 1e-4


# ------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("size", "images", "workers"),
    [(5, None, 2), (7, 23, 0), (24, None, 0), (1, 3, 0), (100, 10, 0)],
)
def test_validation_sees_each_image_once(
    size: int, images: int | None, workers: int, shards: Path
) -> None:
    """None of the sizes divides; 3 images or one batch leave ranks without any."""
    data = EvalStream(open_source("novel", shards, "novel"), EvalTransform(8), max_images=images)
    tokenizer = load_text_tokenizer(shards / "tokenizer")
    validation = Validation(
        evaluator=None,  # type: ignore[arg-type]
        images=data,
        collate=partial(collate_eval, tokenizer=tokenizer, max_text_tokens=8),
        monitor=None,  # type: ignore[arg-type]
        checkpointing=SimpleNamespace(start_step=0),  # type: ignore[arg-type]
        report=None,  # type: ignore[arg-type]
        skipped=None,
        watchdog=None,  # type: ignore[arg-type]
        folder=shards,
        settings={"batch_size": size, "every": 1},
        num_workers=workers,
    )
    stored = [data[item].key for item in range(len(data))]  # type: ignore[union-attr]
    assert len(set(stored)) == len(data) == (images or 24)
    for ranks in (1, 2, 3, 4):
        found: dict[int, list[str]] = {}
        for rank in range(ranks):
            for number, batch in validation._batches(World(rank, ranks)):
                assert number not in found
                found[number] = batch["keys"]
        assert sorted(found) == list(range(-(-len(data) // size)))
        assert [key for number in sorted(found) for key in found[number]] == stored
        assert all(len(found[number]) == size for number in sorted(found)[:-1])
