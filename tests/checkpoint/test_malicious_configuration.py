"""Checkpoints of strangers: the configuration in one runs nothing.

Proven: whatever it names to be built, anywhere in it and in whatever way, `blip2_train.load`,
`blip2-evaluate` and `blip2-convert` refuse it in one sentence before anything is built; so they do
what is no configuration, and a step that is no number.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint.converting import refused

import blip2_train
from blip2_train import evaluate
from blip2_train.checkpoint import io
from blip2_train.errors import UserError
from blip2_train.models.qformer import QFormer

Config = dict[str, Any]
EVIL = {"_target_": "os.mkdir", "path": "executed"}
CASES: dict[str, tuple[str, Callable[[Config], Any]]] = {
    "a class": ("stage1", lambda c: c.update(qformer=dict(EVIL))),
    "a class by a detour": (
        "stage1",
        lambda c: c["qformer"].update(_target_="blip2_train.checkpoint.io.os.mkdir"),
    ),
    "an argument": ("stage1", lambda c: c["vision"].update(options={"act_layer": EVIL})),
    "in a list": ("stage1", lambda c: c["vision"].update(options={"layers": [1, [EVIL]]})),
    "of a text": (
        "stage1",
        lambda c: c["vision"].update(
            options={"act_layer": "${oc.create:{_target_: os.mkdir, path: executed}}"}
        ),
    ),
    "a switch": ("stage2", lambda c: c["model"].update(keep_text=EVIL)),
    "a language model": ("stage2", lambda c: c["language_model"].update(config=EVIL)),
    "no class": ("stage1", lambda c: c["vision"].pop("_target_")),
    "nothing": ("stage1", lambda c: c.clear() or c.update(stage="stage1")),
    "no group": ("stage2", lambda c: c.update(language_model=None)),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_run(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    case: str,
) -> None:
    stage, change = CASES[case]
    path = io.newest_valid(runs[stage] / "checkpoints")
    assert path is not None
    content = io.load(path)
    cfg = yaml.safe_load(content["config"])
    change(cfg)
    monkeypatch.chdir(tmp_path)
    io.save(tmp_path / "theirs.ckpt", content | {"config": yaml.safe_dump(cfg)})
    with pytest.raises(UserError, match="the configuration"):
        blip2_train.load(tmp_path / "theirs.ckpt")
    said = refused(capsys, "blip2-train", "hf", tmp_path / "theirs.ckpt", tmp_path / "out")
    assert "the configuration" in said
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("config", [None, 3, "[1, 2]", "a: [", "word"])
def test_no_configuration(runs: dict[str, Path], tmp_path: Path, config: Any) -> None:
    path = io.newest_valid(runs["stage1"] / "checkpoints")
    assert path is not None
    io.save(tmp_path / "theirs.ckpt", io.load(path) | {"config": config})
    with pytest.raises(UserError, match="holds no configuration"):
        blip2_train.load(tmp_path / "theirs.ckpt")


def test_a_step_that_names_a_place(
    runs: dict[str, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = io.newest_valid(runs["stage1"] / "checkpoints")
    assert path is not None
    (tmp_path / "in").mkdir()
    io.save(tmp_path / "in" / "theirs.ckpt", io.load(path) | {"step": "/../../../out"})
    words = ["task=retrieval", "data=synthetic", f"ckpt={tmp_path / 'in' / 'theirs.ckpt'}"]
    words += [f"data.validation.shards={shards}", "split=val", "accelerator=cpu"]
    assert evaluate.run(words) == 2
    assert "is not a checkpoint of blip2-train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class OwnQFormer(QFormer):
    """Of a user who tries an idea."""


@pytest.mark.parametrize("imported", [True, False])
def test_a_class_of_the_caller(runs: dict[str, Path], tmp_path: Path, imported: bool) -> None:
    path = io.newest_valid(runs["stage1"] / "checkpoints")
    assert path is not None
    content = io.load(path)
    cfg = yaml.safe_load(content["config"])
    cfg["qformer"]["_target_"] = f"{__name__ if imported else 'nowhere'}.{OwnQFormer.__name__}"
    io.save(tmp_path / "own.ckpt", content | {"config": yaml.safe_dump(cfg)})
    if imported:
        assert isinstance(blip2_train.load(tmp_path / "own.ckpt").model.qformer, OwnQFormer)
    else:
        with pytest.raises(UserError, match="import its module first"):
            blip2_train.load(tmp_path / "own.ckpt")
