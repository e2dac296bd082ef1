"""Images: any bytes become an upright RGB picture or a BadImage.

- all eight EXIF orientations, by pixel content; a damaged EXIF block changes nothing
- 16-bit gray is scaled, transparency goes on white, only the first frame counts
- the pixel limit is checked in the header: nothing of a huge image is ever allocated
- a clean small JPEG keeps its bytes; all else is encoded again, shrunk and bare
- mutated bytes raise nothing but BadImage
"""

import contextlib
import io
import random
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from blip2_train.data.images import BadImage, load_rgb, to_jpeg


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Red, green / blue, white: no two orientations look the same."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 2, height // 2))
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_orientation(orientation: int, format: str) -> None:
    stored = quadrants()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, format, exif=exif)
    upright = load_rgb(data)
    stored.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(stored)
    assert upright.size == expected.size == ((48, 32) if orientation < 5 else (32, 48))
    corners = [(2, 2), (-3, 2), (2, -3), (-3, -3)]
    for y, x in corners:
        assert np.abs(pixels(upright)[y, x] - pixels(expected)[y, x]).max() < 30  # JPEG
    assert (upright.size, "RGB") == (to_jpeg(data, short_side=0, quality=90)[1:], upright.mode)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_impossible_orientation_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert load_rgb(encode(quadrants(), "JPEG", exif=exif)).size == (48, 32)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_gray_of_16_bits_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = load_rgb(encode(Image.fromarray(values), format))
    assert pixels(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_and_32_bit_gray() -> None:
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32))
    assert pixels(load_rgb(encode(image, "TIFF")))[0, :, 0].tolist() == [0, 128, 255, 0]
    image = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32))
    assert pixels(load_rgb(encode(image, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_is_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    gray_alpha = Image.new("LA", (2, 1), (0, 255))
    gray_alpha.putpixel((1, 0), (0, 0))
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    for data, expected in [
        (encode(rgba), [[255, 0, 0], [255, 255, 255]]),
        (encode(rgba, "WEBP", lossless=True), [[255, 0, 0], [255, 255, 255]]),
        (encode(gray_alpha), [[0, 0, 0], [255, 255, 255]]),
        (encode(half), [[127, 127, 127]]),
    ]:
        assert pixels(load_rgb(data))[0].tolist() == expected


def test_transparent_colours() -> None:
    red_blue = Image.new("RGB", (2, 1), "red")
    red_blue.putpixel((1, 0), (0, 0, 255))
    palette = red_blue.quantize(2)
    gray = Image.fromarray(np.array([[7, 65535]], dtype=np.uint16))
    blue_index = palette.getpixel((1, 0))
    for data in (
        encode(red_blue, transparency=(0, 0, 255)),
        encode(palette, transparency=blue_index),
        encode(palette, "GIF", transparency=blue_index),
    ):
        assert pixels(load_rgb(data))[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    data = encode(gray, transparency=7)
    assert pixels(load_rgb(data))[0, :, 0].tolist() == [255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBA"])
def test_modes(mode: str) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    decoded = load_rgb(encode(image, "TIFF"))
    assert decoded.mode == "RGB"
    assert pixels(decoded).min() >= 250


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    red, _, blue = pixels(load_rgb(data))[4, 4]
    assert red > 200 and blue < 50


def test_pixel_limit() -> None:
    data = encode(Image.new("RGB", (100, 50)))
    assert load_rgb(data, max_pixels=5000).size == (100, 50)
    with pytest.raises(BadImage, match=r"^too large: 100x50"):
        load_rgb(data, max_pixels=4999)


def png_header(side: int) -> bytes:
    """A PNG file of 8 x 8 pixels whose header says side x side."""
    png = bytearray(encode(Image.new("RGB", (8, 8))))
    png[16:24] = side.to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_headers_are_refused_before_decoding() -> None:
    webp = bytearray(encode(Image.new("RGBA", (8, 8)), "WEBP", exif=b"Exif\0\0"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16_382).to_bytes(3, "little") * 2
    for data in (png_header(60_000), png_header(12_000), bytes(webp)):
        with pytest.raises(BadImage, match=r"^too large"):
            load_rgb(data)


def test_bomb_warnings_are_handled() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=r"^too large"):
            load_rgb(png_header(9_800))  # 96 MP: our limit allows them, PIL warns


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"<html>", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_no_image(data: bytes) -> None:
    with pytest.raises(BadImage, match=r"^(not a readable image|undecodable)"):
        load_rgb(data)


def test_clean_small_jpeg_keeps_its_bytes() -> None:
    data = encode(quadrants(), "JPEG", quality=70)
    assert to_jpeg(data, short_side=32, quality=90) == (data, 48, 32)
    assert to_jpeg(data, short_side=0, quality=90) == (data, 48, 32)


def test_all_else_is_encoded_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    profile = b"profile" * 20
    for data, size in [
        (encode(quadrants(480, 320), "JPEG", icc_profile=profile), (48, 32)),
        (encode(quadrants(), "JPEG", exif=exif, comment=b"private"), (48, 32)),
        (encode(quadrants(), "PNG", icc_profile=profile), (48, 32)),
        (encode(quadrants().convert("L"), "JPEG"), (48, 32)),
        (encode(quadrants().convert("CMYK"), "JPEG", icc_profile=profile), (48, 32)),
    ]:
        jpeg, width, height = to_jpeg(data, short_side=32, quality=90)
        assert jpeg != data and (width, height) == size
        stored = Image.open(io.BytesIO(jpeg))
        assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", size)
        assert not stored.getexif() and not stored.info.keys() & {"icc_profile", "comment"}


def test_sizes() -> None:
    data = encode(Image.new("RGB", (1000, 10)))
    assert to_jpeg(data, short_side=32, quality=90)[1:] == (1000, 10)  # never enlarged
    assert to_jpeg(data, short_side=3, quality=90)[1:] == (300, 3)
    with pytest.raises(BadImage, match="too long"):
        to_jpeg(encode(Image.new("L", (70_000, 1))), short_side=256, quality=90)


def test_truncated_jpeg_is_bad_even_if_it_need_not_change() -> None:
    data = encode(quadrants(), "JPEG")
    with pytest.raises(BadImage, match="truncated"):
        to_jpeg(data[:-20], short_side=256, quality=90)


def test_random_damage_raises_only_bad_image() -> None:
    rng = random.Random(0)
    image = quadrants()
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [
        encode(image, "JPEG", exif=exif),
        encode(image, "PNG", exif=exif),
        encode(image.convert("RGBA"), "WEBP", exif=exif),
        encode(image, "GIF"),
        encode(image, "BMP"),
        encode(image, "TIFF", exif=exif),
        encode(image.convert("I;16"), "PNG", transparency=3),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks about damaged files
        for _ in range(600):
            data = bytearray(rng.choice(originals))
            for _ in range(rng.randrange(1, 12)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(BadImage):
                assert load_rgb(bytes(data), max_pixels=10**6).mode == "RGB"


UNREADABLE = {
    "broken_header.png": "not a readable image",
    "corrupt_header.jpg": "undecodable",
    "giant_280mp.jpg": "too large",
    "truncated.png": "undecodable",
    "truncated_large_dims.jpg": "undecodable",
    "truncated_tail.jpg": "undecodable",
}


def test_hard_images(realdata: Path) -> None:
    paths = sorted((realdata / "hard" / "images").iterdir())
    assert len(paths) >= 23
    for path in paths:
        if path.name in UNREADABLE:
            with pytest.raises(BadImage, match=f"^{UNREADABLE[path.name]}"):
                load_rgb(path.read_bytes())
        else:
            assert load_rgb(path.read_bytes()).mode == "RGB", path.name


def test_hard_images_by_content(realdata: Path) -> None:
    def load(name: str) -> np.ndarray:
        return pixels(load_rgb((realdata / "hard" / "images" / name).read_bytes()))

    # The same waterfall, stored transposed and rotated: the dark forest floor is not the sky.
    for name, shape in (("exif_orientation_5", (600, 450)), ("exif_orientation_6", (450, 600))):
        image = load(f"{name}.jpg")
        assert image.shape == (*shape, 3)
        assert image[: shape[0] // 4].mean() > image[-shape[0] // 4 :].mean()
    # Portrait in front of a flag: stars (blue) are at the top left, the black coat at the bottom.
    portrait = load("exif_orientation_3_small.jpg")
    assert portrait[100:, 40:88].mean() < 70 < portrait[30:60, 40:88].mean()
    red = load("cmyk_small.jpg")
    assert red[0, 0, 0] > 200 and red[0, 0, 1:].max() < 60 and red[-1, -1].max() < 60
    assert (load("gray_alpha_8bit.png")[0, 0] == 255).all()
    assert (load("rgb_trns.png")[32, 28] == 255).all()
    assert (load("gray16_trns.png")[35, 30] == 255).all()
    for name in ("gray_alpha_16bit.png", "rgba_wide.png"):
        assert load(name)[0, 0].min() > 200, name


def test_the_giant_image_is_never_allocated(realdata: Path) -> None:
    path = realdata / "hard" / "images" / "giant_280mp.jpg"
    code = f"""
import resource
from pathlib import Path
from blip2_train.data.images import BadImage, to_jpeg
data = Path({str(path)!r}).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    to_jpeg(data, short_side=256, quality=90)
except BadImage:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(result.stdout) < 50  # MiB; decoded it has 800
