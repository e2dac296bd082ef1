"""Rendered scenes with exact captions: one object of a shape, colour and size at a place.

Scene i of a seed is a function of (seed, i) alone. The scenes run through all combinations before
any comes twice, so up to `len(SCENES)` samples have different captions and different ids.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw

from blip2_train.data.images import encode_jpeg
from blip2_train.data.plan import Item

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 220, 60),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": 0.09, "large": 0.18}  # radius, share of the side
ROWS = {"top": 0.22, "middle": 0.5, "bottom": 0.78}  # centre, share of the side
COLUMNS = {"left": 0.22, "centre": 0.5, "right": 0.78}
SCENES = [  # (size, colour, shape, row, column, background)
    (*scene, background)
    for *scene, background in itertools.product(SIZES, COLOURS, SHAPES, ROWS, COLUMNS, COLOURS)
    if background != scene[1]
]
_CAPTIONS = (
    "a {size} {colour} {shape} at the {place} of a {background} background",
    "there is a {size} {colour} {shape} in the {place} on {background}",
    "a picture in {background} with a {size} {colour} {shape} at the {place}",
    "at the {place} one can see a {size} {shape} that is {colour}, the background is {background}",
    "the {shape} at the {place} is {size} and {colour}, everything else is {background}",
)
_OVERSAMPLING = 4  # PIL draws hard edges; shrinking smooths them
_JITTER = 0.03  # of the centre, share of the side


def synthetic_items(samples: int, seed: int) -> Iterator[tuple[str, Item]]:
    """Yield (split, item) of `samples` scenes; the last tenth, at least one, is the val split."""
    train = samples - max(1, samples // 10)
    for number in range(samples):
        split, place = ("train", number) if number < train else ("val", number - train)
        captions = _captions(_scene(number, seed))
        yield split, Item(f"{place:08d}", f"scene {number}", captions, number)


def make_scene(item: Item, *, size: int, seed: int, quality: int) -> tuple[bytes, dict[str, Any]]:
    """Render an item of `synthetic_items`: its JPEG, `size` pixels square, and its metadata."""
    scene = _scene(item.payload, seed)
    image = _draw(scene, size, random.Random(f"{seed}:{item.payload}"))
    return encode_jpeg(image, quality), {
        "image_id": "-".join(scene),  # equal scenes have equal captions: they are one to the loss
        "captions": item.captions,
        "source": "synthetic",
        "width": size,
        "height": size,
    }


@lru_cache(maxsize=1)
def _order(seed: int) -> list[int]:
    order = list(range(len(SCENES)))
    random.Random(seed).shuffle(order)
    return order


def _scene(number: int, seed: int) -> tuple[str, ...]:
    return SCENES[_order(seed)[number % len(SCENES)]]


def _captions(scene: tuple[str, ...]) -> list[str]:
    size, colour, shape, row, column, background = scene
    place = "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
    words = {"size": size, "colour": colour, "shape": shape, "background": background}
    return [caption.format(place=place, **words) for caption in _CAPTIONS]


def _draw(scene: tuple[str, ...], size: int, rng: random.Random) -> Image.Image:
    radius_name, colour, shape, row, column, background = scene
    side = size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), COLOURS[background])
    x = side * (COLUMNS[column] + rng.uniform(-_JITTER, _JITTER))
    y = side * (ROWS[row] + rng.uniform(-_JITTER, _JITTER))
    radius = side * SIZES[radius_name]
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    else:
        pen.polygon(
            [(x + radius * dx, y + radius * dy) for dx, dy in _outline(shape)], fill=COLOURS[colour]
        )
    return image.resize((size, size), Image.Resampling.LANCZOS)


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
        "diamond": (4, 0.0, 1.0),
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
