"""Image bytes of any origin to an upright RGB picture, or one `BadImage` with a short reason.

Colour profiles are ignored, as in the reference: values are those of the file.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from blip2_train.data.parts import has_too_many_parts

# Optional: gives PIL's own pixels in less time.
simplejpeg: Any = None
if importlib.util.find_spec("simplejpeg"):
    simplejpeg = importlib.import_module("simplejpeg")

# An allow-list: other PIL plugins run programs (EPS) or are not meant for photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
MAX_JPEG_SIDE = 65_500  # what libjpeg writes

_ORIENTATION_TAG = 0x0112
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_UPRIGHT = {  # EXIF orientation -> what to do about it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """The bytes are no usable image; the message is `reason` or `reason: detail`."""


@contextlib.contextmanager
def _only_bad_images() -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # decoders of damaged bytes raise almost anything
        raise _bad_image(error) from error


def load_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image: first frame, EXIF orientation applied, transparency put on white, RGB.

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP or TIFF file.
        max_pixels: largest width times height; checked in the header, before anything is decoded.

    Raises:
        BadImage: too large, truncated, damaged, of another format. No bytes raise anything else.
    """
    return Picture(data, max_pixels=max_pixels).rgb()


def to_rgb(image: Image.Image) -> Image.Image:
    """What `load_rgb` makes of an image that is open already."""
    with _only_bad_images():
        return _to_rgb(_turn(image, _orientation(image)))


