"""Reads weights of any origin, as tensors and plain values: nothing is ever unpickled.

Known are checkpoints of ours, LAVIS's `.pth` files (zip archives and the older plain ones), and
folders or single files of safetensors that Hugging Face's BLIP-2 classes wrote.
"""

import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip2_train.checkpoint.hf import EXTRA, is_hf
from blip2_train.checkpoint.io import FORMAT, damage
from blip2_train.checkpoint.lavis import is_lavis
from blip2_train.errors import UserError

OURS, LAVIS, HF = "blip2-train", "lavis", "hf"
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_PICKLE = b"\x80"  # what torch files before 1.6 begin with


@dataclass
class Contents:
    """What a file or folder holds.

    Attributes:
        kind: OURS, LAVIS or HF.
        state: weights, by the names of that kind.
        extra: of HF's `EXTRA`, by our names.
        notes: metadata of `EXTRA`.
        config: HF's config.json; {} for a single file and other kinds.
        content: all of a checkpoint of ours.
    """

    kind: str
    state: dict[str, Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)


def read(path: Path, what: str) -> Contents:
    """Weights of a file or folder, whatever wrote it.

    Args:
        path: of it.
        what: how messages call it, such as "init_from=PATH".

    Raises:
        UserError: it is missing, damaged, or of another kind.
    """
    if path.is_dir():
        return read_folder(path, what)
    if not path.is_file():
        raise UserError(f"{what}: there is no such file or folder")
    if path.suffix == ".safetensors":
        state, _ = read_safetensors(path, what)
        if not is_hf(state):
            raise UserError(
                f"{what} has not the weights of a BLIP-2 class of Hugging Face; give the whole "
                "folder where the weights are in several files"
            )
        return Contents(HF, state, *read_extra(path.parent, what))
    content = read_torch(path, what)
    state = content.get("model", content) if isinstance(content, dict) else {}
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not (ours or is_lavis(state)):
        raise UserError(f"{what} is a checkpoint of neither blip2-train nor LAVIS nor Hugging Face")
    if ours:
        return Contents(OURS, state, content=content)
    return Contents(LAVIS, state)


def read_torch(path: Path, what: str) -> Any:
    """What torch saved, if it is tensors and plain values.

    Raises:
        UserError: it is damaged, no torch file, or holds more than that.
    """
    with path.open("rb") as file:
        first = file.read(1)
    archive = zipfile.is_zipfile(path)
    if not archive and first != _PICKLE:
        raise UserError(f"{what} is damaged or no torch checkpoint")
    if archive and (reason := damage(path)):
        raise UserError(f"{what} is damaged or no torch checkpoint ({reason})")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not archive and "GLOBAL" not in str(error) and "weights_only" not in str(error):
            raise UserError(f"{what} is damaged or no torch checkpoint ({_line(error)})") from error
        raise UserError(
            f"{what} holds more than tensors and plain values and is not loaded, since it could "
            "run code"
        ) from error
    except Exception as error:  # a cut file fails in as many ways as there are places to cut
        raise UserError(f"{what} is damaged or no torch checkpoint ({_line(error)})") from error


def read_folder(folder: Path, what: str) -> Contents:
    """A folder that `save_pretrained` of a BLIP-2 class, or blip2-convert, wrote.

    Raises:
        UserError: it is something else, or incomplete.
    """
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{what} is the folder of a run; give one of {folder}/checkpoints/*.ckpt")
    config = read_json(folder / CONFIG, what)
    if config.get("model_type") != "blip-2":
        raise UserError(
            f"{what} is the folder of another model ({CONFIG} says model_type="
            f"{config.get('model_type')}, BLIP-2's is blip-2)"
        )
    state: dict[str, Tensor] = {}
    for file in weight_files(folder, what):
        part, _ = read_safetensors(file, what)
        state |= part
    if not is_hf(state):
        raise UserError(f"{what} has not the weights of a BLIP-2 class of Hugging Face")
    extra, notes = read_extra(folder, what)
    return Contents(HF, state, extra, notes, config)


def weight_files(folder: Path, what: str) -> list[Path]:
    """The files of safetensors that a folder's weights are in.

    Raises:
        UserError: one is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise UserError(f"{what} has neither {SINGLE} nor {INDEX}; give a complete folder")
    places = read_json(folder / INDEX, what).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{what}: {INDEX} is damaged")
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{what} lacks {', '.join(lacking)}; give a complete folder")
    return [folder / name for name in names]


def read_extra(folder: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What HF's classes cannot hold, of a folder that blip2-convert wrote; else nothing."""
    path = folder / EXTRA
    return read_safetensors(path, f"{what}: {EXTRA}") if path.is_file() else ({}, {})


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file.

    Raises:
        UserError: it is cut, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{what} is damaged or no file of safetensors ({path.name}: {_line(error)})"
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{what} has no {path.name}; give a folder that save_pretrained wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{what}: {path.name} is no JSON ({_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{what}: {path.name} holds no object")
    return content


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
