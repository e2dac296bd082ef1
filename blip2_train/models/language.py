"""The frozen language model: any decoder-only or encoder-decoder model of transformers.

It reads embeddings, so that projected queries can stand where token embeddings would.

Shapes:
    B  rows          T  positions of the input      S  positions of the decoder's input
    Dl width of its token embeddings                V  vocabulary
    M  positions whose logits are wanted
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from blip2_train.errors import UserError
from blip2_train.models import lm_identity, lm_weights
from blip2_train.models.cross_entropy import frozen_cross_entropy_sum
from blip2_train.models.freezing import Frozen, state_digest
from blip2_train.models.lm_head import find_head, target_logits, target_states
from blip2_train.models.lm_linear import let_gradients_through, use_fast_products
from blip2_train.models.lm_masks import find_form, mask_inputs, window
from blip2_train.models.lm_weights import download, random_model

__all__ = ["LanguageModel", "download", "random_model"]

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LanguageModel(Frozen):
    """A language model as a frozen function of embeddings, with gradients to its input.

    On the meta device nothing is drawn or loaded, and where `config` is given nothing is read.

    Args:
        name: folder of a model (config.json, safetensors), or an id of the Hugging Face hub, with
            "@revision" where wanted; None where `config` says all.
        config: "model_type" and what deviates from that type's defaults. Random weights are built
            from it; with pretrained ones it documents their sizes and is checked against them.
        weights: "pretrained" or "random" (drawn from `seed`).
        dtype: "bfloat16", "float16" or "float32", of weights that are not quantized and of
            activations.
        quantization: None, "torchao_int8", "torchao_int4", "bitsandbytes_int8" or
            "bitsandbytes_nf4": how the weights of linear layers are stored.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its
            activations. Losses and gradients stay the same.
        seed: of the random weights: they are not in checkpoints, so each start draws them again.
        device: where weights are loaded to, without a copy on the host if `accelerate` is there.

    Attributes:
        lm: the model of transformers.
        is_encoder_decoder: whether the input goes to an encoder, and a decoder predicts.
        width: of token embeddings (Dl).
        vocab_size: columns of the logits (V).
        max_positions: longest input, where the model has a limit.
        decoder_start_token_id: stands in front of what the decoder predicts.

    Raises:
        UserError: the model or the weights cannot be had, or not in this dtype or quantization.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        weights: str = "pretrained",
        dtype: str = "bfloat16",
        quantization: str | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_choice("weights", weights, ["pretrained", "random"])
        _check_choice("dtype", dtype, list(DTYPES))
        _check_choice("quantization", quantization, [None, *lm_weights.QUANTIZATIONS])
        if name is None and (config is None or weights == "pretrained"):
            raise UserError(
                "language_model.name is missing: give a folder or a hub id, or a "
                "language_model.config with language_model.weights=random"
            )
        if quantization is not None:
            lm_weights.check_packages(quantization)
        self.name: str = name if name is not None else str((config or {}).get("model_type"))
        self.weights = weights
        self.quantization = quantization
        self._folder: Path | None = None
        self._digest = ""
        target = None if device is None else torch.device(device)
        if lm_weights.on_meta() or weights == "random":
            self.lm = self._build(config, DTYPES[dtype], seed, target)
        else:
            self.lm = self._load(config, DTYPES[dtype], target)

        settings = self.lm.config
        self.is_encoder_decoder: bool = settings.is_encoder_decoder
        self.width: int = self._table.embedding_dim
        head = self.lm.get_output_embeddings()
        self.vocab_size: int = getattr(head, "out_features", settings.vocab_size)
        self.max_positions: int | None = getattr(settings, "max_position_embeddings", None)
        self.decoder_start_token_id = _decoder_start(self.lm)
        self.lm.generation_config = GenerationConfig()  # what a model's authors like is no default
        self.freeze()
        use_fast_products(self.lm)
        if quantization == "torchao_int4":
            let_gradients_through(self.lm)
        self.gradient_checkpointing = gradient_checkpointing
        for module in self.lm.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.forward = functools.partial(self._run_block, module.forward)
        self._head_form = "states"
        self._mask_form = "rows"
        self._window = window(self.lm)
        if not lm_weights.on_meta():
            self._head_form = find_head(self.lm, self.name)
            self._mask_form = find_form(self.lm, self._window)

    def _build(
        self,
        config: Mapping[str, Any] | None,
        dtype: torch.dtype,
        seed: int,
        device: torch.device | None,
    ) -> PreTrainedModel:
        if config is not None:
            settings = lm_weights.parse_config(config)
        else:
            settings = lm_weights.published_config(self.name)
        lm_weights.check_dtype(settings, dtype, device)
        lm = random_model(settings, seed)
        if lm_weights.on_meta():
            lm_weights.cast(lm, dtype)
            return lm
        weights = state_digest(lm.state_dict())  # before any rounding
        self._digest = lm_identity.with_architecture(weights, lm.config.to_diff_dict())
        if self.quantization is not None:
            return lm_weights.quantize(
                self.name, lm, dtype=dtype, quantization=self.quantization, device=device
            )
        lm_weights.cast(lm, dtype)
        return lm if device is None else nn.Module.to(lm, device)

    def _load(
        self, config: Mapping[str, Any] | None, dtype: torch.dtype, device: torch.device | None
    ) -> PreTrainedModel:
        self._folder = lm_weights.download(self.name)
        published = lm_weights.published_config(self.name, self._folder)
        if config is not None:
            lm_weights.check_config(self.name, config, published)
        lm_weights.check_dtype(published, dtype, device)
        return lm_weights.load_model(
            self.name, self._folder, dtype=dtype, quantization=self.quantization, device=device
        )

    def _run_block(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """One block, recomputed in the backward pass while `gradient_checkpointing` is set.

        The library does so in training mode only, in which a frozen model would drop activations.
        """
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # nothing is drawn in eval mode, so there is no random state to bring back
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self._table.weight.dtype

    @property
    def _table(self) -> nn.Embedding:
        return self.lm.get_input_embeddings()  # type: ignore[return-value]

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings as the model's first layer takes them: [...] ids -> [..., Dl]."""
        return self._table(ids)

    def logits(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        index: Tensor,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits at some positions; the large product with the word table is made for them alone.

        Computed in the model's dtype, outside autocast; the gradient reaches `inputs_embeds`.

        Args:
            inputs_embeds: [B, T, Dl]; of a decoder-only model, padded on the right.
            attention_mask: int64 [B, T], 1 = visible.
            index: int64 [M], positions b * T + t, or b * S + s of an encoder-decoder.
            decoder_input_ids: int64 [B, S] of an encoder-decoder.
            decoder_attention_mask: int64 [B, S].

        Returns:
            [M, V]: what stands after position t (s) according to the model.
        """
        inputs = self._inputs(
            inputs_embeds, attention_mask, decoder_input_ids, decoder_attention_mask
        )
        with torch.autocast(inputs_embeds.device.type, enabled=False):
            return self._logits(index, inputs)

    def loss_sum(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        index: Tensor,
        targets: Tensor,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of `logits` against the tokens that stand there, summed over them.

        A few positions' logits are in memory at a time, in float32; see `frozen_cross_entropy_sum`.

        Args:
            inputs_embeds: as all but the next of `logits`.
            attention_mask: int64 [B, T].
            index: int64 [M].
            targets: int64 [M], the tokens to predict.
            decoder_input_ids: int64 [B, S].
            decoder_attention_mask: int64 [B, S].

        Returns:
            Scalar, nats.
        """
        inputs = self._inputs(
            inputs_embeds, attention_mask, decoder_input_ids, decoder_attention_mask
        )
        with torch.autocast(inputs_embeds.device.type, enabled=False):
            if self._head_form == "states":
                states, head = (
                    target_states(self.lm, index, **inputs),
                    self.lm.get_output_embeddings(),
                )
            else:  # what follows the head cannot be had without it
                states, head = self._logits(index, inputs), nn.Identity()
            return frozen_cross_entropy_sum(head, states, targets)

    def _inputs(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
    ) -> dict[str, Any]:
        """Arguments of the library's forward."""
        fits = self._window is None or inputs_embeds.shape[1] <= self._window
        inputs: dict[str, Any] = {
            "inputs_embeds": inputs_embeds.to(self.dtype),
            **mask_inputs(
                self._mask_form if fits else "rows",
                attention_mask,
                decoder_attention_mask,
                encoder_decoder=self.is_encoder_decoder,
            ),
        }
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = decoder_input_ids
        return inputs

    def _logits(self, index: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if self._head_form == "whole":
            return self.lm(**inputs, use_cache=False).logits.flatten(0, 1)[index]
        return target_logits(self.lm, index, **inputs)

    @torch.no_grad()
    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        *,
        end_token_id: int,
        pad_token_id: int,
        max_new_tokens: int = 30,
        min_new_tokens: int = 1,
        num_beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        num_captions: int = 1,
    ) -> Tensor:
        """Continues sequences: greedy, by beam search, or sampled.

        Args:
            inputs_embeds: [B, T, Dl]; of a decoder-only model, padded on the left.
            attention_mask: int64 [B, T], 1 = visible.
            end_token_id: ends a sequence.
            pad_token_id: stands behind the end.
            max_new_tokens: tokens, the end included.
            min_new_tokens: tokens before the end may stand.
            num_beams: sequences that are kept side by side; 1: greedy, or plain sampling.
            top_p: None: the most likely; otherwise each token is drawn, with torch's global
                generator, from the fewest that have this probability together (nucleus sampling).
            temperature: divides the logits that are drawn from; acts with `top_p` only.
            length_penalty: of beams: a sequence scores its summed log-probability divided by its
                length to this power.
            repetition_penalty: > 1 makes tokens that were generated before less likely.
            num_captions: per row; its best beams (no more than `num_beams`), or as many draws.

        Returns:
            int64 [B * num_captions, <= max_new_tokens], new tokens only; a row's stand together.

        Raises:
            UserError: there is no search for so many captions, or a setting is out of range.
        """
        if num_captions > num_beams and (top_p is None or num_beams > 1):
            raise UserError(
                f"num_captions={num_captions} is more than num_beams={num_beams} can give; raise "
                "num_beams, or sample with top_p and one beam"
            )
        try:
            settings = GenerationConfig(
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                num_beams=num_beams,
                do_sample=top_p is not None,
                length_penalty=length_penalty,
                repetition_penalty=repetition_penalty,
                num_return_sequences=num_captions,
                eos_token_id=end_token_id,
                pad_token_id=pad_token_id,
                decoder_start_token_id=self.decoder_start_token_id,
                # the library's default of 50 candidates would cut the nucleus
                **(
                    {}
                    if top_p is None
                    else {"top_p": top_p, "top_k": 0, "temperature": temperature}
                ),
            )
            with torch.autocast(inputs_embeds.device.type, enabled=False):
                ids = self.lm.generate(  # type: ignore[operator]
                    inputs_embeds=inputs_embeds.to(self.dtype),
                    attention_mask=attention_mask,
                    generation_config=settings,
                )
        except ValueError as error:  # the library's checks of each setting
            reason = str(error).splitlines()[0]
            raise UserError(f"captions cannot be searched with these settings: {reason}") from error
        return ids[:, 1:] if self.is_encoder_decoder else ids

    def identity(self) -> dict[str, str]:
        """What a checkpoint records in place of the weights: name, revision, weights, digest.

        The digest is over the weight files, or over random weights before they were rounded, and
        over the configuration, as far as it changes what is computed.
        """
        revision = ""
        if self._folder is not None:
            self._digest = self._digest or lm_identity.files_digest(self._folder)
            if self._folder.parent.name == "snapshots":  # of the hub's cache
                revision = self._folder.name
        return {
            "name": self.name,
            "revision": revision,
            "weights": self.weights,
            "digest": self._digest,
        }


def _check_choice(key: str, value: str | None, allowed: list[Any]) -> None:
    if value not in allowed:
        choices = ", ".join("null" if choice is None else choice for choice in allowed)
        raise UserError(f"language_model.{key}={value} is not one of {choices}")


def _decoder_start(lm: PreTrainedModel) -> int | None:
    if not lm.config.is_encoder_decoder:
        return None
    places = [lm.config, lm.generation_config]
    found = [getattr(place, "decoder_start_token_id", None) for place in places]
    found.append(lm.config.pad_token_id)  # T5's, which its configuration leaves unsaid
    token = next((token for token in found if token is not None), None)
    if token is None:
        raise UserError(
            "language_model: nothing says what the decoder starts with; set "
            "language_model.config.decoder_start_token_id"
        )
    return token
