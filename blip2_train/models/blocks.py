"""The blocks of the Q-Former (BLIP-2, figure 2): BERT's, with cross-attention to the image.

Shapes as in `qformer.py` and `rows.py`; n: positions of a pass, queries first.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2_train.models.attention import attend, join_heads, split_heads
from blip2_train.models.linear import Linear, gelu_linear, linear
from blip2_train.models.rows import Group, leading

# Keys and values: [R, H, L, Dh] of rows, or [n, D] of a pass's flat matrix where it says so.
KeyValue = tuple[Tensor, Tensor]


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
        groups: list[Group],
        num_queries: int,
        image: list[tuple[KeyValue, int | Tensor]] | None,
        past: KeyValue | None,
        last: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[n, D], the first `num_queries` positions queries -> the same, and keys and values.

        In the `last` block only positions that are read come out.
        """
        hidden, keys, values = self.self_attention(hidden, groups, past, last)
        if last and groups[0].read == 0:
            num_queries = 0
        queries, text = hidden[:num_queries], hidden[num_queries:]
        outputs = []
        if num_queries:
            if self.cross_attention is not None:
                assert image is not None, "a pass with queries needs an image"
                queries = self.cross_attention(queries, image)
            outputs.append(self.query_ffn(queries))
        if len(text):
            assert self.text_ffn is not None, "a Q-Former built with text=False reads no text"
            outputs.append(self.text_ffn(text))
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]), keys, values


class SelfAttention(nn.Module):
    """BERT's self-attention with its output projection, residual and norm."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(hidden_size, hidden_size)
        self.key = Linear(hidden_size, hidden_size)
        self.value = Linear(hidden_size, hidden_size)
        self.output = Linear(hidden_size, hidden_size)
        self.norm = layer_norm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, groups: list[Group], past: KeyValue | None, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends within each group.

        Args:
            hidden: [n, D].
            groups: of the n positions.
            past: keys and values of queries that are not among them (see `Group.sees_queries`).
            last: leave out the positions that no later block and nobody else reads.

        Returns:
            [n, D], in the last block [n', D]; and keys and values [n, D].
        """
        keys, values, asking = self.key(hidden), self.value(hidden), groups
        if last:
            hidden, asking = leading(hidden, groups)
        sources = (self.query(hidden), keys, values, *(past or ()))
        outputs = []
        for group, asker in zip(groups, asking, strict=True):
            heads = functools.partial(self._heads, groups[0], group, asker)
            context = attend(heads, sources, group.mask, self.dropout)
            outputs += asker.flat(self.output(join_heads(context)))
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return self.norm(self.dropout(output) + hidden), keys, values

    def _heads(
        self,
        first: Group,
        group: Group,
        asker: Group,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def rows(of: Group, flat: Tensor) -> Tensor:
            return split_heads(of.rows(flat), self.num_heads)

        key, value = rows(group, keys), rows(group, values)
        if group.sees_queries:
            front = past or (rows(first, keys), rows(first, values))
            key, value = torch.cat([front[0], key], dim=2), torch.cat([front[1], value], dim=2)
        return rows(asker, queries), key, value


class CrossAttention(nn.Module):
    """Queries look at the image."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, vision_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(hidden_size, hidden_size)
        self.key = Linear(vision_width, hidden_size)
        self.value = Linear(vision_width, hidden_size)
        self.output = Linear(hidden_size, hidden_size)
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
        key, value = linear(tokens, weight, bias).chunk(2, dim=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)

    def forward(self, queries: Tensor, image: list[tuple[KeyValue, int | Tensor]]) -> Tensor:
        """[R * Q, D] -> [R * Q, D].

        Args:
            queries: of all rows.
            image: keys and values that the rows look at, as `ImageGroups` says. The rows of an
                image are one longer query sequence, so that it is not copied.
        """
        counts = [rows * len(kv[0]) if isinstance(rows, int) else len(rows) for kv, rows in image]
        positions = len(queries) // sum(counts)
        parts = self.query(queries).split([count * positions for count in counts])
        outputs = []
        for part, (kv, rows) in zip(parts, image, strict=True):
            heads = functools.partial(self._heads, rows)
            context = attend(heads, (part, *kv), None, self.dropout)
            outputs.append(self.output(join_heads(context)).flatten(0, 1))
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return self.norm(self.dropout(output) + queries)

    def _heads(
        self, rows: int | Tensor, queries: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(rows, int):
            key, value = key.index_select(0, rows), value.index_select(0, rows)
        return split_heads(queries.unflatten(0, (len(key), -1)), self.num_heads), key, value


class FeedForward(nn.Module):
    """Two layers with an exact (erf) gelu, residual and norm."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.inner = Linear(hidden_size, intermediate_size)
        self.output = Linear(intermediate_size, hidden_size)
        self.norm = layer_norm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, D]."""
        return self.norm(self.dropout(gelu_linear(self.inner(hidden), self.output)) + hidden)


def layer_norm(size: int) -> nn.LayerNorm:
    """BERT's layer norm."""
    return nn.LayerNorm(size, eps=1e-12)
