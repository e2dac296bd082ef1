"""What the benchmarks of training steps share: ours and the reference's in turn, on one device.

A stage derives its `Bench` from `StepBench` and says what a model, a batch and a step of each side
are. Both sides take the same random weights, images and captions, round by round. Before anything
is timed their losses and gradients are compared, in float32 without dropout.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.benchmarks.clock import Clock
from blip2_train.benchmarks.fed import check_data, fed_table, steps_in_a_row
from blip2_train.benchmarks.sides import OURS, SIDES, TEXTBOOK, ratios, table
from blip2_train.models.cached_tower import CachedTower, pack
from blip2_train.models.counting import HostReads, saved_bytes, stored_bytes
from blip2_train.models.vision import VisionTower
from blip2_train.training.compiling import compile_blocks, wants_compilation
from blip2_train.training.fit import STAGES
from blip2_train.training.monitor import matmul_ceiling
from blip2_train.training.optimizer import parameter_groups

CAPTIONS = (8, 26)  # tokens of a caption, drawn uniformly
COMPARED = 4  # samples whose losses and gradients are compared
WARM_UP = 2  # rounds that are not measured
TOLERANCE = {"loss": 1e-4, "gradient": 1e-3}  # of a loss; of a gradient's largest element

Mark = Callable[[str], None]


def run_steps(
    bench: StepBench,
    head: dict[str, Any],
    rounds: int,
    *,
    loader: bool,
    parts: Callable[[], dict] | None = None,
) -> list[dict[str, Any]]:
    """Compare, measure and print a table.

    Args:
        bench: of a stage.
        head: what the record begins with.
        rounds: steps of each side that are measured.
        loader: feed steps in a row from the configuration's data, not from memory.
        parts: gives seconds of parts of our forward pass.

    Returns:
        One record.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    if loader:
        check_data(bench)  # before anything takes long
    with console.status("comparing losses and gradients"):
        record = {**head, "shapes": bench.shapes(), **bench.compare()}
    with console.status("measuring"):
        sides = bench.measure(rounds)
    if parts is not None:
        record["parts"] = parts()
    record |= {"ours": sides[OURS], "baseline": sides[TEXTBOOK]}
    record |= ratios(sides)
    with console.status("measuring steps in a row"):
        record["in_a_row"] = steps_in_a_row(bench, rounds, loader=loader)
    console.print(table(record))
    console.print(fed_table(record["in_a_row"]))
    return [record]


