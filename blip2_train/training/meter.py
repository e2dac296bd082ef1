"""Running sums of a step's metrics, kept on the device and read every few steps."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from blip2_train.distributed import World, all_reduce_sum

ITM_COUNTS = ("match_right", "match", "no_match_right", "no_match", "no_negative")


class Meter:
    """Sums losses and matching counts without waiting for the device.

    Args:
        parts: losses beside the total that are summed ("loss_itc", ...); the same on every rank,
            also on one that has added nothing. With "loss_itm" matching is counted, too.
    """

    def __init__(self, parts: Iterable[str]) -> None:
        on = tuple(parts)
        self.losses = ("loss", *on)
        self.names = (*self.losses, "weight", *(ITM_COUNTS if "loss_itm" in on else ()))
        self.sums: Tensor | None = None

    def add(self, out: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds one contrastive batch's results.

        Args:
            out: of a step; `loss` and its parts, scalars.
            weight: of its losses in the mean.
        """
        values = {name: out[name].detach().double() * weight for name in self.losses}
        values["weight"] = torch.full_like(values["loss"], weight)
        if "itm_logits" in out:
            values |= _matching_counts(out)
        packed = torch.stack([values[name] for name in self.names])
        self.sums = packed if self.sums is None else self.sums + packed

    def read(self, world: World, device: torch.device) -> dict[str, float]:
        """Means over all ranks since the last reading, and starts anew: waits for the device.

        All ranks call it, also those that added nothing.

        Args:
            world: the ranks.
            device: where sums are kept.

        Returns:
            `loss*`, and where matching is trained `itm_accuracy`, `itm_accuracy_match`,
            `itm_accuracy_no_match` (in [0, 1]) and `itm_without_negative` (rows that had none);
            NaN where no rank added anything.
        """
        sums = self.sums
        if sums is None:
            sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.sums = None
        total = dict(zip(self.names, all_reduce_sum(sums, world).tolist(), strict=True))
        if not total["weight"]:
            return dict.fromkeys(self.losses, math.nan)
        metrics = {name: total[name] / total["weight"] for name in self.losses}
        if "match" in total:
            right = total["match_right"] + total["no_match_right"]
            metrics["itm_accuracy"] = right / max(1.0, total["match"] + total["no_match"])
            metrics["itm_accuracy_match"] = total["match_right"] / max(1.0, total["match"])
            metrics["itm_accuracy_no_match"] = total["no_match_right"] / max(1.0, total["no_match"])
            metrics["itm_without_negative"] = total["no_negative"]
        return metrics


def _matching_counts(out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    right = out["itm_logits"].argmax(dim=1) == out["itm_labels"]
    match = out["itm_labels"] == 1
    counts = ~match & (out["itm_row_weight"] > 0)
    values = (right & match, match, right & counts, counts, ~out["has_negative"])
    return {name: value.sum().double() for name, value in zip(ITM_COUNTS, values, strict=True)}


class Level(NamedTuple):
    """Between which values a loss moves, nats.

    Attributes:
        chance: of a model that learned nothing from its input.
        floor: the lowest there is; above 0 where targets are smoothed.
    """

    chance: float
    floor: float


def describe_losses(metrics: Mapping[str, float], levels: Mapping[str, Level]) -> str:
    """One line: every loss beside its chance level and floor; says so where one sits at chance."""
    parts = []
    for name, level in levels.items():
        if name not in metrics:
            continue
        note = f"chance {level.chance:.4g}, floor {level.floor:.3g}"
        if abs(metrics[name] - level.chance) < 0.01:
            note = f"AT CHANCE {level.chance:.4g}: nothing learned from the input yet"
        parts.append(f"{name.removeprefix('loss_')} {metrics[name]:.4f} ({note})")
    if "itm_accuracy" in metrics:
        parts.append(
            f"itm acc {metrics['itm_accuracy']:.3f} (match {metrics['itm_accuracy_match']:.2f}, "
            f"no match {metrics['itm_accuracy_no_match']:.2f}, chance 0.667)"
        )
    return "  ".join(parts)
