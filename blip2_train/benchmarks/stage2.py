"""A step of stage 2, ours and the reference's (`textbook_stage2.py`), in one run on one device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blip2_train.benchmarks.presets import SMALL, Preset, find_device, record_head
from blip2_train.benchmarks.sides import OURS
from blip2_train.benchmarks.step import (
    CAPTIONS,
    Mark,
    StepBench,
    random_images,
    run_steps,
    tower_name,
)
from blip2_train.benchmarks.textbook_stage2 import textbook_queries, textbook_stage2_step
from blip2_train.data.batch import text_bucket
from blip2_train.data.language_parts import LEAST, text_parts
from blip2_train.distributed import World
from blip2_train.models import lm_weights
from blip2_train.models.freezing import count_parameters
from blip2_train.models.language import LanguageModel
from blip2_train.models.stage2 import Blip2Stage2
from blip2_train.training.stage2 import stage2_step

# Language models for processors; their heads take as large a part of the arithmetic as OPT-2.7B's.
SMALL_OPT = (
    "language_model.dtype=float32",
    "language_model.config={model_type: opt, hidden_size: 384, word_embed_proj_dim: 384,"
    " num_hidden_layers: 6, num_attention_heads: 6, ffn_dim: 1536, vocab_size: 2048}",
)
SMALL_T5 = (
    "language_model.dtype=float32",
    "language_model.config={model_type: t5, d_model: 384, d_kv: 64, d_ff: 1024, num_layers: 4,"
    " num_decoder_layers: 4, num_heads: 6, feed_forward_proj: gated-gelu, vocab_size: 2048,"
    " tie_word_embeddings: false}",
)
PRESETS = {
    "small": Preset("stage2_vitg_opt2_7b", 16, (*SMALL, *SMALL_OPT)),
    "small_t5": Preset("stage2_vitg_flant5xl", 16, (*SMALL, *SMALL_T5)),
    "vitg_opt2_7b": Preset("stage2_vitg_opt2_7b", 128),
    "vitg_flant5xl": Preset("stage2_vitg_flant5xl", 128),
}
# Nothing is downloaded; the language model's class stands below.
FIXED = (
    "vision.weights=random",
    "language_model.weights=random",
    "language_model._target_=blip2_train.benchmarks.stage2.MadeUpLanguageModel",
)
QUANTIZED = {"loss": 2e-2, "gradient": 1e-1}  # tolerance where weights cannot be had in float32


def run(
    preset: str,
    batch: int | None,
    device: str,
    rounds: int,
    overrides: Sequence[str],
    *,
    loader: bool = False,
) -> list[dict[str, Any]]:
    """Measure and print a table.

    Args:
        preset: of `PRESETS`.
        batch: samples, None: the preset's.
        device: "cpu", "cuda" or "auto".
        rounds: steps of each side that are measured.
        overrides: further `key=value` of the configuration.
        loader: feed steps in a row from the configuration's data, not from memory.

    Returns:
        One record.

    Raises:
        UserError: an impossible configuration or device.
    """
    found, where = PRESETS[preset], find_device(device)
    cfg = found.compose(overrides, *FIXED)
    bench = Bench(cfg, batch or found.batch, where)
    words = [*found.overrides, *overrides]
    head = record_head(f"stage2 {preset}", where, words, "timm", "transformers", "torchao")
    return run_steps(bench, head, rounds, loader=loader)


class MadeUpLanguageModel(LanguageModel):
    """Random weights drawn on the device and in the dtype that they are used in.

    Billions of them are there in seconds, and what they are does not matter here.
    """

    def _build(
        self,
        config: Mapping[str, Any] | None,
        dtype: torch.dtype,
        seed: int,
        device: torch.device | None,
    ) -> PreTrainedModel:
        if config is None or self.quantization is not None:
            return super()._build(config, dtype, seed, device)
        settings = lm_weights.parse_config(config)
        lm_weights.check_dtype(settings, dtype, device)
        return lm_weights.random_model(settings, seed, dtype=dtype, device=device or "cpu")


class Bench(StepBench):
    """See `StepBench`. The step's phases are `qformer` and `language model`."""

    model: Blip2Stage2
    counted = 4 * LEAST  # so that they make four parts

    def build_model(self) -> Blip2Stage2:
        """Image tower, Q-Former, projection and language model."""
        model: Blip2Stage2 = self.stage.build_model(shapes_only=True, device=self.device)
        if model.language_model.quantization is not None:
            self.tolerance = QUANTIZED
        return model

    def shapes(self) -> dict[str, Any]:
        """Of the batch and the model."""
        vision, qformer, lm = self.model.vision, self.model.qformer, self.model.language_model
        return {
            "batch": self.batch,
            "tokens": vision.num_tokens,
            "width": vision.width,
            "hidden": qformer.hidden_size,
            "layers": len(qformer.layers),
            "queries": qformer.num_query_tokens,
            "language_model": lm.lm.config.model_type,
            "language_width": lm.width,
            "language_parameters": count_parameters(lm.parameters(), trainable=False),
            "vocabulary": lm.vocab_size,
            "text": self.cfg["text"]["max_tokens"],
            "captions": list(CAPTIONS),
            "precision": self.cfg["trainer"]["precision"],
            "tower": tower_name(vision),
            "language": lm.quantization or str(lm.dtype).removeprefix("torch."),
        }

    def made_up(self, samples: int, seed: int) -> dict[str, Any]:
        """Random images and captions of 8 to 26 tokens, on the device.

        An encoder-decoder is given the front of each, cut at random, and says the rest. Under
        `textbook` stands the text as the reference pads it.
        """
        generator = torch.Generator().manual_seed(seed)
        longest = self.cfg["text"]["max_tokens"]
        low, high = (min(length, longest) for length in CAPTIONS)
        lengths = torch.randint(low, high + 1, (samples,), generator=generator)
        if not self.model.language_model.is_encoder_decoder:
            batch, textbook = self._texts(lengths, generator, "input_ids", "attention_mask")
        else:
            share = torch.rand(samples, generator=generator)
            read = 1 + (share * (lengths - 1)).long()  # its end token included
            batch, textbook = self._texts(read, generator, "input_ids", "attention_mask")
            said = self._texts(lengths - read + 1, generator, "target_ids", "target_mask")
            batch, textbook = {**batch, **said[0]}, {**textbook, **said[1]}
        ids, mask = list(batch.values())[-2:]
        index = mask.flatten().nonzero().squeeze(1)
        batch |= {"lm_index": index, "lm_targets": ids.flatten()[index]}
        parts = text_parts(batch, self.cfg["text"]["parts"], self.cfg["text"]["bucket"])
        image = random_images(self.model.vision, samples, seed)
        return {
            **self._moved({"image": image, **batch}),
            "parts": [self._moved(part) for part in parts],
            "textbook": self._moved(textbook),
        }

    def _texts(
        self, lengths: Tensor, generator: torch.Generator, ids: str, mask: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Random tokens and their mask, as our loader pads them and as the reference does."""
        settings, longest = self.cfg["text"], int(lengths.max())
        width = text_bucket(longest, settings["bucket"], settings["max_tokens"])
        seen = (torch.arange(width) < lengths[:, None]).long()
        words = self.model.language_model.vocab_size
        tokens = torch.randint(3, words, seen.shape, generator=generator) * seen
        ours = {ids: tokens, mask: seen}
        return ours, {name: tensor[:, :longest] for name, tensor in ours.items()}

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def step(
        self, side: str, features: Tensor, batch: dict[str, Any], mark: Mark
    ) -> dict[str, Tensor]:
        """The projection begins what the language model takes."""

        def at_projection(*_: Any) -> None:
            handle.remove()  # there may be several parts, and this ends but one phase
            mark("qformer")

        handle = self.model.lm_proj.register_forward_pre_hook(at_projection)
        if side == OURS:
            out = stage2_step(self.model, features, batch, "global", World())
        else:
            out = textbook_stage2_step(self.model, features, batch["textbook"])
        mark("language model")
        return out

    def trained_flops(self, side: str, features: Tensor, batch: dict[str, Any]) -> dict[str, int]:
        """Of the Q-Former, and of projection and language model."""

        def queries() -> None:
            with self.autocast():
                if side == OURS:
                    out = self.model.encode_image(self.model.qformer.project_image(features))
                else:
                    out = textbook_queries(self.model, features)
            out.sum().backward()

        qformer = self.count(queries)
        whole = self.count(lambda: self.losses(side, features, batch)["loss"].backward())
        return {"qformer": qformer, "language model": whole - qformer}

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """The language model's weights are float32 inside, unless they are quantized."""
        language_model = self.model.language_model
        usual = language_model.dtype
        if language_model.quantization is not None:
            yield
            return
        lm_weights.cast(language_model.lm, torch.float32)
        yield
        lm_weights.cast(language_model.lm, usual)
