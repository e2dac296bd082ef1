"""What blip2-convert does not do.

Proven: malicious, cut and mixed-up sources of every kind run nothing, are refused in one sentence,
and leave nothing behind; a configuration inside of a file builds no class that is not ours; what
comes out different, or has no place in the target, is refused; a target that exists is left alone.
"""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint.converting import convert, refused
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import train_in_process

from blip2_train.checkpoint import io
from blip2_train.checkpoint.hf import EXTRA
from blip2_train.interchange import hf_folder


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def malicious(path: Path, marker: Path, how: str, state: dict[str, Any]) -> None:
    content = {"model": state, "config": Malicious(marker)}
    if how == "archive":
        torch.save(content, path)
    elif how == "before 1.6":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        path.write_bytes(pickle.dumps(content, protocol=0))


@pytest.mark.parametrize("how", ["archive", "before 1.6", "pickle", "pickle, protocol 0"])
@pytest.mark.parametrize("kind", ["lavis", "blip2-train"])
def test_a_malicious_file_runs_nothing(
    made: dict[str, Path],
    known: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    how: str,
    kind: str,
) -> None:
    path, marker = tmp_path / "released.pth", tmp_path / "executed"
    malicious(path, marker, how, torch.load(made["stage1.pth"], weights_only=True)["model"])
    more = known["stage1"] if kind == "lavis" else []
    said = refused(capsys, kind, "hf", path, tmp_path / "out", *more)
    assert str(path) in said
    assert "more than tensors and plain values" in said or "no torch checkpoint" in said
    assert ("it could run code" in said) == (how != "pickle, protocol 0")
    assert not marker.exists()
    if "protocol 0" not in how and how != "pickle":
        torch.load(path, weights_only=False)
        assert marker.exists()  # it would have


@pytest.mark.parametrize("place", ["a class", "an argument"])
def test_a_malicious_configuration_runs_nothing(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, place: str
) -> None:
    """Folders of HF and checkpoints of ours remember a configuration, which names classes."""
    marker = tmp_path / "executed"
    evil = {"_target_": "os.mkdir", "path": str(marker)}
    folder = tmp_path / "theirs"
    shutil.copytree(made["stage1.hf"], folder)
    with safe_open(folder / EXTRA, framework="pt") as file:
        notes = file.metadata()
    cfg = yaml.safe_load(notes["config"])
    if place == "a class":
        cfg["vision"] |= {"_target_": "os.mkdir"}
    else:
        cfg["vision"]["options"] = {"act_layer": evil}
    text = yaml.safe_dump(cfg)
    save_file(load_file(folder / EXTRA), folder / EXTRA, {**notes, "config": text})
    said = refused(capsys, "hf", "blip2-train", folder, tmp_path / "out")
    assert "os.mkdir" in said or "act_layer._target_" in said
    checkpoint = tmp_path / "step-00000002.ckpt"
    io.save(checkpoint, {"format": io.FORMAT, "model": {}, "config": text, "step": 2})
    said = refused(capsys, "blip2-train", "hf", checkpoint, tmp_path / "out")
    assert "os.mkdir" in said or "act_layer._target_" in said
    assert not marker.exists()


Spoil = Callable[[Path, dict[str, Path]], Path]


def cut(kind: str, archive: bool = True) -> Spoil:
    def spoil(folder: Path, made: dict[str, Path]) -> Path:
        path = folder / "cut.pth"
        content = torch.load(made[kind], weights_only=True)
        torch.save(content, path, _use_new_zipfile_serialization=archive)
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        return path

    return spoil


def saved(content: Any, name: str = "other.pth") -> Spoil:
    def spoil(folder: Path, made: dict[str, Path]) -> Path:
        torch.save(content, folder / name)
        return folder / name

    return spoil


def written(text: str, name: str) -> Spoil:
    def spoil(folder: Path, made: dict[str, Path]) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return spoil


def state_with(kind: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path, made: dict[str, Path]) -> Path:
        state = torch.load(made[kind], weights_only=True)["model"]
        change(state)
        torch.save({"model": state}, folder / "changed.pth")
        return folder / "changed.pth"

    return spoil


