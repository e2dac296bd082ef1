"""Rendered scenes: a function of (seed, number), drawn as the captions say, split as promised.

- the same seed gives the same bytes, another seed other scenes
- the object is where, as large and of the colours that all five captions name
- captions can be read back, and nothing else can
- no scene is in two splits; unseen pairs are in the compositional split alone, several per value
- neighbours in training differ in one attribute
"""

import io
import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2_train.data.drawing import BACKGROUNDS, COLOURS, PLACES
from blip2_train.data.index import read_index
from blip2_train.data.shards import ShardReader
from blip2_train.data.synthetic import (
    ONE,
    TWO,
    World,
    make_scene,
    split_scenes,
    synthetic_items,
    train_order,
    unseen_pairs,
)
from blip2_train.prepare import main

SIZE = 256
BOTH = pytest.mark.parametrize("world", [ONE, TWO], ids=lambda world: world.name)


def test_shards(tmp_path: Path) -> None:
    args = ["synthetic", "--samples", "45", "--held-out", "10", "--size", str(SIZE), "--workers"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main([*args, "1", "--seed", str(seed), "--out", str(tmp_path / name)]) == 0
    a, b, c = (read_index(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and a["val-000000.tar"] != c["val-000000.tar"]
    counts = {info.split: info.samples for info in a.values()}
    wanted = {"train": 45, "val": 5, "novel": 10, "compositional": 10, "text": 45}
    assert counts == wanted
    raw = ShardReader(tmp_path / "a" / "val-000000.tar", a["val-000000.tar"]).read(4)
    assert len(raw.meta["captions"]) == 5
    assert (raw.meta["width"], raw.meta["height"], raw.meta["source"]) == (SIZE, SIZE, "one")
    assert Image.open(io.BytesIO(raw.image)).size == (SIZE, SIZE)


def test_too_many_held_out_scenes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["synthetic", "--held-out", "5000", "--out", str(tmp_path / "out")]
    assert main(args) == 2
    assert "--held-out 5000" in capsys.readouterr().err


@BOTH
def test_an_image_does_not_depend_on_how_many_there_are(world: World) -> None:
    few = [item for split, item in synthetic_items(world, 20, 3, 10) if split == "train"]
    many = [item for split, item in synthetic_items(world, 500, 3, 10) if split == "train"]
    assert few == many[:20] and len(many) == 500


@BOTH
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_keep_apart_what_they_promise(world: World, seed: int) -> None:
    splits = split_scenes(world, seed, 100)
    scenes = [scene for split in splits.values() for scene in split]
    assert len(set(scenes)) == len(scenes) and len(splits["val"]) == 50
    assert len(splits["novel"]) == len(splits["compositional"]) == 100
    pairs_of = unseen_pairs(world, seed)

    def has(scene: tuple[str, ...]) -> list[bool]:
        return [
            (world.value(scene, a), world.value(scene, b)) in pairs
            for (a, b), pairs in pairs_of.items()
        ]

    for split in ("train", "val", "novel"):
        assert not any(any(has(scene)) for scene in splits[split])
    new = [has(scene) for scene in splits["compositional"]]
    assert all(any(hits) for hits in new)
    assert any(all(hits) for hits in new)
    for (a, b), pairs in pairs_of.items():
        for place, name in enumerate((a, b)):
            partners = Counter(pair[place] for pair in pairs)
            others = len(world.attributes[(b, a)[place]])
            assert set(partners) == set(world.attributes[name])
            assert min(partners.values()) >= 2 and others - max(partners.values()) >= 4


def test_another_seed_keeps_other_pairs_apart() -> None:
    a, b = (set(split_scenes(ONE, seed, 100)["compositional"]) for seed in (0, 1))
    assert len(a & b) < 50


@BOTH
def test_captions_can_be_read_back(world: World) -> None:
    for scene in random.Random(0).sample(world.scenes, 50):
        for template in range(len(world.captions)):
            assert world.read(world.caption(scene, template)) == (scene, template)
    assert world.read("a cat on a mat") is None
    assert world.read(world.caption(world.scenes[0], 0) + " and a cat") is None
    assert len(set(world.captions)) == 5


def test_the_other_side_of_a_relation_is_the_same_picture() -> None:
    scene = ("red", "star", "left of", "blue", "ring", "pink")
    other = TWO.other_side(scene)
    assert other == ("blue", "ring", "right of", "red", "star", "pink")
    assert TWO.other_side(other) == scene and ONE.other_side(scene[:5]) == scene[:5]
    assert scene in TWO.scenes and other not in TWO.scenes
    # a caption that names the second object first tells the same scene
    assert "right of" in TWO.caption(scene, 1) and TWO.read(TWO.caption(scene, 1)) == (scene, 1)


@BOTH
def test_training_neighbours_differ_in_one_attribute(world: World) -> None:
    scenes = split_scenes(world, 0, 100)["train"]
    orders = [train_order(world, scenes, number, 0) for number in (0, 1, 3)]
    for order in orders:
        assert sorted(order) == sorted(scenes)
        changed = Counter(
            tuple(n for n, a, b in zip(world.attributes, *pair, strict=True) if a != b)
            for pair in itertools.pairwise(order)
        )
        alone = {names[0]: count for names, count in changed.items() if len(names) == 1}
        assert alone.keys() == set(world.neighbours)
        assert sum(alone.values()) > 0.6 * len(scenes)
    assert orders[0] != orders[1]


def picture(world: World, number: int) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    items = [item for split, item in synthetic_items(world, number + 1, 0, 10) if split == "train"]
    jpeg, meta = make_scene(items[number], size=SIZE, quality=95)
    image = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
    return image, tuple(meta["image_id"].split("-")), meta["captions"]


@pytest.mark.parametrize("number", range(0, 400, 10))
def test_picture_is_what_the_captions_say(number: int) -> None:
    image, scene, captions = picture(ONE, number)
    size, colour, shape, place, background = scene
    assert all(ONE.read(caption)[0] == scene for caption in captions)  # type: ignore[index]
    assert np.abs(image[0, 0] - BACKGROUNDS[background]).max() < 30
    distance = np.abs(image - image[0, 0]).sum(2)
    near = np.abs(image - np.array(COLOURS[colour])).sum(2)
    pixels = np.argwhere(near < np.minimum(distance, 90))
    y, x = (pixels.min(0) + pixels.max(0)) / 2 / SIZE
    wanted = PLACES[place]
    assert abs(x - wanted[0]) < 0.1 and abs(y - wanted[1]) < 0.1
    extent = np.ptp(pixels, axis=0)
    # a shape is 1.4 (square) to 2 (circle) radii high
    radius = extent.max() / SIZE / (1.42 if shape == "square" else 1.9)
    assert (radius > 0.225) == (size == "large"), radius
    filled = len(pixels) / np.prod(extent + 1)
    low, high = {
        "circle": (0.70, 0.86),
        "square": (0.92, 1.0),
        "triangle": (0.40, 0.60),
        "cross": (0.45, 0.66),
        "star": (0.25, 0.45),
        "ring": (0.48, 0.66),
    }[shape]
    assert low <= filled <= high, (shape, filled)
    if shape == "ring":  # it has a hole
        middle = image[int(y * SIZE), int(x * SIZE)]
        assert np.abs(middle - image[0, 0]).sum() < 30


@pytest.mark.parametrize("number", range(12))
def test_two_objects_stand_as_the_captions_say(number: int) -> None:
    image, scene, _ = picture(TWO, number)
    colour, _, relation, other, _, _ = scene
    if colour == other:
        pytest.skip("the objects cannot be told apart by colour")
    places = []
    for name in (colour, other):
        near = np.abs(image - np.array(COLOURS[name])).sum(2)
        distance = np.abs(image - image[0, 0]).sum(2)
        rivals = [np.abs(image - np.array(c)).sum(2) for n, c in COLOURS.items() if n != name]
        pixels = np.argwhere((near < np.minimum(distance, 90)) & (near < np.min(rivals, axis=0)))
        places.append(np.median(pixels, axis=0))
    (y, x), (other_y, other_x) = places
    assert {"left of": x < other_x, "above": y < other_y}[relation]


def test_texts_tell_of_all_scenes_and_show_none() -> None:
    items = [item for split, item in synthetic_items(ONE, 6000, 0, 10) if split == "text"]
    assert sorted(tuple(item.payload["scene"]) for item in items) == sorted(ONE.scenes)
    pictures = {make_scene(item, size=16, quality=95)[0] for item in items[:20]}
    assert len(pictures) == 1


@BOTH
def test_questions_are_answered_by_the_scene(world: World) -> None:
    """Each names what it does not ask for, or nothing; without the flag there are none."""
    items = list(synthetic_items(world, 20, 0, 10, questions=True))
    plain = list(synthetic_items(world, 20, 0, 10))
    assert all("questions" not in item.payload for _, item in plain)
    ids = set()
    for (split, item), (_, same) in zip(items, plain, strict=True):
        asked = item.payload.pop("questions", [])
        assert item == same  # pictures and captions stay what they were
        assert len(asked) == (0 if split == "text" else len(world.questions))
        scene = item.payload["scene"]
        for one in asked:
            attribute = one["question_type"]
            assert one["answers"] == [world.value(scene, attribute)] * 10
            assert "{" not in one["question"] and one["question"].endswith("?")
            ids.add(one["question_id"])
    assert len(ids) == len(world.questions) * sum(split != "text" for split, _ in items)
    assert (
        "questions"
        in make_scene(
            next(synthetic_items(world, 1, 0, 10, questions=True))[1], size=16, quality=90
        )[1]
    )
