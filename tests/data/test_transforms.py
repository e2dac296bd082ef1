"""Proven here: images come out as torchvision and the reference make them.

- crop, flip and resize are torchvision's own, draw by draw, for many sizes and shapes
- the same generator state gives the same picture, and torch's global generator is not touched
- each RandAugment operation equals a naive implementation of the published one
- RandAugment draws each operation equally often, applies half of them, on both sides
- normalising on uint8 batches equals torchvision's ToTensor and Normalize
"""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

from blip2_train.data import transforms
from blip2_train.data.transforms import (
    OPERATIONS,
    EvalTransform,
    TrainTransform,
    flip_images,
    rand_augment,
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise on top: resizing, shifting and equalising all show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 5 + 1), np.cos(y / 7), np.sin((x + y) / 9)]
    values = np.stack([90 + 50 * wave for wave in waves], -1) + rng.normal(
        0, 12, (height, width, 3)
    )
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def finished(pixels: torch.Tensor, flip: bool) -> torch.Tensor:
    """What the trainer makes of it."""
    return flip_images(pixels[None], torch.tensor([flip]))[0]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The last two can never hold a crop of an allowed shape: the fallback is taken.
SIZES = [(50, 37), (37, 50), (64, 64), (300, 41), (7, 5), (200, 3), (2, 90)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.5, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (0.5, 1.1))]
)
def test_crop_and_flip_are_torchvisions(size, scale, ratio):
    image = picture(*size)
    theirs = tv.Compose(
        [
            tv.RandomResizedCrop(24, scale, ratio, interpolation=InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.PILToTensor(),
        ]
    )
    ours, data = TrainTransform(24, scale, ratio, decode="exact"), png(image)
    for seed in range(25):
        torch.manual_seed(seed)
        expected = theirs(image)
        assert torch.equal(finished(*ours(data, generator(seed))), expected), seed


def test_the_state_of_the_generator_decides_alone():
    image, transform = png(picture(60, 40)), TrainTransform(16, randaugment=True)
    g = generator(3)
    (first, _), (second, _) = transform(image, g), transform(image, g)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    g = generator(3)
    assert torch.equal(transform(image, g)[0], first)
    assert torch.equal(transform(image, g)[0], second)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "out",
    [
        EvalTransform(12)(picture(31, 22)),
        *(
            TrainTransform(12, randaugment=augmented, decode=decode)(
                png(picture(31, 22)), generator(0)
            )[0]
            for augmented in (False, True)
            for decode in ("fast", "exact")
        ),
    ],
)
def test_images_are_small_contiguous_bytes(out):
    assert out.shape == (3, 12, 12)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()


@pytest.mark.parametrize("size", SIZES)
def test_eval_is_torchvisions_exact_resize(size):
    image = picture(*size)
    theirs = tv.Compose([tv.Resize((20, 20), InterpolationMode.BICUBIC), tv.PILToTensor()])
    assert torch.equal(EvalTransform(20)(image), theirs(image))


# RandAugment. The naive twins follow the definition in pixel coordinates: bilinear, fill 128.


def naive_affine(image: Image.Image, source) -> np.ndarray:
    """Output pixel (x, y) shows the input at source(x, y), bilinear; outside lies 128."""
    pixels = np.asarray(image).astype(np.float64)
    height, width = pixels.shape[:2]

    def at(x: int, y: int) -> np.ndarray:
        inside = 0 <= x < width and 0 <= y < height
        return pixels[y, x] if inside else np.full(3, 128.0)

    out = np.empty_like(pixels)
    for y in range(height):
        for x in range(width):
            u, v = source(x, y)
            left, top = math.floor(u), math.floor(v)
            p, q = u - left, v - top
            out[y, x] = (1 - q) * ((1 - p) * at(left, top) + p * at(left + 1, top)) + q * (
                (1 - p) * at(left, top + 1) + p * at(left + 1, top + 1)
            )
    return out


def rotated(sign, width, height):
    """OpenCV's rotation by 15 degrees about (width / 2, height / 2), inverted."""
    angle = math.radians(15 * sign)
    c, s = math.cos(angle), math.sin(angle)

    def source(x, y):
        dx, dy = x - width / 2, y - height / 2
        return c * dx - s * dy + width / 2, s * dx + c * dy + height / 2

    return source


