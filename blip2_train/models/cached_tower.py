"""A tower whose work was done before: its tokens come with the batch (`blip2-prepare features`).

Shapes: B images, P image tokens, Dv tower width.
"""

import torch
from torch import Tensor

from blip2_train.models.freezing import Frozen

# How tokens are kept: as they are, or in 8 bits with a float32 scale behind each token.
STORES = ("float32", "bfloat16", "float8")
SCALE_BYTES = 4
FLOAT8 = torch.float8_e4m3fn


def pack(tokens: Tensor, store: str) -> Tensor:
    """Tokens as they are stored.

    Args:
        tokens: [..., P, Dv] of a tower.
        store: of `STORES`.

    Returns:
        float32 or bfloat16 [..., P, Dv]; of float8, uint8 [..., P, Dv + 4]: e4m3 numbers, the
        largest of each token at the format's largest, and behind them the token's scale.
    """
    if store != "float8":
        return tokens.to(getattr(torch, store))
    wide = tokens.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / torch.finfo(FLOAT8).max
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a token of zeros
    numbers = (wide / scale).to(FLOAT8).view(torch.uint8)
    return torch.cat([numbers, scale.view(torch.uint8)], dim=-1)


def unpack(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of `pack`, on any device.

    Args:
        stored: from `pack`.
        dtype: of the result.

    Returns:
        [..., P, Dv].
    """
    if stored.dtype != torch.uint8:
        return stored.to(dtype)
    numbers = stored[..., :-SCALE_BYTES].contiguous().view(FLOAT8)
    scale = stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (numbers.float() * scale).to(dtype)


class CachedTower(Frozen):
    """Stands where a `VisionTower` does, and passes on what that once computed.

    Args:
        name: timm model of the tower, for messages.
        weights: as the configuration names them, for messages.
        digest: of the tower's weights.
        image_size: side in pixels of what the tower saw.
        num_tokens: P.
        width: Dv.
        dtype: of the features.
        blank: stored as tokens are, [1, P, Dv], of `vision.blank_image`.
        precision: in which the tower computed them, see `VisionTower`.
    """

    trainable = False

    def __init__(
        self,
        name: str,
        weights: str,
        digest: str,
        *,
        image_size: int,
        num_tokens: int,
        width: int,
        dtype: torch.dtype,
        blank: Tensor,
        precision: str = "native",
    ) -> None:
        super().__init__()
        self.name, self.weights = name, weights
        self.image_size, self.num_tokens, self.width = image_size, num_tokens, width
        self.precision = precision
        self._digest = digest
        self.store = "float8" if blank.dtype == torch.uint8 else str(blank.dtype)[len("torch.") :]
        self.register_buffer("_blank", unpack(blank, dtype), persistent=False)
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self._blank.dtype  # type: ignore[return-value]

    def forward(self, stored: Tensor) -> Tensor:
        """Tokens as they are stored, see `pack` -> [B, P, Dv] in the features' dtype."""
        return unpack(stored, self.dtype)

    def blank(self) -> Tensor:
        """Tokens [1, P, Dv] of the least informative image."""
        return self._blank  # type: ignore[return-value]

    def made_up(self, samples: int) -> Tensor:
        """Input of the right shape, zeros."""
        return pack(torch.zeros(samples, self.num_tokens, self.width), self.store)

    def digest(self) -> str:
        """SHA-256 of the weights of the tower that computed them."""
        return self._digest
