"""Rendered scenes with exact captions, for demonstrations and tests.

A *world* says what scenes there are: attributes with their values, five paraphrases that name all
of them, and a picture. `ONE` has one object of a shape, colour and size at one of nine places;
`TWO` has two objects and how they stand to each other. Image i of a split is a function of
(seed, i) alone.

What a model may not have seen in training is kept apart (`split_scenes`):

    train          scenes as often as there are images to render, drawn anew each time
    val            other scenes of the same kind, for every choice that is made
    novel          other scenes of the same kind, for the numbers that are reported
    compositional  scenes with pairs of attribute values that no scene above has
    text           captions of every scene there is, without pictures: a language model has read
                   about everything
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from PIL import Image, ImageDraw

from blip2_train.data.images import encode_jpeg
from blip2_train.data.plan import Item

SPLITS = ("train", "val", "novel", "compositional", "text")
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
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

Scene = tuple[str, ...]  # one value per attribute of its world

_OVERSAMPLING = 4  # PIL draws hard edges; shrinking smooths them
_JITTER = 0.03  # of a centre, share of the side
# Of a colour, each channel, of 255: no two pictures have quite the same red.
_SHADE, _BACKGROUND_SHADE = 16, 26


@dataclass(frozen=True)
class World:
    """A kind of scene.

    Attributes:
        name: of the source in metadata.
        objects: of a scene.
        attributes: {name: values}, in the order of a `Scene`.
        captions: paraphrases; each names every attribute.
        unseen: attributes of whose value pairs some are kept for the compositional split.
        neighbours: attributes along which training scenes are grouped, the more often the more
            groups.
        draw: (scene, side in pixels, generator) -> picture.
        derived: further words of the captions, {name: (attribute, {value: word})}.
        exists: whether a combination of values is a scene of its own.
    """

    name: str
    objects: int
    attributes: dict[str, tuple[str, ...]]
    captions: tuple[str, ...]
    unseen: tuple[tuple[str, str], ...]
    neighbours: tuple[str, ...]
    draw: Callable[[Scene, int, random.Random], Image.Image]
    derived: dict[str, tuple[str, dict[str, str]]]
    exists: Callable[[Scene], bool]

    def value(self, scene: Scene, attribute: str) -> str:
        """Of one attribute."""
        return scene[list(self.attributes).index(attribute)]

    def change(self, scene: Scene, attribute: str, value: str) -> Scene:
        """The same scene but for one attribute."""
        place = list(self.attributes).index(attribute)
        return (*scene[:place], value, *scene[place + 1 :])

    def caption(self, scene: Scene, template: int) -> str:
        """One of the paraphrases.

        Args:
            scene: what is said.
            template: number of the paraphrase.
        """
        words = dict(zip(self.attributes, scene, strict=True))
        words |= {name: table[words[of]] for name, (of, table) in self.derived.items()}
        return self.captions[template].format(**words)

    def read(self, caption: str) -> tuple[Scene, int] | None:
        """The scene and the paraphrase that a caption is, None if it is none of this world."""
        for template, pattern in enumerate(self._patterns):
            if found := pattern.fullmatch(" ".join(caption.split())):
                words = found.groupdict()
                for name, (of, table) in self.derived.items():
                    if name in words:
                        words[of] = next(key for key, word in table.items() if word == words[name])
                return tuple(words[name] for name in self.attributes), template
        return None

    def other_side(self, scene: Scene) -> Scene:
        """The same picture told from its other object, where there are two."""
        if self.objects == 1:
            return scene
        colour, shape, relation, other_colour, other_shape, background = scene
        return other_colour, other_shape, INVERSE[relation], colour, shape, background

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        """What the paraphrases look like, the attributes as named groups."""
        values = {name: list(all_of) for name, all_of in self.attributes.items()}
        values |= {word: list(table.values()) for word, (_, table) in self.derived.items()}

        def group(found: re.Match[str]) -> str:
            longest_first = sorted(values[found[1]], key=len, reverse=True)
            return f"(?P<{found[1]}>{'|'.join(longest_first)})"

        return [re.compile(re.sub(r"\{(\w+)\}", group, caption)) for caption in self.captions]

    @property
    def scenes(self) -> list[Scene]:
        """All scenes, the last attribute changing fastest."""
        return [
            scene for scene in itertools.product(*self.attributes.values()) if self.exists(scene)
        ]


def split_scenes(world: World, seed: int, held_out: int) -> dict[str, list[Scene]]:
    """Which scenes each split has; no scene is in two of them.

    Every scene of `compositional` has an unseen pair of some kind of `world.unseen`, and no scene
    of another split has one. Each value has several unseen partners, and several seen ones.

    Args:
        world: of the scenes.
        seed: which pairs are unseen, and which scene goes where.
        held_out: scenes of `novel` and of `compositional`; `val` has half as many.

    Returns:
        {split: scenes in random order}; `text` is not among them.
    """
    rng = random.Random(f"{world.name}:{seed}")
    unseen = unseen_pairs(world, seed)
    seen: list[Scene] = []
    composed: list[Scene] = []
    for scene in world.scenes:
        hits = [(world.value(scene, a), world.value(scene, b)) in unseen[a, b] for a, b in unseen]
        (composed if any(hits) else seen).append(scene)
    rng.shuffle(seen)
    rng.shuffle(composed)
    val, novel = held_out // 2, held_out
    return {
        "train": seen[val + novel :],
        "val": seen[:val],
        "novel": seen[val : val + novel],
        "compositional": composed[:held_out],
    }


def unseen_pairs(world: World, seed: int) -> dict[tuple[str, str], set[tuple[str, str]]]:
    """{(a, b) of `world.unseen`: pairs of their values that the compositional split alone has}.

    Two values of b for each value of a, so spread that each of b has its share.
    """
    found = {}
    for a, b in world.unseen:
        rng = random.Random(f"{world.name}:{seed}:{a}:{b}")
        first, second = list(world.attributes[a]), list(world.attributes[b])
        rng.shuffle(first)
        rng.shuffle(second)
        found[a, b] = {
            (value, second[(number + shift) % len(second)])
            for number, value in enumerate(first)
            for shift in (0, 2)
        }
    return found


def train_order(world: World, scenes: list[Scene], number: int, seed: int) -> list[Scene]:
    """The training scenes, each once, in the order of pass `number` over them.

    Scenes that differ in one attribute alone stand side by side, in groups whose attribute is drawn
    from `world.neighbours`: where batches are cut from this order (`data.shuffle_window: 1`),
    contrast and matching have to tell scenes apart that a caption tells apart by one word.

    Args:
        world: of the scenes.
        scenes: of the train split.
        number: of the pass; each groups the scenes anew.
        seed: of the order.
    """
    rng = random.Random(f"{world.name}:{seed}:{number}")
    left = set(scenes)
    order: list[Scene] = []
    for scene in rng.sample(scenes, len(scenes)):
        if scene in left:
            attribute = rng.choice(world.neighbours)
            others = (world.change(scene, attribute, v) for v in world.attributes[attribute])
            group = [other for other in others if other in left]
            order += rng.sample(group, len(group))
            left.difference_update(group)
    return order


def synthetic_items(
    world: World, samples: int, seed: int, held_out: int
) -> Iterator[tuple[str, Item]]:
    """Yield (split, item) of `samples` training images and of the other splits.

    `text` has as many items as `train`, or one per scene where these are fewer.

    Raises:
        ValueError: so many scenes are held out that none is left to train on.
    """
    splits = split_scenes(world, seed, held_out)
    scenes = splits["train"]
    if not scenes:
        usable = len(splits["val"]) + len(splits["novel"])
        raise ValueError(f"none of the {usable:,} scenes without an unseen pair is left for train")
    passes = (train_order(world, scenes, number, seed) for number in itertools.count())
    order = itertools.chain.from_iterable(passes)
    listed = {"train": list(itertools.islice(order, samples))}
    listed |= {split: splits[split] for split in SPLITS[1:-1]}
    every = world.scenes
    listed["text"] = random.Random(seed).sample(every, min(samples, len(every)))
    for split, chosen in listed.items():
        for number, scene in enumerate(chosen):
            # the first caption, which some evaluations take alone, is any of the five
            rng = random.Random(f"{seed}:{split}:{number}")
            templates = rng.sample(range(len(world.captions)), len(world.captions))
            captions = [world.caption(scene, template) for template in templates]
            draw = None if split == "text" else rng.getrandbits(32)
            payload = {"objects": world.objects, "scene": scene, "draw": draw}
            yield split, Item(f"{number:08d}", f"{split} image {number}", captions, payload)


def make_scene(item: Item, *, size: int, quality: int) -> tuple[bytes, dict[str, Any]]:
    """Render an item of `synthetic_items`: its JPEG, `size` pixels square, and its metadata.

    Where there is nothing to show (`text`), the picture is blank: a sample has one.
    """
    world, scene = WORLDS[item.payload["objects"]], tuple(item.payload["scene"])
    image = Image.new("RGB", (size, size), "grey")
    if item.payload["draw"] is not None:
        image = world.draw(scene, size, random.Random(item.payload["draw"]))
    # Of a red square on brown, halved colours would leave a smear.
    return encode_jpeg(image, quality, subsampling="4:4:4"), {
        "image_id": "-".join(scene),  # equal scenes have equal captions: they are one to the loss
        "captions": item.captions,
        "source": world.name,
        "width": size,
        "height": size,
    }


# -- pictures --------------------------------------------------------------------------------------


def _draw_one(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    radius, colour, shape, place, background = scene
    picture = _Picture(BACKGROUNDS[background], size, rng)
    picture.add(shape, COLOURS[colour], PLACES[place], SIZES[radius])
    return picture.finish()


def _draw_two(scene: Scene, size: int, rng: random.Random) -> Image.Image:
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


ONE = World(
    name="one",
    objects=1,
    attributes={
        "size": tuple(SIZES),
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "position": tuple(PLACES),
        "background": tuple(BACKGROUNDS),
    },
    captions=(
        "a {size} {colour} {shape} at the {position} on {background}",
        "on {background} a {size} {colour} {shape} in the {position}",
        "{background} with a {size} {colour} {shape} at the {position}",
        "the {position} holds a {size} {colour} {shape} on {background}",
        "the {shape} {position} is {size} and {colour} on {background}",
    ),
    unseen=(("position", "colour"), ("shape", "background")),
    # Shapes are hard to see, and places hard to match.
    neighbours=("shape",) * 6 + ("position",) * 2 + ("size", "colour", "background"),
    draw=_draw_one,
    derived={},
    exists=lambda scene: True,
)


def _is_two(scene: Scene) -> bool:
    colour, shape, relation, other_colour, other_shape, _ = scene
    # What stands right of or below another is the same picture told from the other side.
    return relation in ("left of", "above") and (colour, shape) != (other_colour, other_shape)


TWO = World(
    name="two",
    objects=2,
    attributes={
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "relation": tuple(INVERSE),
        "other_colour": tuple(COLOURS),
        "other_shape": SHAPES,
        "background": tuple(BACKGROUNDS),
    },
    captions=(
        "a {colour} {shape} {relation} a {other_colour} {other_shape} on {background}",
        "on {background} a {other_colour} {other_shape} {inverse} a {colour} {shape}",
        "{background} with a {colour} {shape} {relation} a {other_colour} {other_shape}",
        "a {other_colour} {other_shape} is {inverse} a {colour} {shape} on {background}",
        "on {background} one {colour} {shape} {relation} one {other_colour} {other_shape}",
    ),
    unseen=(("colour", "other_colour"), ("shape", "other_shape")),
    neighbours=("relation", "shape", "colour", "other_shape", "other_colour", "background"),
    draw=_draw_two,
    derived={"inverse": ("relation", INVERSE)},
    exists=_is_two,
)
WORLDS = {world.objects: world for world in (ONE, TWO)}
