"""How the positions of a pass lie in memory, and which of them attend to each other.

Projections, feed-forward and norms treat positions alike, so a pass keeps them in one flat matrix
[n, D] without padding; attention alone needs rows.

Shapes: n positions of the matrix, R rows, L positions of a row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Positions that lie together in a pass's flat matrix and form rows of one width.

    Attributes:
        start: the first one's place in the matrix.
        rows: R.
        width: L, positions of a row.
        slots: int64, which of the R * L are in the matrix, as r * L + l; None: all.
    """

    start: int
    rows: int
    width: int
    slots: Tensor | None = None

    @property
    def count(self) -> int:
        """Positions in the matrix."""
        return self.rows * self.width if self.slots is None else len(self.slots)

    def pad(self, flat: Tensor) -> Tensor:
        """[n, ...] of the whole matrix -> this span's rows [R, L, ...], 0 where none is."""
        own = flat.narrow(0, self.start, self.count)
        if self.slots is not None:
            rows = own.new_zeros(self.rows * self.width, *own.shape[1:])
            own = rows.index_put((self.slots,), own)  # index_copy would keep what it is given
        return own.unflatten(0, (self.rows, self.width))

    def flat(self, rows: Tensor) -> Tensor:
        """[R, L, ...] -> the positions [count, ...] that are in the matrix."""
        own = rows.flatten(0, 1)
        return own if self.slots is None else own.index_select(0, self.slots)


@dataclass(frozen=True)
class Group:
    """Rows of positions that attend to each other.

    Attributes:
        spans: side by side in each row; in the order of the matrix.
        mask: bool, True = visible, broadcastable to [R, H, L, keys]; None: all is visible.
        sees_queries: keys and values of the first group, or of one before this pass, stand in front
            of this one's.
        read: how many leading positions of each row, within the first span, are read after the last
            block, which computes no others; None: all. Of queries: all or 0.
    """

    spans: tuple[Span, ...]
    mask: Tensor | None = None
    sees_queries: bool = False
    read: int | None = None

    def rows(self, flat: Tensor) -> Tensor:
        """[n, ...] of the whole matrix -> [R, L, ...]."""
        parts = [span.pad(flat) for span in self.spans]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def flat(self, rows: Tensor) -> list[Tensor]:
        """[R, L, ...] -> [count, ...] of each span."""
        parts = rows.split([span.width for span in self.spans], dim=1)
        return [span.flat(part) for span, part in zip(self.spans, parts, strict=True)]


def causal_mask(num_queries: int, input_ids: Tensor) -> Tensor:
    """Text [B, T] that sees all queries and no later text: bool [T, Q + T]."""
    T = input_ids.shape[1]
    mask = torch.ones(T, num_queries + T, dtype=torch.bool, device=input_ids.device)
    return mask.tril(diagonal=num_queries)


def leading(flat: Tensor, groups: list[Group]) -> tuple[Tensor, list[Group]]:
    """The positions [n', D] that are read in the end (see `Group.read`), and how they form rows."""
    parts, kept, start = [], [], 0
    for group in groups:
        first, moved = group.spans[0], start - group.spans[0].start
        if group.read is None:
            spans = [replace(span, start=span.start + moved) for span in group.spans]
            parts.append(flat.narrow(0, first.start, sum(span.count for span in spans)))
        else:
            spans = [Span(start, first.rows, group.read)]
            parts.append(first.pad(flat)[:, : group.read].flatten(0, 1))
        kept.append(replace(group, spans=tuple(spans)))
        start += len(parts[-1])
    return torch.cat(parts) if len(parts) > 1 else parts[0], kept
