"""Synthetic scenes: a function of (seed, number), drawn as the captions say.

- the same seed gives the same bytes, another seed other scenes; no scene comes twice
- the object is where, as large and of the colours that all five captions name
"""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2_train.data.shards import ShardReader, read_index
from blip2_train.data.synthetic import COLOURS, SCENES, make_scene, synthetic_items
from blip2_train.prepare import main

SIZE = 256


def make(number: int, seed: int = 0) -> tuple[np.ndarray, dict]:
    item = list(synthetic_items(max(number + 1, 2), seed))[number][1]
    jpeg, meta = make_scene(item, size=SIZE, seed=seed, quality=95)
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(int), meta


def test_shards(tmp_path: Path) -> None:
    args = ["synthetic", "--samples", "50", "--size", str(SIZE), "--workers", "1"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main([*args, "--seed", str(seed), "--out", str(tmp_path / name)]) == 0
    a, b, c = (read_index(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and a["val-000000.tar"] != c["val-000000.tar"]
    assert {info.split: info.samples for info in a.values()} == {"train": 45, "val": 5}
    raw = ShardReader(tmp_path / "a" / "val-000000.tar", a["val-000000.tar"]).read(4)
    assert len(raw.meta["captions"]) == 5
    assert (raw.meta["width"], raw.meta["height"], raw.meta["source"]) == (SIZE, SIZE, "synthetic")
    assert Image.open(io.BytesIO(raw.image)).size == (SIZE, SIZE)


def test_a_scene_does_not_depend_on_how_many_there_are() -> None:
    few = [item.captions for _, item in synthetic_items(20, 3)]
    assert few == [item.captions for _, item in synthetic_items(500, 3)][:20]


def test_all_scenes_come_before_any_comes_twice() -> None:
    captions = [tuple(item.captions) for _, item in synthetic_items(len(SCENES) + 10, 0)]
    assert len(set(captions[: len(SCENES)])) == len(SCENES)
    assert captions[len(SCENES) :] == captions[:10]


@pytest.mark.parametrize("number", range(40))
def test_picture_is_what_the_captions_say(number: int) -> None:
    image, meta = make(number)
    size, colour, shape, row, column, background = meta["image_id"].split("-")
    place = "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
    for caption in meta["captions"]:
        words = caption.replace(",", "").split()
        assert {size, colour, shape, background, *place.split()} <= set(words), caption
    assert np.abs(image[0, 0] - COLOURS[background]).max() < 12
    distance = np.abs(image - np.array(COLOURS[background])).sum(2)
    object_pixels = np.argwhere(
        np.abs(image - np.array(COLOURS[colour])).sum(2) < np.minimum(distance, 80)
    )
    y, x = (object_pixels.min(0) + object_pixels.max(0)) / 2 / SIZE
    assert ("top", "middle", "bottom")[int(y * 3)] == row
    assert ("left", "centre", "right")[int(x * 3)] == column
    height = np.ptp(object_pixels[:, 0]) / SIZE
    assert (height > 0.21) == (size == "large"), height
    filled = len(object_pixels) / np.prod(np.ptp(object_pixels, axis=0) + 1)
    low, high = {
        "circle": (0.70, 0.86),
        "square": (0.92, 1.0),
        "diamond": (0.42, 0.65),
        "triangle": (0.42, 0.60),
        "cross": (0.45, 0.66),
        "star": (0.25, 0.45),
    }[shape]
    assert low <= filled <= high, (shape, filled)
