"""Initial weights of the Q-Former from a BERT (BLIP-2, section 3.1)."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from blip2_train.errors import UserError

# (ours, BERT's) below the embeddings and the head.
NAMES = [
    ("word_embeddings.weight", "bert.embeddings.word_embeddings.weight"),
    ("position_embeddings.weight", "bert.embeddings.position_embeddings.weight"),
    ("norm.weight", "bert.embeddings.LayerNorm.weight"),
    ("norm.bias", "bert.embeddings.LayerNorm.bias"),
    ("lm_head.transform.weight", "cls.predictions.transform.dense.weight"),
    ("lm_head.transform.bias", "cls.predictions.transform.dense.bias"),
    ("lm_head.norm.weight", "cls.predictions.transform.LayerNorm.weight"),
    ("lm_head.norm.bias", "cls.predictions.transform.LayerNorm.bias"),
    ("lm_head.bias", "cls.predictions.bias"),
]
# The same inside a block. Both feed-forwards start as copies of BERT's one.
LAYER_NAMES = [
    ("self_attention.query", "attention.self.query"),
    ("self_attention.key", "attention.self.key"),
    ("self_attention.value", "attention.self.value"),
    ("self_attention.output", "attention.output.dense"),
    ("self_attention.norm", "attention.output.LayerNorm"),
    ("text_ffn.inner", "intermediate.dense"),
    ("text_ffn.output", "output.dense"),
    ("text_ffn.norm", "output.LayerNorm"),
    ("query_ffn.inner", "intermediate.dense"),
    ("query_ffn.output", "output.dense"),
    ("query_ffn.norm", "output.LayerNorm"),
]


def bert_sources(num_layers: int) -> dict[str, str]:
    """{our Q-Former weight: the BERT weight it starts from}."""
    sources = dict(NAMES)
    for i in range(num_layers):
        for ours, theirs in LAYER_NAMES:
            for kind in ("weight", "bias"):
                sources[f"layers.{i}.{ours}.{kind}"] = f"bert.encoder.layer.{i}.{theirs}.{kind}"
    return sources


@dataclass(frozen=True)
class Bert:
    """What a Q-Former starts from.

    Attributes:
        weights: under BERT's names.
        num_heads: attention heads, which the weights' shapes do not tell.
    """

    weights: dict[str, Tensor]
    num_heads: int


def read_bert(name_or_path: str) -> Bert:
    """Weights of a BERT with its prediction head, by Hugging Face id or local folder.

    Raises:
        UserError: it cannot be had, or it is no BERT.
    """
    from transformers import AutoConfig, BertForMaskedLM

    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type != "bert":
            raise UserError(f"qformer.init={name_or_path} is a {config.model_type}, not a bert")
        if config.hidden_act != "gelu":
            raise UserError(
                f"qformer.init={name_or_path} has hidden_act={config.hidden_act}, the Q-Former gelu"
            )
        loaded: Any = BertForMaskedLM.from_pretrained(name_or_path, output_loading_info=True)
        bert, report = loaded
        # what the files lack was drawn at random: a BERT without its head, other names
        drawn = set(report["missing_keys"])
        weights = {k: v for k, v in bert.state_dict().items() if k not in drawn}
        return Bert(weights, config.num_attention_heads)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"qformer.init={name_or_path} could not be loaded ({str(error).splitlines()[0]}); give "
            "a local folder of a BERT, or qformer.init=random"
        ) from error


@torch.no_grad()
def init_from_bert(qformer: nn.Module, bert: Bert, name: str) -> dict[str, str]:
    """Copies BERT's weights into the Q-Former.

    What BERT does not have keeps its random draw: queries, `ln_vision`, cross-attention, and the
    row of [DEC]. Rows of the word and position tables beyond the Q-Former's are not needed.

    Args:
        qformer: changed in place.
        bert: from `read_bert`.
        name: where they come from, for messages.

    Returns:
        {our weight: "bert <name>" or "random"} for every parameter of the Q-Former.

    Raises:
        UserError: the BERT has another shape.
    """
    sources = bert_sources(len(qformer.layers))  # type: ignore[arg-type]
    missing = [theirs for theirs in sources.values() if theirs not in bert.weights]
    if missing:
        raise UserError(
            f"qformer.init={name} has no {missing[0]} (and {len(missing) - 1} more); it must be a "
            "BERT with its prediction head, and qformer.num_layers must not exceed its layers"
        )
    num_heads = qformer.layers[0].self_attention.num_heads  # type: ignore[index, union-attr]
    if num_heads != bert.num_heads:
        raise UserError(
            f"qformer.num_heads={num_heads}, but {name} has {bert.num_heads}; set it to BERT's"
        )
    origin = {}
    for ours, parameter in qformer.named_parameters():
        theirs = sources.get(ours)
        if theirs is None:
            origin[ours] = "random"
            continue
        value = bert.weights[theirs]
        rows = len(value)
        if ours in ("word_embeddings.weight", "lm_head.bias"):
            if rows not in (len(parameter), len(parameter) - 1):
                raise UserError(
                    f"qformer.init={name} has a vocabulary of {rows}, the tokenizer one of "
                    f"{len(parameter) - 1} (and [DEC]); use the tokenizer of that BERT"
                )
        elif ours == "position_embeddings.weight":
            rows = min(rows, len(parameter))
            value = value[:rows]
        if parameter[:rows].shape != value.shape:
            raise UserError(
                f"qformer.init={name}: {theirs} is {tuple(value.shape)}, the Q-Former's is "
                f"{tuple(parameter.shape)}; set the qformer's sizes to BERT's"
            )
        parameter[:rows].copy_(value)
        origin[ours] = f"bert {name}"
    return origin