OPTIMIZER = {"optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1.0}]}}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut("stage1.pth"), "is damaged"),
        (cut("stage1.pth", archive=False), "is damaged"),
        (written("", "empty.pth"), "is damaged"),
        (written('{"model": {}}', "json.pth"), "no torch checkpoint"),
        (saved(OPTIMIZER), "neither blip2-train nor LAVIS"),
        (saved({"model": {"query_tokens": 1, "Qformer.x": 2}}), "neither blip2-train nor LAVIS"),
        (lambda folder, made: made["stage2.pth"], "is of stage2, and the experiment is of stage1"),
        (lambda folder, made: made["stage1.hf"], "say --from hf"),
        (lambda folder, made: made["stage1.hf"] / "model.safetensors", "say --from hf"),
        (lambda folder, made: folder / "nothing.pth", "no such file"),
        (state_with("stage1.pth", lambda s: s.update(extra=torch.ones(1))), "no rule covers"),
        (state_with("stage1.pth", lambda s: s.pop("itm_head.bias")), "missing itm_head.bias"),
        (
            state_with("stage1.pth", lambda s: s.update(query_tokens=torch.ones(1, 5, 32))),
            "query_tokens is",
        ),
        (
            state_with(
                "stage1.pth",
                lambda s: s.update({"visual_encoder.pos_embed": torch.ones(1, 10, 64)}),
            ),
            "vision.image_size",
        ),
        (
            state_with("stage1.pth", lambda s: s.pop("visual_encoder.blocks.1.norm1.bias")),
            "lacks blocks.1.norm1.bias",
        ),
        (
            state_with(
                "stage1.pth",
                lambda s: (
                    s["Qformer.cls.predictions.decoder.bias"].data.add_(1)
                    if False
                    else s.update({"Qformer.cls.predictions.decoder.bias": torch.ones(160)})
                ),
            ),
            "should be tied",
        ),
        (
            state_with("stage1.pth", lambda s: s["query_tokens"].fill_(float("nan"))),
            "gives other outputs",
        ),
    ],
)
def test_what_is_no_lavis_file_is_refused(
    made: dict[str, Path],
    known: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    spoil: Spoil,
    said: str,
) -> None:
    path = spoil(tmp_path, made)
    assert said in refused(capsys, "lavis", "blip2-train", path, tmp_path / "out", *known["stage1"])


def folder_with(kind: str, change: Callable[[Path], Any]) -> Spoil:
    def spoil(folder: Path, made: dict[str, Path]) -> Path:
        shutil.copytree(made[kind], folder / "theirs")
        change(folder / "theirs")
        return folder / "theirs"

    return spoil


def edit(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def cut_weights(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])


def without(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        del state[name]
        save_file(state, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (folder_with("stage1.hf", cut_weights), "is damaged"),
        (folder_with("stage1.hf", lambda f: (f / "config.json").unlink()), "has no config.json"),
        (folder_with("stage1.hf", lambda f: (f / "config.json").write_text("{")), "is no JSON"),
        (folder_with("stage1.hf", edit("config.json", '"blip-2"', '"blip"')), "another model"),
        (
            folder_with("stage1.hf", lambda f: (f / "model.safetensors").unlink()),
            "neither model.safetensors nor",
        ),
        (folder_with("stage1.hf", without("itm_head.bias")), "missing itm_head.bias"),
        (folder_with("stage1.hf", without("query_tokens")), "not the weights of a BLIP-2 class"),
        (
            folder_with("stage2.hf", without("language_model.model.decoder.layers.0.fc1.weight")),
            "lacks 1 weights",
        ),
        (
            folder_with(
                "stage1.hf", lambda f: (f / "model.safetensors").rename(f / "other.safetensors")
            ),
            "give a complete folder",
        ),
        (lambda folder, made: made["stage1.pth"], "say --from lavis"),
        (lambda folder, made: folder, "has no config.json"),
        (
            lambda folder, made: made["stage2.hf"] / "model.safetensors",
            "give the folder with its config.json",
        ),
    ],
)
def test_what_is_no_folder_of_hf_is_refused(
    made: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    spoil: Spoil,
    said: str,
) -> None:
    path = spoil(tmp_path, made)
    assert said in refused(capsys, "hf", "blip2-train", path, tmp_path / "out")


