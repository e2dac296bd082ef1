"""Stage 2: the Q-Former speaks to a frozen language model (BLIP-2, section 3.3 and figure 3).

The queries' outputs, projected to the width of the model's token embeddings, stand in front of
the text as *soft visual prompts*. For visual question answering the Q-Former reads the question too
(section 4.3 and figure 7), so that the queries look for what is asked: it then has a text side.

Shapes as in `qformer.py`, T there being that of the question, and:
    T  text tokens of the caption         P  tokens of a prompt (also none)
    Dl width of the language model        M  target tokens of the whole batch
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2_train.models.cached_tower import CachedTower
from blip2_train.models.language import LanguageModel
from blip2_train.models.qformer import ImageKV, QFormer
from blip2_train.models.vision import VisionTower

# What the Q-Former reads of questions, word pieces from [CLS] on: int64 ids [B, T] and mask [B, T].
Question = tuple[Tensor, Tensor]


def question_of(batch: Mapping[str, Any]) -> Question | None:
    """The questions of a batch, None where it has none."""
    return (batch["question_ids"], batch["question_mask"]) if "question_ids" in batch else None


class Blip2Stage2(nn.Module):
    """Image tower, Q-Former, projection and frozen language model.

    Args:
        vision: frozen unless it is `trainable`.
        qformer: its `vision_width` must be the tower's width.
        language_model: frozen.

    Raises:
        ValueError: the Q-Former was built for another tower.
    """

    def __init__(
        self, vision: VisionTower | CachedTower, qformer: QFormer, language_model: LanguageModel
    ) -> None:
        super().__init__()
        if isinstance(vision, VisionTower | CachedTower) and vision.width != qformer.vision_width:
            raise ValueError(
                f"the Q-Former reads image tokens of width {qformer.vision_width}, the tower "
                f"{vision.name} gives {vision.width}; build it with vision_width={vision.width}"
            )
        self.vision = vision
        self.qformer = qformer
        self.language_model = language_model
        self.lm_proj = nn.Linear(qformer.hidden_size, language_model.width)

    def encode_image(self, image: ImageKV, question: Question | None = None) -> Tensor:
        """Queries see each other, the image and the question, if there is one.

        Args:
            image: keys and values of B images.
            question: one for each image; the Q-Former must have been built with `text=True`.

        Returns:
            query_output [B, Q, D].
        """
        if question is not None:
            return self.qformer.forward_multimodal([(image, 1)], *question)
        query_output, _ = self.qformer.forward_queries(image)
        return query_output

    def soft_prompt(self, query_output: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, Dl], in the language model's dtype."""
        return self.lm_proj(query_output).to(self.language_model.dtype)

    def text_logits(self, query_output: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The language model's logits of the target tokens.

        A decoder-only model reads queries and caption and predicts what follows. An
        encoder-decoder reads queries and prefix in its encoder, and its decoder the caption.

        Args:
            query_output: [B, Q, D].
            text: int64. Decoder-only: "input_ids", "attention_mask" [B, T], padded on the right;
                "lm_index" [M], positions b * T + t of the tokens to predict in `input_ids` (t = 0
                is predicted from the last query). Encoder-decoder: "input_ids",
                "attention_mask" [B, P], padded on the right; "target_ids", "target_mask" [B, T];
                "lm_index" [M], positions b * T + t in `target_ids`.

        Returns:
            [M, V] logits, in the order of `lm_index`, for the tokens that stand there.
        """
        return self.language_model.logits(**self._reading(query_output, text))

    def text_loss_sum(self, query_output: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of the target tokens, summed: that of `text_logits`, never all in memory.

        Args:
            query_output: [B, Q, D].
            text: as for `text_logits`, and "lm_targets" int64 [M], the tokens at "lm_index".

        Returns:
            Scalar, nats.
        """
        reading = self._reading(query_output, text)
        return self.language_model.loss_sum(**reading, targets=text["lm_targets"])

    def logits_without_image(self, text: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the language model says by itself, without any query.

        Args:
            text: as for `text_logits`.

        Returns:
            logits [M', V], and bool [M]: which of the M targets they are for. A decoder-only model
            predicts nothing from nothing, so the first token of each text is not among them.
        """
        embeds = self.language_model.embed(text["input_ids"])
        mask, index = text["attention_mask"], text["lm_index"]
        if self.language_model.is_encoder_decoder:
            logits = self.language_model.logits(
                embeds,
                mask,
                index,
                decoder_input_ids=self._shifted(text["target_ids"]),
                decoder_attention_mask=text["target_mask"],
            )
            return logits, torch.ones_like(index, dtype=torch.bool)
        predicted = index % embeds.shape[1] > 0
        return self.language_model.logits(embeds, mask, index[predicted] - 1), predicted

    def generate(
        self,
        image: ImageKV,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        question: Question | None = None,
        **settings: Any,
    ) -> Tensor:
        """Captions that continue a prompt.

        Args:
            image: keys and values of B images.
            prompt_ids: int64 [B, P], padded on either side; P may be 0.
            prompt_mask: int64 [B, P], 1 = token. What a row gets does not depend on how long the
                other prompts are.
            question: see `encode_image`.
            settings: of `LanguageModel.generate`.

        Returns:
            int64 [B * num_captions, <= max_new_tokens], new tokens only.

        Raises:
            ValueError: there are not as many prompts as images.
        """
        rows = image[0][0].shape[0]
        if prompt_ids.shape[0] != rows or prompt_ids.shape != prompt_mask.shape:
            raise ValueError(
                f"{rows} images need prompt_ids and prompt_mask of shape [{rows}, P], not "
                f"{list(prompt_ids.shape)} and {list(prompt_mask.shape)}"
            )
        with torch.no_grad():
            soft = self.soft_prompt(self.encode_image(image, question))
        embeds, mask = self._behind(soft, prompt_ids, prompt_mask)
        # An encoder counts positions from the left, and a decoder continues at the right end: all
        # padding goes to the other end, so that none stands between queries and prompt.
        order = mask.argsort(dim=1, stable=True, descending=self.language_model.is_encoder_decoder)
        embeds = embeds.take_along_dim(order[..., None], dim=1)
        mask = mask.take_along_dim(order, dim=1)
        with torch.compiler.set_stance("force_eager"):  # a cache makes every block another one
            return self.language_model.generate(embeds, mask, **settings)

    def _reading(self, query_output: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the language model reads, as its methods take it."""
        soft, index = self.soft_prompt(query_output), text["lm_index"]
        embeds, mask = self._behind(soft, text["input_ids"], text["attention_mask"])
        reading = {"inputs_embeds": embeds, "attention_mask": mask}
        if self.language_model.is_encoder_decoder:
            reading["decoder_input_ids"] = self._shifted(text["target_ids"])
            reading["decoder_attention_mask"] = text["target_mask"]
            return {**reading, "index": index}
        Q, T = soft.shape[1], text["input_ids"].shape[1]
        # text token t stands at position Q + t of its row, and the position before predicts it
        rows = index.div(T, rounding_mode="floor")
        return {**reading, "index": index + rows * Q + Q - 1}

    def _behind(self, soft: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, then text: embeddings [B, Q + T, Dl] and mask [B, Q + T]."""
        embeds = torch.cat([soft, self.language_model.embed(ids)], dim=1)
        return embeds, torch.cat([mask.new_ones(soft.shape[:2]), mask], dim=1)

    def _shifted(self, target_ids: Tensor) -> Tensor:
        """The decoder's input: its start token, then all targets but the last; [B, T]."""
        start = self.language_model.decoder_start_token_id
        assert start is not None, "only an encoder-decoder has a decoder's input"
        return torch.cat([torch.full_like(target_ids[:, :1], start), target_ids[:, :-1]], dim=1)
