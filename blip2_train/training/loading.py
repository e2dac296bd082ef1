"""A run's model, loaded again from its folder, and measured on any split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from blip2_train.checkpoint import io
from blip2_train.config import batch_plan, plan_batch
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World
from blip2_train.errors import UserError
from blip2_train.evaluation.retrieval import chunks
from blip2_train.models.vision import VisionTower
from blip2_train.training.checkpointing import load_trained
from blip2_train.training.fit import STAGES
from blip2_train.training.meter import Level
from blip2_train.training.stage import Stage
from blip2_train.training.validation import Evaluator, Findings

# Keys that may name a file or folder.
PLACES = [
    ("vision", "weights"), ("text", "tokenizer"), ("language_model", "name"),
    ("language_model", "tokenizer"),
]  # fmt: skip


def load_run(folder: Path, changes: Mapping[str, Any] | None = None) -> tuple[Stage, Any]:
    """The stage and the model of a run, with the weights of its newest checkpoint.

    Args:
        folder: of the run, with `config.yaml` and `checkpoints/`.
        changes: of the configuration's `validation` keys, for `evaluate`.

    Returns:
        The stage, and its model on the CPU, in evaluation mode.

    Raises:
        UserError: the folder holds no run, or no checkpoint that can be read.
    """
    path = io.newest_valid(folder / "checkpoints")
    if path is None:
        raise UserError(f"{folder} holds no run with a checkpoint; train it first")
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    relocate(cfg, folder)
    cfg["validation"] |= changes or {}
    stage = STAGES[cfg["stage"]](cfg)
    model = stage.build_model()
    if isinstance(vision := getattr(model, "vision", None), VisionTower):
        vision.convert()  # the features that it was trained with
    load_trained(model, io.load(path)["model"], stage.frozen_prefixes, path)
    model.requires_grad_(False)
    model.eval()
    return stage, model


@torch.no_grad()
def evaluate(
    stage: Stage, model: Any, images: EvalStream, *, batch_size: int
) -> tuple[Findings, Evaluator]:
    """Measures a model on a split, as validation does, on this process alone.

    Args:
        stage: from `load_run`, as is the model.
        model: in evaluation mode.
        images: of the split.
        batch_size: images that losses compare with each other.

    Returns:
        What was found, and the evaluator, which can be asked for captions.
    """
    module = stage.build_module(model, plan_batch(batch_size, 1, 1))
    evaluator = stage.build_evaluator(module, images)
    collate = stage.collate_eval()
    evaluator.start()
    for number, part in enumerate(chunks(len(images), batch_size)):
        batch = collate([images[item] for item in range(part.start, part.stop)])
        if batch["keys"]:
            evaluator.add(number, batch)
    return evaluator.finish(World()), evaluator


def loss_levels(stage: Stage, model: Any) -> dict[str, Level]:
    """Chance and floor of each loss of a run's training batches.

    Args:
        stage: from `load_run`, as is the model.
        model: of the run.
    """
    batch = batch_plan(stage.cfg, 1)
    return stage.build_module(model, batch).levels(batch.contrastive)


def relocate(cfg: dict[str, Any], folder: Path) -> None:
    """Finds the files of a run again that was moved with its folder.

    Of `vision.weights`, the tokenizer and the language model, what is named by a path where nothing
    is any more, and stands in the folder under its last name, is taken from there.

    Args:
        cfg: of the run, changed in place.
        folder: of the run.
    """
    for group, key in PLACES:
        place = cfg.get(group, {}).get(key)
        if isinstance(place, str) and "/" in place and not Path(place).exists():
            moved = folder / Path(place).name
            if moved.exists():
                cfg[group][key] = str(moved)
