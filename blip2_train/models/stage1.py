"""Stage 1: the Q-Former on a frozen image tower (BLIP-2, section 3.2).

Shapes as in `qformer.py`; E is the width of the contrastive features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2_train.models.blocks import KeyValue
from blip2_train.models.cached_tower import CachedTower
from blip2_train.models.qformer import ImageGroups, ImageKV, QFormer
from blip2_train.models.vision import VisionTower


@dataclass
class ImageOutput:
    """What the query pass gives.

    Attributes:
        query_output: [B, Q, D] states of the queries.
        image_feats: [B, Q, E] L2-normalised contrastive features, one per query.
        query_kv: per block, the queries' self-attention keys and values, which captioning reads.
    """

    query_output: Tensor
    image_feats: Tensor
    query_kv: list[KeyValue]


class Blip2Stage1(nn.Module):
    """Image tower, Q-Former and the heads of the three stage-1 objectives.

    Args:
        vision: frozen unless it is `trainable`.
        qformer: its `vision_width` must be the tower's width.
        dec_token_id: id of [DEC], which starts a caption in place of [CLS].
        end_token_id: id of [SEP], which ends one.
        embed_dim: width of the contrastive features (E).
        temp: initial temperature, learned; similarities are divided by it.
    """

    def __init__(
        self,
        vision: VisionTower | CachedTower,
        qformer: QFormer,
        *,
        dec_token_id: int,
        end_token_id: int,
        embed_dim: int = 256,
        temp: float = 0.07,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.qformer = qformer
        self.vision_proj = nn.Linear(qformer.hidden_size, embed_dim)
        self.text_proj = nn.Linear(qformer.hidden_size, embed_dim)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(temp))
        self.dec_token_id = dec_token_id
        self.end_token_id = end_token_id

    def encode_image(self, image: ImageKV) -> ImageOutput:
        """The query pass: queries see each other and the image."""
        query_output, query_kv = self.qformer.forward_queries(image)
        return ImageOutput(query_output, unit(self.vision_proj(query_output)), query_kv)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The text pass: [B, T] ids and mask -> text_output [B, T, D], text_feat [B, E].

        The feature is the L2-normalised projection of [CLS].
        """
        text_output = self.qformer.forward_text(input_ids, attention_mask)
        return text_output, unit(self.text_proj(text_output[:, 0]))

    def encode(
        self,
        image: ImageKV,
        input_ids: Tensor,
        attention_mask: Tensor,
        slots: Tensor | None = None,
        *,
        contrast: bool = True,
        caption: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`encode_image`, `encode_text` and `caption` of B pairs in one pass (see `forward_apart`).

        Args:
            image: keys and values of B images.
            input_ids: [B, T], [CLS] first.
            attention_mask: [B, T].
            slots: int64 [n], which of the B * T positions are computed; None: all.
            contrast: encode images and texts.
            caption: run the causal pass.

        Returns:
            image_feats [B, Q, E] and text_feat [B, E], or None and None; the captions' states
            [n, D] or None.
        """
        query_output, cls, states = self.qformer.forward_apart(
            image,
            input_ids,
            attention_mask,
            self._decoder_ids(input_ids) if caption else None,
            slots=slots,
            contrast=contrast,
        )
        if query_output is None or cls is None:
            return None, None, states
        return unit(self.vision_proj(query_output)), unit(self.text_proj(cls)), states

    def match(
        self,
        images: ImageGroups,
        input_ids: Tensor,
        attention_mask: Tensor,
        slots: Tensor | None = None,
    ) -> Tensor:
        """The multimodal pass of R (image, text) rows.

        Args:
            images: what the rows look at (see `qformer.ImageGroups`).
            input_ids: [R, T], [CLS] first.
            attention_mask: [R, T].
            slots: see `QFormer.forward_multimodal`.

        Returns:
            itm_logits [R, 2] (index 1: the pair matches), the mean over queries of the matching
            head.
        """
        queries = self.qformer.forward_multimodal(images, input_ids, attention_mask, slots)
        return widen(self.itm_head(queries)).mean(dim=1)

    def caption(self, input_ids: Tensor, query_kv: list[KeyValue]) -> Tensor:
        """The causal pass: [B, T] ids -> [B, T, D]; [DEC] takes the place of [CLS]."""
        return self.qformer.forward_caption(self._decoder_ids(input_ids), query_kv)

    def _decoder_ids(self, input_ids: Tensor) -> Tensor:
        decoder_ids = input_ids.clone()
        decoder_ids[:, 0] = self.dec_token_id
        return decoder_ids

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] logits of the next token."""
        return self.qformer.lm_head(hidden, self.qformer.word_embeddings.weight)

    def lm_loss_sum(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Cross-entropy of the next tokens [M] after states [M, D], summed; nats."""
        table = self.qformer.word_embeddings.weight
        return self.qformer.lm_head.loss_sum(hidden, table, targets, smoothing)

    @torch.no_grad()
    def generate(
        self,
        image: ImageKV,
        *,
        max_length: int = 30,
        min_length: int = 1,
        num_beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        num_captions: int = 1,
    ) -> Tensor:
        """Captions: greedy, by beam search, or sampled.

        Args:
            image: keys and values of B images.
            max_length: tokens, [DEC] and [SEP] included.
            min_length: tokens, [DEC] included, before [SEP] may stand.
            num_beams: prefixes that are kept side by side; 1: greedy, or plain sampling.
            top_p: None: the most likely; otherwise each token is drawn, with torch's global
                generator, from the fewest that have this probability together (nucleus sampling).
            temperature: divides the logits that are drawn from; acts with `top_p` only.
            length_penalty: of beams: a caption scores its summed log-probability divided by its
                length to this power.
            repetition_penalty: > 1 makes tokens that stand in the caption less likely.
            num_captions: of each image: its best beams, at most `num_beams`, or as many draws.

        Returns:
            int64 [B * num_captions, <= max_length]: [DEC], the caption, [SEP], then [PAD]; an
            image's captions stand together.

        Raises:
            ValueError: `max_length` exceeds the position table or is below 2 or `min_length`; or
                there is no search for so many captions.
        """
        # transformers takes seconds to import, and only captions need it
        from blip2_train.models.captioner import search, search_config

        config = search_config(
            start_id=self.dec_token_id,
            end_id=self.end_token_id,
            longest=self.qformer.position_embeddings.num_embeddings + 1,
            max_length=max_length,
            min_length=min_length,
            num_beams=num_beams,
            top_p=top_p,
            temperature=temperature,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            num_captions=num_captions,
        )
        with torch.compiler.set_stance("force_eager"):  # every length would be another shape
            return search(self._next_logits, self.encode_image(image).query_kv, config)

    def _next_logits(self, input_ids: Tensor, query_kv: list[KeyValue]) -> Tensor:
        """[R, T] ids -> [R, V] logits of the token after them."""
        return self.lm_logits(self.caption(input_ids, query_kv)[:, -1])


def unit(x: Tensor) -> Tensor:
    """L2-normalised along the last dimension, in float32 or wider."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(widen(x), dim=-1)


def widen(x: Tensor) -> Tensor:
    """At least float32: half precision moves a similarity of 1 / 0.07 by more than 0.01."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
