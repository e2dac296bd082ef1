"""Reads a reference case and builds our model from it; all dimensions come from the files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blip2_train.checkpoint.lavis import from_lavis, to_lavis_name
from blip2_train.data.batch import lm_targets, text_tokens
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.training.objectives import ItcConfig, LmConfig, LossConfig


def load_case(oracle: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((oracle / f"{name}.json").read_text()), load_file(
        oracle / f"{name}.safetensors"
    )


def section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class NoTower(nn.Module):
    """Stands for the image tower where a case starts from its features."""


def build_stage1(info: dict[str, Any], weights: dict[str, Tensor]) -> Blip2Stage1:
    dims, ids = info["dims"], info["special_ids"]
    qformer = QFormer(
        vocab_size=dims["vocab_size"] + 1,
        vision_width=dims["feat_dim"],
        hidden_size=dims["hidden"],
        num_layers=dims["layers"],
        num_heads=dims["heads"],
        intermediate_size=dims["inter"],
        num_query_tokens=dims["queries"],
        cross_attention_freq=dims["caf"],
        max_positions=dims["max_pos"],
        dropout=info["dropout"],
    )
    model = Blip2Stage1(
        NoTower(),  # type: ignore[arg-type]
        qformer,
        dec_token_id=ids["[DEC]"],
        end_token_id=ids["[SEP]"],
        embed_dim=dims["embed_dim"],
    )
    account = from_lavis(weights)
    assert not account.unknown
    model.load_state_dict(account.state, strict=True)
    return model


def loss_config(info: dict[str, Any], gradient: str, normalise: str) -> LossConfig:
    return LossConfig(
        weights={"itc": 1.0, "itm": 1.0, "lm": 1.0},
        normalise=normalise,
        itc=ItcConfig(info["label_smoothing_itc"], gradient),
        lm=LmConfig(info["label_smoothing_lm"]),
    )


def text_batch(tensors: dict[str, Tensor], prefix: str, first_id: int = 0) -> dict[str, Any]:
    """The text side of a batch; without ids in the case every sample gets its own."""
    ids, mask = tensors[f"{prefix}input_ids"], tensors[f"{prefix}attention_mask"]
    own = torch.arange(first_id, first_id + len(ids))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "image_id": tensors.get(f"{prefix}image_id", own),
        "text_index": text_tokens(mask),
        "lm_index": lm_targets(mask),
        "text_length": int(mask.sum(dim=1).max()),
    }


def assert_close(ours: Tensor, reference: Tensor, tolerance: float, name: str) -> None:
    assert ours.shape == reference.shape, f"{name}: {ours.shape} against {reference.shape}"
    gap = (ours - reference).abs().max().item()
    assert gap <= tolerance, f"{name} differs by {gap:.2e}, more than {tolerance:.0e}"


def assert_gradients(model: nn.Module, reference: dict[str, Tensor]) -> None:
    """Every trainable parameter's gradient, at FORMAT.md's tolerance."""
    compared = set()
    for name, parameter in model.named_parameters():
        foreign = to_lavis_name(name)
        wanted = reference[foreign]
        assert parameter.grad is not None, f"{name} has no gradient"
        compared.add(foreign)
        if name.endswith(".key.bias"):  # zero in exact arithmetic
            assert max(parameter.grad.abs().max(), wanted.abs().max()) <= 1e-6, name
            continue
        tolerance = 1e-4 * wanted.abs().max().item() + 2e-6
        assert_close(parameter.grad, wanted, tolerance, f"gradient of {name}")
    assert compared == set(reference), set(reference) ^ compared
