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
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from blip2_train.data.drawing import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    draw_one,
    draw_two,
)
from blip2_train.data.images import encode_jpeg
from blip2_train.data.plan import Item, questions_of

SPLITS = ("train", "val", "novel", "compositional", "text")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Scene = tuple[str, ...]  # one value per attribute of its world


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
        questions: (attribute that is the answer, question).
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
    questions: tuple[tuple[str, str], ...]

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

    def asked(self, scene: Scene, name: str) -> list[dict[str, Any]]:
        """All questions with their answers, as shards hold them: ten people, who all agree.

        Args:
            scene: what is asked about.
            name: that the questions' ids begin with.
        """
        words = dict(zip(self.attributes, scene, strict=True))
        return [
            {
                "question_id": f"{name}-{attribute}",
                "question": question.format(**words),
                "answers": [words[attribute]] * 10,
                "answer_type": "other",
                "question_type": attribute,
            }
            for attribute, question in self.questions
        ]

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
    world: World, samples: int, seed: int, held_out: int, questions: bool = False
) -> Iterator[tuple[str, Item]]:
    """Yield (split, item) of `samples` training images and of the other splits.

    `text` has as many items as `train`, or one per scene where these are fewer. With `questions`
    those of the other splits have all of the world's.

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
            if questions and split != "text":
                payload["questions"] = world.asked(scene, f"{split}-{number}")
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
    meta = {
        "image_id": "-".join(scene),  # equal scenes have equal captions: they are one to the loss
        "captions": item.captions,
        "source": world.name,
        "width": size,
        "height": size,
    }
    asked = questions_of(item)
    return (
        encode_jpeg(image, quality, subsampling="4:4:4"),
        {**meta, "questions": asked} if asked else meta,
    )


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
    draw=draw_one,
    derived={},
    exists=lambda scene: True,
    questions=(
        ("colour", "What colour is the {shape}?"),
        ("shape", "What shape is {colour}?"),
        ("size", "How large is the {shape}?"),
        ("position", "Where is the {colour} {shape}?"),
        ("background", "What is behind the {shape}?"),
    ),
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
    draw=draw_two,
    derived={"inverse": ("relation", INVERSE)},
    exists=_is_two,
    questions=(
        ("colour", "What colour is the {shape} {relation} the {other_colour} {other_shape}?"),
        ("shape", "What shape is {relation} the {other_colour} {other_shape}?"),
        ("relation", "Where is the {colour} {shape} to the {other_colour} {other_shape}?"),
        ("background", "What is behind them?"),
    ),
)
WORLDS = {world.objects: world for world in (ONE, TWO)}
