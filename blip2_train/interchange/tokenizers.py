"""Tokenizers as Hugging Face's processor of BLIP-2 wants them, and ours kept beside them."""

import copy
import shutil
from pathlib import Path
from typing import Any

from blip2_train.data.language import LanguageTokenizer
from blip2_train.training.stage import Stage

TOKENIZERS = "blip2_train_tokenizer"  # in a folder of HF: as ours read it
OWN = "tokenizer"  # the same in a run of ours
_WORD = "a"


def hf_tokenizer(stage: Stage, *, encoder: bool) -> Any:
    """A copy of a stage's tokenizer that adds to a text what the model expects around it.

    Args:
        stage: 1 or 2.
        encoder: whether texts go to an encoder.
    """
    if hasattr(stage, "tokenizer"):
        tokenizer = copy.deepcopy(stage.tokenizer)
    else:
        text: LanguageTokenizer = stage.text  # type: ignore[attr-defined]
        tokenizer = _around(text, [] if encoder else text.start, _end(text, encoder))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text.pad_id)
        _set(tokenizer, "padding_side", "right" if encoder else "left")  # decoders go on at the end
    _set(tokenizer, "model_input_names", ["input_ids", "attention_mask"])
    return tokenizer


def save_own(stage: Stage, folder: Path) -> None:
    """Writes a stage's tokenizer as ours read it."""
    tokenizer = getattr(stage, "tokenizer", None)
    if tokenizer is None:
        tokenizer = stage.text.tokenizer  # type: ignore[attr-defined]
    tokenizer.save_pretrained(folder)


def kept_tokenizer(cfg: dict[str, Any], source: Path, work: Path) -> None:
    """Has a configuration read the tokenizer that a folder of HF keeps for ours.

    Args:
        cfg: changed in place.
        source: the folder.
        work: where the tokenizer is copied to.
    """
    shutil.copytree(source / TOKENIZERS, work / OWN)
    group = "text" if cfg["stage"] == "stage1" else "language_model"
    cfg[group]["tokenizer"] = str(work / OWN)


def _set(tokenizer: Any, name: str, value: Any) -> None:
    """Of a tokenizer, and of what it saves."""
    setattr(tokenizer, name, value)
    tokenizer.init_kwargs[name] = value


def _end(text: LanguageTokenizer, encoder: bool) -> list[int]:
    return [text.encoder_end_id] if encoder else []


def _around(text: LanguageTokenizer, start: list[int], end: list[int]) -> Any:
    """The tokenizer, so that it puts these tokens around a text, and no others."""
    tokenizer: Any = copy.deepcopy(text.tokenizer)
    words = text.words([_WORD])[0]
    if tokenizer(_WORD)["input_ids"] == [*start, *words, *end]:
        return tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = {id: tokenizer.convert_ids_to_tokens(id) for id in {*start, *end}}
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=" ".join([*(names[id] for id in start), "$A", *(names[id] for id in end)]),
        special_tokens=[(name, id) for id, name in names.items()],
    )
    # a class of its own would put back what it is used to
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)
