"""The language model on its way from one project's files to another's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from blip2_train.checkpoint.files import Contents
from blip2_train.checkpoint.hf import LANGUAGE
from blip2_train.errors import UserError
from blip2_train.models.lm_weights import (
    parse_config,
    published_config,
    random_model,
    with_exact_gelu,
)
from blip2_train.training.fit import STAGES

SHARD = "5GB"


def config_of(cfg: Mapping[str, Any]) -> Any:
    """The library's configuration of a run's language model; no weights are fetched for it.

    Args:
        cfg: of a run of stage 2.

    Raises:
        UserError: it cannot be had.
    """
    settings = STAGES["stage2"](cfg).language_settings  # type: ignore[attr-defined]
    if settings["weights"] == "random" and settings["config"] is not None:
        return parse_config(settings["config"])
    return published_config(settings["name"])


def config_of_hf(contents: Contents) -> Any:
    """The library's configuration of the language model in a BLIP-2 folder.

    Args:
        contents: of the folder; where blip2-convert wrote it, the model's own is kept.

    Raises:
        UserError: it is of an unknown type.
    """
    from transformers import CONFIG_MAPPING

    kept = contents.notes.get("language_config")
    settings = json.loads(kept) if kept else dict(contents.config["text_config"])
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"config.json: text_config.model_type={model_type} is unknown here")
    try:
        own = CONFIG_MAPPING[model_type].from_dict(settings)
    except Exception as error:  # each type has its own checks
        raise UserError(f"config.json: text_config: {str(error).splitlines()[0]}") from error
    return with_exact_gelu(own)


def noted(contents: Contents, name: str) -> int:
    """A number that blip2-convert has noted in a folder; 0 where there is none."""
    text = contents.notes.get(name, "")
    return int(text) if text.isdecimal() else 0


def write_folder(words: Mapping[str, Tensor], config: Any, folder: Path, source: Path) -> None:
    """Writes a folder that the library, and `LanguageModel`, load.

    Args:
        words: weights by the library's names.
        config: the library's.
        folder: new.
        source: of the weights, for messages.

    Raises:
        UserError: the weights are not those of such a model.
    """
    own = random_model(config, 0, device="meta").state_dict(keep_vars=True)
    if unknown := sorted(words.keys() - own.keys()):
        raise UserError(
            f"the language model in {source} has {len(unknown)} weight(s) that {config.model_type} "
            f"has not, such as {unknown[0]}; set language_model.* as it was built"
        )
    for name, value in words.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"the language model in {source}: {name} is {tuple(value.shape)} and not "
                f"{tuple(own[name].shape)}; set language_model.* as it was built"
            )
    first: dict[int, str] = {}  # of what is one weight in the model
    for name in (name for name in own if name in words):
        twin = first.setdefault(id(own[name]), name)
        if not words[name].equal(words[twin]):
            raise UserError(
                f"the language model in {source}: {name} differs from {twin}, to which "
                f"{config.model_type} ties it; set language_model.* as it was built"
            )
    folder.mkdir()
    config.dtype = str(next(iter(words.values())).dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    save_weights(words, folder, SHARD)


def save_weights(state: Mapping[str, Tensor], folder: Path, max_shard_size: str | int) -> None:
    """Safetensors as `from_pretrained` reads them, in files of at most that size.

    Of tied weights the first is kept, as the library does, which ties them again.
    """
    whole: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in state.items():
        place = (value.data_ptr(), value.shape)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        whole[name] = value.contiguous()
    save_torch_state_dict(whole, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def vocabulary_names(lm: Any) -> list[str]:
    """Names of the weights that have a row for each token: word table, output matrix and bias."""
    head = lm.get_output_embeddings()
    wanted = [lm.get_input_embeddings().weight]
    wanted += [getattr(head, "weight", None), getattr(head, "bias", None)]
    return [
        name
        for name, value in lm.state_dict(keep_vars=True).items()
        if any(value is part for part in wanted)
    ]


def with_rows(state: Mapping[str, Tensor], lm: Any, added: int) -> dict[str, Tensor]:
    """Weights with further rows in the vocabulary, each the mean of the others.

    Its logit is then the mean of the others too, and the token never the most likely one.

    Args:
        state: by the library's names.
        lm: the model that they are of.
        added: rows.
    """
    out = dict(state)
    grown: dict[int, Tensor] = {}  # what is tied stays one tensor
    for name in vocabulary_names(lm) if added else []:
        value = state[name]
        mean = value.mean(dim=0, keepdim=True)
        grown.setdefault(value.data_ptr(), torch.cat([value, mean.expand(added, *value.shape[1:])]))
        out[name] = grown[value.data_ptr()]
    return out


def without_rows(contents: Contents) -> dict[str, Tensor]:
    """The weights of a BLIP-2 folder without the rows that `with_rows` has added.

    Raises:
        UserError: config.json names no language model.
    """
    added = noted(contents, "added_rows")
    if not added:
        return contents.state
    state = dict(contents.state)
    for name in vocabulary_names(random_model(config_of_hf(contents), 0, device="meta")):
        if LANGUAGE + name in state:
            state[LANGUAGE + name] = state[LANGUAGE + name][:-added].clone()
    return state
