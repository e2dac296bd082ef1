"""Fast decoding shows the same pictures as exact decoding, at a fraction of the work.

- a JPEG is shrunk by its decoder, never so far that a crop has less pixels than are wanted
- what is drawn (crop, flip, RandAugment) does not depend on the mode
- on photographs the mean difference stays within stated bounds, at every size and orientation
- files that cannot be shrunk (other formats, odd modes, turned ones) differ by rounding alone
- damaged files are a BadImage in both modes, and nothing else
- the optional JPEG decoder gives PIL's own pixels
"""

import contextlib
import io
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from blip2_train.benchmarks.photographs import Photographer
from blip2_train.data import images
from blip2_train.data.images import BadImage, Picture, load_rgb
from blip2_train.data.transforms import TrainTransform, shrink_box, shrink_factor

SIZE = 32


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    return Photographer(width, height, seed).shoot()


def both(data: bytes, seed: int, size: int = SIZE, **options) -> list[torch.Tensor]:
    """What the fast and the exact mode make of a file with the same random numbers."""
    found = []
    for decode in ("fast", "exact"):
        generator = torch.Generator().manual_seed(seed)
        pixels, flip = TrainTransform(size, decode=decode, **options)(data, generator)
        found.append((pixels.int(), flip, generator.get_state()))
    fast, exact = found
    assert fast[1] == exact[1]
    assert torch.equal(fast[2], exact[2])
    return [fast[0], exact[0]]


@pytest.fixture(params=["PIL", "simplejpeg"])
def decoder(request, monkeypatch):
    """Each of the two JPEG decoders, where it is installed."""
    if request.param == "PIL":
        monkeypatch.setattr(images, "simplejpeg", None)
    elif images.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")


