"""Pictures of scenes: what shapes, colours, sizes and places look like."""

from __future__ import annotations

import math
import random
from functools import lru_cache

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 150, 60),
    "blue": (50, 90, 230),
    "purple": (140, 50, 180),
    "black": (12, 12, 12),
    "white": (255, 255, 255),
}
# Names of their own: a caption's "pink" can only be the background.
BACKGROUNDS = {
    "pink": (248, 172, 195),
    "grey": (140, 140, 140),
    "brown": (115, 75, 42),
    "cyan": (90, 212, 212),
    "khaki": (196, 182, 100),
    "navy": (32, 42, 112),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.17, "large": 0.29}  # radius, share of the side
PLACES = {  # centre, share of the side
    f"{row} {column}".replace("middle centre", "centre"): (x, y)
    for row, y in (("top", 0.29), ("middle", 0.5), ("bottom", 0.71))
    for column, x in (("left", 0.29), ("centre", 0.5), ("right", 0.71))
}
# Where the first object stands, seen from the second.
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

_OVERSAMPLING = 4  # PIL draws hard edges; shrinking smooths them
_JITTER = 0.03  # of a centre, share of the side
# Of a colour, each channel, of 255: no two pictures have quite the same red.
_SHADE, _BACKGROUND_SHADE = 16, 26


def draw_one(scene: tuple[str, ...], size: int, rng: random.Random) -> Image.Image:
    """One object on a background.

    Args:
        scene: size, colour, shape, place, background.
        size: side of the picture, pixels.
        rng: of shades, light, exact place and radius.
    """
    radius, colour, shape, place, background = scene
    picture = _Picture(BACKGROUNDS[background], size, rng)
    picture.add(shape, COLOURS[colour], PLACES[place], SIZES[radius])
    return picture.finish()


def draw_two(scene: tuple[str, ...], size: int, rng: random.Random) -> Image.Image:
    """Two objects of one size on a background.

    Args:
        scene: colour, shape, relation to the other, the other's colour and shape, background.
        size: side of the picture, pixels.
        rng: of shades, light, exact place and radius.
    """
    colour, shape, relation, other_colour, other_shape, background = scene
    picture = _Picture(BACKGROUNDS[background], size, rng)
    x, y = (0.24 * step for step in STEPS[relation])
    aside = rng.uniform(-0.24, 0.24)  # both, across the line between them
    across, along = (aside, 0.0) if y else (0.0, aside)
    for sign, form, paint in ((1, shape, colour), (-1, other_shape, other_colour)):
        centre = (0.5 + sign * x + across, 0.5 + sign * y + along)
        picture.add(form, COLOURS[paint], centre, 0.14)
    return picture.finish()


class _Picture:
    """A background on which objects are drawn, larger than it will be."""

    def __init__(self, background: tuple[int, int, int], size: int, rng: random.Random) -> None:
        self.size, self.side, self.rng = size, size * _OVERSAMPLING, rng
        self.image = self._lit(background)
        self.pen = ImageDraw.Draw(self.image)

    def add(
        self,
        shape: str,
        colour: tuple[int, int, int],
        centre: tuple[float, float],
        radius: float,
    ) -> None:
        """Draws an object; centre and radius are shares of the side."""
        x, y = (self.side * (at + self.rng.uniform(-_JITTER, _JITTER)) for at in centre)
        reach = self.side * radius * self.rng.uniform(0.95, 1.05)
        fill = self._shade(colour)
        box = (x - reach, y - reach, x + reach, y + reach)
        if shape == "circle":
            self.pen.ellipse(box, fill=fill)
        elif shape == "ring":
            self.pen.ellipse(box, outline=fill, width=round(0.45 * reach))
        else:
            self.pen.polygon([(x + reach * dx, y + reach * dy) for dx, dy in _outline(shape)], fill)

    def finish(self) -> Image.Image:
        """The picture in its final size."""
        return self.image.resize((self.size, self.size), Image.Resampling.LANCZOS)

    def _lit(self, colour: tuple[int, int, int]) -> Image.Image:
        """A background from one shade to another, as light falls from some side."""
        size = (self.side, self.side)
        ramp = _ramp().rotate(self.rng.uniform(0, 360), Image.Resampling.BILINEAR)
        mask = ramp.crop((16, 16, 48, 48)).resize(size, Image.Resampling.BILINEAR)
        one, other = (Image.new("RGB", size, self._shade(colour, _BACKGROUND_SHADE)) for _ in "ab")
        return Image.composite(one, other, mask)

    def _shade(self, colour: tuple[int, int, int], most: int = _SHADE) -> tuple[int, ...]:
        return tuple(min(255, max(0, c + self.rng.randint(-most, most))) for c in colour)


@lru_cache
def _ramp() -> Image.Image:
    """From black to white, 64 pixels square; its middle stays within the square when turned."""
    return Image.linear_gradient("L").resize((64, 64))


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1 around the origin, y downwards."""
    if shape == "cross":
        arm = 0.33
        corners = [(arm, 1.0), (arm, arm), (1.0, arm)]
        quarter = [corners, [(y, -x) for x, y in corners]]
        quarter += [[(-x, -y) for x, y in part] for part in quarter]
        return [corner for part in quarter for corner in part]
    points, turn, inner = {
        "square": (4, 0.125, 1.0),
        "triangle": (3, 0.0, 1.0),
        "star": (5, 0.0, 0.42),
    }[shape]
    corners = []
    for k in range(2 * points):
        angle = 2 * math.pi * (k / (2 * points) + turn)
        # Between two corners of a polygon lies the middle of its side.
        reach = 1.0 if k % 2 == 0 else min(inner, math.cos(math.pi / points))
        corners.append((reach * math.sin(angle), -reach * math.cos(angle)))
    return corners
