"""A step of stage 1, ours and the reference's (`textbook.py`), in one run on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from blip2_train.benchmarks.presets import SMALL, Preset, find_device, record_head
from blip2_train.benchmarks.sides import OURS
from blip2_train.benchmarks.step import (
    CAPTIONS,
    Mark,
    StepBench,
    random_images,
    run_steps,
    tower_name,
)
from blip2_train.benchmarks.textbook import textbook_step
from blip2_train.data.batch import lm_targets, text_bucket, text_tokens
from blip2_train.distributed import World
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.training.objectives import LossConfig, draw_uniform, stage1_step

PRESETS = {
    "small": Preset("stage1_vitg", 16, SMALL),
    "vitl": Preset("stage1_vitl", 128),
    "vitg": Preset("stage1_vitg", 128),
}


def run(
    preset: str,
    batch: int | None,
    device: str,
    rounds: int,
    overrides: Sequence[str],
    *,
    loader: bool = False,
) -> list[dict[str, Any]]:
    """Measure and print a table.

    Args:
        preset: of `PRESETS`.
        batch: samples, None: the preset's.
        device: "cpu", "cuda" or "auto".
        rounds: steps of each side that are measured.
        overrides: further `key=value` of the configuration.
        loader: feed steps in a row from the configuration's data, not from memory.

    Returns:
        One record.

    Raises:
        UserError: an impossible configuration or device.
    """
    found, where = PRESETS[preset], find_device(device)
    cfg = found.compose(overrides, "qformer.init=random", "vision.weights=random")
    bench = Bench(cfg, batch or found.batch, where)
    words = [*found.overrides, *overrides]
    head = record_head(f"stage1 {preset}", where, words, "timm", "torchao")
    return run_steps(bench, head, rounds, loader=loader, parts=bench.parts)


class Bench(StepBench):
    """See `StepBench`."""

    model: Blip2Stage1

    def build_model(self) -> Blip2Stage1:
        """Image tower and Q-Former with its three heads."""
        self.loss = LossConfig({"itc": 1.0, "itm": 1.0, "lm": 1.0})
        model: Blip2Stage1 = self.stage.build_model(shapes_only=True)
        return model

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
            "tower": tower_name(vision),
        }

    def made_up(self, samples: int, seed: int) -> dict[str, Any]:
        """Random images and captions of 8 to 26 tokens, on the device."""
        generator = torch.Generator().manual_seed(seed)
        settings = self.cfg["text"]
        longest = settings["max_tokens"]
        low, high = (min(length, longest) for length in CAPTIONS)
        lengths = torch.randint(low, high + 1, (samples,), generator=generator)
        mask = (torch.arange(longest) < lengths[:, None]).long()
        words = self.model.dec_token_id
        ids = torch.randint(1, words, (samples, longest), generator=generator) * mask
        uniform = draw_uniform(seed, 0, 0, samples, World())
        batch = {
            "image": random_images(self.model.vision, samples, seed),
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

    def step(
        self, side: str, features: Tensor, batch: dict[str, Any], mark: Mark
    ) -> dict[str, Tensor]:
        """Its only phase is `forward`."""
        function: Callable[..., dict[str, Tensor]] = stage1_step if side == OURS else textbook_step
        out = function(self.model, features, batch, self.loss, uniform=batch["uniform"])
        mark("forward")
        return out

    def trained_flops(self, side: str, features: Tensor, batch: dict[str, Any]) -> dict[str, int]:
        """All is the Q-Former's."""
        whole = self.count(lambda: self.losses(side, features, batch)["loss"].backward())
        return {"qformer": whole}

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
