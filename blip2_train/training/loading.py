"""A run's model, loaded again from its folder or a checkpoint file, and measured on any split."""

import contextlib
import importlib
import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from blip2_train.checkpoint import io
from blip2_train.config import batch_plan, flatten, plan_batch, trains_tower
from blip2_train.data.language import tokenizer_digest
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World
from blip2_train.errors import UserError
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.retrieval import chunks
from blip2_train.models import int8 as int8_weights
from blip2_train.models.vision import VisionTower
from blip2_train.training.checkpointing import load_trained
from blip2_train.training.fit import STAGES
from blip2_train.training.meter import Level
from blip2_train.training.stage import Stage
from blip2_train.training.validation import Evaluator, Findings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INT8_PARTS = ("qformer", "language_model")
KINDS = ("stage1", "stage2", "clip")
# The groups that build the parts of a model, and their classes.
CLASSES = {
    "vision": "blip2_train.models.vision.VisionTower",
    "qformer": "blip2_train.models.qformer.QFormer",
    "language_model": "blip2_train.models.language.LanguageModel",
    "image_encoder": "blip2_train.models.clip.ImageEncoder",
    "text_encoder": "blip2_train.models.clip.TextEncoder",
}
# The groups that a model cannot be built without.
GROUPS = {
    "stage1": ("vision", "qformer", "model", "text", "loss", "data", "run"),
    "stage2": ("vision", "qformer", "language_model", "model", "text", "data", "run"),
    "clip": ("image_encoder", "text_encoder", "model", "text", "data", "run"),
}
# Keys that may name a file or folder.
PLACES = [
    ("vision", "weights"), ("text", "tokenizer"), ("language_model", "name"),
    ("language_model", "tokenizer"),
]  # fmt: skip


