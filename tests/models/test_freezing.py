"""Freezing.

Proven: a frozen module stays in eval mode whatever `.train()` says; a loss that reaches everything
freezes nothing; captioning alone freezes exactly what it does not reach, the last block's query
feed-forward among it, and leaves no gradient behind; the table shows every parameter once.
"""

from typing import Any

import pytest
import torch
from tiny import loss_config, tiny_batch, tiny_model
from torch import Tensor, nn

from blip2_train.models.freezing import (
    Frozen,
    count_parameters,
    freeze_unreached,
    parameter_table,
)
from blip2_train.training.objectives import stage1_step


class Tower(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.freeze()


def test_frozen_means_frozen() -> None:
    model = nn.Sequential(Tower(), nn.Linear(5, 2))
    x = torch.randn(7, 3)
    before = model[0].layers(x)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    model.train()
    model[0].train(True)
    assert model.training and not any(m.training for m in model[0].modules())
    assert model[0].layers(x).equal(before)  # no dropout
    assert all(b.equal(buffers[name]) for name, b in model.named_buffers())  # no new statistics
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2


def total_loss(model: nn.Module, **weights: float) -> Any:
    batch = tiny_batch(4)
    uniform = torch.rand(2, 4, dtype=torch.float64)

    def loss() -> Tensor:
        embeds = batch["image_embeds"]
        return stage1_step(model, embeds, batch, loss_config(**weights), uniform=uniform)["loss"]

    return loss


def test_with_every_loss_nothing_is_frozen() -> None:
    model = tiny_model(num_layers=4).double()
    assert freeze_unreached(model, total_loss(model)) == []
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


HEADS = {"vision_proj", "text_proj", "itm_head", "temp"}


@pytest.mark.parametrize(
    ("layers", "weights", "wanted"),
    [
        (4, {"itc": 0.0, "itm": 0.0}, {*HEADS, "qformer.layers.3.query_ffn"}),
        # an odd number of blocks ends with a cross-attention, whose result only queries carry on
        (
            3,
            {"itc": 0.0, "itm": 0.0},
            {*HEADS, "qformer.layers.2.query_ffn", "qformer.layers.2.cross_attention"},
        ),
        (4, {"lm": 0.0}, {"qformer.lm_head"}),
        (
            4,
            {"itc": 0.0, "lm": 0.0},
            {"vision_proj", "text_proj", "temp", "qformer.lm_head", "qformer.layers.3.text_ffn"},
        ),
    ],
)
def test_what_no_loss_reaches_is_frozen(
    layers: int, weights: dict[str, float], wanted: set[str]
) -> None:
    model = tiny_model(num_layers=layers).double()
    loss = total_loss(model, **weights)
    unreached = freeze_unreached(model, loss)
    every = [name for name, _ in model.named_parameters()]
    assert unreached == [n for n in every if any(f"{n}.".startswith(w + ".") for w in wanted)]
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(unreached)
    assert all(p.grad is None for p in model.parameters())
    loss().backward()  # now every trainable one gets a gradient
    assert all((p.grad is not None) is p.requires_grad for p in model.parameters())


def test_the_table_counts_everything_once() -> None:
    model = nn.ModuleDict({"vision": Tower(), "head": nn.Linear(5, 2)})
    model["vision"].layers[1].bfloat16()
    model.register_parameter("temp", nn.Parameter(torch.zeros(())))
    assert parameter_table(model) == [
        {"module": "temp", "parameters": 1, "state": "trained", "dtype": "float32"},
        {"module": "vision.layers", "parameters": 20, "state": "frozen", "dtype": "float32"},
        {"module": "vision.layers", "parameters": 10, "state": "frozen", "dtype": "bfloat16"},
        {"module": "head", "parameters": 12, "state": "trained", "dtype": "float32"},
    ]
    assert [row["module"] for row in parameter_table(model, depth=1)] == [
        "temp", "vision", "vision", "head"
    ]  # fmt: skip
    assert count_parameters(model.parameters(), trainable=True) == 13
    assert count_parameters(model.parameters(), trainable=False) == 30
