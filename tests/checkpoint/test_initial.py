"""`init_from`: initial weights from a checkpoint.

Proven: a LAVIS file and one of ours load with an account of every key; frozen parts are left alone;
what is missing is listed; another width, no query tokens, a missing, cut or foreign file are
refused and change nothing; a malicious file runs nothing.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, WIDTH, tiny_model
from torch import nn

from blip2_train.checkpoint import io
from blip2_train.checkpoint.initial import init_from
from blip2_train.checkpoint.lavis import to_lavis_name
from blip2_train.errors import UserError
from blip2_train.models.stage1 import Blip2Stage1

FROZEN = ("vision.",)


def other_model(**changes: Any) -> Blip2Stage1:
    """The same shapes as `tiny_model`, all weights different, with something for a tower."""
    model = tiny_model(**changes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=5.0)
    model.vision.tower = nn.Linear(2, 3)
    return model


def lavis_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {to_lavis_name(k): v for k, v in model.state_dict().items()}
    table = state["Qformer.bert.embeddings.word_embeddings.weight"]
    return state | {
        "Qformer.cls.predictions.decoder.weight": table,
        "Qformer.bert.embeddings.position_ids": torch.arange(9)[None],
        "visual_encoder.blocks.0.weight": torch.zeros(2),
        "opt_proj.weight": torch.zeros(4),
    }


def assert_equal_but_tower(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if not name.startswith(FROZEN):
            assert value.equal(wanted[name]), name


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_lavis_file(tmp_path: Path, wrapped: bool) -> None:
    path, source, model = tmp_path / "pretrained.pth", other_model(), tiny_model()
    model.vision.tower = nn.Linear(2, 3)
    tower = model.vision.tower.weight.clone()
    state = lavis_state(source)
    torch.save({"model": state, "epoch": 9} if wrapped else state, path)
    account = init_from(model, path, FROZEN)
    assert_equal_but_tower(model, source)
    assert model.vision.tower.weight.equal(tower)
    assert account.missing == [] and account.unexpected == ["lm_proj.weight"]
    everything = len(account.loaded) + len(account.dropped) + len(account.unexpected)
    assert everything == len(state)
    assert "frozen" in account.dropped["vision.tower.blocks.0.weight"]
    assert "tied" in account.dropped["Qformer.cls.predictions.decoder.weight"]
    text = str(account)
    assert "dropped: Qformer.bert.embeddings.position_ids" in text
    assert "unexpected: lm_proj.weight" in text and text.startswith(f"{len(account.loaded)} ")


def test_one_of_ours(tmp_path: Path) -> None:
    path, source, model = tmp_path / "step-00000001.ckpt", other_model(), tiny_model()
    state = source.state_dict()
    dropped = ["itm_head.weight", "qformer.lm_head.bias"]
    kept = {k: v for k, v in state.items() if k not in dropped}
    io.save(path, {"format": io.FORMAT, "model": kept | {"lm_proj.weight": torch.zeros(2)}})
    before = model.itm_head.weight.clone()
    account = init_from(model, path, FROZEN)
    assert sorted(account.missing) == dropped and account.unexpected == ["lm_proj.weight"]
    assert model.itm_head.weight.equal(before)
    assert model.itm_head.bias.equal(source.itm_head.bias)
    assert "not in the checkpoint: itm_head.weight" in str(account)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_malicious_file_runs_nothing(tmp_path: Path) -> None:
    path, marker = tmp_path / "pretrained.pth", tmp_path / "executed"
    torch.save({"model": lavis_state(other_model()), "config": Malicious(marker)}, path)
    with pytest.raises(UserError, match=r"pretrained.pth holds more than tensors"):
        init_from(tiny_model(), path, FROZEN)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "there is no such file"),
        ("cut", "is damaged"),
        ("garbage", "is damaged"),
        ("a bit flipped", "is damaged"),
        ("wider", r"is \(1, 4, 20\), the model's is \(1, 4, 16\)"),
        ("another tower", rf"ln_vision.weight is \(13,\), the model's is \({WIDTH},\)"),
        ("no query tokens", "query tokens|neither"),
        ("ours without query tokens", "has no query tokens"),
        ("another project", "neither blip2-train nor LAVIS"),
        ("a list", "neither blip2-train nor LAVIS"),
        ("numbers for names", "neither blip2-train nor LAVIS"),
        ("no tensors", "neither blip2-train nor LAVIS"),
        ("ours without a model", "no query tokens|neither"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tmp_path: Path, kind: str, said: str) -> None:
    path = tmp_path / "pretrained.pth"
    state = lavis_state(other_model())
    contents: dict[str, Any] = {
        "no query tokens": {"model": {k: v for k, v in state.items() if k != "query_tokens"}},
        "ours without query tokens": {"format": io.FORMAT, "model": {"temp": torch.ones(())}},
        "another project": {"state_dict": {"backbone.weight": torch.zeros(3)}},
        "a list": [1, 2, 3],
        "numbers for names": {"model": {0: torch.zeros(1)}},
        "no tensors": {"model": dict.fromkeys(state, 1)},
        "ours without a model": {"format": io.FORMAT},
    }
    if kind == "wider":
        contents[kind] = {"model": lavis_state(other_model(hidden_size=20))}
    if kind == "another tower":
        wide = state | {"ln_vision.weight": torch.ones(13)}
        contents[kind] = {"model": wide}
    torch.save(contents.get(kind, {"model": state}), path)
    raw = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif kind == "garbage":
        path.write_bytes(b"hello" * 99)
    elif kind == "a bit flipped":
        raw[raw.index(state["query_tokens"].numpy().tobytes()) + 3] ^= 4
        path.write_bytes(raw)
    model, untouched = tiny_model(), tiny_model()
    with pytest.raises(UserError, match=said) as error:
        init_from(model, path, FROZEN)
    assert str(path) in str(error.value)
    assert_equal_but_tower(model, untouched)


def test_the_vocabulary_counts(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.pth"
    state = lavis_state(other_model())
    name = "Qformer.bert.embeddings.word_embeddings.weight"
    state[name] = state["Qformer.cls.predictions.decoder.weight"] = torch.zeros(VOCAB + 3, 16)
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match=rf"word_embeddings.weight is \({VOCAB + 3}, 16\)"):
        init_from(tiny_model(), path, FROZEN)
