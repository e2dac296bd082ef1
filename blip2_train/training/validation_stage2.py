"""What stage 2 is validated by: its loss, whether the text depends on the image, captions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2_train.data.language import LanguageTokenizer, decode, encode_prompts
from blip2_train.data.question_batch import ask
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World
from blip2_train.evaluation.grounding import Grounding, describe_grounding
from blip2_train.evaluation.samples import Row
from blip2_train.evaluation.stage2 import stage2_grounding
from blip2_train.models.stage2 import Question, question_of
from blip2_train.training.meter import describe_losses
from blip2_train.training.module import StageModule
from blip2_train.training.validation import Evaluator, Findings, chosen_samples


class Stage2Evaluator(Evaluator):
    """Loss per token with the right, a shuffled, a blank and no image; captions of some images.

    Args:
        module: being trained.
        images: the validation split.
        text: the language model's tokenizer.
        prompt: that captions begin with.
        settings: `samples`, `num_beams`, `max_new_tokens` of the configuration.
        questions: puts a batch of questions together, which are then answered; None: images are
            captioned.
    """

    def __init__(
        self,
        module: StageModule,
        images: EvalStream,
        text: LanguageTokenizer,
        prompt: str,
        settings: Mapping[str, Any],
        *,
        questions: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        self.module = module
        self.images = images
        self.text = text
        self.prompt = prompt
        self.samples = settings["samples"]
        self.questions = questions
        self.search = {k: settings[k] for k in ("num_beams", "max_new_tokens")}

    def start(self) -> None:
        """Forgets the validation before."""
        self.grounding = Grounding()
        self.blank = self.module.model.vision.blank()

    def add(self, number: int, batch: dict[str, Any]) -> None:
        """Takes in one batch."""
        model = self.module.model
        image_embeds = model.vision(batch["image"])
        self.grounding.add(*stage2_grounding(model, image_embeds, self.blank, batch))

    def finish(self, world: World) -> Findings:
        """Sums up."""
        grounding = self.grounding.read(world)
        loss = grounding["lm_right"]
        metrics = {"loss": loss, "loss_lm": loss, **grounding}
        lines = [
            describe_losses(metrics, self.module.levels(1)),
            describe_grounding(grounding),
        ]
        rows = self._rows() if world.rank == 0 else []
        for row in rows[:4]:
            asked = f"asked: {row.notes['asked']}  " if row.notes else ""
            lines.append(f"{asked}says: {row.said['says']}  (truth: {row.truth[0]})")
        title = "what the model says of held-out images"
        return Findings(metrics, -loss, lines, rows, title)

    @torch.no_grad()
    def captions(self, images: Tensor) -> list[str]:
        """What the model says of images, as batches hold them."""
        return self._continue(images, [self.prompt] * len(images))

    def _continue(
        self, images: Tensor, prompts: list[str], question: Question | None = None
    ) -> list[str]:
        model = self.module.model
        ids, mask = encode_prompts(
            prompts, self.text, encoder=model.language_model.is_encoder_decoder
        )
        device = self.module.device
        if question is not None:
            question = question[0].to(device), question[1].to(device)
        ids = model.generate(
            model.qformer.project_image(model.vision(images.to(device))),
            ids.to(device),
            mask.to(device),
            question=question,
            end_token_id=self.text.end_id,
            pad_token_id=self.text.pad_id,
            **self.search,
        )
        return decode(ids, self.text)

    def _rows(self) -> list[Row]:
        items = chosen_samples(self.images, self.samples) if self.samples else []
        if not items:
            return []
        if self.questions is not None:
            return self._answers(self.questions(items))
        words = self.captions(torch.stack([item.image for item in items]))
        return [
            Row(self.images.picture(item.item), {"says": caption}, item.captions)
            for item, caption in zip(items, words, strict=True)
        ]

    @torch.no_grad()
    def _answers(self, batch: Mapping[str, Any]) -> list[Row]:
        """What is answered, of a batch of questions."""
        asked = batch["questions"]
        if not asked:
            return []
        prompts = [ask(self.prompt, question) for question in asked]
        words = self._continue(batch["image"], prompts, question_of(batch))
        return [
            Row(self.images.picture(item), {"says": answer}, truth, notes={"asked": question})
            for item, question, answer, truth in zip(
                batch["items"], asked, words, batch["captions"], strict=True
            )
        ]
