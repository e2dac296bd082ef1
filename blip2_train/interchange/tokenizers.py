"""Tokenizers as Hugging Face's processor of BLIP-2 wants them, and ours kept beside them."""

import copy
import shutil
from pathlib import Path
from typing import Any

from blip2_train.data.language import LanguageTokenizer
from blip2_train.training.stage import Stage
from blip2_train.training.stage2 import Stage2

# In a folder of HF: as ours read it, and the Q-Former's of stage 2, which reads questions by it;
TOKENIZERS, ASKING = "blip2_train_tokenizer", "blip2_train_question_tokenizer"
OWN, OWN_ASKING = "tokenizer", "question_tokenizer"  # the same in a run of ours.
_WORD = "a"


def hf_tokenizer(stage: Stage, *, encoder: bool) -> Any:
    """A copy of a stage's tokenizer that adds to a text what the model expects around it.

    Args:
        stage: 1 or 2.
        encoder: whether texts go to an encoder.
    """
    if not isinstance(stage, Stage2):
        tokenizer = copy.deepcopy(stage.tokenizer)  # type: ignore[attr-defined]
    else:
        text = stage.text
        tokenizer = _around(text, [] if encoder else text.start, _end(text, encoder))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text.pad_id)
        _set(tokenizer, "padding_side", "right" if encoder else "left")  # decoders go on at the end
    _set(tokenizer, "model_input_names", ["input_ids", "attention_mask"])
    return tokenizer


def save_own(stage: Stage, folder: Path) -> None:
    """Writes a stage's tokenizers as ours read them, into a folder of HF."""
    if isinstance(stage, Stage2):
        stage.text.tokenizer.save_pretrained(folder / TOKENIZERS)
        if stage.asks:
            stage.tokenizer.save_pretrained(folder / ASKING)
    else:
        stage.tokenizer.save_pretrained(folder / TOKENIZERS)  # type: ignore[attr-defined]


def kept_tokenizers(cfg: dict[str, Any], source: Path, work: Path) -> None:
    """Has a configuration read the tokenizers that a folder of HF keeps for ours.

    Args:
        cfg: changed in place.
        source: the folder.
        work: where the tokenizers are copied to.
    """
    group = "text" if cfg["stage"] == "stage1" else "language_model"
    for theirs, ours, reader in ((TOKENIZERS, OWN, group), (ASKING, OWN_ASKING, "text")):
        if (source / theirs).is_dir():
            shutil.copytree(source / theirs, work / ours)
            cfg[reader]["tokenizer"] = str(work / ours)


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
