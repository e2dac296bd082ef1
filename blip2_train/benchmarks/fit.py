"""The largest batch that fits a device, and which blocks to recompute for it.

On a GPU real steps are run until they do not fit; without one the memory of a step is computed from
its shapes (`training/memory.py`): an estimate. Texts have `text.max_tokens`, the most there can be.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from blip2_train.benchmarks.batches import (
    Choice,
    Estimate,
    Needs,
    Parts,
    advise,
    describe,
    largest_of,
    one_plan,
)
from blip2_train.benchmarks.machine import processor, versions
from blip2_train.benchmarks.trial import Trial
from blip2_train.config import (
    BatchPlan,
    batch_plan,
    to_plain,
    trains_tower,
    validate,
    without_checkpoint,
)
from blip2_train.errors import UserError
from blip2_train.train import compose
from blip2_train.training.memory import CONTEXT, GB, Memory, Sketch, recomputable, recompute


def run(
    overrides: Sequence[str], memory: float | None, world: int, device: str
) -> list[dict[str, Any]]:
    """Find what fits, and print a table.

    Args:
        overrides: `experiment=NAME` and further `key=value` of the configuration.
        memory: bytes of a device; None: of this GPU.
        world: devices that train together.
        device: "cpu" (an estimate), "cuda" or "auto".

    Returns:
        One record.

    Raises:
        UserError: an impossible configuration, device or size, or nothing fits.
    """
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: torch sees no GPU here; take --device cpu for an estimate")
    memory = _checked(memory, cuda)
    cfg = configuration(overrides, world)
    console = Console(width=None if sys.stdout.isatty() else 140)
    with console.status("tracing a step"):
        sketch = Sketch(cfg)
        check_room(cfg, sketch.empty(), memory)
        estimate = estimates(sketch)
        needs = measurements(cfg, sketch, memory) if cuda else totals(estimate)
        found = choices(cfg, sketch, estimate, needs, memory, world)
        if not any(choice.largest for choice in found):
            check_room(cfg, found[-1].memory, memory)
            raise UserError(
                "not one sample fits, although the estimate for one is "
                f"{found[-1].memory.total / GB:.1f} GB; {taken_by_others()}"
            )
        advice = advise(cfg, found, needs, memory, world)
    record = {
        "name": f"fit {cfg['run']['name']}",
        "date": datetime.date.today().isoformat(),
        "measured": cuda,
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "versions": versions("blip2-train", "torch", "timm", "transformers"),
        "overrides": list(overrides),
        "memory_gb": memory / GB,
        "devices": world,
        "text_tokens": cfg["text"]["max_tokens"],
        "choices": [_as_plain(choice) for choice in found],
        "recommended": advice.overrides,
        "batch": str(advice.plan),
    }
    console.print(table(record))
    for line in describe(cfg, advice):
        print(line)
    return [record]


def configuration(overrides: Sequence[str], world: int) -> dict[str, Any]:
    """The resolved configuration of a training whose weights do not matter.

    Raises:
        UserError: it is not one, or its batch cannot be cut for so many devices.
    """
    cfg = without_checkpoint(to_plain(compose(list(overrides))))
    if cfg["stage"] == "stage2":
        cfg |= {"init": "random", "init_from": None}
        cfg["language_model"]["weights"] = "random"
    validate(cfg, world)
    return cfg


def check_room(cfg: Mapping[str, Any], least: Memory, memory: float) -> None:
    """Refuses a device that is too small.

    Args:
        cfg: resolved configuration.
        least: what it must hold at least.
        memory: bytes that it has.

    Raises:
        UserError: it has less; says what weights and optimizer take and what would help.
    """
    if least.total <= memory:
        return
    ways = []
    if "language_model" in cfg and cfg["language_model"]["quantization"] is None:
        ways.append(
            "language_model.quantization=torchao_int4 (torchao_int8, bitsandbytes_nf4) stores the "
            "language model in less"
        )
    if cfg.get("vision", {}).get("dtype") == "float32" and not trains_tower(cfg):
        ways.append("vision.dtype=bfloat16 halves the tower")
    ways.append("a smaller model or a larger device")
    raise UserError(
        f"--memory {memory / GB:g}GB is too little: weights take {least.weights / GB:.1f} GB, "
        f"gradients and optimizer {(least.gradients + least.optimizer) / GB:.1f} GB, and with "
        f"{'a sample and ' if least.activations else ''}the reserve that is "
        f"{least.total / GB:.1f} GB; what helps: {', or '.join(ways)}"
    )


def choices(
    cfg: Mapping[str, Any],
    sketch: Sketch,
    estimate: Estimate,
    needs: Needs,
    memory: float,
    world: int,
) -> list[Choice]:
    """What fits with every combination of recomputed parts, fastest first."""
    parts = recomputable(sketch.model)
    largest, found = batch_plan(cfg, world).at_a_time, []
    plain = math.nan
    for count in range(len(parts) + 1):
        for recomputed in itertools.combinations(parts, count):
            recompute(sketch.model, recomputed)
            flops = sum(sketch.flops())
            plain = flops if not recomputed else plain
            largest = largest_of(needs, recomputed, memory, world, max(largest, 1))
            then = estimate(one_plan(max(largest, 1), world), recomputed)
            found.append(Choice(recomputed, largest, then, flops / plain - 1))
    return sorted(found, key=lambda choice: choice.extra)


def table(record: dict[str, Any]) -> Table:
    """A record of `run` to look at."""
    kind = "measured" if record["measured"] else "an estimate, not measured"
    out = Table(
        title=f"{record['name']}: {record['memory_gb']:g} GB, one of {record['devices']} "
        f"device(s), captions of {record['text_tokens']} tokens: {kind}",
        title_justify="left",
        caption="The memory of the largest batch, in GB, is an estimate. The tower and the rest of "
        "a step take turns, and the larger of the two counts. Gradients are DDP's buckets. In all: "
        "with 1 GB for context and NCCL, and 5 % for gaps.",
        caption_justify="left",
    )
    names = ("weights", "gradients", "optimizer", "tower", "activations", "logits")
    out.add_column("recomputed")
    for column in ("largest batch", "in eights", *names, "in all", "arithmetic"):
        out.add_column(column, justify="right")
    for row in record["choices"]:
        out.add_row(
            ", ".join(row["recomputed"]) or "nothing",
            str(row["largest"]),
            str(row["largest"] // 8 * 8),
            *(f"{row['gb'][name]:.1f}" for name in (*names, "total")),
            f"+{row['extra']:.0%}",
        )
    return out


def estimates(sketch: Sketch) -> Estimate:
    """Memory from shapes, each plan once."""

    @functools.cache
    def estimate(plan: BatchPlan, recomputed: Parts) -> Memory:
        recompute(sketch.model, recomputed)
        return sketch.memory(plan)

    return estimate


def totals(estimate: Estimate) -> Needs:
    """What a device must have, by an estimate."""
    return lambda plan, recomputed: estimate(plan, recomputed).total


def measurements(cfg: Mapping[str, Any], sketch: Sketch, memory: float) -> Needs:
    """What this GPU was seen to need, each plan once; it is given so much memory and no more."""
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((memory - CONTEXT) / whole)
    try:
        trial = Trial(cfg, sketch)
    except torch.OutOfMemoryError:
        raise UserError(f"the weights do not fit this GPU; {taken_by_others()}") from None

    @functools.cache
    def needs(plan: BatchPlan, recomputed: Parts) -> float:
        recompute(trial.model, recomputed)
        return trial.needs(plan)

    return needs


def taken_by_others() -> str:
    """What other processes hold of this GPU, as a part of a sentence."""
    free, whole = torch.cuda.mem_get_info()
    others = whole - free - torch.cuda.memory_reserved()
    return f"other processes hold {others / GB:.1f} GB of it: end them, or give a smaller model"


def _checked(memory: float | None, cuda: bool) -> float:
    """Bytes of a device.

    Raises:
        UserError: it is not known, or this GPU has less.
    """
    if not cuda:
        if memory is None:
            raise UserError("--memory is missing, and there is no GPU to ask; give --memory 80GB")
        return memory
    whole = float(torch.cuda.get_device_properties(0).total_memory)
    if memory is not None and memory > whole:
        raise UserError(
            f"--memory {memory / GB:g}GB is more than this GPU has ({whole / GB:.1f}GB); take "
            "--device cpu for an estimate"
        )
    return whole if memory is None else memory


def _as_plain(choice: Choice) -> dict[str, Any]:
    parts = asdict(choice.memory) | {"total": choice.memory.total}
    return {
        "recomputed": list(choice.recomputed),
        "largest": choice.largest,
        "extra": choice.extra,
        "gb": {name: size / GB for name, size in parts.items()},
    }
