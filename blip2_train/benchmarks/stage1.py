"""A step of stage 1, ours and the reference's (`textbook.py`), in one run on one device.

Both take the same random weights, images and captions in turn, round by round. Before anything is
timed their losses and gradients are compared, in float32 without dropout.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.benchmarks.clock import Clock
from blip2_train.benchmarks.machine import processor, versions
from blip2_train.benchmarks.sides import OURS, SIDES, TEXTBOOK, ratios, table
from blip2_train.benchmarks.textbook import textbook_step
from blip2_train.config import to_plain
from blip2_train.data.batch import lm_targets, text_bucket, text_tokens
from blip2_train.distributed import World
from blip2_train.errors import UserError
from blip2_train.models.counting import HostReads, saved_bytes
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.train import compose
from blip2_train.training.compiling import compile_blocks, wants_compilation
from blip2_train.training.monitor import matmul_ceiling
from blip2_train.training.objectives import LossConfig, draw_uniform, stage1_step
from blip2_train.training.optimizer import parameter_groups
from blip2_train.training.stage1 import Stage1

CAPTIONS = (8, 26)  # tokens of a caption, drawn uniformly
COUNTED = 4  # samples whose arithmetic is counted, and whose gradients are compared
WARM_UP = 2  # rounds that are not measured
TOLERANCE = {"loss": 1e-4, "gradient": 1e-3}  # of a loss; of a gradient's largest element


@dataclass(frozen=True)
class Preset:
    """What is measured if nothing else is said.

    Attributes:
        experiment: of `conf/experiment`.
        batch: samples.
        overrides: of the experiment.
    """

    experiment: str
    batch: int
    overrides: tuple[str, ...] = ()


PRESETS = {
    # for processors: a narrow Q-Former on image tokens like ViT-g's, a quarter as wide
    "small": Preset(
        "stage1_vitg",
        16,
        (
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
        ),
    ),
    "vitl": Preset("stage1_vitl", 128),
    "vitg": Preset("stage1_vitg", 128),
}


def run(
    preset: str, batch: int | None, device: str, rounds: int, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """Measure and print a table.

    Args:
        preset: of `PRESETS`.
        batch: samples, None: the preset's.
        device: "cpu", "cuda" or "auto".
        rounds: steps of each side that are measured.
        overrides: further `key=value` of the configuration.

    Returns:
        One record.

    Raises:
        UserError: an impossible configuration or device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; take --device cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    found = PRESETS[preset]
    words = [f"experiment={found.experiment}", *found.overrides, *overrides]
    cfg = to_plain(compose([*words, "qformer.init=random", "vision.weights=random"]))
    bench = Bench(cfg, batch or found.batch, torch.device("cuda" if cuda else "cpu"))
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("comparing losses and gradients"):
        record = {
            "name": f"stage1 {preset}",
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if cuda else processor(),
            "threads": torch.get_num_threads(),
            "versions": versions("blip2-train", "torch", "timm", "torchao"),
            "overrides": [*found.overrides, *overrides],
            "shapes": bench.shapes(),
            **bench.compare(),
        }
    with console.status("measuring"):
        sides = bench.measure(rounds)
    record["parts"] = bench.parts()
    record |= {"ours": sides[OURS], "baseline": sides[TEXTBOOK]}
    record |= ratios(sides)
    console.print(table(record))
    return [record]


