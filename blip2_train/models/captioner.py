"""Lets the searches of `transformers` run over the image-grounded text decoder.

Greedy, beam search, nucleus sampling and their settings are the library's. Nothing is cached: a
caption has some 30 tokens, and its prefix is read anew for each of them.

Shapes as in `qformer.py`; N captions per image, R = B * beams or B * N rows of the search.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from blip2_train.models.blocks import KeyValue

# Ids [R, T] and the queries' keys and values of R rows -> logits [R, V] of the next token.
Decode = Callable[[Tensor, list[KeyValue]], Tensor]
PAD = 0  # id of [PAD] in BERT's vocabulary, and in ours


def search_config(
    *,
    start_id: int,
    end_id: int,
    longest: int,
    max_length: int,
    min_length: int,
    num_beams: int,
    top_p: float | None,
    temperature: float,
    length_penalty: float,
    repetition_penalty: float,
    num_captions: int,
) -> GenerationConfig:
    """Settings of a search in the library's terms.

    `longest` is how many tokens the decoder can write, [DEC] included; from `max_length` on the
    arguments are those of `Blip2Stage1.generate`, which says what they do.

    Raises:
        ValueError: a length or the number of captions is out of range.
    """
    if not (2 <= max_length <= longest and min_length <= max_length):
        raise ValueError(
            f"max_length={max_length} must be between 2 and {longest}, and min_length={min_length} "
            "no larger"
        )
    if num_captions > num_beams and (top_p is None or num_beams > 1):
        raise ValueError(
            f"num_captions={num_captions} of one image need as many beams (num_beams={num_beams}), "
            "or top_p with one beam"
        )
    # Only what acts: the library warns of anything else that is set.
    settings: dict[str, Any] = {}
    if num_beams > 1:
        settings |= {"length_penalty": length_penalty, "early_stopping": False}
    if top_p is not None:  # top_k=0: of the whole vocabulary; the library's default is 50
        settings |= {"do_sample": True, "top_p": top_p, "temperature": temperature, "top_k": 0}
    return GenerationConfig(
        bos_token_id=start_id,
        eos_token_id=end_id,
        pad_token_id=PAD,
        max_length=max_length,
        min_length=min_length,
        num_beams=num_beams,
        num_return_sequences=num_captions,
        repetition_penalty=repetition_penalty,
        use_cache=False,
        **settings,
    )


@torch.no_grad()
def search(decode: Decode, query_kv: list[KeyValue], config: GenerationConfig) -> Tensor:
    """Captions of B images.

    Args:
        decode: the decoder.
        query_kv: of the B images.
        config: from `search_config`.

    Returns:
        int64 [B * N, <= max_length]: [DEC], the caption, [SEP], then [PAD]; an image's captions
        stand together, best first where beams were searched.
    """
    stacked = stack(query_kv)
    start = torch.full((len(stacked), 1), config.bos_token_id, device=stacked.device)
    captioner: Any = Captioner(decode, stacked.device)  # the mixin's annotations fit no class
    ids = captioner.generate(start, config, query_kv=stacked)
    # Beams are padded with [SEP], because the library takes the id 0 for none given.
    end = ids == config.eos_token_id
    return ids.masked_fill(end.cumsum(dim=1) > end.long(), PAD)


def stack(query_kv: list[KeyValue]) -> Tensor:
    """One tensor [B, layers, 2, H, Q, Dh], whose rows the library can repeat."""
    return torch.stack([torch.stack(kv, dim=1) for kv in query_kv], dim=1)


def unstack(stacked: Tensor) -> list[KeyValue]:
    """The inverse of `stack`, without a copy."""
    return [(kv[:, 0], kv[:, 1]) for kv in stacked.unbind(dim=1)]


class Captioner(PreTrainedModel, GenerationMixin):
    """What the library searches over: it holds no parameters, only a function; made per call.

    Args:
        decode: the decoder.
        device: on which it works.
    """

    def __init__(self, decode: Decode, device: torch.device) -> None:
        super().__init__(PreTrainedConfig())
        self.decode = decode
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where ids and keys lie; the library would look at the parameters."""
        return self._device

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, query_kv: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Whole prefixes, for want of a cache."""
        return {"input_ids": input_ids, "query_kv": query_kv}

    def forward(self, input_ids: Tensor, query_kv: Tensor, return_dict: bool = True) -> Any:
        """Ids [R, T] and stacked keys and values of R rows -> logits [R, 1, V]."""
        return CausalLMOutput(logits=self.decode(input_ids, unstack(query_kv))[:, None])