class Picture:
    """An image file whose size is known before it is decoded; to be decoded once.

    Args:
        data: as for `load_rgb`.
        max_pixels: as for `load_rgb`.

    Attributes:
        size: width and height in pixels of the upright picture.
        shrinks: it can be decoded at a fraction of its size: an upright colour JPEG.

    Raises:
        BadImage: as for `load_rgb`, here or when it is decoded.
    """

    def __init__(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
        self._data = data
        with _only_bad_images():
            self._image = _open(data, max_pixels)
            is_jpeg = self._image.format == "JPEG"
            if not is_jpeg:  # others may say only at their end which way is up
                self._image.load()
            self._orientation = _orientation(self._image)
            width, height = self._image.size
        self.size = (height, width) if (self._orientation or 1) > 4 else (width, height)
        self.shrinks = is_jpeg and self._image.mode == "RGB" and self._orientation == 1

    def rgb(self) -> Image.Image:
        """Decode in full, as `load_rgb` does."""
        with _only_bad_images():
            self._image.load()
            return _to_rgb(_turn(self._image, self._orientation))

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """Decode what `shrinks`, by the JPEG decoder's own scaling, or anything in full.

        Args:
            shrink: 1, 2, 4 or 8; 1 unless `shrinks`.

        Returns:
            uint8 [height / shrink, width / shrink, 3], rounded up; of full size the values of
            `rgb`.
        """
        if not self.shrinks:
            return np.array(self.rgb())
        with _only_bad_images():
            pixels = _turbo_pixels(self._data, self.size, shrink)
            if pixels is None:
                self._image.draft(None, (self.size[0] // shrink, self.size[1] // shrink))
                self._image.load()
                pixels = np.array(self._image)
            return pixels


def _turbo_pixels(data: bytes, size: tuple[int, int], shrink: int) -> np.ndarray | None:
    """Return what PIL would give for a colour JPEG; None: only PIL can tell."""
    if simplejpeg is None:
        return None
    least = {"min_width": -(-size[0] // shrink), "min_height": -(-size[1] // shrink)}
    try:
        pixels = simplejpeg.decode_jpeg(data, **least)
    except ValueError:  # PIL bears with some damage that this takes for an error
        return None
    # It takes the smallest of its scales that is large enough: of a few pixels, another one.
    return pixels if pixels.shape[1::-1] == tuple(least.values()) else None


def to_jpeg(
    data: bytes, *, short_side: int, quality: int, max_pixels: int = MAX_PIXELS
) -> tuple[bytes, int, int]:
    """Turn image bytes into what a shard stores: an upright RGB JPEG, shrunk to `short_side`.

    An upright RGB JPEG that is no larger already is returned as it is, after it was decoded in
    full to be sure of it: encoding twice only loses.

    Args:
        data: as for `load_rgb`.
        short_side: length of the shorter side in pixels, 0 to keep the size; never enlarged.
        quality: of a new JPEG, 1 to 95.
        max_pixels: as for `load_rgb`.

    Returns:
        The JPEG, its width and its height.

    Raises:
        BadImage: as for `load_rgb`, or too long for a JPEG.
    """
    with _only_bad_images():
        image = _open(data, max_pixels)
        image.load()
        orientation = _orientation(image)
        small = not short_side or min(image.size) <= short_side
        if small and image.format == "JPEG" and image.mode == "RGB" and orientation == 1:
            return data, *image.size
        image = _to_rgb(_turn(image, orientation))
        if not small:
            image = image.resize(_shrunk(image.size, short_side), Image.Resampling.LANCZOS)
        if max(image.size) > MAX_JPEG_SIDE:
            raise BadImage(f"too long for a JPEG: {image.width}x{image.height}")
        return encode_jpeg(image, quality), *image.size


def encode_jpeg(image: Image.Image, quality: int, *, subsampling: str = "4:2:0") -> bytes:
    """Encode an RGB image as a bare JPEG, without EXIF and colour profile.

    Args:
        image: changed: what PIL keeps of its profile and comment is dropped.
        quality: 1 to 95.
        subsampling: of the colours; "4:4:4" keeps every pixel's.
    """
    buffer = io.BytesIO()
    image.info.clear()  # PIL would write a profile and comment that it finds there
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header of the first frame."""
    _check_pixels(_webp_size(data), max_pixels)
    if has_too_many_parts(data):
        raise BadImage("undecodable: it has too many parts")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_pixels(image.size, max_pixels)
    if image.format == "TIFF":  # of a picture of any size, a whole tile is decoded
        tags = image.tag_v2  # type: ignore[attr-defined]
        _check_pixels((tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)), max_pixels)
    return image


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise BadImage(f"too large: {size[0]}x{size[1]} is more than {max_pixels} pixels")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of an extended WebP file, else (0, 0).

    PIL allocates the canvas of a WebP file when it opens it, before the size can be asked.
    """
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return 0, 0
    return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")


def _orientation(image: Image.Image) -> int | None:
    """EXIF orientation, 1 (upright) to 8; None where the EXIF block cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged block says nothing about the pixels
        return None
    return value if value in _UPRIGHT else 1


def _turn(image: Image.Image, orientation: int | None) -> Image.Image:
    method = _UPRIGHT.get(orientation or 1)
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = image.info  # holds the transparent colour, which transpose drops
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB, transparent parts to white."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _gray_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _gray_to_rgb(image: Image.Image) -> Image.Image:
    """Scale gray of more than 8 bits to 8; PIL's own conversion clips at 255."""
    gray = np.asarray(image).astype(np.float32)  # exact up to 24 bits
    gray = np.nan_to_num(gray, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    scales = [65535.0] if image.mode != "F" else [1.0, 255.0, 65535.0]  # full scale, if it fits
    white = next((scale for scale in scales if gray.max(initial=0.0) <= scale), gray.max())
    pixels = np.rint(gray * (255.0 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[gray == transparent] = 255
    return Image.fromarray(pixels).convert("RGB")


def _shrunk(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _bad_image(error: Exception) -> BadImage:
    """Say in one short line, without addresses and paths, what went wrong."""
    if isinstance(error, UnidentifiedImageError):
        return BadImage("not a readable image")
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return BadImage("too large: refused by PIL from its header")
    if isinstance(error, MemoryError):
        return BadImage("too large: not enough memory to decode it")
    detail = " ".join(str(error).split())[:100]
    return BadImage(f"undecodable: {detail or type(error).__name__}")
