"""`blip2-evaluate`, the real command.

Proven: it writes metrics, files, page and pictures, says when it is finished, and does not
overwrite other results; killed in the midst and started again, on another number of processes, it
computes only what is missing and ends with the same metrics.json; several processes give the
metrics of one; unknown keys, wrong values, models and data end with one sentence and exit code 2.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from splits import make_split

from blip2_train.config import conf_dir
from blip2_train.evaluate import compose, run

HERE = Path(__file__).parent


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder with `task=probe`, see probe.py."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    (tmp_path / "conf" / "task").mkdir(parents=True)
    settings = f'_target_: probe.Probe\nlog: {tmp_path / "log"}\nfail: ""\n'
    (tmp_path / "conf" / "task" / "probe.yaml").write_text(settings)
    return f"--config-dir={tmp_path / 'conf'}"


def words(shards: Path, ckpt: Path, out: Path | None, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "task": "retrieval",
        "ckpt": ckpt,
        "data": "synthetic",
        "data.validation.shards": shards,
        "split": "val",
        "batch_size": 5,
        "samples": 2,
        "accelerator": "cpu",
        "data.num_workers": 0,
    }
    if out is not None:
        settings["out"] = out
    return [f"{key}={value}" for key, value in (settings | changes).items()]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_what_it_leaves(
    shards: Path, finished: Path, tmp_path: Path, conf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "stage1", tmp_path / "run")
    command = [conf, *words(shards, tmp_path / "run", None, task="probe")]
    assert run(command) == 0
    folder = tmp_path / "run" / "eval" / "probe-synthetic-2"
    found = metrics(folder)
    assert found["metrics"].keys() == {"length", "norm"}
    assert found["metrics"]["norm"] == pytest.approx(1, abs=1e-5)
    assert found["counts"] == {"images": 12}
    assert found["checkpoint"]["kind"] == "stage1" and found["checkpoint"]["step"] == 2
    assert len(found["checkpoint"]["digest"]) == 64 and found["data"]["samples"] == 12
    assert found["config"]["name"] == {"task": "probe", "data": "synthetic"}
    assert "torch" in found["versions"]
    assert json.loads((folder / "answers.json").read_text()) == [{"id": 1, "text": "ä"}]
    page = (folder / "report.html").read_text()
    assert "Ünlike" in page and "länge" in page and "&lt;b&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (folder / "samples" / "best.png").stat().st_size > 100
    assert not (folder / "parts").exists() and not (folder / "lock.json").exists()

    log = (tmp_path / "log").read_text()
    before = (folder / "metrics.json").read_bytes()
    capsys.readouterr()
    assert run(command) == 0
    assert (tmp_path / "log").read_text() == log
    assert (folder / "metrics.json").read_bytes() == before
    # other results in the same folder
    assert run([*command, "max_images=3"]) == 2
    assert "settings.max_images: None -> 3); give another out=" in capsys.readouterr().err
    assert (folder / "metrics.json").read_bytes() == before
    # what changes nothing
    assert run([*command, "batch_size=2", "data.num_workers=1", "samples=0"]) == 0


def test_a_checkpoint_outside_of_a_run(shards: Path, finished: Path, tmp_path: Path) -> None:
    (file,) = (finished / "clip" / "checkpoints").glob("*.ckpt")
    shutil.copy(file, tmp_path / "x.ckpt")
    assert run(words(shards, tmp_path / "x.ckpt", None, **{"data.num_workers": 2})) == 0
    found = metrics(tmp_path / "eval" / "retrieval-synthetic-2")
    assert set(found["metrics"]) == {
        *(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)), "r_mean",
    }  # fmt: skip


def evaluating(arguments: list[str], processes: int = 1) -> Forked:
    return Forked(run, arguments, processes)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_killed_and_started_again(
    shards: Path,
    finished: Path,
    tmp_path: Path,
    conf: str,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    after: int,
) -> None:
    common = {"task": "probe", "batch_size": 1}
    assert run([conf, *words(shards, finished / "stage1", tmp_path / "whole", **common)]) == 0
    (tmp_path / "log").unlink()
    monkeypatch.setenv("PROBE_SECONDS", "0.1")
    killed = [conf, *words(shards, finished / "stage1", tmp_path / "killed", **common)]
    first = evaluating(killed, before)
    parts = tmp_path / "killed" / "parts"
    while len(list(parts.glob("*.pt")) if parts.is_dir() else []) < 4:
        assert first.is_alive(), first.output()
        time.sleep(0.005)
    first.kill()
    there = {int(path.stem.split("-")[1]) for path in parts.glob("*.pt")}
    assert 4 <= len(there) < 12
    said = evaluating(killed, after).finish()
    assert f"{len(there)} of 12 parts were there" in said
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(set(lines)) == 12
    # twice only what was being computed when it was killed
    assert len(lines) <= 12 + before
    ours, theirs = metrics(tmp_path / "killed"), metrics(tmp_path / "whole")
    ours["config"].pop("out"), theirs["config"].pop("out")
    assert ours == theirs


def test_killed_while_matching(shards: Path, finished: Path, tmp_path: Path) -> None:
    common = {"split": "train", "batch_size": 2, "task.k": 20}
    assert run(words(shards, finished / "stage1", tmp_path / "whole", **common)) == 0
    killed = words(shards, finished / "stage1", tmp_path / "killed", **common)
    first = evaluating(killed, 2)
    parts = tmp_path / "killed" / "parts"
    while not list(parts.glob("matching-*.pt")):
        assert first.is_alive(), first.output()
        time.sleep(0.001)
    first.kill()
    count = len(list(parts.glob("matching-*.pt")))
    said = evaluating(killed, 3).finish()
    assert re.search(rf"matching-\w+: {count} of \d+ parts were there", said)
    for part in ("metrics", "counts", "identity"):
        assert metrics(tmp_path / "killed")[part] == metrics(tmp_path / "whole")[part]


def test_sigterm_ends_it_with_its_code(
    shards: Path, finished: Path, tmp_path: Path, conf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBE_SECONDS", "0.2")
    slow = {"task": "probe", "batch_size": 1, "data.num_workers": 1}
    process = evaluating([conf, *words(shards, finished / "stage1", tmp_path / "out", **slow)])
    process.wait_for("on 12 images")
    while not list((tmp_path / "out" / "parts").glob("*.pt")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.finish(128 + signal.SIGTERM)
    assert not (tmp_path / "out" / "lock.json").exists()


@pytest.mark.parametrize("kind", ["stage1", "clip"])
def test_several_processes_give_the_metrics_of_one(
    shards: Path, finished: Path, tmp_path: Path, kind: str
) -> None:
    common = {"batch_size": 3, "task.k": 7, "split": "train"}
    assert run(words(shards, finished / kind, tmp_path / "1", **common)) == 0
    alone = metrics(tmp_path / "1")
    assert alone["counts"]["images"] == 108 and alone["counts"]["captions"] == 540
    assert ("itm_r_mean" in alone["metrics"]) == (kind == "stage1")
    for size in (2, 3):
        command = words(shards, finished / kind, tmp_path / str(size), **common)
        evaluating(command, size).finish()
        found = metrics(tmp_path / str(size))
        assert found["metrics"] == alone["metrics"] and found["counts"] == alone["counts"]
        assert (tmp_path / str(size) / "report.html").is_file()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


CASES = {
    "batchsize=4": "unknown key batchsize; did you mean batch_size?",
    "xyzzy=4": "unknown key xyzzy; see blip2-evaluate --help",
    "task.kk=4": "unknown key task.kk",
    "+task.kk=4": "task: .*kk",
    "+more=1": "nothing reads more",
    "+data.validation.max_images=3": "nothing reads data.validation.max_images",
    "~data.num_workers": "data.num_workers may not be taken away",
    "~split": "split may not be taken away",
    "task.k=-1": r"task\.k=-1 must be a whole number",
    "task.k=2.5": r"task\.k=2\.5",
    "batch_size=0": "batch_size=0 must be a whole number of at least 1",
    "samples=-1": "samples=-1",
    "max_images=0": "max_images=0",
    "dtype=float16": "dtype=float16 must be one of float32, bfloat16",
    "accelerator=tpu": "accelerator=tpu",
    "int8=qformer": "int8=qformer must be a list",
    "int8=[vision]": "int8=vision",
    "changes=3": "changes=3",
    "changes={vision.x: 1}": "no vision.x",
    "split=nothing": "no samples of split 'nothing'",
    "data.validation.split=val": "split=NAME",
    "data.sources.synthetic.weight=2": "nothing else of conf/data",
    "data.on_bad_shard=maybe": "data.on_bad_shard=maybe",
    "data.validation.shards=/nowhere": "error: data.validation.shards=/nowhere: ",
    "task=nothing": "task=NAME names what to measure and task=nothing is none of them: .*retrieval",
    "data=nothing": "data=NAME names what to measure it on",
    "data=laion115m": "names no shards to evaluate on",
    "ckpt=/nowhere": "there is no checkpoint and no run /nowhere",
    "--verbose": "unknown option --verbose; see blip2-evaluate --help",
    "word": "word is not of the form key=value",
}


@pytest.mark.parametrize("override", CASES)
def test_one_sentence(
    override: str, shards: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    key = override.split("=")[0]
    given = [w for w in words(shards, finished / "stage1", tmp_path) if not w.startswith(f"{key}=")]
    if override.startswith("data=laion"):
        given = [w for w in given if not w.startswith("data.validation")]
    assert re.search(CASES[override], refused([*given, override], capsys))


@pytest.mark.parametrize("missing", ["task", "data", "ckpt"])
def test_what_must_be_given(
    missing: str, shards: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    given = words(shards, finished / "stage1", tmp_path)
    said = refused([w for w in given if not w.startswith(f"{missing}=")], capsys)
    assert f"{missing}=" in said


def test_files_that_are_no_checkpoints(
    shards: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    (good,) = (finished / "clip" / "checkpoints").glob("*.ckpt")
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 255
    cases = {
        "damaged": (bytes(data), "is damaged"),
        "cut": (good.read_bytes()[:5000], "is damaged"),
        "text": (b"a text", "is damaged"),
        "empty": (b"", "is damaged"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        assert message in refused(words(shards, path, tmp_path / "out"), capsys)
    torch.save({"model": {}, "by": Bad()}, tmp_path / "pickle.ckpt")
    said = refused(words(shards, tmp_path / "pickle.ckpt", tmp_path / "out"), capsys)
    assert "more than tensors and plain values" in said
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    said = refused(words(shards, tmp_path / "other.ckpt", tmp_path / "out"), capsys)
    assert "is not a checkpoint of blip2-train" in said


class Bad:
    def __reduce__(self) -> Any:
        return os.system, ("false",)


def test_another_kind_and_a_task_that_fails(
    shards: Path, finished: Path, tmp_path: Path, conf: str, capsys: Any
) -> None:
    assert "needs stage1 or clip" in refused(words(shards, finished / "stage2", tmp_path), capsys)
    failing = {"task": "probe", "task.fail": "no luck"}
    given = [conf, *words(shards, finished / "stage1", tmp_path, **failing)]
    assert refused(given, capsys) == "error: no luck\n"
    said = evaluating(given, 2).finish(2)
    assert "error: no luck" in said and "Traceback" not in said


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_that_is_damaged(
    shards: Path, finished: Path, tmp_path: Path, processes: int
) -> None:
    split = make_split(shards, tmp_path / "s", [None] * 8)
    tar = split / "test-000001.tar"
    data = bytearray(tar.read_bytes())
    data[:200] = b"x" * 200  # the first header
    tar.write_bytes(bytes(data))
    given = words(split, finished / "clip", tmp_path / "out", split="test", batch_size=2)
    said = evaluating(given, processes).finish(3)
    assert "error: the data cannot be read: " in said and "Traceback" not in said
    skipping = [*given, "data.on_bad_shard=skip"]
    evaluating(skipping, processes).finish()
    assert metrics(tmp_path / "out")["counts"] == {
        "images": 7, "captions": 35, "skipped": 1, "repeated images": 0,
    }  # fmt: skip


def test_other_files_are_no_results(
    shards: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    assert "no result of blip2-evaluate" in refused(
        words(shards, finished / "clip", tmp_path), capsys
    )


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    assert "blip2-evaluate task=retrieval" in said and "changes:" in said and "hydra" not in said


@pytest.mark.parametrize(
    "path",
    [conf_dir() / "evaluate.yaml", *sorted((conf_dir() / "task").glob("*.yaml"))],
    ids=lambda p: p.stem,
)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text().split("\nhydra:")[0].splitlines()
    bare = [
        line
        for line in lines
        if line.strip()
        and not line.strip().startswith(("#", "-", "_target_"))
        and not line.rstrip().endswith(":")
        and "#" not in line
    ]
    assert bare == []


def test_every_task_composes() -> None:
    for path in (conf_dir() / "task").glob("*.yaml"):
        given = [f"task={path.stem}", "data=coco", "ckpt=x"]
        if "classes: ???" in path.read_text():
            given.append("task.classes=[a]")
        assert compose(given)["name"] == {"task": path.stem, "data": "coco"}
