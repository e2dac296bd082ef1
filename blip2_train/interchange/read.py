"""Sources: a checkpoint or run of ours, a LAVIS file, a folder of Hugging Face.

A foreign one is taken apart into what a run of ours is made of: the trained weights, a file of
timm weights of the image tower and a folder of the language model, where the source has them.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2_train.checkpoint import files, io
from blip2_train.checkpoint.account import KeyAccount
from blip2_train.checkpoint.foreign import TOWER, split, to_ours
from blip2_train.checkpoint.hf import OUR_LANGUAGE
from blip2_train.checkpoint.lavis import POSITIONS
from blip2_train.config import trains_tower
from blip2_train.errors import UserError
from blip2_train.interchange import language
from blip2_train.interchange.hf_config import apply_hf_config, eva_settings, stage_of
from blip2_train.interchange.tokenizers import kept_tokenizers
from blip2_train.interchange.whole import (
    CONVERTIBLE,
    Whole,
    build,
    check_dtypes,
    check_frozen_parts,
    fill,
)
from blip2_train.training.build import instantiate_group
from blip2_train.training.loading import check_classes, configuration, relocate

TOWER_FILE, LANGUAGE_FOLDER = "vision.safetensors", "language_model"
# What a source may lack, and what stands in its place.
OPTIONAL = {
    "qformer.lm_head.": "drawn at random: captions mean nothing before it is trained",
    "temp": "its initial value",
}


def read_ours(path: Path) -> Whole:
    """A checkpoint of ours, or the newest one of a run's folder.

    Raises:
        UserError: there is none, or a frozen part cannot be had or is another one.
    """
    folder = path if path.is_dir() else path.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    if path.is_dir():
        newest = io.newest_valid(path / "checkpoints", rename=False)  # others may be writing there
        if newest is None:
            raise UserError(f"{path} is no run with a checkpoint; is --from right?")
        path = newest
    elif path.is_file():
        what_it_is(path, files.OURS)
    content = io.load(path)
    cfg = configuration(content.get("config"), path, CONVERTIBLE)
    relocate(cfg, folder)
    start = cfg
    if trains_tower(cfg):  # the checkpoint has its weights; those it began with may be gone
        start = {**cfg, "vision": {**cfg["vision"], "weights": "random"}}
    whole = Whole(cfg, *build(start), step=content.get("step", 0))
    if not any(name.startswith(TOWER) for name in content["model"]):
        check_frozen_parts(whole, content.get("frozen", {}), path)
    fill(whole, content["model"], path)
    for name, value in content["model"].items():
        whole.account.take(name, name, value)
    check_dtypes(whole.account)
    return whole


def read_lavis(path: Path, cfg: dict[str, Any], work: Path) -> Whole:
    """A checkpoint of LAVIS.

    Args:
        path: of the file.
        cfg: configuration of the run that it would be of.
        work: empty folder, for the frozen parts that the file has.

    Raises:
        UserError: it is another file, or of another architecture.
    """
    contents = what_it_is(path, files.LAVIS)
    is_stage2 = any(name.startswith(("opt_proj.", "t5_proj.")) for name in contents.state)
    _check_stage(path, "stage2" if is_stage2 else "stage1", cfg)
    if is_stage2 and POSITIONS in contents.state:  # nothing else says it there
        cfg["qformer"]["max_positions"] = contents.state[POSITIONS].shape[-1]
    whole = _assemble(path, contents, cfg, work, functools.partial(language.config_of, cfg))
    if is_stage2:
        encoder = any(name.startswith("t5_proj.") for name in contents.state)
        if encoder != whole.model.language_model.is_encoder_decoder:
            raise UserError(
                f"{path} is made for {'T5' if encoder else 'OPT'}, and language_model.name="
                f"{cfg['language_model']['name']} is of the other kind"
            )
    return whole


def read_hf(path: Path, cfg: dict[str, Any] | None, work: Path) -> Whole:
    """A folder of `Blip2ForImageTextRetrieval` or `Blip2ForConditionalGeneration`.

    Args:
        path: of the folder.
        cfg: of the run that it would be of; its sizes come from config.json. None: as the folder
            remembers, where blip2-convert wrote it.
        work: empty folder, for the frozen parts.

    Raises:
        UserError: it is something else, or of an architecture that ours have not.
    """
    contents = what_it_is(path, files.HF)
    if not contents.config:
        raise UserError(f"{path} is one file of weights; give the folder with its config.json")
    stage, own = stage_of(contents.config), contents.notes.get("config")
    if cfg is None and own is None:
        raise UserError(
            f"{path} does not say what run it is of: give experiment=NAME, of {stage}, whose data "
            "and schedule a training would take (sizes come from config.json)"
        )
    remembered = configuration(own, path, CONVERTIBLE) if own is not None else None
    cfg = cfg if cfg is not None else remembered
    assert cfg is not None
    _check_stage(path, stage, cfg)
    apply_hf_config(cfg, contents.config)
    if remembered is not None:
        cfg["vision"] |= {
            key: remembered["vision"][key]
            for key in ("name", "image_size", "drop_last_block", "options")
            if key in remembered["vision"]
        }
    elif (eva := eva_settings(contents.config)) is not None:
        cfg["vision"] |= eva
    kept_tokenizers(cfg, path, work)
    contents.state = language.without_rows(contents)
    text = functools.partial(language.config_of_hf, contents)
    whole = _assemble(path, contents, cfg, work, text)
    whole.step = language.noted(contents, "step")
    return whole


def what_it_is(path: Path, wanted: str) -> files.Contents:
    """The contents of a source, if it is of the kind that was announced.

    Raises:
        UserError: it is not.
    """
    contents = files.read(path, str(path))
    if contents.kind != wanted:
        raise UserError(
            f"{path} is of {contents.kind}, not of {wanted}; say --from {contents.kind}"
        )
    return contents


def _check_stage(path: Path, stage: str, cfg: dict[str, Any]) -> None:
    if cfg["stage"] != stage:
        raise UserError(
            f"{path} is of {stage}, and the experiment is of {cfg['stage']}; give an experiment= "
            f"of {stage}"
        )


def _assemble(
    path: Path,
    contents: files.Contents,
    cfg: dict[str, Any],
    work: Path,
    text: Callable[[], Any],
) -> Whole:
    """Takes a foreign source apart, and builds ours from the parts."""
    check_classes(cfg)
    template = _tower_template(cfg)
    account = to_ours(contents, [TOWER + name for name in template])
    account.check(str(path))
    check_dtypes(account)
    if cfg["stage"] == "stage2":  # whether it has a text side is seen
        words = account.state.get("qformer.word_embeddings.weight")
        if words is None and cfg["data"].get("text") == "questions":
            raise UserError(
                f"the Q-Former in {path} has no text side, and the experiment's (data.text="
                "questions) reads questions by it; give another experiment="
            )
        cfg["model"]["keep_text"] = words is not None
        if words is not None:
            cfg["model"]["vocab_size"] = len(words) - 1
    tower, rest = split(account.state, TOWER)
    lm, trained = split(rest, OUR_LANGUAGE)
    if tower:
        _check_tower(path, tower, template)
        weights = {name: value.contiguous() for name, value in tower.items()}
        save_file(weights, work / TOWER_FILE)
        cfg["vision"]["weights"] = str(work / TOWER_FILE)
    if lm:
        language.write_folder(lm, text(), work / LANGUAGE_FOLDER, path)
        cfg["language_model"] |= {
            "name": str(work / LANGUAGE_FOLDER), "weights": "pretrained", "config": None,
        }  # fmt: skip
    whole = Whole(cfg, *build(cfg), account)
    _complete(whole, trained, account)
    fill(whole, trained | _tower_if_trained(whole, tower), path)
    account.state = {}  # the model has them now
    return whole


def _tower_template(cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The tower's weights, without values."""
    with torch.device("meta"):
        vision = instantiate_group("vision", {**cfg["vision"], "weights": "random"})
    return vision.tower.state_dict()


def _check_tower(path: Path, tower: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    problems = [f"it lacks {name}" for name in wanted if name not in tower]
    problems += [f"it has {name} too" for name in tower if name not in wanted]
    problems += [
        f"its {name} is {tuple(tower[name].shape)} and not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tower and tower[name].shape != value.shape
    ]
    if problems:
        raise UserError(
            f"the image tower in {path} is not that of vision.* ({'; '.join(problems[:3])}); set "
            "vision.name, vision.image_size and vision.options as it was built"
        )


def _tower_if_trained(whole: Whole, tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's weights where checkpoints store them."""
    if TOWER.startswith(whole.stage.frozen_prefixes) or not tower:
        return {}
    return {TOWER + name: value for name, value in tower.items()}


def _complete(whole: Whole, trained: dict[str, Tensor], account: KeyAccount) -> None:
    """What the source may lack is what a new run begins with."""
    for name, value in copy.copy(whole.own).items():
        reasons = [why for start, why in OPTIONAL.items() if name.startswith(start)]
        if name not in trained and reasons:
            trained[name] = value
            account.miss(name, reasons[0])
