"""What a model knows of rendered scenes (`data.synthetic`), attribute by attribute.

Retrieval alone flatters: a model may find the right caption among hundreds and still not know what
a square is. So every attribute is asked for by itself: among its k values (`choice_accuracy`,
chance 1 / k), against one other value (`foil_accuracy`, chance 1 / 2), and in captions that a model
wrote (`caption_accuracy`).
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2_train.data.synthetic import INVERSE, Scene, World

# Captions of each of N images -> [N, captions of one image], higher is better.
Score = Callable[[list[list[str]]], Tensor]


@dataclass(frozen=True)
class Told:
    """A scene and the paraphrase that tells it.

    Attributes:
        scene: one value per attribute.
        template: number of the paraphrase.
    """

    scene: Scene
    template: int


def read_captions(world: World, captions: Sequence[str]) -> list[Told]:
    """What true captions say.

    Raises:
        ValueError: a caption is not of this world.
    """
    told = []
    for caption in captions:
        found = world.read(caption)
        if found is None:
            raise ValueError(f"{caption!r} is no caption of the world {world.name!r}")
        told.append(Told(*found))
    return told


def chance(world: World) -> dict[str, float]:
    """Share of right answers of a model that guesses, percent, per attribute and `everything`."""
    shares = {name: 100.0 / len(values) for name, values in world.attributes.items()}
    return {**shares, "everything": 100.0 / len(world.scenes)}


def caption_accuracy(
    world: World, truths: Sequence[Told], captions: Sequence[str]
) -> dict[str, float]:
    """How much of what captions say is true, percent.

    A caption that is none of the world's sentences is wrong in every attribute. Where the other
    object of two is named first, the caption counts by what it means.

    Args:
        world: of the scenes.
        truths: of N images.
        captions: what a model says of each.

    Returns:
        Per attribute; `everything` (all attributes of a caption); `sentences` (captions that are
        sentences of the world, right or wrong).
    """
    right = dict.fromkeys([*world.attributes, "everything", "sentences"], 0)
    for truth, caption in zip(truths, captions, strict=True):
        found = world.read(caption)
        if found is None:
            continue
        right["sentences"] += 1
        said = max((found[0], world.other_side(found[0])), key=lambda s: _agreement(s, truth.scene))
        hits = [a == b for a, b in zip(said, truth.scene, strict=True)]
        for name, hit in zip(world.attributes, hits, strict=True):
            right[name] += hit
        right["everything"] += all(hits)
    return {name: 100.0 * count / len(truths) for name, count in right.items()}


def _agreement(a: Scene, b: Scene) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def choice_accuracy(world: World, truths: Sequence[Told], score: Score) -> dict[str, float]:
    """How often the true value scores best among all values of an attribute, percent.

    All other attributes are told as they are. Ties count against the model.

    Args:
        world: of the scenes.
        truths: of N images.
        score: of the model.
    """
    result = {}
    for name, values in world.attributes.items():
        captions = [
            [world.caption(world.change(t.scene, name, value), t.template) for value in values]
            for t in truths
        ]
        scores = score(captions)
        own = torch.tensor([values.index(world.value(t.scene, name)) for t in truths])
        mine = scores.gather(1, own[:, None])
        best = (~(scores < mine)).sum(dim=1) == 1  # nothing but itself is not below it
        result[name] = 100.0 * best.double().mean().item()
    return result


def foil_accuracy(
    world: World, truths: Sequence[Told], score: Score, seed: int
) -> dict[str, float]:
    """How often a true caption beats the same one with a single attribute changed, percent.

    A relation is changed into its inverse. Ties count against the model.

    Args:
        world: of the scenes.
        truths: of N images.
        score: of the model.
        seed: draws the other value.
    """
    captions = []
    for number, told in enumerate(truths):
        rng = random.Random(f"foil:{seed}:{number}")
        row = [world.caption(told.scene, told.template)]
        for name in world.attributes:
            other = world.change(told.scene, name, _other_value(world, told.scene, name, rng))
            row.append(world.caption(other, told.template))
        captions.append(row)
    scores = score(captions)  # [N, 1 + attributes]
    wins = (scores[:, :1] > scores[:, 1:]).double().mean(dim=0) * 100.0
    return dict(zip(world.attributes, wins.tolist(), strict=True))


def _other_value(world: World, scene: Scene, name: str, rng: random.Random) -> str:
    own = world.value(scene, name)
    if own in INVERSE:
        return INVERSE[own]
    return rng.choice([value for value in world.attributes[name] if value != own])


def best_possible_loss(world: World, tokens: float) -> dict[str, float]:
    """What a captioner can reach at best, nats per token, with and without seeing the image.

    Paraphrases are drawn evenly, and so nearly are scenes: who sees the image need only guess
    which paraphrase is meant; who does not must guess the scene, too.

    Args:
        world: of the scenes.
        tokens: of a caption, mean.
    """
    wording, scene = math.log(len(world.captions)), math.log(len(world.scenes))
    return {"seeing": wording / tokens, "blind": (wording + scene) / tokens}
