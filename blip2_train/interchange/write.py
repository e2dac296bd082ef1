"""Targets: a file of LAVIS, a run of ours. Hugging Face's folder is in `hf_folder.py`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from blip2_train import __version__
from blip2_train.checkpoint import io
from blip2_train.checkpoint.account import KeyAccount
from blip2_train.checkpoint.foreign import LAVIS_TOWER, TOWER, prefixed
from blip2_train.checkpoint.hf import OUR_LANGUAGE
from blip2_train.checkpoint.lavis import to_lavis, to_lavis_name
from blip2_train.checkpoint.tower_shape import shape_for_lavis
from blip2_train.checkpoint.towers import timm_to_lavis
from blip2_train.data.language import tokenizer_digest
from blip2_train.errors import UserError
from blip2_train.interchange.whole import Whole, tower_digest
from blip2_train.training.checkpointing import RunState


def write_lavis(whole: Whole, path: Path, *, trained_only: bool) -> KeyAccount:
    """Writes a file as LAVIS saves them.

    Args:
        whole: the model.
        path: of the new file.
        trained_only: without image tower and language model, as its pre-training leaves them out.

    Returns:
        What became of every weight.

    Raises:
        UserError: LAVIS cannot hold the image tower or the language model.
    """
    family = lavis_family(whole) if whole.language else "opt"
    account = to_lavis(whole.own, family, whole.cfg["qformer"]["max_positions"])
    if not trained_only:
        shape_for_lavis(whole.model.vision.tower, whole.model.vision.name)
        account.update(prefixed(timm_to_lavis(whole.tower), TOWER, LAVIS_TOWER))
        for name, value in whole.language.items():
            ours = OUR_LANGUAGE + name
            account.take(ours, to_lavis_name(ours, family), value)
    else:
        for name in whole.tower:
            account.drop(TOWER + name, "frozen part, left out as asked")
        for name in whole.language:
            account.drop(OUR_LANGUAGE + name, "frozen part, left out as asked")
    account.check("the model")
    io.save(path, {"model": account.state})
    return account


def lavis_family(whole: Whole) -> str:
    """The language model's, by LAVIS's names.

    Raises:
        UserError: LAVIS has no such model.
    """
    kind = whole.model.language_model.lm.config.model_type
    if kind not in ("opt", "t5"):
        raise UserError(
            f"LAVIS's BLIP-2 knows the language models OPT and T5, and this one is {kind}"
        )
    return kind


def write_ours(whole: Whole, work: Path, final: Path) -> KeyAccount:
    """Writes a run's configuration and its checkpoint of the source's step.

    Args:
        whole: the model; its frozen parts that came from the source are in `work` already.
        work: folder that is written.
        final: where `work` will be, which the configuration names.

    Returns:
        What became of every weight.
    """
    cfg = _moved(whole.cfg, f"{work}/", f"{final}/")
    cfg["run"] |= {"dir": str(final.parent), "name": final.name}
    if "init" in cfg:  # that of the checkpoint is in it
        cfg |= {"init": "random", "init_from": None}
    frozen = whole.stage.frozen_parts(whole.model)
    if "vision" in frozen:  # else it is stored itself
        frozen["vision"]["digest"] = tower_digest(whole)
    for name, tokenizer in whole.stage.tokenizers().items():
        frozen[name] = {"digest": tokenizer_digest(tokenizer)}
    state = RunState(step=whole.step, config=yaml.safe_dump(cfg, sort_keys=False), frozen=frozen)
    content: dict[str, Any] = {"format": io.FORMAT, "version": __version__, **vars(state)}
    content |= {"model": whole.trained, "optimizer": None}
    io.save(io.step_path(work / "checkpoints", whole.step), content)
    (work / "config.yaml").write_text(state.config, encoding="utf-8")
    account = KeyAccount()
    for name, value in whole.trained.items():
        account.take(name, name, value)
    return account


def _moved(value: Any, old: str, new: str) -> Any:
    """A copy of a configuration, with paths below a folder as they will be."""
    if isinstance(value, Mapping):
        return {key: _moved(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, old, new) for inner in value]
    if isinstance(value, str) and value.startswith(old):
        return new + value.removeprefix(old)
    return value


def publish(work: Path, final: Path) -> None:
    """Gives what was written its name, on the disk and whole.

    Raises:
        UserError: something has that name by now.
    """
    for path in [*work.rglob("*"), work] if work.is_dir() else [work]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():
        raise UserError(f"{final} exists by now; give another name, or delete it")
    work.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
