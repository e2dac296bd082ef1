"""Weight names of the reference implementation (LAVIS) and ours.

Shapes and contents are the same; only names differ, so a conversion is a renaming with an account
of every key. Its image towers and ours are in `towers.py`.
"""

from typing import Any

import torch
from torch import Tensor

from blip2_train.checkpoint.account import KeyAccount
from blip2_train.checkpoint.names import FEED_FORWARDS, Names, attention
from blip2_train.errors import UserError

WHOLE = [
    ("qformer.query_tokens", "query_tokens"),
    ("qformer.ln_vision.", "ln_vision."),
    ("qformer.word_embeddings.", "Qformer.bert.embeddings.word_embeddings."),
    ("qformer.position_embeddings.", "Qformer.bert.embeddings.position_embeddings."),
    ("qformer.norm.", "Qformer.bert.embeddings.LayerNorm."),
    ("qformer.lm_head.transform.", "Qformer.cls.predictions.transform.dense."),
    ("qformer.lm_head.norm.", "Qformer.cls.predictions.transform.LayerNorm."),
    ("qformer.lm_head.bias", "Qformer.cls.predictions.bias"),
    ("vision_proj.", "vision_proj."),
    ("text_proj.", "text_proj."),
    ("itm_head.", "itm_head."),
    ("temp", "temp"),
    ("vision.tower.", "visual_encoder."),
]
# Stage 2, by the family of its language model, which LAVIS's names contain.
STAGE2 = {
    "opt": [("lm_proj.", "opt_proj."), ("language_model.lm.", "opt_model.")],
    "t5": [("lm_proj.", "t5_proj."), ("language_model.lm.", "t5_model.")],
}
LAYERS = [
    *attention("self_attention", "attention", "self"),
    *attention("cross_attention", "crossattention", "self"),
    *FEED_FORWARDS,
]
BLOCKS = ("qformer.layers.", "Qformer.bert.encoder.layer.")
NAMES = {family: Names(WHOLE + names, LAYERS, BLOCKS) for family, names in STAGE2.items()}
EITHER = Names(WHOLE + STAGE2["opt"] + STAGE2["t5"], LAYERS, BLOCKS)

TABLE = "Qformer.bert.embeddings.word_embeddings.weight"
HEAD_BIAS = "Qformer.cls.predictions.bias"
POSITIONS = "Qformer.bert.embeddings.position_ids"
# LAVIS entries that repeat another one,
TIED = {
    "Qformer.cls.predictions.decoder.weight": TABLE,
    "Qformer.cls.predictions.decoder.bias": HEAD_BIAS,
}
# or hold a constant.
DROPPED = {
    "Qformer.cls.predictions.decoder.weight": "is the word table (tied)",
    "Qformer.cls.predictions.decoder.bias": f"is {HEAD_BIAS} (tied)",
    POSITIONS: "a constant, 0, 1, 2, ...",
}


def is_lavis(state: Any) -> bool:
    """Whether the names are those of a LAVIS checkpoint."""
    if not isinstance(state, dict) or "query_tokens" not in state:
        return False
    return any(str(name).startswith("Qformer.") for name in state)


def to_lavis_name(name: str, family: str = "opt") -> str:
    """Our weight name -> LAVIS's.

    Args:
        name: of a weight.
        family: of stage 2's language model, "opt" or "t5".

    Raises:
        KeyError: LAVIS has no such weight.
    """
    return NAMES[family].theirs(name)


def from_lavis_name(name: str) -> str:
    """LAVIS's weight name -> ours.

    Raises:
        KeyError: we have no such weight.
    """
    return EITHER.ours(name)


def from_lavis(state: dict[str, Tensor]) -> KeyAccount:
    """Renames a LAVIS state dict, accounting for every key.

    Raises:
        UserError: a tied weight differs from the one it should repeat, or a constant is another.
    """
    account = KeyAccount()
    for name, value in state.items():
        if name in DROPPED:
            twin = state.get(TIED.get(name, ""))
            if twin is not None and not twin.equal(value):
                raise UserError(f"{name} differs from {TIED[name]}, to which it should be tied")
            if name == POSITIONS and not value.equal(positions(value.shape[-1]).to(value.dtype)):
                raise UserError(f"{name} is not 0, 1, 2, ...; no model of ours has such positions")
            account.drop(name, DROPPED[name])
            continue
        try:
            account.take(name, from_lavis_name(name), value)
        except KeyError:
            account.refuse(name)
    return account


def to_lavis(state: dict[str, Tensor], family: str, max_positions: int) -> KeyAccount:
    """Renames our weights, and writes down again what LAVIS stores twice.

    Args:
        state: under our names, with the tower as LAVIS calls its parts.
        family: see `to_lavis_name`.
        max_positions: rows of the text position table, which LAVIS counts also without one.
    """
    account = KeyAccount()
    for name, value in state.items():
        try:
            account.take(name, to_lavis_name(name, family), value)
        except KeyError:
            account.refuse(name)
    for name, twin in TIED.items():
        if twin in account.state:
            account.state[name] = account.state[twin]
    account.state[POSITIONS] = positions(max_positions)
    return account


def positions(count: int) -> Tensor:
    """Int64 [1, count], as LAVIS stores them."""
    return torch.arange(count)[None]
