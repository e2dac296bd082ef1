"""Running sums of a step's metrics, kept on the device and read every few steps."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from blip2_train import losses
from blip2_train.distributed import World, all_reduce_sum
from blip2_train.training.objectives import LossConfig

LOSSES = ("loss", "loss_itc", "loss_itm", "loss_lm")
ITM_COUNTS = ("match_right", "match", "no_match_right", "no_match", "no_negative")


class Meter:
    """Sums losses and matching counts without waiting for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, out: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds one contrastive batch's results.

        Args:
            out: from `stage1_step`.
            weight: of its losses in the mean.
        """
        values = {name: out[name].detach().double() * weight for name in LOSSES if name in out}
        values["weight"] = torch.full_like(values["loss"], weight)
        if "itm_logits" in out:
            values |= _matching_counts(out)
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self, world: World) -> dict[str, float]:
        """Means over all ranks since the last reading, and starts anew: waits for the device.

        Returns:
            `loss*`, and where matching is trained `itm_accuracy`, `itm_accuracy_match`,
            `itm_accuracy_no_match` (in [0, 1]) and `itm_without_negative` (rows that had none).
        """
        if not self.sums:
            return {}
        names = list(self.sums)
        packed = torch.stack([self.sums[name].double() for name in names])
        total = dict(zip(names, all_reduce_sum(packed, world).tolist(), strict=True))
        self.sums = {}
        metrics = {name: total[name] / total["weight"] for name in LOSSES if name in total}
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


def chance_levels(config: LossConfig, contrastive: float, vocabulary: int) -> dict[str, float]:
    """What each loss is for a model that learned nothing from its input, nats.

    Args:
        config: the objectives.
        contrastive: samples that are compared with each other (N).
        vocabulary: classes of captioning (V).
    """
    levels = {
        "loss_itc": math.log(contrastive),
        "loss_itm": losses.itm_prior(),
        "loss_lm": math.log(vocabulary),
    }
    return {k: v for k, v in levels.items() if config.weights.get(k.removeprefix("loss_"))}


def floors(config: LossConfig, contrastive: int, vocabulary: int) -> dict[str, float]:
    """The lowest value each smoothed loss can reach, nats; arguments as in `chance_levels`."""
    levels = {
        "loss_itc": losses.smoothing_floor(contrastive, config.itc.smoothing),
        "loss_itm": 0.0,
        "loss_lm": losses.smoothing_floor(vocabulary, config.lm.smoothing),
    }
    return {k: v for k, v in levels.items() if config.weights.get(k.removeprefix("loss_"))}


def describe_losses(
    metrics: Mapping[str, float], chance: Mapping[str, float], floor: Mapping[str, float]
) -> str:
    """One line: every loss beside its chance level and floor; says so where one sits at chance."""
    parts = []
    for name, level in chance.items():
        if name not in metrics:
            continue
        note = f"chance {level:.4g}, floor {floor[name]:.3g}"
        if abs(metrics[name] - level) < 0.01:
            note = f"AT CHANCE {level:.4g}: nothing learned from the input yet"
        parts.append(f"{name.removeprefix('loss_')} {metrics[name]:.4f} ({note})")
    if "itm_accuracy" in metrics:
        parts.append(
            f"itm acc {metrics['itm_accuracy']:.3f} (match {metrics['itm_accuracy_match']:.2f}, "
            f"no match {metrics['itm_accuracy_no_match']:.2f}, chance 0.667)"
        )
    return "  ".join(parts)
