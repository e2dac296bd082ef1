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

# Keys and values of one attention, each [rows, H, positions, Dh].
KeyValue = tuple[Tensor, Tensor]
# Keys and values of the image for every cross-attention, first layer first.
ImageKV = list[KeyValue]
# Which images the rows of a pass look at: each entry covers `images * repeat` rows in order,
# repeat-major ("all images once, all images again, ...").
ImageGroups = list[tuple[ImageKV, int]]


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
        """The learned queries as the first block's input, [rows, Q, D]."""
        return self.dropout(self.norm(self.query_tokens).expand(rows, -1, -1))

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Word and position embeddings [R, T, D] of token ids [R, T]; positions start at 0."""
        assert self.word_embeddings is not None, "a Q-Former built with text=False reads no text"
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(self.norm(hidden))

    # -- the three passes ------------------------------------------------------------------------

    def forward_queries(self, image: ImageKV) -> tuple[Tensor, list[KeyValue]]:
        """Queries see each other and the image.

        Returns:
            query_output [B, Q, D], and every block's self-attention (keys, values)
            [B, H, Q, Dh], which `forward_caption` reads.
        """
        hidden = self.embed_queries(image[0][0].shape[0])
        return self._blocks(hidden, self.num_query_tokens, images=[(image, 1)])

    def forward_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text sees itself in both directions; [R, T] ids and mask (1 = token) -> [R, T, D]."""
        hidden, _ = self._blocks(
            self.embed_text(input_ids), 0, mask=attention_mask.bool()[:, None, None]
        )
        return hidden

    def forward_multimodal(
        self, images: ImageGroups, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Queries and text see each other; queries see the image.

        Args:
            images: what the R rows look at (see `ImageGroups`).
            input_ids: [R, T] token ids.
            attention_mask: [R, T], 1 = token, 0 = padding.

        Returns:
            [R, Q + T, D], queries first.
        """
        rows = input_ids.shape[0]
        hidden = torch.cat([self.embed_queries(rows), self.embed_text(input_ids)], dim=1)
        visible = F.pad(attention_mask.bool(), (self.num_query_tokens, 0), value=True)
        hidden, _ = self._blocks(
            hidden, self.num_query_tokens, mask=visible[:, None, None], images=images
        )
        return hidden

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
        T, Q = input_ids.shape[1], query_kv[0][0].shape[2]
        mask = torch.ones(T, Q + T, dtype=torch.bool, device=input_ids.device).tril(diagonal=Q)
        hidden, _ = self._blocks(self.embed_text(input_ids), 0, mask=mask, past=query_kv)
        return hidden

    def _blocks(
        self,
        hidden: Tensor,
        num_queries: int,
        *,
        mask: Tensor | None = None,
        images: ImageGroups | None = None,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        keys_values = []
        cross_index = 0
        for i, layer in enumerate(self.layers):
            image = None
            if layer.cross_attention is not None:
                if images is not None:
                    image = [(kv[cross_index], repeat) for kv, repeat in images]
                cross_index += 1
            args = (hidden, num_queries, mask, image, past[i] if past else None)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden, kv = checkpoint(layer, *args, use_reentrant=False)
            else:
                hidden, kv = layer(*args)
            keys_values.append(kv)
        return hidden, keys_values


class QFormerLayer(nn.Module):
    """One post-norm block: self-attention, cross-attention of the queries, feed-forward."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout: float,
        *,
        vision_width: int | None,
        text: bool,
    ) -> None:
        super().__init__()
        self.self_attention = SelfAttention(hidden_size, num_heads, dropout)
        self.cross_attention = (
            CrossAttention(hidden_size, num_heads, dropout, vision_width) if vision_width else None
        )
        self.query_ffn = FeedForward(hidden_size, intermediate_size, dropout)
        self.text_ffn = FeedForward(hidden_size, intermediate_size, dropout) if text else None

    def forward(
        self,
        hidden: Tensor,
        num_queries: int,
        mask: Tensor | None,
        image: list[tuple[KeyValue, int]] | None,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """[R, L, D], the first `num_queries` positions queries -> the same, and keys and values."""
        hidden, kv = self.self_attention(hidden, mask, past)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        outputs = []
        if num_queries:
            if self.cross_attention is not None:
                assert image is not None, "a pass with queries needs an image"
                queries = self.cross_attention(queries, image)
            outputs.append(self.query_ffn(queries))
        if text.shape[1]:
            assert self.text_ffn is not None, "a Q-Former built with text=False reads no text"
            outputs.append(self.text_ffn(text))
        return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), kv