def find(path_or_run: str | Path) -> Path:
    """The checkpoint that is meant: the file itself, or the newest one of a run's folder.

    All of it is read once, so that a damaged one is known.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path_or_run)
    if path.is_dir():
        inner = path / "checkpoints"
        found = io.newest_valid(inner if inner.is_dir() else path, rename=False)
        if found is None:
            raise UserError(
                f"{path} holds no run with a checkpoint; train it first, or make one of another "
                "model with blip2-convert"
            )
        return found
    if not path.is_file():
        raise UserError(f"there is no checkpoint and no run {path}; give the path of one of them")
    if reason := io.damage(path):
        raise UserError(f"checkpoint {path} is damaged ({reason}); give another one")
    return path


def load(
    path_or_run: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: str | torch.dtype | None = None,
    int8: bool | Collection[str] = False,
    changes: Mapping[str, Any] | None = None,
) -> Blip2:
    """A trained model to use: see `blip2_train.load`, which this is."""
    path = find(path_or_run)
    content = io.load(path, checked=True)
    return from_checkpoint(path, content, device, dtype=dtype, int8=int8, changes=changes or {})


def from_checkpoint(
    path: Path,
    content: Mapping[str, Any],
    device: str | torch.device,
    *,
    dtype: str | torch.dtype | None,
    int8: bool | Collection[str],
    changes: Mapping[str, Any],
) -> Blip2:
    """The model of a checkpoint that was read; arguments as of `blip2_train.load`."""
    where, wanted = _device(device), _dtype(dtype)
    cfg = changed(_config(content, path), changes)
    if cfg["stage"] not in KINDS:
        raise UserError(
            f"{path} is of kind {cfg['stage']}, which sees no images; give the checkpoint of a "
            f"{', '.join(KINDS[:-1])} or {KINDS[-1]} run"
        )
    parts = _int8_parts(int8, cfg["stage"])
    if "language_model" in parts and cfg["language_model"].get("quantization") is None:
        cfg["language_model"]["quantization"] = "torchao_int8"
    if wanted is not None and "language_model" in cfg:
        cfg["language_model"]["dtype"] = str(wanted).removeprefix("torch.")
    stage, model = build(path, content, cfg, where, wanted)
    if "qformer" in parts:
        int8_weights.quantize_linears(model.qformer)
    size = stage.image_size(model)
    assert size is not None, "these kinds see images"
    return Blip2(
        kind=cfg["stage"],
        cfg=cfg,
        model=model,
        device=where,
        step=content["step"],
        digest=io.identity(path),
        image_size=size,
        tokenizer=getattr(stage, "tokenizer", None),
        language=getattr(stage, "text", None),
        dtype=wanted or torch.float32,
        path=path,
    )


def build(
    path: Path,
    content: Mapping[str, Any],
    cfg: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> tuple[Stage, Any]:
    """The stage of a checkpoint, and its model with the checkpoint's weights.

    Args:
        path: of the checkpoint.
        content: of that file.
        cfg: its configuration, or one that differs in nothing but places and precision.
        device: where the model goes.
        dtype: that the frozen tower is stored in; None: as configured.

    Returns:
        The stage, and its model in evaluation mode, without gradients.

    Raises:
        UserError: the weights do not fit, or a frozen part is not the one of the training.
    """
    if trains_tower(cfg):  # the checkpoint has its weights; those it began with may be gone
        cfg = {**cfg, "vision": {**cfg["vision"], "weights": "random"}}
    stage = STAGES[cfg["stage"]](cfg)
    model = stage.build_model(device=device if device.type != "cpu" else None)
    _check_parts(stage, model, content, path)
    load_trained(model, content["model"], stage.frozen_prefixes, path)
    model.requires_grad_(False)
    model.eval()
    model.to(device)
    if isinstance(vision := getattr(model, "vision", None), VisionTower):
        if dtype is None:
            vision.convert()  # the features that it was trained with
        else:
            vision.tower.to(dtype)
    return stage, model


def changed(cfg: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values of some keys.

    Args:
        cfg: is changed.
        changes: {dotted key, or nested: value}.

    Raises:
        UserError: there is no such key.
    """
    known = flatten(cfg)
    for key, value in flatten(changes).items():
        if key not in known:
            raise UserError(f"changes: the checkpoint's configuration has no {key}")
        *parents, last = key.split(".")
        inner = cfg
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return cfg


def load_run(folder: Path, changes: Mapping[str, Any] | None = None) -> tuple[Stage, Any]:
    """The stage and the model of a run, with the weights of its newest checkpoint.

    Args:
        folder: of the run.
        changes: of the configuration's `validation` keys, for `evaluate`.

    Returns:
        The stage, and its model on the CPU, in evaluation mode.

    Raises:
        UserError: the folder holds no run, or no checkpoint that can be read.
    """
    path = find(folder)
    content = io.load(path, checked=True)
    cfg = _config(content, path)
    cfg["validation"] |= changes or {}
    return build(path, content, cfg, torch.device("cpu"))


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


def configuration(text: Any, path: Path, kinds: Collection[str] = KINDS) -> dict[str, Any]:
    """The configuration that a file remembers, from which nothing is built but classes of ours.

    Args:
        text: YAML.
        path: of the file.
        kinds: of models that are to be built, whose groups must be there.

    Raises:
        UserError: it is none of a run of ours, or names something else to build.
    """
    try:
        cfg = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError as error:
        raise UserError(f"{path} holds no configuration of a run") from error
    if not isinstance(cfg, dict):
        raise UserError(f"{path} holds no configuration of a run")
    cfg = {"stage": "stage1", **cfg}  # 0.1 knew no other stage
    check_classes(cfg)
    groups = GROUPS[cfg["stage"]] if cfg["stage"] in kinds else ()
    if lacking := [name for name in groups if not isinstance(cfg.get(name), dict)]:
        raise UserError(f"the configuration in {path} has no {lacking[0]}")
    return cfg


