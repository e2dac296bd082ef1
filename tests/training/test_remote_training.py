"""Whole runs whose shards are somewhere else, or have no index.

- the server of the shards is killed and started again in the middle: the same run, bit for bit
- one that stays away ends the run with one sentence
- `data.mode=stream` trains from the command line and continues
"""

import csv
import shutil
from pathlib import Path

import pytest
from faulty_server import free_port, serving, start_server
from forked import train
from tiny import command, tiny_run, train_in_process
from whole_runs import assert_same_end, last_checkpoint, start

from blip2_train.prepare import main as prepare


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of eight pictures: there are always some that were not fetched yet."""
    folder = tmp_path_factory.mktemp("shards")
    options = "--samples 120 --held-out 12 --size 32 --samples-per-shard 8 --workers 1"
    assert prepare(["synthetic", "--out", str(folder), *options.split(), "--tokenizer", "160"]) == 0
    return folder


def test_the_server_is_killed_and_started_again(shards: Path, tmp_path: Path) -> None:
    changes = {"trainer.max_steps": 20, "trainer.log_every": 1, "data.shuffle_window": 1}
    changes |= {"data.num_workers": 1, "validation.every": "null"}
    train(tiny_run(shards, tmp_path, "alone", **changes))
    port = free_port()
    server = start_server(shards, port)
    remote = {
        "data.sources.synthetic.shards": f"http://127.0.0.1:{port}",
        "data.cache_dir": tmp_path / "cache",
        "data.cache_gb": 0.0002,  # about ten shards
    }
    overrides = tiny_run(shards, tmp_path, "remote", **(changes | remote))
    process = start(["env", "PYTHONUNBUFFERED=1", *command(overrides)])
    assert process.stdout is not None
    lines, down = [], False
    for line in process.stdout:
        lines.append(line)
        if "step 3/" in line and not down:
            server.kill()
            server.wait()
            down = True
        if down and "trying again" in line:
            server = start_server(shards, port)
            break
    lines += process.stdout.read().splitlines(keepends=True)
    server.kill()
    assert process.wait() == 0, "".join(lines)
    assert any("trying again" in line for line in lines), "the server was not missed"
    assert_same_end(tmp_path / "remote", tmp_path / "alone")


def test_a_server_that_stays_away_ends_the_run_with_a_sentence(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(shards) as server:
        for number in range(20):
            server.faults[f"train-{number:06d}.tar"] = ["drop"] * 1000
        changes = {
            "data.sources.synthetic.shards": server.url,
            "data.cache_dir": tmp_path / "cache",
            "data.retry_seconds": 1,
            "validation.every": "null",
        }
        assert train_in_process(tiny_run(shards, tmp_path, "cut", **changes)) == 3
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: the data cannot be read: http://")
    assert "train-0000" in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_tars_without_an_index_train_and_go_on(shards: Path, tmp_path: Path, caplog) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for path in shards.glob("train-*.tar"):
        shutil.copy(path, tars)
    changes = {"data.mode": "stream", "data.sources.synthetic.shards": f"'{tars}/*.tar'"}
    overrides = tiny_run(shards, tmp_path, "streamed", **changes)
    assert train_in_process([*overrides, "trainer.max_steps=4"]) == 0
    assert "drawn with replacement" in caplog.text
    assert train_in_process([*overrides, "resume.allow=[trainer.max_steps]"]) == 0
    state = last_checkpoint(tmp_path / "streamed")
    assert state["step"] == 12 and state["drawn"] == {"synthetic": 144}
    with (tmp_path / "streamed" / "metrics.csv").open() as file:
        assert not any(name.startswith("epochs/") for name in next(csv.reader(file)))
