"""`vision.precision=float8`: the tower goes over to it only if its features stay what they were."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2_train.config import Launch
from blip2_train.errors import UserError
from blip2_train.models import float8
from blip2_train.models.cached_tower import CachedTower
from blip2_train.models.vision import VisionTower

log = logging.getLogger(__name__)

LEAST_SIMILARITY = 0.999  # of features in float8 to those in bfloat16, as a cosine
PICTURES = 4  # whose cosines differ by 2e-4, by 1e-3 where they are worst (docs/performance.md)


def check_gpu(cfg: Mapping[str, Any], launch: Launch, cuda: bool) -> None:
    """Before anything is read: whether this process's GPU can do what `vision.precision` says.

    Raises:
        UserError: it cannot.
    """
    computed = cfg["data"]["features"] == "computed"
    if cuda and computed and cfg.get("vision", {}).get("precision") == "float8":
        float8.check_device(torch.device("cuda", launch.local_rank))


def start_tower(vision: VisionTower | CachedTower, device: torch.device) -> None:
    """Converts a tower that shall compute in float8, and compares its features before and after.

    Before anything is compiled, so that no block is compiled twice (a compiled block rounds less
    often in between, not more). The native features are taken first: the weights are never there
    in both precisions.

    Args:
        vision: nothing happens to one of native precision, or to one whose features were computed
            and compared before; another one is moved to the device.
        device: that trains.

    Raises:
        UserError: the features differ too much, or cannot be had on this device.
    """
    if isinstance(vision, CachedTower) or vision.precision == "native":
        return
    if device.type == "cpu":
        log.warning(
            "vision.precision=float8: processors only emulate float8 products, several times "
            "slower than vision.precision=native; good for trying a recipe, not for training"
        )
    vision.to(device)
    image = made_up_pictures(PICTURES, vision.image_size).to(device)
    native = vision(image)
    try:
        vision.convert()
        similarity = token_similarity(native, vision(image))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of torchao's and the device's own kinds
        raise UserError(
            f"vision.precision=float8: {vision.name} cannot be computed in it on this device "
            f"({(str(error) or type(error).__name__).splitlines()[0]}); set vision.precision=native"
        ) from error
    if not similarity >= LEAST_SIMILARITY:  # which no number is not either
        raise UserError(
            f"vision.precision=float8 changes the features of vision.name={vision.name} too much: "
            f"their cosine with the native ones is {similarity:.5f} on made-up pictures, and must "
            f"be at least {LEAST_SIMILARITY}; set vision.precision=native"
        )
    log.info(
        "vision.precision=float8: cosine with the native features %.5f, at least %s is needed",
        similarity,
        LEAST_SIMILARITY,
    )


def token_similarity(one: Tensor, other: Tensor) -> float:
    """Mean over pictures and tokens of the cosine of their features, [B, P, Dv] each.

    By token and not of a picture as a whole: trained transformers have a few tokens many times as
    long as the others, whose direction would decide, while `ln_vision` makes all of them equally
    long before the Q-Former reads them. With four tokens 40 times as long as the others, the
    cosine of whole pictures was 0.9999 where that of the other tokens was 0.9978. Channels far
    larger than the others flatter both; `docs/performance.md` has the numbers.
    """
    return F.cosine_similarity(one.float(), other.float(), dim=-1).mean().item()


def made_up_pictures(count: int, size: int) -> Tensor:
    """Smooth random fields with noise, the same at every call: uint8 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bicubic")
    noise = 0.05 * torch.randn(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8)
