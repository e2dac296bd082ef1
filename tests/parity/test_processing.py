"""Image and text processing against the reference's own values (FORMAT.md, facts.json)."""

import io
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from blip2_train.data.batch import tokenise
from blip2_train.data.text import clean_caption, clean_question, load_text_tokenizer
from blip2_train.data.transforms import (
    EvalTransform,
    TrainTransform,
    draw_crop,
    flip_images,
)
from blip2_train.models.vision import normalise

# The towers of the released models.
TOWERS = (
    "eva_giant_patch14_clip_224.laion400m",
    "vit_large_patch14_clip_quickgelu_224.openai",
)


@pytest.fixture(scope="module")
def facts(oracle: Path) -> dict:
    return json.loads((oracle / "facts.json").read_text())


@pytest.fixture(scope="module")
def case(oracle: Path) -> dict:
    return json.loads((oracle / "image_processing.json").read_text())


@pytest.fixture(scope="module")
def tensors(oracle: Path) -> dict[str, torch.Tensor]:
    return load_file(oracle / "image_processing.safetensors")


@pytest.fixture(scope="module")
def image(tensors, case) -> Image.Image:
    pixels = [value for value in tensors.values() if value.dtype == torch.uint8]
    assert len(pixels) == 1
    image = Image.fromarray(pixels[0].numpy())
    assert image.size == (case["image_width"], case["image_height"])
    return image


def named(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor `name`, in whatever group it lies."""
    return next(value for key, value in tensors.items() if key.rpartition("/")[2] == name)


def normalised(image: torch.Tensor, facts: dict) -> torch.Tensor:
    constants = facts["image_processing"]
    return normalise(image[None], constants["mean"], constants["std"])[0]


def test_the_constants_are_the_references(facts):
    for name in TOWERS:
        weights = timm.get_pretrained_cfg(name)
        assert list(weights.mean) == facts["image_processing"]["mean"]
        assert list(weights.std) == facts["image_processing"]["std"]


def test_the_eval_image(facts, case, tensors, image):
    ours = normalised(EvalTransform(case["size"])(image), facts)
    torch.testing.assert_close(ours, named(tensors, "eval"), atol=1e-5, rtol=0)


def test_the_train_images(facts, case, tensors, image):
    transform = TrainTransform(case["size"], case["scale"], case["ratio"], decode="exact")
    data = io.BytesIO()
    image.save(data, "PNG")
    for seed, crop in enumerate(case["train_crop_top_left_height_width_by_seed"]):
        generator = torch.Generator().manual_seed(seed)
        left, top, width, height = draw_crop(
            image.size, transform.scale, transform.ratio, generator
        )
        assert [top, left, height, width] == crop
        pixels, flip = transform(data.getvalue(), torch.Generator().manual_seed(seed))
        ours = normalised(flip_images(pixels[None], torch.tensor([flip]))[0], facts)
        expected = named(tensors, f"train_seed{seed}")
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_captions(facts):
    for example in facts["text_processing"]["caption_examples"]:
        assert clean_caption(example["input"]) == example["output"]


def test_captions_behind_a_prompt(facts):
    named = re.compile(r"caption_examples_prompt_(\w+)_max_words_(\d+)")
    groups = {key: match for key in facts["text_processing"] if (match := named.fullmatch(key))}
    assert groups
    for key, match in groups.items():
        prompt, max_words = match[1].replace("_", " ") + " ", int(match[2])
        for example in facts["text_processing"][key]:
            assert clean_caption(example["input"], max_words, prompt) == example["output"]


def test_questions(facts):
    for example in facts["text_processing"]["question_examples"]:
        assert clean_question(example["input"]) == example["output"]


def test_token_ids(facts, tmp_path):
    text = facts["text_processing"]
    (tmp_path / "vocab.txt").write_text("\n".join(text["vocab"]) + "\n", encoding="utf-8")
    tokenizer = load_text_tokenizer(tmp_path)
    assert tokenizer.bos_token_id == len(text["vocab"])
    examples = text["tokenised_processed_captions"]
    ids, mask = tokenise(
        [example["processed"] for example in examples], tokenizer, len(examples[0]["input_ids"])
    )
    assert ids.tolist() == [example["input_ids"] for example in examples]
    assert mask.tolist() == [example["attention_mask"] for example in examples]
