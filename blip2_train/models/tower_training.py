"""What a timm tower needs to be trained: recomputed blocks, its layers in order, other image sizes.

Shapes: S image side in pixels, P image tokens, Dv tower width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import timm.models.eva
import timm.models.vision_transformer
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import group_parameters
from torch import Tensor, nn

from blip2_train.errors import UserError

Features = Callable[[nn.Module, Tensor], Tensor]  # of a tower and an image


class RecomputableTower(nn.Module):
    """Base of modules around a timm tower whose blocks can be recomputed in the backward pass.

    Attributes:
        group: of the configuration, which errors name.
        name: of the timm model.
        tower: the model.
    """

    group: ClassVar[str]
    name: str
    tower: nn.Module
    _gradient_checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether timm recomputes the blocks (not reentrant).

        Raises:
            UserError: it is set and the model cannot.
        """
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on or self._gradient_checkpointing:
            try:
                self.tower.set_grad_checkpointing(on)  # type: ignore[operator]
            except (AttributeError, AssertionError) as error:  # what timm says where it cannot
                raise UserError(
                    f"{self.group}.gradient_checkpointing=true is not possible with {self.name}; "
                    "set it to false"
                ) from error
        self._gradient_checkpointing = on


class _Features(nn.Module):
    def __init__(self, features: Features, tower: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.tower = tower

    def forward(self, image: Tensor) -> Tensor:
        return self.features(self.tower, image)


def without_values(
    features: Features, tower: nn.Module, image_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """One image's features as a tensor without values, which costs next to nothing.

    Args:
        features: of a tower and an image [1, 3, S, S] in the tower's dtype.
        tower: in eval mode, as batch norms refuse to train on a single value.
        image_size: side in pixels (S).

    Returns:
        The features; and {name: what stood for it}, of each parameter, with a gradient wanted.
    """
    parameters: dict[str, Tensor] = {
        name: torch.empty_like(value, device="meta", requires_grad=True)
        for name, value in tower.named_parameters()
    }
    buffers = {
        name: torch.empty_like(value, device="meta") for name, value in tower.named_buffers()
    }
    state = {f"tower.{name}": value for name, value in (parameters | buffers).items()}
    dtype = next(tower.parameters()).dtype
    blank = torch.zeros(1, 3, image_size, image_size, dtype=dtype, device="meta")
    out = torch.func.functional_call(_Features(features, tower), state, (blank,))
    return out, parameters


def freeze_unread(features: Features, tower: nn.Module, image_size: int) -> None:
    """Freezes the parameters that the features do not depend on, such as those of a pooling head.

    DDP waits for a gradient of every parameter that is trained. Found on tensors without values:
    a real backward pass of a billion weights would take minutes and gigabytes on a processor.

    Args:
        features: see `without_values`.
        tower: changed in place.
        image_size: side in pixels (S).
    """
    out, parameters = without_values(features, tower, image_size)
    out.sum().backward()
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(parameters[name].grad is not None)


def layers_of(name: str, tower: nn.Module) -> dict[str, int]:
    """The layer that each trained parameter is in: embeddings 0, the first block 1, ...

    What comes behind the blocks, such as a norm, belongs to the last layer.

    Args:
        name: of the model, for errors.
        tower: a timm model.

    Raises:
        UserError: timm does not know the model's layers.
    """
    try:
        matcher = tower.group_matcher(coarse=False)  # type: ignore[operator]
        known = group_parameters(tower, matcher, reverse=True)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"optimizer.layer_decay: timm does not know the layers of vision.name={name}; set "
            "optimizer.layer_decay=1"
        ) from error
    return {key: known[key] for key, p in tower.named_parameters() if p.requires_grad}


def resized_positions(tower: Any, table: Tensor) -> Tensor:
    """A table of positions for the size of image that a tower takes.

    As the reference and Hugging Face do it: the patches' positions by bicubic interpolation,
    without the smoothing that timm's own default has; those of class token and registers stay.

    Args:
        tower: a timm vision transformer.
        table: [1, P', Dv] of one that takes square images of another size.

    Returns:
        [1, P, Dv]; the table itself where it is not of such a tower.
    """
    prefix = 0 if getattr(tower, "no_embed_class", False) else tower.num_prefix_tokens
    patches = table.shape[1] - prefix
    if patches < 1 or math.isqrt(patches) ** 2 != patches or table.shape[2] != tower.embed_dim:
        return table
    grid = list(tower.patch_embed.grid_size)
    return resample_abs_pos_embed(table, new_size=grid, num_prefix_tokens=prefix, antialias=False)


@contextlib.contextmanager
def reference_positions() -> Iterator[None]:
    """Inside, timm brings tables of positions to another size as `resized_positions` does.

    Its loading functions say nothing about how, so it is said in their place.
    """
    modules = (timm.models.vision_transformer, timm.models.eva)
    name = resample_abs_pos_embed.__name__  # by which both have imported it
    for module in modules:
        setattr(module, name, _without_smoothing)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, resample_abs_pos_embed)


def _without_smoothing(*args: Any, **kwargs: Any) -> Tensor:
    return resample_abs_pos_embed(*args, **{**kwargs, "antialias": False})
