"""Weight names of the reference implementation (LAVIS) and ours.

Shapes and contents are the same; only names differ, so a conversion is a renaming with an account
of every key.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from blip2_train.errors import UserError

# (ours, LAVIS); an entry that ends in a dot renames what starts with it, others are whole names.
NAMES = [
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
STAGE2_NAMES = {
    "opt": [("lm_proj.", "opt_proj."), ("language_model.lm.", "opt_model.")],
    "t5": [("lm_proj.", "t5_proj."), ("language_model.lm.", "t5_model.")],
}
# The same inside a block: qformer.layers.{i}. and Qformer.bert.encoder.layer.{i}.
LAYER_NAMES = [
    ("self_attention.query.", "attention.self.query."),
    ("self_attention.key.", "attention.self.key."),
    ("self_attention.value.", "attention.self.value."),
    ("self_attention.output.", "attention.output.dense."),
    ("self_attention.norm.", "attention.output.LayerNorm."),
    ("cross_attention.query.", "crossattention.self.query."),
    ("cross_attention.key.", "crossattention.self.key."),
    ("cross_attention.value.", "crossattention.self.value."),
    ("cross_attention.output.", "crossattention.output.dense."),
    ("cross_attention.norm.", "crossattention.output.LayerNorm."),
    ("query_ffn.inner.", "intermediate_query.dense."),
    ("query_ffn.output.", "output_query.dense."),
    ("query_ffn.norm.", "output_query.LayerNorm."),
    ("text_ffn.inner.", "intermediate.dense."),
    ("text_ffn.output.", "output.dense."),
    ("text_ffn.norm.", "output.LayerNorm."),
]
OUR_LAYER = re.compile(r"qformer\.layers\.(\d+)\.")
LAVIS_LAYER = re.compile(r"Qformer\.bert\.encoder\.layer\.(\d+)\.")
# LAVIS entries that repeat another one or hold a constant.
DROPPED = {
    "Qformer.cls.predictions.decoder.weight": "is the word table (tied)",
    "Qformer.cls.predictions.decoder.bias": "is Qformer.cls.predictions.bias (tied)",
    "Qformer.bert.embeddings.position_ids": "a constant, 0, 1, 2, ...",
}


@dataclass
class KeyAccount:
    """What became of every key of a checkpoint.

    Attributes:
        state: converted weights under our names.
        dropped: {foreign name: why it is not needed}.
        unknown: foreign names that no rule covers.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


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
    table = NAMES + STAGE2_NAMES[family]
    return _rename(name, OUR_LAYER, "Qformer.bert.encoder.layer.", table, ours=0, theirs=1)


def from_lavis_name(name: str) -> str:
    """LAVIS's weight name -> ours.

    Raises:
        KeyError: we have no such weight.
    """
    table = NAMES + STAGE2_NAMES["opt"] + STAGE2_NAMES["t5"]
    return _rename(name, LAVIS_LAYER, "qformer.layers.", table, ours=1, theirs=0)


def from_lavis(state: dict[str, Tensor]) -> KeyAccount:
    """Renames a LAVIS state dict, accounting for every key.

    Raises:
        UserError: a tied weight differs from the one it should repeat.
    """
    account = KeyAccount()
    tied = {
        "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
        "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
    }
    for name, value in state.items():
        if name in DROPPED:
            twin = state.get(tied.get(name, ""))
            if twin is not None and not twin.equal(value):
                raise UserError(f"{name} differs from {tied[name]}, to which it should be tied")
            account.dropped[name] = DROPPED[name]
            continue
        try:
            account.state[from_lavis_name(name)] = value
        except KeyError:
            account.unknown.append(name)
    return account


def _rename(
    name: str,
    layer: re.Pattern[str],
    prefix: str,
    table: list[tuple[str, str]],
    *,
    ours: int,
    theirs: int,
) -> str:
    start = ""
    if match := layer.match(name):
        table, start, name = LAYER_NAMES, f"{prefix}{match[1]}.", name[match.end() :]
    for entry in table:
        known = entry[ours]
        if name == known or (known.endswith(".") and name.startswith(known)):
            return start + entry[theirs] + name[len(entry[ours]) :]
    raise KeyError(start + name)
