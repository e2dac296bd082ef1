"""Stage 0: a tower of one's own, trained by contrast with a text transformer (CLIP, 2103.00020).

Shapes: B images or texts, S image side in pixels, P image tokens, Dv tower width, T text tokens,
D text width, E width of the contrastive features.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from blip2_train.errors import UserError
from blip2_train.models.stage1 import unit
from blip2_train.models.tower_training import RecomputableTower
from blip2_train.models.vision import (
    create_tower,
    expected_input,
    feature_shape,
    image_tokens,
    normalise,
)

KEY = "image_encoder"  # configuration group
POOLS = ("head", "max", "mean")
POSITIONS = ("learned", "sincos")
# Of the sin-cos positions; found by trial on small towers.
SINCOS_SCALE = 0.5


class Clip(nn.Module):
    """Image and text encoder with linear maps into one space.

    Args:
        image: the tower that is wanted.
        text: what it is trained against.
        embed_dim: width of the contrastive features (E).
        temp: initial temperature, learned; similarities are divided by it.
    """

    def __init__(
        self,
        image: "ImageEncoder",
        text: "TextEncoder",
        *,
        embed_dim: int = 256,
        temp: float = 0.07,
    ) -> None:
        super().__init__()
        self.image_encoder = image
        self.text_encoder = text
        self.image_proj = nn.Linear(image.width, embed_dim, bias=False)
        self.text_proj = nn.Linear(text.hidden_size, embed_dim, bias=False)
        for proj in (self.image_proj, self.text_proj):
            nn.init.normal_(proj.weight, std=proj.in_features**-0.5)
        self.temp = nn.Parameter(torch.tensor(temp))

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 3, S, S], uint8 or already normalised float -> [B, E], L2-normalised."""
        return unit(self.image_proj(self.image_encoder(image)))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] ids and mask -> [B, E], L2-normalised."""
        return unit(self.text_proj(self.text_encoder(input_ids, attention_mask)))

    def save_tower(self, path: Path) -> None:
        """Writes the tower as a file of timm weights, whole or not at all.

        `VisionTower(name, weights=str(path), image_size=...)` reads it, with the name and the
        image size of this tower; so does timm itself.

        Args:
            path: ends with ".safetensors"; its folder is made if need be.
        """
        assert path.suffix == ".safetensors", "timm tells the kind of a file by its ending"
        tower = self.image_encoder.tower
        weights = {key: value.cpu().contiguous() for key, value in tower.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:  # what safetensors opens, only the owner may read
                file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


class ImageEncoder(RecomputableTower):
    """A timm model that is trained: images to one vector each.

    Args:
        name: timm model, with the tag of its weights if it has any.
        image_size: side in pixels (S); None takes the weights' own.
        weights: "random" (drawn from `seed`), "pretrained" (downloaded by timm), or the path of a
            file of timm weights.
        pool: "max" or "mean" over all tokens that `VisionTower` would give of the whole model, or
            "head": as the model itself does it (class token, attention pooling, mean of the map).
        position: "learned": the model's own initial positions; "sincos": those of the patches
            start as two-dimensional sines and cosines. They are learned from there on either way.
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping their
            activations. Gradients stay the same; batch norms see each batch twice, so that their
            running statistics follow it faster.
        seed: of the random weights.
        options: further arguments of the timm model, such as its depth.

    Raises:
        UserError: the model or the weights cannot be had, or it lacks what is asked of it.
    """

    group = KEY

    def __init__(
        self,
        name: str,
        *,
        image_size: int | None = None,
        weights: str = "random",
        pool: str = "max",
        position: str = "learned",
        gradient_checkpointing: bool = False,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise UserError(f"{KEY}.pool={pool} is unknown; set it to one of {', '.join(POOLS)}")
        if position not in POSITIONS:
            raise UserError(
                f"{KEY}.position={position} is unknown; set it to one of {', '.join(POSITIONS)}"
            )
        self.name = name
        self.pool = pool
        self.tower = create_tower(
            name, image_size=image_size, weights=weights, seed=seed, options=options, key=KEY
        )
        self.image_size, self.mean, self.std = expected_input(self.tower, image_size)
        self.tower.eval()
        shape = feature_shape(self._pooled, self.tower, self.image_size, name=name, key=KEY)
        self.tower.train()
        self.width = shape[-1]
        if position == "sincos":
            if weights != "random":
                raise UserError(
                    f"{KEY}.position=sincos would replace the positions of {KEY}.weights="
                    f"{weights}; set {KEY}.position=learned"
                )
            _sincos_positions(name, self.tower)
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.tower.parameters()).dtype

    def forward(self, image: Tensor) -> Tensor:
        """One vector per image.

        Args:
            image: [B, 3, S, S], uint8 or already normalised float.

        Returns:
            [B, Dv].
        """
        if image.dtype == torch.uint8:
            image = normalise(image, self.mean, self.std)
        return self._pooled(self.tower, image.to(self.dtype))

    def _pooled(self, tower: nn.Module, image: Tensor) -> Tensor:
        if self.pool == "head":
            features = tower.forward_features(image)  # type: ignore[operator]
            return tower.forward_head(features, pre_logits=True)  # type: ignore[operator]
        tokens = image_tokens(tower, image, KEY)  # [B, P, Dv]
        return tokens.amax(dim=1) if self.pool == "max" else tokens.mean(dim=1)


class TextEncoder(nn.Module):
    """CLIP's text transformer, from random weights: a text's vector is the state of its [SEP].

    Attention is causal, so [SEP] sees the whole text and no padding.

    Args:
        vocab_size: rows of the word table.
        end_token_id: id of [SEP], which ends a text, also a truncated one.
        pad_token_id: id of what follows it.
        hidden_size: width (D).
        num_layers: number of blocks.
        num_heads: attention heads; must divide `hidden_size`.
        intermediate_size: width of the feed-forward.
        max_positions: longest text, [CLS] and [SEP] included.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        end_token_id: int,
        pad_token_id: int = 0,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        intermediate_size: int = 512,
        max_positions: int = 64,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(
                f"text_encoder.hidden_size={hidden_size} must be a multiple of "
                f"text_encoder.num_heads={num_heads}; change one of them"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.end_token_id = end_token_id
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=max_positions,
            pad_token_id=pad_token_id,
            bos_token_id=None,
            eos_token_id=end_token_id,
        )
        self.model = CLIPTextModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One vector per text.

        Args:
            input_ids: int64 [B, T], right-padded, each with its [SEP].
            attention_mask: int64 [B, T], 0 on padding.

        Returns:
            [B, D].
        """
        # The mask would hide nothing that causality does not hide from [SEP], and to look for
        # padding in it transformers would wait for the device.
        hidden = self.model(input_ids=input_ids).last_hidden_state
        # Not the model's own pooling: an id of 2 makes it look for the largest id instead, and a
        # text may hold a [SEP] before the last.
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        is_end = (input_ids == self.end_token_id) & (attention_mask != 0)
        end = torch.where(is_end, columns, 0).amax(dim=1)
        return hidden[torch.arange(len(end), device=end.device), end]


def _sincos_positions(name: str, tower: nn.Module) -> None:
    """Sets the patches' positions, which remain ordinary weights; the class token keeps its own."""
    table: Any = getattr(tower, "pos_embed", None)
    grid: Any = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
    fits = isinstance(table, nn.Parameter) and table.ndim == 3 and grid is not None
    if fits:  # one row per patch, after those of the class token and registers if these have any
        patches, prefix = grid[0] * grid[1], getattr(tower, "num_prefix_tokens", 0)
        fits = table.shape[1] in (patches, prefix + patches) and table.shape[2] % 4 == 0
    if not fits:
        raise UserError(
            f"{KEY}.position=sincos needs a table of one position per patch, which {name} has "
            f"not; set {KEY}.position=learned"
        )
    values = build_sincos2d_pos_embed(list(grid), table.shape[2], device=table.device)
    with torch.no_grad():
        table[0, -patches:] = SINCOS_SCALE * values
