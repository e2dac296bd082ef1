"""Which of the foreign image towers can hold one of ours: read off the timm model itself."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from blip2_train.checkpoint.towers import has_first_norm, timm_to_hf, timm_to_lavis
from blip2_train.errors import UserError

# timm's activations by the names of transformers
ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class TowerShape:
    """A vision transformer with a class token, learned positions and norms in front of sub-layers.

    Attributes:
        width: of its tokens.
        depth: blocks.
        heads: of an attention.
        mlp: width of the feed-forwards.
        patch: side of a patch, pixels.
        activation: of the feed-forwards, by transformers' name.
        eps: of its norms.
        first_norm: whether a norm stands in front of the blocks (CLIP).
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    activation: str
    eps: float
    first_norm: bool


def shape_for_hf(tower: nn.Module, name: str) -> TowerShape:
    """The tower's shape, if `Blip2VisionModel` can be of that shape.

    Raises:
        UserError: it cannot.
    """
    holder = "Hugging Face's BLIP-2 classes"
    shape = _shape(tower, name, holder)
    if shape.first_norm:
        raise _cannot(name, holder, "has a norm in front of its blocks, as CLIP's, and theirs none")
    if unknown := timm_to_hf(tower.state_dict()).unknown:
        raise _cannot(name, holder, f"has {unknown[0]}, and theirs nothing of the kind")
    return shape


def shape_for_lavis(tower: nn.Module, name: str) -> TowerShape:
    """The tower's shape, if LAVIS's eva_vit or clip_vit can be of that shape.

    Raises:
        UserError: neither can.
    """
    shape = _shape(tower, name, "LAVIS")
    wanted = ("quick_gelu", 1e-5) if shape.first_norm else ("gelu", 1e-6)
    if (shape.activation, shape.eps) != wanted:
        raise _cannot(
            name,
            "LAVIS",
            f"computes with {shape.activation} and eps {shape.eps:g}, and its "
            f"{'clip_vit' if shape.first_norm else 'eva_vit'} with {wanted[0]} and {wanted[1]:g}",
        )
    rename = timm_to_lavis if shape.first_norm else timm_to_hf  # eva_vit's parts are those of HF
    if unknown := rename(tower.state_dict()).unknown:
        raise _cannot(name, "LAVIS", f"has {unknown[0]}, and theirs nothing of the kind")
    return shape


def _shape(tower: Any, name: str, holder: str) -> TowerShape:
    """Raises UserError where it is no such transformer."""
    state = tower.state_dict()
    blocks = getattr(tower, "blocks", None)
    if not isinstance(blocks, nn.Module) or not {"cls_token", "pos_embed"} <= state.keys():
        raise _cannot(
            name, holder, "is no vision transformer with a class token and learned positions"
        )
    block: Any = blocks[0]  # type: ignore[index]
    mlp: Any = getattr(block, "mlp", None)
    norms = [block.norm1, block.norm2]
    patch = tower.patch_embed.patch_size
    side = tower.patch_embed.grid_size
    eps = {getattr(norm, "eps", None) for norm in norms}
    problems = {
        "has a norm behind its blocks (vision.drop_last_block=true takes it away)": not isinstance(
            tower.norm, nn.Identity
        ),
        "has rotary positions": getattr(tower, "rope", None) is not None,
        "has other tokens than the class token in front": state["pos_embed"].shape[1]
        != side[0] * side[1] + 1,
        "has no square patches and pictures": patch[0] != patch[1] or side[0] != side[1],
        "has gated feed-forwards": not hasattr(mlp, "fc1")
        or mlp.fc1.out_features != mlp.fc2.in_features,
        "has other norms than layer norms": len(eps) > 1
        or not all(isinstance(norm, nn.LayerNorm) for norm in norms),
        "has another activation": type(getattr(mlp, "act", None)).__name__ not in ACTIVATIONS,
    }
    if reasons := [reason for reason, holds in problems.items() if holds]:
        raise _cannot(name, holder, reasons[0])
    return TowerShape(
        width=tower.embed_dim,
        depth=len(blocks),  # type: ignore[arg-type]
        heads=block.attn.num_heads,
        mlp=mlp.fc1.out_features,
        patch=patch[0],
        activation=ACTIVATIONS[type(mlp.act).__name__],
        eps=block.norm1.eps,
        first_norm=has_first_norm(state),
    )


def _cannot(name: str, holder: str, reason: str) -> UserError:
    return UserError(f"{holder} cannot hold the image tower vision.name={name}: it {reason}")