def test_an_index_names_files_of_its_folder_alone(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "hf"
    small = ["--max-shard-size", "100KB"]
    assert convert("blip2-train", "hf", runs["stage1"], folder, *small) == 0
    place = folder / "model.safetensors.index.json"
    whole = place.read_text()
    place.write_text(whole.replace("model-00001", "../model-00001"))
    assert "is damaged" in refused(capsys, "hf", "lavis", folder, tmp_path / "out")
    place.write_text(whole)
    next(folder.glob("model-00002*")).unlink()
    assert "lacks model-00002" in refused(capsys, "hf", "lavis", folder, tmp_path / "out")


def test_a_checkpoint_of_ours_is_checked(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = io.newest_valid(runs["stage1"] / "checkpoints")
    assert path is not None
    out = tmp_path / "out"
    assert "no more" in refused(capsys, "blip2-train", "hf", path, out, "experiment=stage1_vitg")
    assert "no run with a checkpoint" in refused(capsys, "blip2-train", "hf", tmp_path, out)
    content = io.load(path)
    content["frozen"]["vision"]["digest"] = "another"
    io.save(tmp_path / "other.ckpt", content)
    said = refused(capsys, "blip2-train", "hf", tmp_path / "other.ckpt", out)
    assert "other weights than the one" in said
    content["config"] = "stage: clip"
    io.save(tmp_path / "clip.ckpt", content)
    said = refused(capsys, "blip2-train", "hf", tmp_path / "clip.ckpt", out)
    assert "stage=clip has no counterpart" in said


def test_the_target_is_left_alone(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, out = runs["stage1"], tmp_path / "out"
    out.mkdir()
    assert "exists" in refused(capsys, "blip2-train", "hf", run, out)
    (tmp_path / "file").write_text("mine")
    assert "exists" in refused(capsys, "blip2-train", "lavis", run, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "link").symlink_to("nowhere")
    assert "exists" in refused(capsys, "blip2-train", "lavis", run, tmp_path / "link")
    assert "there is nothing to convert" in refused(
        capsys, "blip2-train", "blip2-train", run, tmp_path / "x"
    )
    assert convert("blip2-train", "hf", run, tmp_path / "no" / "x") == 2
    assert "does not exist" in capsys.readouterr().err


def test_another_output_is_refused(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = hf_folder.timm_to_hf

    def wrong(state: dict[str, torch.Tensor]) -> Any:
        account = honest(state)
        name = "encoder.layers.0.mlp.fc1.weight"
        account.state[name] = account.state[name].flip(0)
        return account

    monkeypatch.setattr(hf_folder, "timm_to_hf", wrong)
    said = refused(capsys, "blip2-train", "hf", runs["stage1"], tmp_path / "out")
    assert "gives other outputs" in said


def test_a_full_disk(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*given: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(hf_folder, "save_file", full)
    said = refused(capsys, "blip2-train", "hf", runs["stage1"], tmp_path / "out")
    assert "No space left" in said


@pytest.mark.parametrize("size", ["abc", "5", "-1GB", "5 parsecs"])
def test_no_size(tmp_path: Path, capsys: pytest.CaptureFixture, size: str) -> None:
    with pytest.raises(SystemExit) as error:
        convert("blip2-train", "hf", tmp_path, tmp_path / "out", f"--max-shard-size={size}")
    assert error.value.code == 2 and f"{size} is no size" in capsys.readouterr().err


def test_the_source_is_left_as_it_is(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """A damaged checkpoint is passed over, and keeps its name; a lone file finds its neighbours."""
    shutil.copytree(runs["stage1"], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000009.ckpt").write_bytes(b"cut")
    before = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert convert("blip2-train", "hf", tmp_path / "run", tmp_path / "hf") == 0
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == before
    assert convert("hf", "blip2-train", tmp_path / "hf", tmp_path / "a") == 0
    moved = (tmp_path / "a").rename(tmp_path / "b")
    lone = next((moved / "checkpoints").iterdir()).rename(moved / "lone.ckpt")
    assert convert("blip2-train", "lavis", lone, tmp_path / "file.pth") == 0


def test_questions_need_a_text_side(
    made: dict[str, Path], known: dict[str, list[str]], tmp_path: Path, capsys: Any
) -> None:
    asking = [*known["stage2"], "data.text=questions", "model.keep_text=true"]
    asking += ["model.vocab_size=40"]
    said = refused(capsys, "lavis", "hf", made["stage2.pth"], tmp_path / "out", *asking)
    assert "has no text side" in said


def test_what_the_target_cannot_hold_is_refused(
    known: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = [f"run.dir={tmp_path}", "run.name=run"]
    convolutional = ["vision.name=resnet10t", "vision.drop_last_block=false"]
    assert train_in_process([*known["stage1"], *place, *convolutional]) == 0
    run = tmp_path / "run"
    assert "vision.name=resnet10t" in refused(capsys, "blip2-train", "hf", run, tmp_path / "out")
    assert "LAVIS cannot hold" in refused(capsys, "blip2-train", "lavis", run, tmp_path / "out")
    only = ["--trained-only"]
    assert convert("blip2-train", "lavis", run, tmp_path / "file.pth", *only) == 0
