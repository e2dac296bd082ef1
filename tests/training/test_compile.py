"""Compiled blocks.

Proven: the Q-Former's blocks compile without a graph break, forward and backward, and compute what
they compute; after a few batches new lengths of text need no new compilation; the blocks of every
tower and language model are found; a whole run compiled is the plain one (slow).
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from language_steps import OPT, T5, stage2
from tiny import loss_config, tiny_batch, tiny_model, tiny_run, train_in_process
from torch import Tensor, nn
from torch._dynamo.utils import counters
from whole_runs import rows

from blip2_train.distributed import World
from blip2_train.models.counting import saved_bytes
from blip2_train.models.qformer import QFormer
from blip2_train.training.compiling import VARIANTS, compile_blocks, repeated_blocks
from blip2_train.training.objectives import draw_uniform, stage1_step


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def losses_and_gradients(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    size = len(batch["image_id"])
    uniform = draw_uniform(0, 0, 0, size, World())
    out = stage1_step(model, batch["image_embeds"], batch, loss_config(), uniform=uniform)  # type: ignore[arg-type]
    out["loss"].backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [out["loss_itc"], out["loss_itm"], out["loss_lm"], *gradients]


@pytest.mark.slow
def test_nothing_breaks_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", VARIANTS)
    plain, compiled = (tiny_model(num_layers=2).double() for _ in range(2))
    for block in compiled.qformer.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    graphs = []
    for seed, size in enumerate([6, 5, 7, 8, 4]):
        batch = tiny_batch(size, seed=seed)
        pairs = zip(
            losses_and_gradients(compiled, batch), losses_and_gradients(plain, batch), strict=True
        )
        for one, two in pairs:
            torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[-1] == graphs[2] <= 12


@pytest.mark.slow
def test_a_compiled_block_keeps_no_more() -> None:
    batch, kept = tiny_batch(8), []
    for compiled in (False, True):
        model = tiny_model(num_layers=2, intermediate_size=64)
        if compiled:
            compile_blocks(model)
            for block in model.qformer.layers:  # the partition is inductor's, its kernels are not
                block.compile(backend="aot_eager_decomp_partition")
        run = functools.partial(
            stage1_step, model, batch["image_embeds"].float(), batch, loss_config(),
            uniform=draw_uniform(0, 0, 0, 8, World()),
        )  # fmt: skip
        run()["loss"].backward()
        kept.append(saved_bytes(run, model.parameters()))
    assert kept[1] < 1.1 * kept[0]


def test_blocks_are_found() -> None:
    def kinds(model: nn.Module) -> set[tuple[str, int]]:
        found = [type(block).__name__ for block in repeated_blocks(model)]
        return {(name, found.count(name)) for name in found}

    with torch.device("meta"):
        assert kinds(QFormer(vocab_size=9, vision_width=8)) == {("QFormerLayer", 12)}
        assert kinds(timm.create_model("test_vit")) == {("Block", 6)}
        eva = timm.create_model("eva02_tiny_patch14_224")
        assert kinds(eva) == {("EvaBlock", 12)}
    for config, wanted in ((OPT, {("OPTDecoderLayer", 2)}), (T5, {("T5Block", 4)})):
        found = kinds(stage2(config).language_model)
        assert found == wanted
    assert kinds(nn.Linear(2, 2)) == set()


def test_blocks_are_compiled_in_place() -> None:
    model = tiny_model()
    before = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == before
    assert all(block._compiled_call_impl is not None for block in model.qformer.layers)
    assert torch._dynamo.config.recompile_limit == VARIANTS


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one(shards: Path, tmp_path: Path) -> None:
    changes = {"qformer.dropout": 0, "trainer.max_steps": 300, "trainer.log_every": 10,
               "validation.every": 150}  # fmt: skip
    for name, compiled in (("plain", False), ("compiled", True)):
        overrides = tiny_run(shards, tmp_path, name, **changes, **{"trainer.compile": compiled})
        assert train_in_process(overrides) == 0
    pairs = list(zip(rows(tmp_path / "compiled"), rows(tmp_path / "plain"), strict=True))
    assert len(pairs) > 30
    for one, two in pairs:
        for key in (k for k, v in two.items() if k.startswith(("train/loss", "val/loss")) and v):
            assert float(one[key]) == pytest.approx(float(two[key]), abs=0.02), key
