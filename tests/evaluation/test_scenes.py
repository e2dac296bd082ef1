"""Accuracies on rendered scenes, against cases counted by hand.

- captions: each attribute by itself, all together, sentences of no world
- the second object named first counts by what it means
- choices and foils: what changes is one attribute; ties count against the model
"""

import math

import pytest
import torch

from blip2_train.data.synthetic import INVERSE, ONE, TWO, World, split_scenes
from blip2_train.evaluation.scenes import (
    Told,
    best_possible_loss,
    caption_accuracy,
    chance,
    choice_accuracy,
    foil_accuracy,
    read_captions,
)

SCENE = ("small", "red", "star", "top left", "pink")


def told(world: World, count: int) -> list[Told]:
    scenes = split_scenes(world, 0, 20)["novel"][:count]
    return [Told(scene, number % 5) for number, scene in enumerate(scenes)]


def test_chance() -> None:
    lucky = chance(ONE)
    assert lucky["size"] == 50 and lucky["shape"] == pytest.approx(100 / 6)
    assert lucky["everything"] == pytest.approx(100 / (2 * 8 * 6 * 9 * 6))


def test_captions_are_counted_attribute_by_attribute() -> None:
    truths = [Told(SCENE, 0)] * 4
    says = [
        ONE.caption(SCENE, 3),  # another paraphrase is as good
        ONE.caption(ONE.change(SCENE, "shape", "ring"), 0),
        ONE.caption(("large", "blue", "ring", "bottom right", "navy"), 0),
        "a small red star at the top left on pink and on",
    ]
    found = caption_accuracy(ONE, truths, says)
    assert found["sentences"] == 75 and found["everything"] == 25
    assert found["shape"] == 25 and found["colour"] == found["position"] == 50


def test_the_second_object_may_be_named_first() -> None:
    scene = ("red", "star", "left of", "blue", "ring", "pink")
    other = ("blue", "ring", "right of", "red", "star", "pink")
    wrong = ("blue", "ring", "left of", "red", "star", "pink")
    truths = [Told(scene, 0)] * 2
    found = caption_accuracy(TWO, truths, [TWO.caption(other, 0), TWO.caption(wrong, 0)])
    assert found["everything"] == 50 and found["relation"] == 50 and found["other_shape"] == 100


def test_truth_must_be_of_the_world() -> None:
    with pytest.raises(ValueError, match="a dog"):
        read_captions(ONE, ["a dog"])
    assert read_captions(ONE, [ONE.caption(SCENE, 2)]) == [Told(SCENE, 2)]


@pytest.mark.parametrize("world", [ONE, TWO], ids=lambda world: world.name)
def test_choices_and_foils_change_one_attribute(world: World) -> None:
    truths = told(world, 12)

    def knows(captions: list[list[str]]) -> torch.Tensor:
        """Agreement with the truth in every attribute but the first."""
        rows = []
        for truth, row in zip(truths, captions, strict=True):
            read = [world.read(caption) for caption in row]
            assert all(told is not None and told[1] == truth.template for told in read)
            changed = [
                sum(a != b for a, b in zip(told[0], truth.scene, strict=True))
                for told in read
                if told is not None
            ]
            assert max(changed) <= 1
            rows.append([-float(told[0][1:] != truth.scene[1:]) for told in read if told])
        return torch.tensor(rows)

    first, *rest = world.attributes
    choices, foils = choice_accuracy(world, truths, knows), foil_accuracy(world, truths, knows, 0)
    assert choices[first] == foils[first] == 0  # all its values score the same: no answer
    assert all(choices[name] == foils[name] == 100 for name in rest)


def test_foils_of_relations_are_their_inverse_and_depend_on_the_seed() -> None:
    truths, asked = told(TWO, 12), []

    def note(captions: list[list[str]]) -> torch.Tensor:
        asked.append(captions)
        return torch.zeros(len(captions), len(captions[0]))

    for seed in (0, 0, 1):
        assert set(foil_accuracy(TWO, truths, note, seed).values()) == {0.0}
    assert asked[0] == asked[1] != asked[2]
    place = 1 + list(TWO.attributes).index("relation")
    for truth, row in zip(truths, asked[0], strict=True):
        read = TWO.read(row[place])
        assert read is not None
        assert TWO.value(read[0], "relation") == INVERSE[TWO.value(truth.scene, "relation")]


def test_best_possible_losses() -> None:
    best = best_possible_loss(ONE, 10.0)
    assert best["seeing"] == pytest.approx(math.log(5) / 10)
    assert best["blind"] == pytest.approx(math.log(5 * 5184) / 10)