class StepBench(abc.ABC):
    """Model, optimizers and batches of both sides.

    Args:
        cfg: resolved configuration of a training.
        batch: samples.
        device: that computes.

    Attributes:
        stage: of the configuration.
        model: with a frozen tower `vision`, on the device and in training mode.
        tolerance: within which both sides must agree.
        counted: samples whose arithmetic is counted, at most.
    """

    tolerance = TOLERANCE
    counted = 4

    def __init__(self, cfg: dict[str, Any], batch: int, device: torch.device) -> None:
        self.cfg, self.batch, self.device = cfg, batch, device
        self.stage = STAGES[cfg["stage"]](cfg)
        self.model: Any = self.build_model().to(device).train()
        # the reference's computes as it is, whatever ours does
        self.towers = dict.fromkeys(SIDES, self.model.vision)
        if self.model.vision.precision != "native" and isinstance(self.model.vision, VisionTower):
            self.towers[TEXTBOOK] = copy.deepcopy(self.model.vision)
            self.model.vision.convert()
        if wants_compilation(cfg["trainer"], cuda=device.type == "cuda"):
            compile_blocks(self.model)
        settings = cfg["optimizer"]
        adamw = functools.partial(
            torch.optim.AdamW,
            lr=1e-5,
            betas=tuple(settings["betas"]),
            eps=settings["eps"],
        )
        groups = functools.partial(parameter_groups, self.model, settings["weight_decay"])
        # the reference takes torch's default: a loop over parameters on CPUs, foreach on GPUs
        self.optimizers = {OURS: adamw(groups(), fused=True), TEXTBOOK: adamw(groups())}

    # -- what a stage says ---------------------------------------------------------------------

    @abc.abstractmethod
    def build_model(self) -> Any:
        """With random weights; nothing is downloaded."""

    @abc.abstractmethod
    def shapes(self) -> dict[str, Any]:
        """Of the batch and the model; at least `batch` and `precision`."""

    @abc.abstractmethod
    def made_up(self, samples: int, seed: int) -> dict[str, Any]:
        """A random batch on the device, with images uint8 [B, 3, S, S]."""

    @abc.abstractmethod
    def step(
        self, side: str, features: Tensor, batch: dict[str, Any], mark: Mark
    ) -> dict[str, Tensor]:
        """From features to the losses of one side, in the precision around; marks its phases."""

    @abc.abstractmethod
    def trained_flops(self, side: str, features: Tensor, batch: dict[str, Any]) -> dict[str, int]:
        """Operations of forward and backward from features, by part, none counted twice."""

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Frozen parts that a step runs have float32 weights inside."""
        yield

    # -- one step ------------------------------------------------------------------------------

    def features(self, side: str, batch: dict[str, Any]) -> Tensor:
        """The frozen tower's."""
        return tower_features(self.towers[side], side, batch["image"])

    def losses(
        self, side: str, features: Tensor, batch: dict[str, Any], mark: Mark = lambda _: None
    ) -> dict[str, Tensor]:
        """From features to the total loss, in the precision of training."""
        with self.autocast():
            return self.step(side, features, batch, mark)

    def autocast(self) -> torch.autocast:
        """The precision of training."""
        half = self.cfg["trainer"]["precision"] == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    # -- what is compared ----------------------------------------------------------------------

    def compare(self) -> dict[str, Any]:
        """Losses and gradients of both sides, in float32, without dropout, and not compiled.

        That compiled blocks compute the same has tests of its own; here they would be compiled for
        a precision and a batch that nobody trains with.
        """
        batch = self.made_up(min(COMPARED, self.batch), seed=0)
        with torch.compiler.set_stance("force_eager"):
            features = self.features(OURS, batch).float()
        results = []
        eager = torch.compiler.set_stance("force_eager")
        with self.evaluating(), self.in_float32(), eager:
            for side in SIDES:
                self.model.zero_grad()
                out = self.step(side, features, batch, lambda _: None)
                out["loss"].backward()
                losses = {k: v.item() for k, v in out.items() if k.startswith("loss")}
                results.append((losses, self.gradients()))
            self.model.zero_grad()
        (ours, our_gradients), (theirs, their_gradients) = results
        loss = max(abs(ours[name] - value) for name, value in theirs.items())
        gradient = max(
            ((our_gradients[name] - value).abs().max() / value.abs().max()).item()
            for name, value in their_gradients.items()
        )
        return {
            "equal": loss < self.tolerance["loss"] and gradient < self.tolerance["gradient"],
            "largest_difference": {"loss": loss, "gradient": gradient},
        }

    def gradients(self) -> dict[str, Tensor]:
        """Of all parameters but the bias of keys, which no softmax notices."""
        return {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not name.endswith(".key.bias")
        }

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout is off inside."""
        self.model.eval()
        yield
        self.model.train()

    # -- what is measured ----------------------------------------------------------------------

    def measure(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Both sides in turn."""
        clocks = {side: Clock(self.device) for side in SIDES}
        for number in range(WARM_UP + rounds):
            batch = self.made_up(self.batch, seed=number)
            for side in SIDES:
                self.timed_step(side, batch, clocks[side])
                clocks[side].end(keep=number >= WARM_UP)
        ceiling = matmul_ceiling(self.device, self.cfg["trainer"]["precision"])
        return {side: self.summary(side, clocks[side], ceiling) for side in SIDES}

    def timed_step(self, side: str, batch: dict[str, Any], clock: Clock) -> None:
        """A whole training step."""
        clock.mark("start")
        features = self.features(side, batch)
        clock.mark("tower")
        self.losses(side, features, batch, clock.mark)["loss"].backward()
        clock.mark("backward")
        self.optimizers[side].step()
        self.optimizers[side].zero_grad()
        clock.mark("optimizer")

    def summary(self, side: str, clock: Clock, ceiling: float) -> dict[str, Any]:
        """Medians, and what does not depend on time."""
        seconds, cpu = clock.medians(), clock.cpu_medians()
        whole = sum(seconds.values())
        batch = self.made_up(self.batch, seed=0)
        features = self.features(side, batch)
        with self.evaluating():
            saved = saved_bytes(lambda: self.losses(side, features, batch), self.model.parameters())
        flops = self.flops(side)
        return {
            "samples_per_second": self.batch / whole,
            "samples_per_second_from_features": self.batch / (whole - seconds["tower"]),
            "seconds": seconds,
            "cpu_seconds": cpu,
            "gflop_per_sample": {part: count / 1e9 for part, count in flops.items()},
            "matmul_ceiling_tflops": ceiling / 1e12,
            "share_of_ceiling": sum(flops.values()) * self.batch / whole / ceiling,
            "saved_mib": saved / 2**20,
            "peak_memory_mib": self.peak_memory(side, batch),
            "host_waits": self.host_waits(side, batch),
        }

    def flops(self, side: str) -> dict[str, float]:
        """Floating-point operations of one sample, without what is computed twice."""
        samples = min(self.counted, self.batch)
        batch = self.made_up(samples, seed=0)
        tower = self.count(lambda: self.features(side, batch))
        trained = self.trained_flops(side, self.features(side, batch), batch)
        self.model.zero_grad()
        return {part: n / samples for part, n in {"tower": tower, **trained}.items()}

    def count(self, function: Callable[[], Any]) -> int:
        """Floating-point operations of a function, none of them made again for want of memory."""
        again = [
            m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False) is True
        ]
        for module in again:
            module.gradient_checkpointing = False
        flops = count_flops(function)
        for module in again:
            module.gradient_checkpointing = True
        return flops

    def peak_memory(self, side: str, batch: dict[str, Any]) -> float | None:
        """Of a step on a GPU, weights and optimizer included."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self.timed_step(side, batch, Clock(self.device))
        others = [o for name, o in self.optimizers.items() if name != side]
        states = [value for o in others for state in o.state.values() for value in state.values()]
        idle = stored_bytes(states) if others else 0
        return (torch.cuda.max_memory_allocated() - idle) / 2**20

    def host_waits(self, side: str, batch: dict[str, Any]) -> int:
        """Times that the host waits for the device within a step.

        On a CPU: that it would wait on a GPU. The optimizer is left out there, for it counts its
        steps on the host.
        """
        if self.device.type != "cuda":
            with HostReads() as reads:
                self.losses(side, self.features(side, batch), batch)["loss"].backward()
            self.model.zero_grad()
            return len(reads.names)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                self.timed_step(side, batch, Clock(self.device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in found)


def count_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of a function; compiled blocks run as they are written."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def random_images(tower: VisionTower | CachedTower, samples: int, seed: int) -> Tensor:
    """What the tower takes: pictures, or tokens of normal numbers as they are stored."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(tower, CachedTower):
        tokens = torch.randn(samples, tower.num_tokens, tower.width, generator=generator)
        return pack(tokens, tower.store)
    pixels = samples, 3, tower.image_size, tower.image_size
    return torch.randint(256, pixels, dtype=torch.uint8, generator=generator)


def tower_features(tower: VisionTower | CachedTower, side: str, image: Tensor) -> Tensor:
    """Features of images; the reference multiplies attention out and compiles nothing."""
    if side == OURS:
        return tower(image)
    with explicit_attention(tower), torch.compiler.set_stance("force_eager"):
        return tower(image)


def tower_name(tower: VisionTower | CachedTower) -> str:
    """In what a tower computes."""
    native = tower.precision == "native"
    return str(tower.dtype).removeprefix("torch.") if native else tower.precision


@contextlib.contextmanager
def explicit_attention(tower: nn.Module) -> Iterator[None]:
    """Inside, attention of timm's is softmax(Q K^T) V, each product in memory."""
    fused = [m for m in tower.modules() if getattr(m, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    yield
    for module in fused:
        module.fused_attn = True  # type: ignore[assignment]