def check_classes(cfg: Mapping[str, Any]) -> None:
    """Refuses to build what a file from elsewhere names and nobody here knows: it could run code.

    Parts of models may be of any `nn.Module` of this package, or of one that whoever calls this has
    imported.

    Raises:
        UserError: a part of the model is of another class, or there is an object, or a place that
            could become one, among the values.
    """
    for key, value in _entries(cfg):
        group, _, last = key.partition(".")
        if last == "_target_" and group in CLASSES:
            if value != CLASSES[group] and not _is_known_module(value):
                raise UserError(
                    f"the configuration builds {group} by {value}, and not by {CLASSES[group]}; if "
                    "that class is yours, import its module first"
                )
        elif re.search(r"(^|\.)_\w+_($|\.)", key):
            raise UserError(f"the configuration has {key}, which would build an object")
        elif isinstance(value, str) and "${" in value:
            raise UserError(f"the configuration has {key}={value}, and a run's is resolved")
    for group in CLASSES.keys() & cfg.keys():
        if isinstance(cfg[group], Mapping) and "_target_" not in cfg[group]:
            raise UserError(f"the configuration does not say {group}._target_")


def _is_known_module(target: Any) -> bool:
    """Whether it names a torch module of this package, or one that the program has imported."""
    module, _, name = str(target).rpartition(".")
    if module.startswith("blip2_train."):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values with their dotted keys, also those inside of lists."""
    if isinstance(value, Mapping):
        inner = [(str(name), part) for name, part in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(str(number), part) for number, part in enumerate(value)]
    else:
        inner = []
    if not inner:
        yield key, value
    for name, part in inner:
        yield from _entries(part, f"{key}.{name}" if key else name)


def _config(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    cfg = configuration(content.get("config"), path)
    relocate(cfg, path.parent.parent if path.parent.name == "checkpoints" else path.parent)
    return cfg


def _check_parts(stage: Stage, model: Any, content: Mapping[str, Any], path: Path) -> None:
    """Compares frozen parts and tokenizers with those of the training, by their digests."""
    here = {part: identity["digest"] for part, identity in stage.frozen_parts(model).items()}
    here |= {part: tokenizer_digest(t) for part, t in stage.tokenizers().items()}
    for part, digest in here.items():
        saved = content.get("frozen", {}).get(part)
        if saved is not None and saved["digest"] != digest:
            name = saved.get("name", "")
            raise UserError(
                f"the {part} here is not the one that {path} was trained with"
                f"{f' ({name})' if name else ''}; `changes` can name the right one, such as "
                "{vision.weights: FILE}"
            )


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device} is none; give cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU; give device=cpu")
    return found


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name in DTYPES:
        return DTYPES.get(name)
    raise UserError(f"dtype={dtype} must be {' or '.join(DTYPES)}, or null")


def _int8_parts(int8: bool | Collection[str], kind: str) -> set[str]:
    there = {"stage1": INT8_PARTS[:1], "stage2": INT8_PARTS, "clip": ()}[kind]
    if not int8:
        return set()
    parts = set(there) if int8 is True else {int8} if isinstance(int8, str) else set(int8)
    if not parts <= set(there) or not parts:
        raise UserError(
            f"int8={', '.join(sorted(parts)) or 'true'}: of a {kind} model "
            f"{' and '.join(there) or 'no part'} can have weights of 8 bits"
        )
    # torch warns of every enum that torchao registers when it is imported
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    int8_weights.check_package()
    return parts


def relocate(cfg: dict[str, Any], folder: Path) -> None:
    """Finds the files of a run again that was moved with its folder.

    Of `vision.weights`, the tokenizer and the language model, what is named by a path where nothing
    is any more, and stands in the folder under its last name, is taken from there.

    Args:
        cfg: of the run, changed in place.
        folder: of the run.
    """
    for group, key in PLACES:
        place = (cfg.get(group) or {}).get(key)
        if isinstance(place, str) and "/" in place and not Path(place).exists():
            moved = folder / Path(place).name
            if moved.exists():
                cfg[group][key] = str(moved)
