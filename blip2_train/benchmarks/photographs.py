"""Pictures drawn on the spot that cost a JPEG decoder what photographs cost it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

# Amplitude over spatial frequency falls as 1/f^SLOPE. With it and the shapes below, JPEGs of
# quality 90 take about as many bits per pixel as photographs: 2.7 at 256 pixels on the shorter side
# (a sample of Flickr8k: 2.7), 2.6 at 375 and 2.0 at 1024 (a large one, shrunk: 2.2 and 1.7).
_SLOPE = 1.3
_CONTRAST, _COLOUR = 38.0, 12.0  # standard deviations of brightness, and of colours around it
_SHAPES = 25


class Photographer:
    """Draws photographs of one size: 1/f noise with shapes that have hard edges.

    Args:
        width: of each picture, in pixels.
        height: of each picture, in pixels.
        seed: the same seed draws the same pictures.
    """

    def __init__(self, width: int, height: int, seed: int = 0) -> None:
        self._size = (width, height)
        self._random = np.random.default_rng(seed)
        side = 2 ** int(np.ceil(np.log2(max(width, height, 2))))
        # One field, which repeats without a seam, is moved about: much cheaper than a new one each.
        self._fields = [_noise(side, self._random) for _ in range(3)]

    def shoot(self) -> Image.Image:
        """Return the next picture, RGB."""
        width, height = self._size
        parts = []
        for field in self._fields:
            y, x = self._random.integers(0, len(field), 2)
            rows = field.take(range(y, y + height), 0, mode="wrap")
            parts.append(rows.take(range(x, x + width), 1, mode="wrap"))
        light, warm, green = parts
        light = 120 + _CONTRAST * light
        warm, green = _COLOUR * warm, _COLOUR * green
        channels = [light + warm - green / 2, light + green, light - warm - green / 2]
        image = Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))
        self._add_shapes(image)
        return image

    def _add_shapes(self, image: Image.Image) -> None:
        """Lay shapes over the picture, half transparent: what is below keeps its texture."""
        layer = image.copy()
        pen = ImageDraw.Draw(layer)
        for _ in range(_SHAPES):
            x, y = self._random.uniform(0, image.width), self._random.uniform(0, image.height)
            w, h = self._random.uniform(0.05, 0.4, 2) * min(image.size)
            draw = pen.ellipse if self._random.random() < 0.5 else pen.rectangle
            colour = tuple(int(value) for value in self._random.integers(0, 256, 3))
            draw((x, y, x + w, y + h), fill=colour)
        image.paste(Image.blend(image, layer, 0.4))


def _noise(side: int, random: np.random.Generator) -> np.ndarray:
    """Return periodic 1/f^SLOPE noise, float32 [side, side], mean 0 and variance 1."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * random.random(frequency.shape))
    field = np.fft.irfft2(phases / frequency**_SLOPE, (side, side))
    return (field / field.std()).astype(np.float32)
