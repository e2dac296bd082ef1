"""Flips are made where the trainer takes a batch, once, before the stage's step sees it."""

from types import SimpleNamespace
from typing import Any

import torch

from blip2_train.training.module import StageModule


def taken(batch: dict[str, Any]) -> dict[str, Any]:
    """What a stage's step is given of a batch."""
    seen: list[dict[str, Any]] = []

    def step(batch, *_):
        seen.append(batch)
        return {"loss": torch.zeros(())}

    module: Any = SimpleNamespace(
        prepared=lambda batch: StageModule.prepared(module, batch),  # type: ignore[arg-type]
        see=lambda batch: StageModule.see(module, batch),  # type: ignore[arg-type]
        image_tokens=lambda image: None,
        trainer=SimpleNamespace(global_step=0),
        batch=SimpleNamespace(accumulate=1),
        seed=0,
        step=step,
        meter=SimpleNamespace(add=lambda out, weight: None),
    )
    StageModule.training_step(module, batch, 0)  # type: ignore[arg-type]
    return seen[0]


def test_a_step_is_given_flipped_images() -> None:
    image = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    batch = {"image": image.clone(), "flip": torch.tensor([False, True, False])}
    expected = torch.stack([image[0], image[1].flip(-1), image[2]])
    assert torch.equal(taken(batch)["image"], expected)
    assert torch.equal(batch["image"], image)  # the loader's is left alone


def test_batches_of_text_and_of_validation_pass_as_they_are() -> None:
    for batch in ({"text": ["a"]}, {"image": torch.zeros(1, 3, 2, 2)}):
        assert taken(batch) == batch