class Bench:
    """Model, optimizers and batches of both sides.

    Args:
        cfg: resolved configuration of a stage-1 training.
        batch: samples.
        device: that computes.
    """

    def __init__(self, cfg: dict[str, Any], batch: int, device: torch.device) -> None:
        self.cfg, self.batch, self.device = cfg, batch, device
        self.stage = Stage1(cfg)
        self.model: Blip2Stage1 = self.stage.build_model(shapes_only=True).to(device).train()
        if wants_compilation(cfg["trainer"], cuda=device.type == "cuda"):
            compile_blocks(self.model)
        self.loss = LossConfig({"itc": 1.0, "itm": 1.0, "lm": 1.0})
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

    def shapes(self) -> dict[str, Any]:
        """Of the batch and the model."""
        vision, qformer = self.model.vision, self.model.qformer
        return {
            "batch": self.batch,
            "tokens": vision.num_tokens,
            "width": vision.width,
            "hidden": qformer.hidden_size,
            "layers": len(qformer.layers),
            "queries": qformer.num_query_tokens,
            "vocabulary": qformer.word_embeddings.num_embeddings,
            "text": self.cfg["text"]["max_tokens"],
            "captions": list(CAPTIONS),
            "precision": self.cfg["trainer"]["precision"],
            "tower": str(vision.dtype).removeprefix("torch."),
        }

    # -- one step ------------------------------------------------------------------------------

    def made_up(self, samples: int, seed: int) -> dict[str, Any]:
        """Random images and captions of 8 to 26 tokens, on the device."""
        generator = torch.Generator().manual_seed(seed)
        settings, size = self.cfg["text"], self.model.vision.image_size
        longest = settings["max_tokens"]
        low, high = (min(length, longest) for length in CAPTIONS)
        lengths = torch.randint(low, high + 1, (samples,), generator=generator)
        mask = (torch.arange(longest) < lengths[:, None]).long()
        words = self.model.dec_token_id
        ids = torch.randint(1, words, (samples, longest), generator=generator) * mask
        image = torch.randint(256, (samples, 3, size, size), dtype=torch.uint8, generator=generator)
        uniform = draw_uniform(seed, 0, 0, samples, World())
        batch = {
            "image": image,
            "input_ids": ids,
            "attention_mask": mask,
            "image_id": torch.arange(samples),
            "text_index": text_tokens(mask),
            "lm_index": lm_targets(mask),
            "uniform": uniform,
        }
        moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
        text_length = text_bucket(int(lengths.max()), settings["bucket"], longest)
        return {**moved, "text_length": text_length}

    def features(self, side: str, batch: dict[str, Any]) -> Tensor:
        """The frozen tower's; the reference's multiplies attention out and compiles nothing."""
        if side == OURS:
            return self.model.vision(batch["image"])
        with explicit_attention(self.model.vision), torch.compiler.set_stance("force_eager"):
            return self.model.vision(batch["image"])

    def losses(self, side: str, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """From features to the total loss."""
        half = self.cfg["trainer"]["precision"] == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return self.step(side, features, batch)

    def step(self, side: str, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The same in the precision around."""
        function: Callable[..., dict[str, Tensor]] = stage1_step if side == OURS else textbook_step
        return function(self.model, features, batch, self.loss, uniform=batch["uniform"])

    # -- what is compared ----------------------------------------------------------------------

    def compare(self) -> dict[str, Any]:
        """Losses and gradients of both sides, in float32 and without dropout."""
        batch = self.made_up(min(COUNTED, self.batch), seed=0)
        features = self.features(OURS, batch).float()
        results = []
        with self.evaluating():
            for side in SIDES:
                self.model.zero_grad()
                out = self.step(side, features, batch)
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
            "equal": loss < TOLERANCE["loss"] and gradient < TOLERANCE["gradient"],
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
        loss = self.losses(side, features, batch)["loss"]
        clock.mark("forward")
        loss.backward()
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
        batch = self.made_up(COUNTED, seed=0)
        counts = {}
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            features = self.features(side, batch)
        counts["tower"] = counter.get_total_flops() / COUNTED
        head = self.model.qformer.lm_head
        head.gradient_checkpointing = False
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.losses(side, features, batch)["loss"].backward()
        head.gradient_checkpointing = True
        counts["qformer"] = counter.get_total_flops() / COUNTED
        self.model.zero_grad()
        return counts

    def peak_memory(self, side: str, batch: dict[str, Any]) -> float | None:
        """Of a step on a GPU, weights and optimizer included."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self.timed_step(side, batch, Clock(self.device))
        return torch.cuda.max_memory_allocated() / 2**20

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

    def parts(self) -> dict[str, float]:
        """Seconds of the parts of our forward pass, from a profile of one step."""
        batch = self.made_up(self.batch, seed=0)
        features = self.features(OURS, batch)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as trace:
            self.losses(OURS, features, batch)
        return {
            event.key: event.device_time_total / 1e6
            if self.device.type == "cuda"
            else event.cpu_time_total / 1e6
            for event in trace.key_averages()
            if event.is_user_annotation and "#" not in event.key
        }


@contextlib.contextmanager
def explicit_attention(tower: torch.nn.Module) -> Iterator[None]:
    """Inside, attention of timm's is softmax(Q K^T) V, each product in memory."""
    fused = [m for m in tower.modules() if getattr(m, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    yield
    for module in fused:
        module.fused_attn = True  # type: ignore[assignment]
