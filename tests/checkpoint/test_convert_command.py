"""The command `blip2-convert`.

Proven: runs of ours go to LAVIS and Hugging Face and come back to the same weights, also sharded,
with a Q-Former that keeps its text side, from files of older torch and without frozen parts; a
moved run is found again and refuses to be continued; trainings begin with LAVIS's and HF's weights,
of the folder and of its file; every key is accounted for, and what a source lacks is said.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.converting import convert, refused
from safetensors.torch import load_file
from tiny import train_in_process

from blip2_train.checkpoint import io
from blip2_train.checkpoint.hf import EXTRA
from blip2_train.checkpoint.initial import init_from
from blip2_train.interchange.read import read_hf, read_ours
from blip2_train.interchange.tokenizers import TOKENIZERS
from blip2_train.training.loading import load_run


def assert_same_model(ours: Path, theirs: Path) -> None:
    a, b = read_ours(ours), read_ours(theirs)
    assert a.step == b.step
    ours_state, theirs_state = a.model.state_dict(), b.model.state_dict()
    assert ours_state.keys() == theirs_state.keys()
    for name, value in ours_state.items():
        assert value.equal(theirs_state[name]), name


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_by_hf_and_back(
    runs: dict[str, Path], made: dict[str, Path], tmp_path: Path, stage: str
) -> None:
    assert convert("hf", "blip2-train", made[f"{stage}.hf"], tmp_path / "back") == 0
    assert_same_model(runs[stage], tmp_path / "back")
    loaded, _ = load_run(tmp_path / "back")
    assert loaded.cfg["run"] == {"dir": str(tmp_path), "name": "back"}
    before = io.load(io.newest_valid(runs[stage] / "checkpoints"))["frozen"]  # type: ignore[arg-type]
    after = io.load(io.newest_valid(tmp_path / "back" / "checkpoints"))["frozen"]  # type: ignore[arg-type]
    assert before.keys() == after.keys()
    assert before["vision"]["digest"] == after["vision"]["digest"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("archive", [True, False])
def test_by_lavis_and_back(
    runs: dict[str, Path],
    made: dict[str, Path],
    known: dict[str, list[str]],
    tmp_path: Path,
    stage: str,
    archive: bool,
) -> None:
    content = torch.load(made[f"{stage}.pth"], weights_only=True)
    path = tmp_path / "file.pth"
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    assert convert("lavis", "blip2-train", path, tmp_path / "back", *known[stage]) == 0
    a, b = read_ours(runs[stage]), read_ours(tmp_path / "back")
    other = b.model.state_dict()
    for name, value in a.model.state_dict().items():
        if name.endswith("attn.qkv.bias"):  # LAVIS has no bias of the key
            third = len(value) // 3
            value = value.clone()
            value[third : 2 * third] = 0
        assert value.equal(other[name]), name


def test_shards(runs: dict[str, Path], tmp_path: Path) -> None:
    small = ["--max-shard-size", "100KB"]
    assert convert("blip2-train", "hf", runs["stage2"], tmp_path / "hf", *small) == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert convert("hf", "blip2-train", tmp_path / "hf", tmp_path / "back") == 0
    assert_same_model(runs["stage2"], tmp_path / "back")


def test_a_kept_text_side(
    known: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keep = ["model.keep_text=true", "model.vocab_size=40", f"run.dir={tmp_path}", "run.name=keep"]
    assert train_in_process([*known["stage2"], *keep, "trainer.max_steps=1"]) == 0
    assert convert("blip2-train", "hf", tmp_path / "keep", tmp_path / "hf") == 0
    assert "their Q-Former of stage 2 reads no text" in capsys.readouterr().out
    lavis = tmp_path / "file.pth"
    assert convert("hf", "lavis", tmp_path / "hf", lavis) == 0
    told = known["stage2"]  # that it has a text side is seen
    assert convert("lavis", "blip2-train", lavis, tmp_path / "again", *told) == 0
    a, b = read_ours(tmp_path / "keep").own, read_ours(tmp_path / "again").own
    assert a.keys() == b.keys() and "qformer.word_embeddings.weight" in a
    assert all(value.equal(b[name]) for name, value in a.items())


def test_trained_only(runs: dict[str, Path], known: dict[str, list[str]], tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    assert convert("blip2-train", "lavis", runs["stage2"], path, "--trained-only") == 0
    names = torch.load(path, weights_only=True)["model"].keys()
    assert {name.split(".")[0] for name in names} == {
        "Qformer", "opt_proj", "ln_vision", "query_tokens",
    }  # fmt: skip
    assert convert("lavis", "blip2-train", path, tmp_path / "back", *known["stage2"]) == 0
    assert not (tmp_path / "back" / "vision.safetensors").exists()
    assert not (tmp_path / "back" / "language_model").exists()
    assert_same_weights(runs["stage2"], tmp_path / "back")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    a, b = read_ours(ours).model.state_dict(), read_ours(theirs).model.state_dict()
    assert all(value.equal(b[name]) for name, value in a.items())


def test_what_the_source_lacks_is_said(
    made: dict[str, Path],
    runs: dict[str, Path],
    known: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """A folder that others wrote has neither the captioning head nor our notes."""
    folder = tmp_path / "theirs"
    shutil.copytree(made["stage1.hf"], folder)
    (folder / EXTRA).unlink()
    shutil.rmtree(folder / TOKENIZERS)
    assert "give experiment=NAME, of stage1" in refused(
        capsys, "hf", "blip2-train", folder, tmp_path / "back"
    )
    sizes = ["qformer.hidden_size=8", "vision.name=resnet10t", "vision.drop_last_block=false"]
    others = [o for o in known["stage1"] if "vision." not in o]  # config.json says them
    assert convert("hf", "blip2-train", folder, tmp_path / "back", *others, *sizes) == 0
    said = capsys.readouterr().out
    assert "6 missing" in said and "captions mean nothing" in said and "temp" in said
    mine, theirs = read_ours(runs["stage1"]), read_ours(tmp_path / "back")
    assert theirs.cfg["vision"]["name"].startswith("eva")  # the same transformer
    assert mine.model.itm_head.weight.equal(theirs.model.itm_head.weight)
    image = torch.zeros(1, 3, 32, 32)
    assert mine.model.vision(image).allclose(theirs.model.vision(image), atol=1e-5)


def test_a_moved_run(
    made: dict[str, Path], known: dict[str, list[str]], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "a").mkdir()
    assert convert("hf", "blip2-train", made["stage2.hf"], tmp_path / "a" / "run") == 0
    (tmp_path / "b").mkdir()
    moved = (tmp_path / "a" / "run").rename(tmp_path / "b" / "run")
    _, model = load_run(moved)
    assert Path(model.vision.weights).parent == moved
    assert convert("blip2-train", "hf", moved, tmp_path / "hf") == 0
    capsys.readouterr()
    again = [*known["stage2"], f"run.dir={tmp_path / 'b'}", "run.name=run", "trainer.max_steps=9"]
    assert train_in_process(again) == 2
    assert "init_from=" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("source", ["{}.hf", "{}.hf/model.safetensors", "{}.pth"])
def test_initial_weights(
    made: dict[str, Path], runs: dict[str, Path], stage: str, source: str
) -> None:
    whole = read_ours(runs[stage])
    wanted = {name: value.clone() for name, value in whole.trained.items()}
    name, _, file = source.format(stage).partition("/")
    for value in whole.trained.values():
        value.zero_()
    account = init_from(whole.model, made[name] / file, whole.stage.frozen_prefixes)
    assert account.missing == account.unexpected == [] and len(account.loaded) == len(wanted)
    assert any(name.startswith("vision.tower.") for name in account.dropped)
    for name, value in whole.trained.items():
        assert value.equal(wanted[name]), name


@pytest.mark.parametrize("source", ["stage1.hf", "stage1.pth"])
def test_a_tower_that_is_trained_begins_there_too(
    made: dict[str, Path], runs: dict[str, Path], source: str
) -> None:
    whole = read_ours(runs["stage1"])
    wanted = {name: value.clone() for name, value in whole.tower.items()}
    for value in whole.tower.values():
        value.zero_()
    account = init_from(whole.model, made[source], ())
    assert account.missing == account.unexpected == []
    for name, value in whole.tower.items():
        if source == "stage1.pth" and name.endswith("qkv.bias"):  # LAVIS has none of the key
            wanted[name][64:128] = 0
        assert value.equal(wanted[name]), name


def test_stage_2_begins_with_a_folder_of_hf(
    made: dict[str, Path], known: dict[str, list[str]], runs: dict[str, Path], tmp_path: Path
) -> None:
    still = ["optimizer.lr=0", "schedule.min_lr=0", "schedule.warmup_lr=0", "trainer.max_steps=1"]
    start = ["init=checkpoint", f"init_from={made['stage1.hf']}", f"run.dir={tmp_path}", *still]
    assert train_in_process([*known["stage2"], *start]) == 0
    begun, wanted = read_ours(tmp_path / "stage2").own, read_ours(runs["stage1"]).own
    both = begun.keys() & wanted.keys()
    assert begun.keys() - both == {"lm_proj.weight", "lm_proj.bias"}
    assert all(begun[name].equal(wanted[name]) for name in both)


def test_the_account_is_complete(made: dict[str, Path], tmp_path: Path) -> None:
    folder = made["stage1.hf"]
    whole = read_hf(folder, None, tmp_path)
    theirs = load_file(folder / "model.safetensors").keys()
    extra = {f"{EXTRA}: {name}" for name in load_file(folder / EXTRA)}
    assert {row.source for row in whole.account.rows} == theirs | extra
    assert {row.target for row in whole.account.rows} == whole.model.state_dict().keys()
    assert extra == {
        f"{EXTRA}: {name}"
        for name in whole.model.state_dict()
        if name.startswith("qformer.lm_head.") or name == "temp"
    }


def test_half_precision_is_said(
    made: dict[str, Path], known: dict[str, list[str]], tmp_path: Path, capsys: Any
) -> None:
    state = torch.load(made["stage1.pth"], weights_only=True)["model"]
    half = {k: v.half() if k.startswith("visual_encoder.") else v for k, v in state.items()}
    torch.save({"model": half}, tmp_path / "half.pth")
    assert convert("lavis", "hf", tmp_path / "half.pth", tmp_path / "hf", *known["stage1"]) == 0
    assert "float16, the same numbers in float32" in capsys.readouterr().out
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written["vision_model.embeddings.class_embedding"].equal(
        half["visual_encoder.cls_token"].float()
    )
