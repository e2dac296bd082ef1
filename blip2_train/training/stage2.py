"""Stage 2: the Q-Former's queries as a soft prompt of a frozen language model (section 3.3)."""

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2_train import losses
from blip2_train.checkpoint.initial import init_from
from blip2_train.config import BatchPlan
from blip2_train.data.language import (
    LanguageTokenizer,
    encode_prompts,
    load_language_tokenizer,
)
from blip2_train.data.language_batch import (
    collate_causal,
    collate_eval_causal,
    collate_eval_seq2seq,
    collate_seq2seq,
)
from blip2_train.data.language_parts import collate_in_parts
from blip2_train.data.question_batch import ask, collate_eval_questions, collate_questions
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World
from blip2_train.errors import UserError
from blip2_train.models import language
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage2 import Blip2Stage2, Question, question_of
from blip2_train.training.build import (
    build_text_tokenizer,
    build_vision,
    frozen_tower,
    initialise_qformer,
    instantiate_group,
    log_account,
    seed_weights,
)
from blip2_train.training.float8 import start_tower
from blip2_train.training.meter import Level, Meter
from blip2_train.training.module import StageModule
from blip2_train.training.objectives import mean_losses
from blip2_train.training.stage import Stage
from blip2_train.training.validation_stage2 import Stage2Evaluator

log = logging.getLogger(__name__)

TEXT_SIDE = r"qformer\.((word_embeddings|position_embeddings|lm_head)|layers\.\d+\.text_ffn)\."
# Of these, what writes captions in stage 1: nothing here reads it, and a checkpoint may lack it.
UNREAD = "qformer.lm_head."
# Weights of stage 1 that stage 2 has no use for, and why.
LEFT_BEHIND = {
    TEXT_SIDE: "text side of the Q-Former",
    r"(vision_proj|text_proj|itm_head)\.|temp$": "head of stage 1",
}


def stage2_step(
    model: Blip2Stage2,
    image_embeds: Tensor,
    batch: Mapping[str, Any],
    normalise: str,
    world: World,
) -> dict[str, Tensor]:
    """Loss of the captions, given their images.

    Args:
        model: the stage-2 model.
        image_embeds: [B, P, Dv] tokens of the tower.
        batch: the text as `Blip2Stage2.text_loss_sum` takes it, or under `parts` such texts of
            some rows each, see `text_parts`; of questions also `question_ids` and `question_mask`.
        normalise: "global" or "rank", see `mean_losses`.
        world: the ranks.

    Returns:
        `loss` and `loss_lm`, the same scalar, nats per token; `query_output` [B, Q, D].
    """
    query_output = model.encode_image(model.qformer.project_image(image_embeds), question_of(batch))
    parts = batch.get("parts", [{**batch, "rows": slice(None)}])
    total = torch.stack(
        [model.text_loss_sum(query_output[part["rows"]], part) for part in parts]
    ).sum()
    count = torch.full((), len(batch["lm_targets"]), device=total.device)
    out = mean_losses({"loss_lm": total}, {"loss_lm": count}, normalise, world)
    return {"loss": out["loss_lm"], "query_output": query_output, **out}


