"""The Querying Transformer (BLIP-2, arXiv 2301.12597, section 3.1 and figure 2).

A BERT encoder that reads two kinds of positions at once: learned *queries*, which look at the image
through cross-attention, and *text*. Both share the self-attention; each has its own feed-forward.
What a position may see is decided by the caller:

    image-text contrast      queries alone, then text alone (two passes)
    image-text matching      queries and text see each other
    image-grounded caption   text is causal and sees the queries; queries do not see the text

Shapes:
    B  images              R  rows of a pass (several rows may share an image)
    Q  queries             T  text tokens            L  = Q + T, positions of a row
    P  image tokens        D  Q-Former width         Dv width of the image tower
    H  heads               Dh = D / H                V  vocabulary, [DEC] included
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2_train.losses import lm_loss_sum
from blip2_train.models.attention import split_heads
from blip2_train.models.blocks import CrossAttention, KeyValue, QFormerLayer, layer_norm
from blip2_train.models.cross_entropy import linear_cross_entropy_sum
from blip2_train.models.linear import Linear, linear
from blip2_train.models.rows import Group, Span, causal_mask

# Keys and values of the image for every cross-attention, first layer first.
ImageKV = list[KeyValue]
# Which images the rows of a pass look at, part by part. With a number n beside them, each image is
# looked at by n rows, which stand side by side; with an index [r], r rows look at these images.
ImageGroups = list[tuple[ImageKV, int | Tensor]]


class QFormer(nn.Module):
    """BERT encoder with learned queries that cross-attend to an image.

    Args:
        vocab_size: rows of the word table, [DEC] included (V); None where there is no text side.
        vision_width: width of the image tower's tokens (Dv).
        hidden_size: width (D).
        num_layers: number of blocks.
        num_heads: attention heads (H); must divide `hidden_size`.
        intermediate_size: width of both feed-forwards.
        num_query_tokens: learned queries (Q).
        query_std: of their initial values, normal with zero mean. A norm follows them, so it says
            how fast they turn: where the learning rate times some tens of steps exceeds it, a
            gradient that all queries share makes one query of them all.
        cross_attention_freq: every how many blocks, from block 0 on, the queries see the image.
        max_positions: rows of the text position table.
        dropout: probability on embeddings, attention weights and sub-layer outputs.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its
            activations. Losses and gradients stay the same, dropout included.
        text: build the text side: embeddings, feed-forwards and head of the text. Without it (None
            in their places) only `project_image` and `forward_queries` are left, as in stage 2.

    Raises:
        ValueError: the heads do not divide the width, or a text side lacks its vocabulary.
    """

    def __init__(
        self,
        *,
        vocab_size: int | None = None,
        vision_width: int,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        num_query_tokens: int = 32,
        query_std: float = 0.02,
        cross_attention_freq: int = 2,
        max_positions: int = 512,
        dropout: float = 0.1,
        gradient_checkpointing: bool = False,
        text: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"qformer.hidden_size={hidden_size} must be a multiple of num_heads={num_heads}"
            )
        if text and vocab_size is None:
            raise ValueError("a Q-Former with a text side needs vocab_size; give it, or text=False")
        self.gradient_checkpointing = gradient_checkpointing
        self.num_query_tokens = num_query_tokens
        self.num_heads = num_heads
        self.hidden_size = hidden_size
        self.vision_width = vision_width

        self.query_tokens = nn.Parameter(torch.empty(1, num_query_tokens, hidden_size))
        self.ln_vision = nn.LayerNorm(vision_width, eps=1e-5)
        if vocab_size is not None and text:
            self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
            self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        else:
            self.register_module("word_embeddings", None)
            self.register_module("position_embeddings", None)
        self.norm = layer_norm(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(
                hidden_size,
                num_heads,
                intermediate_size,
                dropout,
                vision_width=vision_width if i % cross_attention_freq == 0 else None,
                text=text,
            )
            for i in range(num_layers)
        )
        if vocab_size is not None and text:
            self.lm_head = LMHead(hidden_size, vocab_size)
        else:
            self.register_module("lm_head", None)
        # BERT's 0.02 belongs to its width of 768. A narrower model gets the same gain per layer:
        # with 0.02 the text would hardly reach the queries, and matching would stay at chance.
        std = 0.02 * (768 / hidden_size) ** 0.5
        self.apply(functools.partial(_init_weights, std=std))
        nn.init.normal_(self.query_tokens, std=query_std)  # zeros would keep them identical

    # -- inputs ----------------------------------------------------------------------------------

    def project_image(self, image_embeds: Tensor) -> ImageKV:
        """Keys and values of the image for every cross-attention: once per image and step.

        `ln_vision` is applied here. Its affine part is folded into each projection, so that the
        normalised tokens need no gradient as long as the tower is frozen.

        Args:
            image_embeds: [B, P, Dv] tokens of the image tower, before `ln_vision`.

        Returns:
            One (keys, values) per cross-attention, each [B, H, P, Dh].
        """
        tokens = F.layer_norm(
            image_embeds.to(self.ln_vision.weight.dtype),
            (self.vision_width,),
            eps=self.ln_vision.eps,
        )
        if torch.is_autocast_enabled(tokens.device.type):  # cast once, not once per layer
            tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
        attentions = [layer.cross_attention for layer in self.layers]
        return [
            attention.project(tokens, self.ln_vision)
            for attention in attentions
            if isinstance(attention, CrossAttention)
        ]

    def embed_queries(self, rows: int) -> Tensor:
        """The learned queries as the first block's input, [rows * Q, D]."""
        return self.dropout(self.norm(self.query_tokens).expand(rows, -1, -1)).flatten(0, 1)

    def embed_text(self, input_ids: Tensor, slots: Tensor | None = None) -> Tensor:
        """Word and position embeddings [n, D] of token ids [R, T]; positions start at 0.

        Args:
            input_ids: [R, T].
            slots: int64 [n], which of the R * T; None: all.
        """
        assert self.word_embeddings is not None, "a Q-Former built with text=False reads no text"
        ids, width = input_ids.flatten(), input_ids.shape[1]
        if slots is None:
            slots = torch.arange(len(ids), device=ids.device)
        else:
            ids = ids.index_select(0, slots)
        hidden = self.word_embeddings(ids) + self.position_embeddings(slots % width)
        return self.dropout(self.norm(hidden))

    # -- the passes ------------------------------------------------------------------------------

    def forward_queries(self, image: ImageKV) -> tuple[Tensor, list[KeyValue]]:
        """Queries see each other and the image.

        Returns:
            query_output [B, Q, D], and every block's self-attention (keys, values)
            [B, H, Q, Dh], which `forward_caption` reads.
        """
        queries = Span(0, image[0][0].shape[0], self.num_query_tokens)
        hidden, keys_values = self._blocks(
            self.embed_queries(queries.rows), [Group((queries,))], queries.count, [(image, 1)]
        )
        split = functools.partial(split_heads, num_heads=self.num_heads)
        query_kv = [(split(queries.pad(k)), split(queries.pad(v))) for k, v in keys_values]
        return queries.pad(hidden), query_kv

    def forward_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text sees itself in both directions; [R, T] ids and mask (1 = token) -> [R, T, D]."""
        text = Span(0, *input_ids.shape)
        group = Group((text,), attention_mask.bool()[:, None, None])
        hidden, _ = self._blocks(self.embed_text(input_ids), [group])
        return text.pad(hidden)

    def forward_caption(self, input_ids: Tensor, query_kv: list[KeyValue]) -> Tensor:
        """Causal text that sees all queries (UniLM's mask; figure 2, right).

        The queries do not see the text, so their states are those of `forward_queries`: its keys
        and values are all that is needed of them, and the gradient flows back through them.
        Padding stands on the right, where a causal mask hides it from every real token.

        Args:
            input_ids: [B, T], [DEC] first.
            query_kv: from `forward_queries`, for the same B images.

        Returns:
            [B, T, D].
        """
        text = Span(0, *input_ids.shape)
        group = Group((text,), causal_mask(query_kv[0][0].shape[2], input_ids), sees_queries=True)
        hidden, _ = self._blocks(self.embed_text(input_ids), [group], past=query_kv)
        return text.pad(hidden)

    def forward_apart(
        self,
        image: ImageKV,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_ids: Tensor | None,
        *,
        slots: Tensor | None = None,
        contrast: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`forward_queries`, `forward_text` and `forward_caption` side by side, for B pairs.

        One product per layer where the three passes would take three small ones. Captions read of
        the queries their keys and values, contrast reads of the text the state of [CLS]: the last
        block computes nothing else.

        Args:
            image: keys and values of B images.
            input_ids: [B, T] token ids, [CLS] first.
            attention_mask: [B, T], 1 = token, 0 = padding.
            decoder_ids: the same with [DEC] first; None: no captions.
            slots: int64 [n], ascending: positions b * T + t that are computed, all tokens among
                them; None: all, padding too.
            contrast: whether the queries' and the text's outputs are wanted.

        Returns:
            query_output [B, Q, D] and [CLS]'s state [B, D], or None and None; the captions' states
            [n, D] in the order of `slots`, or None.
        """
        B, T, Q = *input_ids.shape, self.num_query_tokens
        queries = Span(0, B, Q)
        hidden, end = [self.embed_queries(B)], queries.count
        groups = [Group((queries,), read=None if contrast else 0)]
        if contrast:
            text = Span(end, B, T, slots)
            groups.append(Group((text,), attention_mask.bool()[:, None, None], read=1))
            hidden.append(self.embed_text(input_ids, slots))
            end += text.count
        if decoder_ids is not None:
            caption = Span(end, B, T, slots)
            groups.append(Group((caption,), causal_mask(Q, decoder_ids), sees_queries=True))
            hidden.append(self.embed_text(decoder_ids, slots))
        states, _ = self._blocks(torch.cat(hidden), groups, queries.count, [(image, 1)])
        if not contrast:
            return None, None, states
        query_output, cls, caption_states = states.tensor_split([B * Q, B * Q + B])
        return queries.pad(query_output), cls, caption_states if decoder_ids is not None else None

    def forward_multimodal(
        self,
        images: ImageGroups,
        input_ids: Tensor,
        attention_mask: Tensor,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Queries and text see each other; queries see the image.

        The last block computes the queries' states alone: nothing reads the text's.

        Args:
            images: what the R rows look at (see `ImageGroups`).
            input_ids: [R, T] token ids.
            attention_mask: [R, T], 1 = token, 0 = padding.
            slots: int64 [n], positions r * T + t that are computed, all tokens among them; None:
                all, padding too.

        Returns:
            [R, Q, D], states of the queries.
        """
        (R, T), Q = input_ids.shape, self.num_query_tokens
        queries = Span(0, R, Q)
        text = Span(queries.count, R, T, slots)
        visible = F.pad(attention_mask.bool(), (Q, 0), value=True)[:, None, None]
        hidden, _ = self._blocks(
            torch.cat([self.embed_queries(R), self.embed_text(input_ids, slots)]),
            [Group((queries, text), visible, read=Q)],
            queries.count,
            images,
        )
        return queries.pad(hidden)

    def _blocks(
        self,
        hidden: Tensor,
        groups: list[Group],
        num_queries: int = 0,
        images: ImageGroups | None = None,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """All blocks.

        Args:
            hidden: [n, D], positions of all groups, queries first.
            groups: which positions attend to which.
            num_queries: positions of queries among the n.
            images: what the queries look at.
            past: per block, keys and values of queries that are not among the n.

        Returns:
            [n', D], positions that are read (see `Group.read`); and per block keys and values
            [n, D].
        """
        keys_values = []
        cross_index = 0
        for i, layer in enumerate(self.layers):
            image = None
            if layer.cross_attention is not None:
                if images is not None:
                    image = [(kv[cross_index], rows) for kv, rows in images]
                cross_index += 1
            last = i == len(self.layers) - 1
            args = (hidden, groups, num_queries, image, past[i] if past else None, last)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden, keys, values = checkpoint(layer, *args, use_reentrant=False)
            else:
                hidden, keys, values = layer(*args)
            keys_values.append((keys, values))
        return hidden, keys_values


class LMHead(nn.Module):
    """BERT's prediction head; its matrix is the word table."""

    gradient_checkpointing = True  # the loss computes logits once more in the backward pass

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = Linear(hidden_size, hidden_size)
        self.norm = layer_norm(hidden_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """[..., D] and the word table [V, D] -> logits [..., V]."""
        return linear(self.states(hidden), word_embeddings, self.bias)

    def loss_sum(
        self, hidden: Tensor, word_embeddings: Tensor, targets: Tensor, smoothing: float
    ) -> Tensor:
        """Cross-entropy of [M, D] against int64 [M], summed: see `linear_cross_entropy_sum`."""
        if not self.gradient_checkpointing:
            return lm_loss_sum(self(hidden, word_embeddings), targets, smoothing)
        return linear_cross_entropy_sum(
            self.states(hidden), word_embeddings, self.bias, targets, smoothing
        )

    def states(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D], what the word table is multiplied with."""
        return self.norm(F.gelu(self.transform(hidden)))


def _init_weights(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
