"""Real steps of a training on a GPU, with random weights, to see whether they fit."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from typing import Any

import torch

from blip2_train.config import BatchPlan
from blip2_train.models.vision import VisionTower
from blip2_train.training.compiling import compile_blocks, wants_compilation
from blip2_train.training.fit import STAGES
from blip2_train.training.memory import ALONE, CONTEXT, Sketch, made_up_loss

MADE_UP = "blip2_train.benchmarks.stage2.MadeUpLanguageModel"  # drawn on the device
STEPS = 2  # the optimizer's state is there from the first one's end on


class Trial:
    """A training on a device, of random weights and made-up batches.

    Args:
        cfg: resolved and validated configuration; of a quantized language model with
            `weights: random`.
        sketch: of the same configuration.
        device: "cuda", or "cpu" where nothing is measured.
    """

    def __init__(self, cfg: Mapping[str, Any], sketch: Sketch, device: str = "cuda") -> None:
        self.cfg, self.device = cfg, device
        if "language_model" in cfg:
            cfg = {**cfg, "language_model": {**cfg["language_model"], "_target_": MADE_UP}}
        stage = STAGES[cfg["stage"]](cfg)
        model = stage.build_model(shapes_only=True, device=torch.device(device))
        if cfg["trainer"]["precision"] == "64-true":
            model.double()
        model.to(device)
        if isinstance(vision := getattr(model, "vision", None), VisionTower):
            vision.convert()
        self.stream = (
            torch.cuda.Stream() if device == "cuda" and cfg["trainer"]["overlap"] else None
        )
        trained = {name for name, p in sketch.model.named_parameters() if p.requires_grad}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.model: Any = model
        self.module = stage.build_module(model, ALONE).train()
        if wants_compilation(cfg["trainer"], cuda=device == "cuda"):
            compile_blocks(model)
        self.optimizer = self.module.configure_optimizers()

    def needs(self, plan: BatchPlan) -> float:
        """Bytes that a device must have for a step; infinite where this one has too little."""
        torch.cuda.reset_peak_memory_stats()
        fits = True
        try:
            for _ in range(STEPS):
                self.step(plan)
        except torch.OutOfMemoryError:
            fits = False
        # outside of `except`, where the traceback would hold the step's tensors
        taken = torch.cuda.max_memory_reserved()
        gc.collect()
        torch.cuda.empty_cache()
        return taken + CONTEXT if fits else math.inf

    def step(self, plan: BatchPlan) -> None:
        """Forward, backward, optimizer, with texts of `text.max_tokens`."""
        precision, longest = self.cfg["trainer"]["precision"], self.cfg["text"]["max_tokens"]
        made_up_loss(self.module, plan, precision, longest, self.device, self.stream).backward()
        self.module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # DDP's buckets stay
        with torch.no_grad():
            self.module.after_step()
