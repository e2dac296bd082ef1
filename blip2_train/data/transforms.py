"""From an image to a uint8 tensor [3, S, S]; what is random is drawn from a given generator.

Images stay uint8 up to the device (a quarter of the bytes to copy), where they are flipped and
normalised. The train transform draws in torchvision's order, so that a generator seeded like
torch's global one gives torchvision's own crops and flips. It draws before it decodes: a JPEG is
decoded only as finely as its crop needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from blip2_train.data.images import Picture
from blip2_train.errors import UserError

Decode = Literal["fast", "exact"]

_CROP_ATTEMPTS = 10


class EvalTransform:
    """Resize to exactly [size, size] (no aspect keeping, no centre crop), bicubic."""

    def __init__(self, size: int) -> None:
        """Fix the output size in pixels."""
        self.size = size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return uint8 [3, size, size] of an RGB image."""
        return _exact_resize(image, self.size)


class TrainTransform:
    """Random resized crop and horizontal flip, then RandAugment where asked for.

    The defaults are the reference's recipe for COCO; `randaugment=True` is its one for Visual
    Genome.
    """

    def __init__(
        self,
        size: int,
        scale: Sequence[float] | None = (0.5, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        randaugment: bool = False,
        decode: Decode = "fast",
    ) -> None:
        """Fix the distribution.

        Args:
            size: output size in pixels.
            scale: smallest and largest share of the image's area that a crop covers; None: the
                whole image, as in evaluation.
            ratio: smallest and largest width / height of a crop.
            flip: probability of a horizontal flip.
            randaugment: apply `rand_augment` after the flip.
            decode: `fast`, or `exact`: the reference's pixels to the last bit.

        Raises:
            UserError: `decode` is neither.
        """
        if decode not in get_args(Decode):
            choices = " or ".join(repr(choice) for choice in get_args(Decode))
            raise UserError(f"data.decode={decode!r} must be {choices}.")
        self.size = size
        self.scale = None if scale is None else (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.flip = flip
        self.randaugment = randaugment
        self.decode = decode

    def __call__(self, data: bytes, generator: torch.Generator) -> tuple[torch.Tensor, bool]:
        """Decode an image file and transform it.

        Args:
            data: see `load_rgb`.
            generator: a CPU generator; what is drawn from it does not depend on `decode`.

        Returns:
            uint8 [3, size, size], and whether it is still to be flipped (`flip_images`).

        Raises:
            BadImage: see `load_rgb`.
        """
        picture = Picture(data)
        box = (0, 0, *picture.size)
        if self.scale is not None:
            box = draw_crop(picture.size, self.scale, self.ratio, generator)
        flip = bool(torch.rand(1, generator=generator) < self.flip)
        crop = _exact_crop if self.decode == "exact" else _fast_crop
        pixels = crop(picture, box, self.size)
        if not self.randaugment:
            return pixels, flip
        image = Image.fromarray((pixels.flip(-1) if flip else pixels).permute(1, 2, 0).numpy())
        return _to_tensor(rand_augment(image, generator)), False


def flip_images(image: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Flip some images of a batch horizontally, on any device, without waiting for it.

    Args:
        image: [B, C, H, W].
        flip: bool [B], the ones to flip.
    """
    return torch.where(flip[:, None, None, None], image.flip(-1), image)


def shrink_factor(width: int, height: int, size: int) -> int:
    """Return the largest of 8, 4, 2 and 1 by which a crop shrinks to no less than `size` pixels.

    Args:
        width: of the crop, in pixels.
        height: of the crop, in pixels.
        size: needed in both directions.
    """
    return next((factor for factor in (8, 4, 2) if min(width, height) >= factor * size), 1)


def shrink_box(box: tuple[int, int, int, int], shrink: int) -> tuple[int, int, int, int]:
    """Return a box (left, top, width, height) in pixels of an image that was shrunk.

    Its edges are rounded to whole pixels: they move by no more than half of one, and no side gets
    shorter than what `shrink` leaves of it, rounded down.
    """
    left, top, width, height = box
    x, right = (left + shrink // 2) // shrink, (left + width + shrink // 2) // shrink
    y, bottom = (top + shrink // 2) // shrink, (top + height + shrink // 2) // shrink
    return x, y, right - x, bottom - y


def _exact_crop(picture: Picture, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """Return uint8 [3, size, size] of a box (left, top, width, height), as torchvision does."""
    left, top, width, height = box
    return _exact_resize(picture.rgb().crop((left, top, left + width, top + height)), size)


def _fast_crop(picture: Picture, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """Return uint8 [3, size, size] of a box (left, top, width, height), decoded no finer than that.

    The resizing is PIL's algorithm in torch's implementation, several times as fast.
    """
    shrink = shrink_factor(box[2], box[3], size) if picture.shrinks else 1
    left, top, width, height = shrink_box(box, shrink)
    pixels = picture.pixels(shrink)[top : top + height, left : left + width]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(image, (size, size), mode="bicubic", antialias=True)[0]


def draw_crop(
    image_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop as torchvision's `RandomResizedCrop.get_params` does.

    Args:
        image_size: width and height in pixels.
        scale: range of the crop's share of the area.
        ratio: range of width / height, drawn uniformly in its logarithm.
        generator: the same numbers in the same order as torchvision takes from the global one.

    Returns:
        Left, top, width and height in pixels. After ten boxes that do not fit: the largest
        centred box of an allowed aspect ratio.
    """
    image_width, image_height = image_size
    area = image_width * image_height
    log_ratio = torch.log(torch.tensor(ratio)).tolist()
    for _ in range(_CROP_ATTEMPTS):
        share = torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(*log_ratio, generator=generator)).item()
        width = round(math.sqrt(area * share * aspect))
        height = round(math.sqrt(area * share / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = torch.randint(0, image_height - height + 1, (1,), generator=generator).item()
            left = torch.randint(0, image_width - width + 1, (1,), generator=generator).item()
            return int(left), int(top), width, height
    width, height = image_width, image_height
    if image_width / image_height < min(ratio):
        height = round(width / min(ratio))
    elif image_width / image_height > max(ratio):
        width = round(height * max(ratio))
    return (image_width - width) // 2, (image_height - height) // 2, width, height


# RandAugment as the reference applies it: two operations of ten, magnitude 5 of 10, each carried
# out with probability 1/2. Sizes are those of magnitude 5; its random generator was NumPy's global
# one, so the operations are the same here, not the draws.
_NUM_OPERATIONS = 2
_APPLY = 0.5
_SHEAR = 0.15
_TRANSLATE_PIXELS = 5
_ROTATE_DEGREES = 15
_FILL = (128, 128, 128)

_Operation = Callable[[Image.Image, float], Image.Image]


def rand_augment(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Apply two operations, drawn with replacement out of `OPERATIONS`.

    Args:
        image: RGB, changed neither in size nor in place.
        generator: a CPU generator; the number of draws is always the same.
    """
    chosen = torch.randint(0, len(OPERATIONS), (_NUM_OPERATIONS,), generator=generator).tolist()
    draws = torch.rand(_NUM_OPERATIONS, 2, generator=generator).tolist()
    operations = list(OPERATIONS.values())
    for index, (apply, side) in zip(chosen, draws, strict=True):
        if apply < _APPLY:
            image = operations[index](image, 1.0 if side < 0.5 else -1.0)
    return image


def _identity(image: Image.Image, sign: float) -> Image.Image:
    return image


def _autocontrast(image: Image.Image, sign: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, sign: float) -> Image.Image:
    return ImageOps.equalize(image)


def _shear_x(image: Image.Image, sign: float) -> Image.Image:
    return _affine(image, (1, -sign * _SHEAR, 0, 0, 1, 0))


def _shear_y(image: Image.Image, sign: float) -> Image.Image:
    return _affine(image, (1, 0, 0, -sign * _SHEAR, 1, 0))


def _translate_x(image: Image.Image, sign: float) -> Image.Image:
    return _affine(image, (1, 0, sign * _TRANSLATE_PIXELS, 0, 1, 0))


def _translate_y(image: Image.Image, sign: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, sign * _TRANSLATE_PIXELS))


def _rotate(image: Image.Image, sign: float) -> Image.Image:
    angle = math.radians(sign * _ROTATE_DEGREES)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _affine(image: Image.Image, source: tuple[float, ...]) -> Image.Image:
    """Sample an image bilinearly at affine coordinates; what lies outside is `_FILL`.

    Args:
        image: RGB.
        source: (a, b, c, d, e, f): output pixel (x, y) shows input (a x + b y + c, d x + e y + f);
            integer coordinates are pixel centres.

    Returns:
        RGB of the same size.
    """
    a, b, c, d, e, f = source
    # PIL puts pixel centres at halves. One pixel of fill around the image lets its edge blend into
    # the fill instead of being cut, as in the reference (OpenCV, which rounds where PIL truncates).
    c += 1.5 - 0.5 * (a + b)
    f += 1.5 - 0.5 * (d + e)
    padded = ImageOps.expand(image, border=1, fill=_FILL)
    return padded.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        resample=Image.Resampling.BILINEAR,
        fillcolor=_FILL,
    )


# At magnitude 5 the enhancement factor is 1.0: Brightness and Sharpness are drawn but do nothing.
OPERATIONS: dict[str, _Operation] = {
    "Identity": _identity,
    "AutoContrast": _autocontrast,
    "Brightness": _identity,
    "Sharpness": _identity,
    "Equalize": _equalize,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}


def _exact_resize(image: Image.Image, size: int) -> torch.Tensor:
    """Return uint8 [3, size, size] of an RGB image, as torchvision resizes it."""
    return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Return uint8 [3, H, W], contiguous, of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
