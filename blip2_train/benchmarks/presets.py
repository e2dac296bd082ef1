"""What a benchmark of a model measures if nothing else is said, where, and what its record says."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blip2_train.benchmarks.machine import processor, versions
from blip2_train.config import to_plain, trains_tower
from blip2_train.errors import UserError
from blip2_train.train import compose

# A narrow Q-Former on image tokens like ViT-g's, a quarter as wide: for processors.
SMALL = (
    "vision.dtype=float32",
    "+vision.options.embed_dim=352",
    "+vision.options.num_heads=4",
    "+vision.options.depth=3",
    "qformer.hidden_size=256",
    "qformer.num_layers=6",
    "qformer.num_heads=4",
    "qformer.intermediate_size=1024",
    "qformer.dropout=0",
    "trainer.precision=32-true",
)


@dataclass(frozen=True)
class Preset:
    """A configuration of `blip2-train` to measure.

    Attributes:
        experiment: of `conf/experiment`.
        batch: samples.
        overrides: of the experiment.
    """

    experiment: str
    batch: int
    overrides: tuple[str, ...] = ()

    def compose(self, overrides: Sequence[str], *fixed: str) -> dict[str, Any]:
        """The resolved configuration.

        Args:
            overrides: further `key=value`.
            fixed: those that nobody can change, last of all.

        Raises:
            UserError: an impossible configuration.
        """
        words = [f"experiment={self.experiment}", *self.overrides, *overrides, *fixed]
        cfg = to_plain(compose(words))
        if trains_tower(cfg):
            raise UserError(
                "vision.trainable=true: steps are measured apart from those of a frozen tower; set "
                "vision.trainable=false, or ask blip2-benchmark fit for memory and arithmetic"
            )
        return cfg


def find_device(word: str) -> torch.device:
    """The device of "cpu", "cuda" or "auto", which is the GPU where there is one.

    Raises:
        UserError: there is no such device.
    """
    if word == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; take --device cpu")
    return torch.device("cuda" if word != "cpu" and torch.cuda.is_available() else "cpu")


def record_head(
    name: str, device: torch.device, overrides: Sequence[str], *packages: str
) -> dict[str, Any]:
    """What every record begins with.

    Args:
        name: of what is measured.
        device: that computes.
        overrides: of the experiment.
        packages: whose versions matter, besides ours and torch.
    """
    return {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "versions": versions("blip2-train", "torch", *packages),
        "overrides": list(overrides),
    }
