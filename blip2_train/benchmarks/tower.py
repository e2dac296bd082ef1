"""The frozen image tower alone, ours and as the reference runs it, in one run on one device.

Both have the same random weights and images, and normalise pixels themselves. Ours fuses attention
and is compiled where `trainer.compile` says; the reference's has each product of attention in
memory, and compiles nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from blip2_train.benchmarks.clock import Clock
from blip2_train.benchmarks.presets import SMALL, Preset, find_device, record_head
from blip2_train.benchmarks.sides import OURS, SIDES, TEXTBOOK, Row, comparison
from blip2_train.benchmarks.step import WARM_UP, count_flops, explicit_attention, tower_name
from blip2_train.models.counting import stored_bytes
from blip2_train.models.vision import VisionTower
from blip2_train.training.build import instantiate_group
from blip2_train.training.compiling import compile_blocks, wants_compilation
from blip2_train.training.float8 import LEAST_SIMILARITY
from blip2_train.training.monitor import matmul_ceiling

PRESETS = {
    "small": Preset("stage1_vitg", 16, SMALL),
    "vitl": Preset("stage1_vitl", 128),
    "vitg": Preset("stage1_vitg", 128),
}
OURS_ALONE = ("precision",)  # settings of the tower's arithmetic that the reference does not have
COUNTED = 2  # images whose arithmetic is counted


def run(
    preset: str, batch: int | None, device: str, rounds: int, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """Measure and print a table.

    Args:
        preset: of `PRESETS`.
        batch: images, None: the preset's.
        device: "cpu", "cuda" or "auto".
        rounds: passes of each side that are measured.
        overrides: further `key=value` of the configuration.

    Returns:
        One record.

    Raises:
        UserError: an impossible configuration or device.
    """
    found, where = PRESETS[preset], find_device(device)
    cfg = found.compose(overrides, "vision.weights=random")
    bench = Bench(cfg, batch or found.batch, where)
    words = [*found.overrides, *overrides]
    record = record_head(f"tower {preset}", where, words, "timm", "torchao")
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("measuring"):
        record |= {"shapes": bench.shapes()}
        sides = bench.measure(rounds)
        record |= {"cosine": bench.cosine()}  # of few images: after those that training has
    record |= {"ours": sides[OURS], "baseline": sides[TEXTBOOK]}
    speeds = [sides[side]["images_per_second"] for side in SIDES]
    record |= {
        "speedup": speeds[0] / speeds[1],
        "equal": record["cosine"]["mean"] >= LEAST_SIMILARITY,
    }
    console.print(table(record))
    return [record]


class Bench:
    """Two towers of the same weights.

    Args:
        cfg: resolved configuration of a training.
        batch: images.
        device: that computes.
    """

    def __init__(self, cfg: dict[str, Any], batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        settings = cfg["vision"]
        plain = {key: value for key, value in settings.items() if key not in OURS_ALONE}
        self.towers: dict[str, VisionTower] = {
            side: instantiate_group("vision", of_side).to(device)
            for side, of_side in ((OURS, settings), (TEXTBOOK, plain))
        }
        self.towers[OURS].convert()
        if wants_compilation(cfg["trainer"], cuda=device.type == "cuda"):
            compile_blocks(self.towers[OURS])

    def shapes(self) -> dict[str, Any]:
        """Of images and features."""
        tower = self.towers[OURS]
        return {
            "batch": self.batch,
            "image": tower.image_size,
            "tokens": tower.num_tokens,
            "width": tower.width,
            "tower": tower_name(tower),
        }

    def images(self, count: int, seed: int) -> Tensor:
        """Random pixels uint8 [B, 3, S, S]."""
        size = self.towers[OURS].image_size
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        return pixels.to(self.device)

    def features(self, side: str, images: Tensor) -> Tensor:
        """Of one side, [B, P, Dv]."""
        tower = self.towers[side]
        if side == OURS:
            return tower(images)
        with explicit_attention(tower):
            return tower(images)

    def cosine(self) -> dict[str, float]:
        """Between both sides' features of a token: mean and least of a few images."""
        images = self.images(min(COUNTED, self.batch), seed=0)
        ours, theirs = (self.features(side, images).double() for side in SIDES)
        found = F.cosine_similarity(ours, theirs, dim=-1)
        return {"mean": found.mean().item(), "least": found.min().item()}

    def measure(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Both sides in turn."""
        clocks = {side: Clock(self.device) for side in SIDES}
        for number in range(WARM_UP + rounds):
            images = self.images(self.batch, seed=number)
            for side in SIDES:
                clocks[side].mark("start")
                self.features(side, images)
                clocks[side].mark("tower")
                clocks[side].end(keep=number >= WARM_UP)
        half = self.towers[OURS].dtype == torch.bfloat16
        ceiling = matmul_ceiling(self.device, "bf16-mixed" if half else "32-true")
        return {side: self.summary(side, clocks[side], ceiling) for side in SIDES}

    def summary(self, side: str, clock: Clock, ceiling: float) -> dict[str, Any]:
        """Medians, and what does not depend on time."""
        seconds = clock.medians()["tower"]
        few = self.images(COUNTED, seed=0)
        flops = count_flops(lambda: self.features(side, few)) / COUNTED
        return {
            "images_per_second": self.batch / seconds,
            "seconds": seconds,
            "cpu_seconds": clock.cpu_medians().get("tower"),
            "gflop_per_image": flops / 1e9,
            "matmul_ceiling_tflops": ceiling / 1e12,
            "share_of_ceiling": flops * self.batch / seconds / ceiling,
            "peak_memory_mib": self.peak_memory(side),
        }

    def peak_memory(self, side: str) -> float | None:
        """Of a pass on a GPU, with the weights of this tower alone."""
        if self.device.type != "cuda":
            return None
        images = self.images(self.batch, seed=0)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.features(side, images)
        weights = stored_bytes(self.towers[side].state_dict().values())
        return (torch.cuda.max_memory_allocated() - before + weights) / 2**20


def table(record: dict[str, Any]) -> Table:
    """A record of `run` to look at."""
    ours, theirs, shapes = record["ours"], record["baseline"], record["shapes"]
    rows: list[Row] = [
        (name, ours[key], theirs[key], unit)
        for name, key, unit in (
            ("images per second", "images_per_second", ".1f"),
            ("seconds", "seconds", ".4f"),
            ("processor seconds", "cpu_seconds", ".4f"),
            ("GFLOP an image", "gflop_per_image", ".1f"),
            ("share of the matmul ceiling", "share_of_ceiling", ".1%"),
            ("peak memory, MiB", "peak_memory_mib", ".0f"),
        )
    ]
    cosine = record["cosine"]
    return comparison(
        f"{record['name']}: {shapes['batch']} images, {record['device']}, {shapes['tower']}",
        rows,
        f"cosine of both sides' features: {cosine['mean']:.6f}, the least {cosine['least']:.6f}",
    )