WIDTH, HEIGHT = 26, 19
GEOMETRY = {
    "ShearX": lambda sign: lambda x, y: (x - sign * 0.15 * y, y),
    "ShearY": lambda sign: lambda x, y: (x, y - sign * 0.15 * x),
    "TranslateX": lambda sign: lambda x, y: (x + sign * 5, y),
    "TranslateY": lambda sign: lambda x, y: (x, y + sign * 5),
    "Rotate": lambda sign: rotated(sign, WIDTH, HEIGHT),
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometric_operations(name, sign):
    image = picture(WIDTH, HEIGHT)
    out = np.asarray(OPERATIONS[name](image, sign)).astype(np.float64)
    expected = naive_affine(image, GEOMETRY[name](sign))
    # PIL drops the fraction of the result; a wrong pixel is off by tens.
    assert (expected - out).min() > -1e-6 and (expected - out).max() < 1 + 1e-6
    assert (out != np.asarray(image)).mean() > 0.5


def test_translation_moves_whole_pixels_over_gray():
    image = picture(WIDTH, HEIGHT)
    out = np.asarray(OPERATIONS["TranslateX"](image, 1.0))
    np.testing.assert_array_equal(out[:, :-5], np.asarray(image)[:, 5:])
    assert (out[:, -5:] == 128).all()


def test_autocontrast_spreads_each_channel():
    image = picture(WIDTH, HEIGHT)
    pixels = np.asarray(image).astype(np.float64)
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    expected = ((pixels - low) * 255 / (high - low)).clip(0, 255)
    out = np.asarray(OPERATIONS["AutoContrast"](image, 1.0))
    assert np.abs(out - expected).max() <= 1.0
    assert out.min() == 0 and out.max() == 255


def test_equalize_follows_the_published_histogram_rule():
    image = picture(70, 60)
    pixels = np.asarray(image)
    out = np.asarray(OPERATIONS["Equalize"](image, 1.0))
    for channel in range(3):
        histogram = np.bincount(pixels[..., channel].ravel(), minlength=256)
        step = histogram[histogram > 0][:-1].sum() // 255
        assert step > 0
        table = (np.cumsum(np.concatenate([[step // 2], histogram[:-1]])) // step).clip(0, 255)
        np.testing.assert_array_equal(out[..., channel], table[pixels[..., channel]])


def test_a_flat_image_survives_every_operation():
    image = Image.new("RGB", (9, 9), (7, 128, 200))
    for name, operation in OPERATIONS.items():
        out = operation(image, 1.0)
        assert out.size == (9, 9) and out.mode == "RGB", name


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_at_magnitude_five_three_operations_do_nothing(name):
    image = picture(WIDTH, HEIGHT)
    assert np.array_equal(np.asarray(OPERATIONS[name](image, -1.0)), np.asarray(image))


def test_rand_augment_draws_two_of_ten_with_replacement(monkeypatch):
    calls: list[tuple[str, float]] = []

    def recorder(name):
        def operation(image, sign):
            calls.append((name, sign))
            return image

        return operation

    recorders = {name: recorder(name) for name in OPERATIONS}
    monkeypatch.setattr(transforms, "OPERATIONS", recorders)
    image, g, rounds = picture(4, 4), generator(0), 4000
    per_round, twice = [], 0
    for _ in range(rounds):
        before = len(calls)
        rand_augment(image, g)
        drawn = [name for name, _ in calls[before:]]
        per_round.append(len(drawn))
        twice += len(drawn) == 2 and drawn[0] == drawn[1]
    # Binomial: 0, 1, 2 operations at 1/4, 1/2, 1/4; bounds are five standard deviations.
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert abs(per_round.count(number) / rounds - share) < 0.04
    assert abs(twice / rounds - 0.025) < 0.0125
    for name in recorders:
        assert abs(sum(call[0] == name for call in calls) / len(calls) - 0.1) < 0.025
    assert abs(sum(sign > 0 for _, sign in calls) / len(calls) - 0.5) < 0.04


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_augmented_images_differ_from_the_plain_ones_only_by_the_operations(decode):
    """The crop and the flip come first and draw alike, with and without RandAugment."""
    image = png(picture(60, 40))
    plain = TrainTransform(16, decode=decode)
    augmented = TrainTransform(16, randaugment=True, decode=decode)
    same = 0
    for seed in range(60):
        g = generator(seed)
        plain_out = finished(*plain(image, g))
        expected = rand_augment(Image.fromarray(plain_out.permute(1, 2, 0).numpy()), g)
        out, flip = augmented(image, generator(seed))
        assert not flip  # done, as the operations come after it
        assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(expected))
        same += torch.equal(out, plain_out)
    assert 0 < same < 60


def test_without_a_crop_training_sees_what_evaluation_sees():
    image = picture(31, 17, 5)
    transform = TrainTransform(12, scale=None, flip=0.0, decode="exact")
    pixels, flip = transform(png(image), generator(1))
    assert torch.equal(pixels, EvalTransform(12)(image)) and not flip


def test_flips_on_the_device_are_pils():
    images = [picture(20, 20, seed) for seed in range(4)]
    batch = torch.stack([EvalTransform(20)(image) for image in images])
    flip = torch.tensor([True, False, False, True])
    for out, image, flipped in zip(flip_images(batch, flip), images, flip, strict=True):
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert torch.equal(out, EvalTransform(20)(image))
