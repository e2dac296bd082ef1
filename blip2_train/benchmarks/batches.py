"""The search for the largest batch, and what to train with, whoever says what a batch needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blip2_train.config import BatchPlan, batch_plan, plan_batch
from blip2_train.errors import UserError
from blip2_train.training.memory import CHECKPOINTED, GB, Memory

Parts = tuple[str, ...]  # of `CHECKPOINTED`, whose blocks are recomputed
Estimate = Callable[[BatchPlan, Parts], Memory]
Needs = Callable[[BatchPlan, Parts], float]  # bytes that a device must have


@dataclass(frozen=True)
class Choice:
    """What fits if the blocks of some parts are recomputed.

    Attributes:
        recomputed: these parts.
        largest: samples that a device computes at a time; 0: not even one fits.
        memory: estimate at that batch, or of one sample.
        extra: arithmetic of a sample beyond that without recomputation, as a share of it.
    """

    recomputed: Parts
    largest: int
    memory: Memory
    extra: float


@dataclass(frozen=True)
class Advice:
    """What to train with.

    Attributes:
        plan: how the recipe's global batch is cut.
        overrides: of the configuration, to paste.
    """

    plan: BatchPlan
    overrides: list[str]


def one_plan(samples: int, world: int) -> BatchPlan:
    """So many samples on each of so many devices, all at a time."""
    return plan_batch(samples * world, 1, world)


def largest_of(needs: Needs, recomputed: Parts, memory: float, world: int, start: int) -> int:
    """`largest_batch` of a training on so many devices."""
    return largest_batch(lambda n: needs(one_plan(n, world), recomputed), memory, start)


def largest_batch(needs: Callable[[int], float], memory: float, start: int) -> int:
    """The most samples that fit: doubling, then closing in.

    Args:
        needs: bytes for a number of samples, growing with it; infinite where that is not known.
        memory: bytes that there are.
        start: the number that is tried first.

    Returns:
        0 where not even one fits.
    """
    fits, exceeds = 0, start
    while (needed := needs(exceeds)) <= memory:
        fits, exceeds = exceeds, 2 * exceeds
    for turn in itertools.count():
        if exceeds - fits <= 1:
            return fits
        middle = (fits + exceeds) // 2
        if fits and needed < math.inf and turn % 3 < 2:  # nearly a straight line
            share = (memory - needs(fits)) / (needed - needs(fits))
            middle = min(max(fits + int(share * (exceeds - fits)), fits + 1), exceeds - 1)
        if (tried := needs(middle)) <= memory:
            fits = middle
        else:
            exceeds, needed = middle, tried
    raise AssertionError("unreachable")


def advise(
    cfg: Mapping[str, Any], found: list[Choice], needs: Needs, memory: float, world: int
) -> Advice:
    """The fastest choice with which the configuration's own batch fits, else more parts of it.

    Parts of one contrastive batch are computed twice anyway (GradCache); recomputing their blocks
    besides would take more memory, for a checkpoint within another keeps what both make.

    Args:
        cfg: resolved and validated configuration.
        found: fastest first.
        needs: as of `choices`.
        memory: bytes of a device.
        world: devices.

    Raises:
        UserError: no number of parts fits.
    """
    plan = batch_plan(cfg, world)
    for choice in found:
        if needs(plan, choice.recomputed) <= memory:
            return Advice(plan, switches(cfg, choice.recomputed))
    size, before = cfg["batch"]["size"], cfg["batch"]["accumulate"]
    caches = compares(cfg)
    best = found[0] if caches else max(found, key=lambda choice: choice.largest)
    for parts in range(before + 1, size // world + 1):
        if size % (world * parts):
            continue
        plan = plan_batch(size, parts, world, cache=caches)
        if plan.at_a_time > 2 * best.largest:
            continue  # a part takes more than half of what a whole step of its size does
        if needs(plan, best.recomputed) <= memory:
            cached = ["loss.itc.cache=true"] if caches and not cfg["loss"]["itc"]["cache"] else []
            own = switches(cfg, best.recomputed)
            return Advice(plan, [f"batch.accumulate={parts}", *cached, *own])
    raise UserError(
        f"batch.size={size} cannot be cut into parts that fit {world} devices of "
        f"{memory / GB:g} GB, which compute {best.largest} samples at a time; set batch.size to a "
        f"multiple of {world * max(best.largest, 1)}, or take more devices"
    )


def switches(cfg: Mapping[str, Any], recomputed: Parts) -> list[str]:
    """Overrides with which a configuration recomputes the blocks of these parts and no others."""
    return [
        f"{part}.gradient_checkpointing={str(part in recomputed).lower()}"
        for part in CHECKPOINTED
        if cfg.get(part, {}).get("gradient_checkpointing", False) != (part in recomputed)
    ]


def compares(cfg: Mapping[str, Any]) -> bool:
    """Whether a loss of stage 1 compares the samples of a batch with each other."""
    return cfg["stage"] == "stage1" and any(cfg["loss"]["weights"][n] for n in ("itc", "itm"))


def describe(cfg: Mapping[str, Any], advice: Advice) -> list[str]:
    """What to paste, and what it means."""
    plan, before = advice.plan, batch_plan(cfg, advice.plan.world_size).contrastive
    lines = [
        f"recommended: {' '.join(advice.overrides) or 'no override: it fits as it is'}",
        f"  {plan}",
    ]
    if plan.parts > 1 and not cfg["loss"]["itc"]["cache"]:
        lines.append(
            f"  without loss.itc.cache=true contrast would compare {plan.size // plan.parts} "
            f"samples in place of {plan.contrastive}"
        )
    if compares(cfg) and plan.contrastive != before:
        lines.append(
            f"  as configured contrast compares {before} samples; to keep that, set batch.size and "
            "batch.accumulate yourself"
        )
    return lines