class SelfAttention(nn.Module):
    """BERT's self-attention with its output projection, residual and norm."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.norm = layer_norm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Attends from every position to all that `mask` (bool, True = visible) lets it see.

        Args:
            hidden: [R, L, D].
            mask: broadcastable to [R, H, L, keys], or None where everything is visible.
            past: keys and values that stand in front of this pass's own.

        Returns:
            [R, L, D], and this pass's own keys and values [R, H, L, Dh].
        """
        query = split_heads(self.query(hidden), self.num_heads)
        own = (
            split_heads(self.key(hidden), self.num_heads),
            split_heads(self.value(hidden), self.num_heads),
        )
        key, value = own
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, own, strict=True))
        context = attend(query, key, value, mask, self.dropout)
        context = context.transpose(1, 2).flatten(2)
        return self.norm(self.dropout(self.output(context)) + hidden), own


class CrossAttention(nn.Module):
    """Queries look at the image."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, vision_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(vision_width, hidden_size)
        self.value = nn.Linear(vision_width, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.norm = layer_norm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def project(self, tokens: Tensor, ln_vision: nn.LayerNorm) -> KeyValue:
        """Keys and values of image tokens that are normalised but not yet scaled and shifted.

        W (g * x + b) + c = (W g) x + (W b + c): the affine (g, b) of `ln_vision` moves into the
        weight, where its gradient costs a matrix of the weight's size and not one per image token.

        Args:
            tokens: [B, P, Dv], zero mean and unit variance per token.
            ln_vision: the norm whose weight and bias are folded in.

        Returns:
            (keys, values), each [B, H, P, Dh].
        """
        weight = torch.cat([self.key.weight, self.value.weight])  # [2D, Dv]
        bias = torch.cat([self.key.bias, self.value.bias])
        with torch.autocast(tokens.device.type, enabled=False):
            bias = F.linear(ln_vision.bias, weight, bias)
            weight = weight * ln_vision.weight
        key, value = F.linear(tokens, weight, bias).chunk(2, dim=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)

    def forward(self, queries: Tensor, image: list[tuple[KeyValue, int]]) -> Tensor:
        """[R, Q, D] -> [R, Q, D]; `image` says which keys and values each row looks at.

        Rows that share an image stand side by side as one longer query sequence against a single
        set of keys and values, so that no image is copied.
        """
        Q = queries.shape[1]
        query = split_heads(self.query(queries), self.num_heads)  # [R, H, Q, Dh]
        contexts, start = [], 0
        for (key, value), repeat in image:
            images = key.shape[0]
            rows = query[start : start + images * repeat].unflatten(0, (repeat, images))
            start += images * repeat
            rows = rows.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [images, H, repeat * Q, Dh]
            context = attend(rows, key, value, None, self.dropout)
            context = context.unflatten(2, (repeat, Q)).permute(2, 0, 3, 1, 4)
            contexts.append(context.reshape(images * repeat, Q, -1))
        context = torch.cat(contexts) if len(contexts) > 1 else contexts[0]
        return self.norm(self.dropout(self.output(context)) + queries)


class FeedForward(nn.Module):
    """Two layers with an exact (erf) gelu, residual and norm."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size)
        self.norm = layer_norm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, L, D] -> [R, L, D]."""
        return self.norm(self.dropout(self.output(F.gelu(self.inner(hidden)))) + hidden)


class LMHead(nn.Module):
    """BERT's prediction head; its matrix is the word table."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Linear(hidden_size, hidden_size)
        self.norm = layer_norm(hidden_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """[..., D] and the word table [V, D] -> logits [..., V]."""
        return F.linear(self.norm(F.gelu(self.transform(hidden))), word_embeddings, self.bias)


def layer_norm(size: int) -> nn.LayerNorm:
    """BERT's layer norm."""
    return nn.LayerNorm(size, eps=1e-12)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[R, L, D] -> [R, H, L, Dh]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: nn.Dropout
) -> Tensor:
    """Scaled dot-product attention, [R, H, L, Dh]; dropout on the weights while training."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout.p if dropout.training else 0.0
    )


def _init_weights(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