# How far a file is shrunk.


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 500), st.integers(0, 500),
    st.integers(1, 700),
)  # fmt: skip
def test_a_crop_is_never_shrunk_below_what_is_wanted(width, height, left, top, size):
    shrink = shrink_factor(width, height, size)
    assert shrink in (1, 2, 4, 8)
    assert shrink == 1 or min(width, height) / shrink >= size
    if shrink < 8:  # nor less than it could be
        assert min(width, height) / (2 * shrink) < size
    x, y, w, h = shrink_box((left, top, width, height), shrink)
    if shrink == 1:
        assert (x, y, w, h) == (left, top, width, height)
    else:
        assert w >= size and h >= size
    # inside the decoded image, whose sides are rounded up
    assert x + w <= -(-(left + width) // shrink) and y + h <= -(-(top + height) // shrink)
    for ours, exact in ((x, left), (y, top), (x + w, left + width), (y + h, top + height)):
        assert abs(ours - exact / shrink) <= 0.5


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(97, 61), (64, 64), (17, 130)])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": "4:2:2"}, {"progressive": True}]
)
def test_the_decoders_own_scaling(decoder, size, shrink, options):
    """One pixel for `shrink` squared, near the mean of those; else what `load_rgb` gives."""
    data = encode(photograph(*size), quality=90, **options)
    picture = Picture(data)
    assert picture.size == size and picture.shrinks
    pixels = picture.pixels(shrink)
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    assert pixels.shape == (-(-size[1] // shrink), -(-size[0] // shrink), 3)
    whole = np.asarray(load_rgb(data))
    if shrink == 1:
        assert np.array_equal(pixels, whole)
    reduced = np.asarray(Image.fromarray(whole).reduce(shrink)).astype(int)
    assert np.abs(pixels - reduced).mean() < 8  # one pixel further: 13 and more


@pytest.mark.parametrize("size", [(341, 256), (250, 375), (17, 9), (8, 8), (700, 40)])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_both_decoders_give_the_same_pixels(monkeypatch, size, shrink):
    if images.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    data = encode(photograph(*size, seed=3), quality=90)
    pixels = Picture(data).pixels(shrink)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(pixels, Picture(data).pixels(shrink))


def test_damage_that_pil_bears_with_is_borne_with(decoder):
    """Stray bytes between the segments: libjpeg warns and goes on."""
    data = encode(photograph(64, 48), quality=90)
    stray = data[:-2] + b"\x00\x00\x00\x00\x00" + data[-2:]
    assert np.array_equal(Picture(stray).pixels(), np.asarray(load_rgb(stray)))
    assert Picture(stray).pixels(2).shape == (24, 32, 3)


# What comes out.


# Mean difference of values from 0 to 255. The shrinking alone makes 0.4 to 1.2 of it, the crop's
# edges, which move by up to half a pixel, the rest.
@pytest.mark.parametrize(
    ("size", "output", "bound"),
    [
        ((341, 256), 224, 0.3),  # nothing to shrink: rounding alone
        ((500, 375), 96, 5),
        ((1365, 1024), 224, 2.5),
        ((256, 341), 48, 5),
        ((640, 480), 24, 5),
    ],
)
def test_photographs_look_the_same(decoder, size, output, bound):
    data = encode(photograph(*size), quality=90)
    for seed in range(4):
        fast, exact = both(data, seed, output)
        assert (fast - exact).abs().float().mean() < bound


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_before_the_crop(decoder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(160, 120), quality=90, exif=exif)
    picture = Picture(data)
    assert picture.size == load_rgb(data).size
    assert picture.shrinks == (orientation == 1)
    for seed in range(3):
        fast, exact = both(data, seed)
        assert (fast - exact).abs().float().mean() < (5 if orientation == 1 else 0.3)


def gray16(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


UNUSUAL = {
    "png": lambda image: encode(image, "PNG"),
    "webp": lambda image: encode(image, "WEBP", lossless=True),
    "bmp": lambda image: encode(image, "BMP"),
    "tiff": lambda image: encode(image, "TIFF"),
    "gif": lambda image: encode(image, "GIF"),
    "palette": lambda image: encode(image.quantize(64), "PNG", transparency=3),
    "alpha": lambda image: encode(
        Image.merge("RGBA", (*image.split(), image.getchannel(0))), "PNG"
    ),
    "gray": lambda image: encode(image.convert("L"), quality=90),
    "gray 16 bits": lambda image: encode(gray16(image), "PNG"),
    "gray tiff 16 bits": lambda image: encode(gray16(image), "TIFF"),
    "cmyk": lambda image: encode(image.convert("CMYK"), quality=90),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_differ_by_rounding_alone(decoder, name):
    data = UNUSUAL[name](photograph(160, 120))
    assert not Picture(data).shrinks
    for seed in range(3):
        fast, exact = both(data, seed)
        assert (fast - exact).abs().max() <= 2  # sums of weights in 16 bits, where PIL has 22
        assert (fast - exact).abs().float().mean() < 0.3


def test_augmented_images_are_drawn_alike(decoder):
    data = encode(photograph(160, 120), quality=90)
    for seed in range(8):
        fast, exact = both(data, seed, randaugment=True, scale=None)
        assert (fast - exact).abs().float().mean() < 12  # equalising spreads small differences


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (3, 2), (33, 32)])
def test_tiny_images(decoder, size):
    for data in (encode(photograph(*size)), encode(photograph(*size), "PNG")):
        for seed in range(3):
            fast, exact = both(data, seed)
            assert fast.shape == exact.shape == (3, SIZE, SIZE)


# Files that cannot be used.


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_cut_and_foreign_files_are_bad_images(decoder, decode):
    image = photograph(160, 120)
    transform = TrainTransform(SIZE, decode=decode)
    whole = [encode(image), encode(image, "PNG"), encode(image.convert("CMYK"))]
    for data in (*(file[: len(file) // 2] for file in whole), b"", b"no image", whole[0][:20]):
        with pytest.raises(BadImage):
            transform(data, torch.Generator().manual_seed(0))


def test_the_pixel_limit_is_checked_before_anything_is_decoded():
    with pytest.raises(BadImage, match=r"^too large: 160x120"):
        Picture(encode(photograph(160, 120)), max_pixels=160 * 119)


def test_random_damage_raises_only_bad_image(decoder):
    image, numbers = photograph(160, 120), random.Random(0)
    originals = [encode(image), encode(image, progressive=True), encode(image, subsampling=0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks about damaged files
        for seed in range(200):
            data = bytearray(numbers.choice(originals))
            for _ in range(numbers.randrange(1, 8)):
                data[numbers.randrange(min(len(data), 900))] = numbers.randrange(256)
            with contextlib.suppress(BadImage):
                transform = TrainTransform(SIZE, ratio=(0.5, 2))
                out, _ = transform(bytes(data), torch.Generator().manual_seed(seed))
                assert out.shape == (3, SIZE, SIZE)
