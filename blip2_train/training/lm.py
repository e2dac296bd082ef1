"""Stage 0, `lm`: a small causal language model of one's own, trained on captions alone."""

import functools
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blip2_train import losses
from blip2_train.checkpoint.initial import init_from
from blip2_train.config import BatchPlan
from blip2_train.data.language import (
    LanguageTokenizer,
    decode,
    encode_prompts,
    load_language_tokenizer,
)
from blip2_train.data.language_batch import collate_documents, collate_eval_documents
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World, all_reduce_sum
from blip2_train.errors import UserError
from blip2_train.models.language import random_model
from blip2_train.models.lm_head import target_logits
from blip2_train.models.lm_masks import find_form, mask_inputs
from blip2_train.models.lm_weights import save_model
from blip2_train.seeding import stable_hash
from blip2_train.training.meter import Level, Meter, describe_losses
from blip2_train.training.module import StageModule
from blip2_train.training.objectives import mean_losses
from blip2_train.training.stage import Stage
from blip2_train.training.validation import Evaluator, Findings

log = logging.getLogger(__name__)


def lm_loss_sum(
    model: PreTrainedModel, batch: Mapping[str, Any], mask_form: str = "rows"
) -> Tensor:
    """Cross-entropy of each token given those before it, summed over a batch of documents.

    Args:
        model: causal language model.
        batch: `input_ids` and `attention_mask` int64 [B, T], right-padded; `lm_index` int64 [M],
            flat positions of the tokens to predict; `lm_targets` int64 [M], these tokens.
        mask_form: how the model is told what is padding, see `lm_masks`.
    """
    logits = target_logits(
        model,
        batch["lm_index"] - 1,  # each token is predicted from the one before
        input_ids=batch["input_ids"],
        **mask_inputs(mask_form, batch["attention_mask"]),
    )
    return losses.lm_loss_sum(logits, batch["lm_targets"], smoothing=0.0)


class LmModule(StageModule):
    """The step of `lm`.

    Args:
        model: causal language model.
        normalise: "global" or "rank", see `mean_losses`.
        common: see `StageModule`.
    """

    def __init__(self, model: PreTrainedModel, *, normalise: str, **common: Any) -> None:
        super().__init__(model, meter=Meter(("loss_lm",)), **common)
        self.normalise = normalise
        self.vocabulary = model.config.vocab_size
        self.mask_form = find_form(model)

    def step(self, batch: dict[str, Any], step: int, part: int, world: World) -> dict[str, Tensor]:
        """Loss per token of one batch of documents."""
        total = lm_loss_sum(self.model, batch, self.mask_form)
        count = torch.full((), len(batch["lm_targets"]), device=total.device)
        out = mean_losses({"loss_lm": total}, {"loss_lm": count}, self.normalise, world)
        return {"loss": out["loss_lm"], **out}

    def levels(self, contrastive: float) -> dict[str, Level]:
        """Chance: every token is as likely as any other."""
        return {"loss_lm": Level(*losses.choice_levels(self.vocabulary, 0.0))}

    def rehearsal_batch(self, samples: int = 2, longest: int | None = None) -> dict[str, Any]:
        """Documents of random words."""
        return made_up_documents(self.vocabulary, samples, longest or self.usual_tokens)

    def rehearsal_loss(self) -> Tensor:
        """Loss of that batch."""
        return lm_loss_sum(self.model, self.rehearsal_batch())