class Stage2Module(StageModule):
    """The step of stage 2.

    Args:
        model: with its frozen parts frozen.
        normalise: see `stage2_step`.
        prefix: `text.prefix`: what of a caption an encoder may have to read.
        questions: of so many word pieces at most, which the Q-Former reads; None: it reads none.
        common: see `StageModule`.
    """

    def __init__(
        self,
        model: Blip2Stage2,
        *,
        normalise: str,
        prefix: str = "none",
        questions: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(model, meter=Meter(("loss_lm",)), **common)
        self.normalise = normalise
        self.prefix = prefix
        self.questions = questions
        self.vocabulary = model.language_model.vocab_size

    def step(self, batch: dict[str, Any], step: int, part: int, world: World) -> dict[str, Tensor]:
        """Loss of one micro-batch."""
        return stage2_step(self.model, batch["image_tokens"], batch, self.normalise, world)

    def image_tokens(self, image: Tensor) -> Tensor:
        """Of the tower."""
        return self.model.vision(image)

    def levels(self, contrastive: float) -> dict[str, Level]:
        """Chance: every token is as likely as any other."""
        return {"loss_lm": Level(*losses.choice_levels(self.vocabulary, 0.0))}

    def rehearsal_batch(self, samples: int = 2, longest: int | None = None) -> dict[str, Any]:
        """Blank images with made-up text."""
        image = self.model.vision.made_up(samples)
        # the longest of split captions and the longest of their rests may both be whole captions
        length = longest or self.usual_tokens
        whole = self.prefix == "random_split" or self.questions is not None
        read = longest if longest and whole else 2
        text = made_up_text(self.model.language_model, samples, length, read)
        if self.questions is None:
            return {"image": image, **text}
        asked = made_up_question(samples, self.questions if longest else 2)
        return {"image": image, **text, "question_ids": asked[0], "question_mask": asked[1]}

    def rehearsal_loss(self) -> Tensor:
        """All that is trained stands before the language model, which is left out."""
        parameter = self.model.lm_proj.weight
        tokens = torch.randn(2, 3, self.model.vision.width).to(parameter)
        question = None
        if self.questions is not None:
            ids, mask = made_up_question(2, 3)
            question = ids.to(parameter.device), mask.to(parameter.device)
        query_output = self.model.encode_image(self.model.qformer.project_image(tokens), question)
        return self.model.lm_proj(query_output).sum()


class Stage2(Stage):
    """The parts of stage 2."""

    frozen_prefixes = ("vision.", "language_model.")

    @functools.cached_property
    def text(self) -> LanguageTokenizer:
        """The language model's tokenizer."""
        settings = self.cfg["language_model"]
        return load_language_tokenizer(settings["tokenizer"], settings["end"])

    @property
    def asks(self) -> bool:
        """Whether questions are trained on, which the Q-Former reads."""
        return self.cfg["data"].get("text") == "questions"  # a key that older checkpoints lack

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The Q-Former's, of questions; None where it reads none."""
        if not self.asks:
            return None
        settings = {"tokenizer": self.cfg["text"]["tokenizer"]}
        return build_text_tokenizer({**settings, "vocab_size": self.cfg["model"]["vocab_size"]})

    @functools.cached_property
    def language_settings(self) -> dict[str, Any]:
        """Arguments of the language model; a random one takes over the tokenizer's vocabulary."""
        settings = {
            k: v for k, v in self.cfg["language_model"].items() if k not in ("tokenizer", "end")
        }
        config = settings.get("config")
        if settings["weights"] == "random" and config and "vocab_size" not in config:
            settings["config"] = {
                **config,
                "vocab_size": len(self.text.tokenizer),
                "pad_token_id": self.text.pad_id,
                "eos_token_id": self.text.end_id,
            }
        return settings

    def tokenizers(self) -> dict[str, Any]:
        """The language model's, and the Q-Former's where it reads questions."""
        own = {"tokenizer": self.tokenizer} if self.asks else {}
        return {"language model's tokenizer": self.text, **own}

    def download(self) -> None:
        """The language model's weights and tokenizer."""
        super().download()
        settings = self.language_settings
        if settings["weights"] == "pretrained":
            language.download(settings["name"])

    def build_model(
        self, *, shapes_only: bool = False, device: torch.device | None = None
    ) -> Blip2Stage2:
        """Image tower, query side of the Q-Former, projection, language model."""
        settings = dict(self.cfg["qformer"])
        vision = build_vision(self.cfg, self.features, shapes_only=shapes_only)
        language_model = instantiate_group("language_model", self.language_settings, device=device)
        self._check_language_model(language_model, shapes_only)
        del settings["init"]
        keep_text, words = self.cfg["model"]["keep_text"], self.cfg["model"]["vocab_size"]
        if self.asks and (words is None or not shapes_only):
            words = len(self.tokenizer) - 1
        seed_weights(self.cfg["seed"])
        qformer = instantiate_group(
            "qformer",
            settings,
            text=keep_text,
            vocab_size=words + 1 if keep_text else None,
            vision_width=vision.width,
        )
        return Blip2Stage2(vision, qformer, language_model)

    def _check_language_model(self, model: language.LanguageModel, shapes_only: bool) -> None:
        self.encoder_decoder = model.is_encoder_decoder
        if self.cfg["text"]["prefix"] != "none" and not model.is_encoder_decoder:
            raise UserError(
                f"text.prefix={self.cfg['text']['prefix']} splits a caption between encoder and "
                f"decoder, and language_model.name={model.name} has a decoder only; set "
                "text.prefix=none"
            )
        if shapes_only:
            return
        if len(self.text.tokenizer) > model.vocab_size:
            raise UserError(
                f"language_model.tokenizer={self.cfg['language_model']['tokenizer']} has "
                f"{len(self.text.tokenizer)} tokens, the model knows {model.vocab_size}; give the "
                "tokenizer of that model"
            )
        self._check_lengths(model)

    def _check_lengths(self, model: language.LanguageModel) -> None:
        """That queries, prompt and caption fit, in training and in generation."""
        longest = self.cfg["text"]["max_tokens"]
        prompt_text = (
            ask(self.cfg["data"]["prompt"], "") if self.asks else self.cfg["data"]["prompt"]
        )
        asked = encode_prompts([prompt_text], self.text, self.encoder_decoder)[0]
        prompt = asked.shape[1]
        if prompt + (0 if self.encoder_decoder else 2) > longest:
            raise UserError(
                f"text.max_tokens={longest} has no room for a caption behind "
                f"data.prompt={self.cfg['data']['prompt']!r} of {prompt} tokens; raise it"
            )
        queries, said = self.cfg["qformer"]["num_query_tokens"], prompt
        if not self.encoder_decoder and self.cfg["validation"]["every"] is not None:
            said = (longest if self.asks else said) + self.cfg["validation"]["max_new_tokens"]
        needed = queries + max(longest, said)
        if model.max_positions is not None and needed > model.max_positions:
            raise UserError(
                f"language_model.name={model.name} reads {model.max_positions} positions, and "
                f"{queries} queries with text.max_tokens={longest}, or prompt and "
                f"validation.max_new_tokens, need {needed}; lower these"
            )

    def initialise(self, model: Blip2Stage2) -> None:
        """The Q-Former of stage 1; or, for the ablation, of a BERT or at random."""
        if self.cfg["init"] == "checkpoint":
            account = init_from(
                model, Path(self.cfg["init_from"]), self.frozen_prefixes, LEFT_BEHIND
            )
            log_account(self.cfg["init_from"], account)
            lacking = [
                name
                for name in account.missing
                if name.startswith("qformer.") and not name.startswith(UNREAD)
            ]
            text_side = [name for name in lacking if re.match(TEXT_SIDE, name)]
            if text_side and text_side == lacking:
                self._take_text_side(model)
            elif lacking:
                raise UserError(
                    f"init_from={self.cfg['init_from']} lacks {len(lacking)} weights of the "
                    f"Q-Former, the first is {lacking[0]}; set qformer.* as that run had it"
                )
        elif self.cfg["init"] == "bert":
            initialise_qformer(model.qformer, self.cfg["qformer"]["init"])
        else:
            initialise_qformer(model.qformer, "random")

    def _take_text_side(self, model: Blip2Stage2) -> None:
        """What a checkpoint of stage 2 lacks, from one of stage 1."""
        source = self.cfg["init_text_from"]
        if source is None:
            raise UserError(
                f"init_from={self.cfg['init_from']} lacks the text side of the Q-Former, which "
                "model.keep_text=true wants: give a checkpoint of stage 1, or beside one of stage "
                "2 also init_text_from=PATH of the stage 1 that it began with"
            )
        try:
            account = init_from(TextSide(model.qformer), Path(str(source)), (), {"": "not text"})
        except UserError as error:
            raise UserError(str(error).replace("init_from=", "init_text_from=")) from None
        log.info("init_text_from=%s: %s", source, account)
        if lacking := [name for name in account.missing if not name.startswith(UNREAD)]:
            raise UserError(
                f"init_text_from={source} has no {lacking[0]}; give a checkpoint of stage 1"
            )

    def frozen_parts(self, model: Blip2Stage2) -> dict[str, dict[str, str]]:
        """Language model, and image tower where it is frozen."""
        return {
            **frozen_tower(model.vision),
            "language_model": model.language_model.identity(),
        }

    def start_frozen(self, model: Blip2Stage2, device: torch.device) -> None:
        """The image tower, where it computes in float8."""
        start_tower(model.vision, device)

    def build_module(self, model: Blip2Stage2, batch: BatchPlan) -> Stage2Module:
        """The Lightning module."""
        return Stage2Module(
            model,
            normalise=self.cfg["loss"]["normalise"],
            prefix=self.cfg["text"]["prefix"],
            questions=self.cfg["text"]["max_question_tokens"] if self.asks else None,
            **self.common(batch),
        )

    def collate(self) -> Any:
        """Puts training batches together."""
        own: dict[str, Any] = {"collate": collate_causal}
        if self.encoder_decoder:
            own = {"collate": collate_seq2seq, "prefix": self.cfg["text"]["prefix"]}
        parts = self.cfg["text"]["parts"]
        put = functools.partial(collate_in_parts, parts=parts, **own, **self._text_settings())
        return self._with_questions(put) if self.asks else put

    def collate_eval(self) -> Any:
        """Puts evaluation batches together."""
        settings = self._text_settings()
        if self.asks:
            put: Any = functools.partial(collate_causal, **settings)
            if self.encoder_decoder:
                put = functools.partial(collate_seq2seq, prefix="none", **settings)
            return functools.partial(
                collate_eval_questions,
                collate=self._with_questions(put),
                prompt=settings["prompt"],
                max_words=self.cfg["data"]["max_words"],
            )
        function = collate_eval_seq2seq if self.encoder_decoder else collate_eval_causal
        return functools.partial(function, **settings)

    def _with_questions(self, collate: Any) -> Any:
        """Adds what the Q-Former reads to the batches that `collate` puts together."""
        return functools.partial(
            collate_questions,
            collate=collate,
            tokenizer=self.tokenizer,
            max_question_tokens=self.cfg["text"]["max_question_tokens"],
            bucket=self.cfg["text"]["bucket"],
        )

    def build_evaluator(self, module: StageModule, images: EvalStream) -> Stage2Evaluator:
        """Loss, grounding, captions or answers."""
        return Stage2Evaluator(
            module,
            images,
            self.text,
            self.cfg["data"]["prompt"],
            self.cfg["validation"],
            questions=self.collate_eval() if self.asks else None,
        )

    def _text_settings(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "max_text_tokens": self.cfg["text"]["max_tokens"],
            "prompt": self.cfg["data"]["prompt"],
            "bucket": self.cfg["text"]["bucket"],
        }


class TextSide(nn.Module):
    """The parts of a Q-Former that read and write text, under the names that they have there."""

    def __init__(self, qformer: QFormer) -> None:
        super().__init__()
        self.qformer = nn.Module()
        for name in ("word_embeddings", "position_embeddings", "lm_head"):
            self.qformer.add_module(name, getattr(qformer, name))
        layers: Any = qformer.layers
        parts = [nn.ModuleDict({"text_ffn": layer.text_ffn}) for layer in layers]
        self.qformer.add_module("layers", nn.ModuleList(parts))


def made_up_question(samples: int, length: int) -> Question:
    """The same few word pieces for each sample: int64 ids and mask [samples, length]."""
    ids = torch.arange(length).remainder(3).expand(samples, length).contiguous()
    return ids, torch.ones_like(ids)


def made_up_text(
    model: language.LanguageModel, samples: int, length: int, read: int
) -> dict[str, Any]:
    """Random text.

    Args:
        model: the language model.
        samples: of the batch.
        length: tokens of each text.
        read: tokens that an encoder reads, where there is one; at most `length`.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(model.vocab_size, 100), (samples, length), generator=generator)
    text = {"lm_index": torch.arange(ids.numel()), "lm_targets": ids.flatten()}
    ones = torch.ones_like(ids)
    if model.is_encoder_decoder:
        prompt = {"input_ids": ids[:, :read], "attention_mask": ones[:, :read]}
        return {**prompt, "target_ids": ids, "target_mask": ones, **text}
    return {"input_ids": ids, "attention_mask": ones, **text}
