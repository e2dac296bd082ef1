"""Weight names of Hugging Face's BLIP-2 classes and ours.

`Blip2ForImageTextRetrieval` holds stage 1, `Blip2ForConditionalGeneration` (and `Blip2Model`, with
the same names) stage 2. What they cannot hold travels in `EXTRA`, a file beside their own. The
image tower is in `towers.py`; its last norm, which they count to it, is our `ln_vision`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from blip2_train.checkpoint.account import MAPPED, KeyAccount, Row
from blip2_train.checkpoint.names import FEED_FORWARDS, Names, attention

EXTRA = "blip2_train_extra.safetensors"
TOWER = "vision_model."
LAST_NORM = "vision_model.post_layernorm."
LANGUAGE = "language_model."
OUR_LANGUAGE = "language_model.lm."

WHOLE = [
    ("qformer.query_tokens", "query_tokens"),
    ("qformer.ln_vision.", LAST_NORM),
    ("qformer.word_embeddings.", "embeddings.word_embeddings."),
    ("qformer.position_embeddings.", "embeddings.position_embeddings."),
    ("qformer.norm.", "qformer.layernorm."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("itm_head.", "itm_head."),
    ("lm_proj.", "language_projection."),
    (OUR_LANGUAGE, LANGUAGE),
]
LAYERS = [
    *attention("self_attention", "attention", "attention"),
    *attention("cross_attention", "crossattention", "attention"),
    *FEED_FORWARDS,
]
NAMES = Names(WHOLE, LAYERS, ("qformer.layers.", "qformer.encoder.layer."))
# Ours that their classes of a stage have no place for, and why.
_NO_TEXT = "their Q-Former of stage 2 reads no text"
WITHOUT_PLACE = {
    "stage1": {
        r"qformer\.lm_head\.": "their Q-Former has no language-modelling head",
        r"temp$": "their class gives cosines, which nothing divides",
    },
    "stage2": {
        r"qformer\.(word_embeddings|position_embeddings|lm_head)\.": _NO_TEXT,
        r"qformer\.layers\.\d+\.text_ffn\.": _NO_TEXT,
    },
}
POSITIONS = "embeddings.position_ids"


def is_hf(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a BLIP-2 class of Hugging Face."""
    return "query_tokens" in state and any(
        str(name).startswith("qformer.encoder.layer.") for name in state
    )


def to_hf_name(name: str) -> str:
    """Our weight name -> theirs.

    Raises:
        KeyError: they have no such weight.
    """
    return NAMES.theirs(name)


def from_hf_name(name: str) -> str:
    """Their weight name -> ours, the tower's aside.

    Raises:
        KeyError: we have no such weight.
    """
    return NAMES.ours(name)


def to_hf(state: Mapping[str, Tensor], stage: str) -> tuple[KeyAccount, dict[str, Tensor]]:
    """Renames our weights, the tower's aside.

    Args:
        state: under our names.
        stage: "stage1" or "stage2".

    Returns:
        What their class holds, and what goes to `EXTRA`, under our names.
    """
    account, extra = KeyAccount(), {}
    for name, value in state.items():
        reasons = [why for names, why in WITHOUT_PLACE[stage].items() if re.match(names, name)]
        if reasons:
            extra[name] = value
            account.rows.append(Row(MAPPED, name, f"{EXTRA}: {name}", reasons[0]))
            continue
        try:
            account.take(name, to_hf_name(name), value)
        except KeyError:
            account.refuse(name)
    return account, extra


def from_hf(state: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> KeyAccount:
    """Renames their weights, accounting for every key.

    Args:
        state: of their class, the tower aside.
        extra: of `EXTRA`, or nothing.
    """
    account = KeyAccount()
    for name, value in state.items():
        if name == POSITIONS:
            account.drop(name, "a constant, 0, 1, 2, ...")
            continue
        try:
            account.take(name, from_hf_name(name), value)
        except KeyError:
            account.refuse(name)
    for name, value in extra.items():
        account.take(f"{EXTRA}: {name}", name, value)
    return account