class LmStage(Stage):
    """The parts of `lm`."""

    product = "model"

    @functools.cached_property
    def text(self) -> LanguageTokenizer:
        """The model's tokenizer."""
        settings = self.cfg["causal_lm"]
        return load_language_tokenizer(settings["tokenizer"], settings["end"], "causal_lm")

    def tokenizers(self) -> dict[str, Any]:
        """The model's."""
        return {"tokenizer": self.text}

    def build_model(
        self, *, shapes_only: bool = False, device: torch.device | None = None
    ) -> PreTrainedModel:
        """A model of `causal_lm.config` with this tokenizer's vocabulary."""
        config = dict(self.cfg["causal_lm"]["config"] or {})
        if not (shapes_only and "vocab_size" in config):
            config |= {
                "vocab_size": len(self.text.tokenizer),
                "bos_token_id": self.text.start_id,
                "eos_token_id": self.text.end_id,
                "pad_token_id": self.text.pad_id,
            }
        model = random_model(config, stable_hash("weights", self.cfg["seed"]), "causal_lm")
        if model.config.is_encoder_decoder:
            raise UserError(
                f"causal_lm.config.model_type={config['model_type']} is an encoder-decoder; `lm` "
                "trains decoder-only models, such as opt or llama"
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and self.cfg["text"]["max_tokens"] > longest:
            raise UserError(
                f"text.max_tokens={self.cfg['text']['max_tokens']} exceeds "
                f"causal_lm.config.max_position_embeddings={longest}; lower it"
            )
        return model

    def initialise(self, model: PreTrainedModel) -> None:
        """From `init_from`, or at random."""
        if self.cfg["init_from"] is not None:
            account = init_from(model, Path(self.cfg["init_from"]), ())
            log.info("init_from=%s: %s", self.cfg["init_from"], account)

    def build_module(self, model: PreTrainedModel, batch: BatchPlan) -> LmModule:
        """The Lightning module."""
        return LmModule(model, normalise=self.cfg["loss"]["normalise"], **self.common(batch))

    def image_size(self, model: PreTrainedModel) -> None:
        """Images are not even decoded."""
        return None

    def collate(self) -> Any:
        """Puts documents of training captions together."""
        return functools.partial(collate_documents, **self._documents())

    def collate_eval(self) -> Any:
        """Puts documents of validation captions together."""
        prompt = self.cfg["data"]["prompt"]
        return functools.partial(collate_eval_documents, prompt=prompt, **self._documents())

    def build_evaluator(self, module: StageModule, images: EvalStream) -> Evaluator:
        """Loss per token."""
        return LmEvaluator(module, self.text, self.cfg["validation"], self.cfg["seed"])

    def export(self, model: PreTrainedModel, path: Path) -> None:
        """The model and its tokenizer as a Hugging Face folder, for `language_model.name`."""
        temporary = path.with_name(f".{path.name}.tmp")
        for folder in (temporary, path):  # the first may be left of a start that was killed
            shutil.rmtree(folder, ignore_errors=True)
        save_model(model, temporary)
        self.text.tokenizer.save_pretrained(temporary)
        temporary.rename(path)
        log.info("the model is in %s: language_model.name=%s", path, path)

    def _documents(self) -> dict[str, Any]:
        settings = self.cfg["text"]
        return {
            "text": self.text,
            "max_text_tokens": settings["max_tokens"],
            "bucket": settings["bucket"],
        }


class LmEvaluator(Evaluator):
    """Loss per token over all documents, and some captions made up by the model.

    Args:
        module: being trained.
        text: its tokenizer.
        settings: `samples` of the configuration.
        seed: of the made-up captions.
    """

    def __init__(
        self,
        module: StageModule,
        text: LanguageTokenizer,
        settings: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.module = module
        self.text = text
        self.samples = settings["samples"]
        self.seed = seed

    def start(self) -> None:
        """Forgets the validation before."""
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.module.device)

    def add(self, number: int, batch: dict[str, Any]) -> None:
        """Takes in one batch."""
        total = lm_loss_sum(self.module.model, batch).double()
        self.sums += torch.stack([total, torch.full_like(total, len(batch["lm_targets"]))])

    def finish(self, world: World) -> Findings:
        """Sums up."""
        total, tokens = all_reduce_sum(self.sums, world).tolist()
        loss = total / tokens
        metrics = {"loss": loss, "loss_lm": loss, "perplexity": math.exp(min(50.0, loss))}
        lines = [
            f"{describe_losses(metrics, self.module.levels(1))}  "
            f"perplexity {metrics['perplexity']:.2f}"
        ]
        if world.rank == 0:
            lines += [f"writes: {caption}" for caption in self._made_up()]
        return Findings(metrics, -loss, lines)

    def _made_up(self) -> list[str]:
        count = min(4, self.samples)
        start, mask = encode_prompts([""] * count, self.text, encoder=False)
        if not start.numel():
            return []  # nothing to begin with: the tokenizer has no start token
        device = self.module.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            ids = self.module.model.generate(
                start.to(device),
                attention_mask=mask.to(device),
                do_sample=True,
                top_p=0.9,
                max_new_tokens=30,
                eos_token_id=self.text.end_id,
                pad_token_id=self.text.pad_id,
            )
        return decode(ids[:, start.shape[1] :], self.text)


def made_up_documents(words: int, samples: int, length: int) -> dict[str, Any]:
    """Random documents, the same at every call.

    Args:
        words: rows of the word table.
        samples: of the batch.
        length: tokens of each.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(words, 100), (samples, length), generator=generator)
    index = (torch.arange(samples)[:, None] * length + torch.arange(1, length)).flatten()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "lm_index": index,
        "lm_targets": ids.flatten()[index],
    }
