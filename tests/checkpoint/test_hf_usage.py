"""Hugging Face's own classes and processor, with an export's folder as the model's name.

Proven, on exports of small trained models (stage 1; stage 2 with a decoder alone, and with an
encoder too): every documented call of processor and models works, in float32, bfloat16 and int8,
with and without a prompt, and gives what ours give for the same picture and words; a picture of the
tower's size becomes the very numbers that training saw; the token for pictures is never written.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2Processor,
    Blip2TextModelWithProjection,
    Blip2VisionModelWithProjection,
    TorchAoConfig,
)

from blip2_train.data.language import decode, encode_prompts
from blip2_train.data.transforms import EvalTransform
from blip2_train.interchange.compare import one_eps
from blip2_train.interchange.read import read_ours
from blip2_train.interchange.whole import Whole
from blip2_train.models.vision import normalise

SIZE = 32
STAGE2 = ("stage2", "t5")
NAMES = ("stage1", *STAGE2)


@pytest.fixture(scope="module")
def exports(made: dict[str, Path]) -> dict[str, str]:
    return {name: str(made[f"{name}.hf"]) for name in NAMES}


@pytest.fixture(scope="module")
def whole(runs: dict[str, Path]) -> dict[str, Whole]:
    return {name: read_ours(runs[name]) for name in NAMES}


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def pixels_of(image: Image.Image) -> Tensor:
    values = torch.tensor(list(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", NAMES)
def test_the_processor(exports: dict[str, str], whole: dict[str, Whole], name: str) -> None:
    folder, mine = exports[name], whole[name]
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is Blip2Processor
    assert processor.num_query_tokens == mine.cfg["qformer"]["num_query_tokens"]
    inputs = processor(images=picture(), return_tensors="pt")
    vision = mine.model.vision
    assert inputs["pixel_values"].allclose(
        normalise(pixels_of(picture()), vision.mean, vision.std), atol=1e-6
    )
    larger = processor(images=picture(size=50), return_tensors="pt")["pixel_values"]
    assert larger.shape == (1, 3, SIZE, SIZE)
    exact = Blip2Processor.from_pretrained(folder, backend="pil")
    seen = normalise(EvalTransform(SIZE)(picture(size=50))[None], vision.mean, vision.std)
    assert exact(images=picture(size=50), return_tensors="pt")["pixel_values"].allclose(
        seen, atol=1e-6
    )

    ids = processor(images=picture(), text="a red circle", return_tensors="pt")["input_ids"][0]
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    queries = processor.num_query_tokens
    assert ids[:queries].tolist() == [token] * queries and token not in ids[queries:]
    if name == "stage1":
        wanted = mine.stage.tokenizer("a red circle")["input_ids"]  # type: ignore[attr-defined]
    else:
        text = mine.stage.text  # type: ignore[attr-defined]
        wanted = encode_prompts(["a red circle"], text, encoder=name == "t5")[0][0].tolist()
    assert ids[queries:].tolist() == wanted
    assert "token_type_ids" not in processor(text="a red circle", return_tensors="pt")


@pytest.mark.parametrize("name", STAGE2)
@torch.no_grad()
def test_blip2_model(exports: dict[str, str], whole: dict[str, Whole], name: str) -> None:
    folder, mine = exports[name], whole[name].model
    processor = Blip2Processor.from_pretrained(folder)
    model = Blip2Model.from_pretrained(folder).eval()
    inputs = processor(images=picture(), text="a red circle", return_tensors="pt")
    start = {} if name == "stage2" else {"decoder_input_ids": torch.zeros(1, 2, dtype=torch.int64)}
    out = model(**inputs, **start)
    vocabulary = mine.language_model.vocab_size
    assert out.logits.shape[-1] == vocabulary + 1  # the tokenizer fills it: <image> is one more

    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = tokenizer(["a red circle", "a blue square on a"], padding=True, return_tensors="pt")
    features = model.get_text_features(**words).last_hidden_state
    assert features.shape == (*words["input_ids"].shape, mine.language_model.width)

    only = processor(images=picture(), return_tensors="pt")
    tokens = mine.vision(only["pixel_values"])
    with one_eps(whole[name], 1e-6):
        norm = mine.qformer.ln_vision
        seen = torch.nn.functional.layer_norm(
            tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps
        )
        assert model.get_image_features(**only).last_hidden_state.allclose(seen, atol=1e-5)
        queries = mine.encode_image(mine.qformer.project_image(tokens))
    assert model.get_qformer_features(**only).allclose(queries, atol=1e-5)


@pytest.mark.parametrize("name", STAGE2)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_generate(exports: dict[str, str], whole: dict[str, Whole], name: str, form: str) -> None:
    folder, mine = exports[name], whole[name]
    processor = Blip2Processor.from_pretrained(folder)
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if form == "int8":
        options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    model = Blip2ForConditionalGeneration.from_pretrained(folder, **options).eval()
    stored = {type(value).__name__ for value in model.language_model.parameters()}
    assert ("Int8Tensor" in stored) == (form == "int8")

    images = [picture(0), picture(1)]
    alone = processor(images=images, return_tensors="pt").to(dtype=dtype)
    words = ["a red circle", "a"]
    prompted = processor(images=images, text=words, padding=True, return_tensors="pt").to(
        dtype=dtype
    )
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    for inputs, prompts in ((alone, ["", ""]), (prompted, words)):
        ids = model.generate(**inputs, max_new_tokens=8)
        new = ids[:, 1:] if name == "t5" else ids[:, -8:]
        assert token not in new and ids.shape[0] == 2
        assert processor.batch_decode(ids, skip_special_tokens=True)[0] is not None
        if form == "float32":
            text: Any = mine.stage.text  # type: ignore[attr-defined]
            with one_eps(mine, 1e-6):
                kv = mine.model.qformer.project_image(mine.model.vision(inputs["pixel_values"]))
                ours = mine.model.generate(
                    kv, *encode_prompts(prompts, text, encoder=name == "t5"),
                    end_token_id=text.end_id, pad_token_id=text.pad_id,
                    max_new_tokens=8, min_new_tokens=0,
                )  # fmt: skip
            before = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
            before = before or processor.num_query_tokens + 1
            theirs = ids[:, 1 if name == "t5" else before :]
            assert decode(theirs, text) == decode(ours, text)
            assert theirs[:, : ours.shape[1]].equal(ours)
    assert model.generate(**alone).shape[0] == 2  # the library's own limit
    assert model.generate(**alone, num_beams=2, max_new_tokens=4).shape[0] == 2


def test_generation_config_and_auto_class(exports: dict[str, str]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(exports["stage2"])
    assert type(model) is Blip2ForConditionalGeneration
    written = transformers.GenerationConfig.from_pretrained(exports["stage2"])
    inner = model.language_model.generation_config
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(written, key) == getattr(inner, key) is not None
    card = (Path(exports["stage2"]) / "README.md").read_text()
    assert "library_name: transformers" in card and "1 more row" in card


@torch.no_grad()
def test_image_text_retrieval(exports: dict[str, str], whole: dict[str, Whole]) -> None:
    folder, mine = exports["stage1"], whole["stage1"]
    processor = AutoProcessor.from_pretrained(folder)
    model = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    texts = ["a red circle", "a large blue square at the top"]
    inputs = processor(
        images=[picture(0), picture(1)], text=texts, padding=True, return_tensors="pt"
    )
    cosine = model(**inputs).logits_per_image
    match = model(**inputs, use_image_text_matching_head=True).logits_per_image
    words = mine.stage.tokenizer(texts, padding=True, return_tensors="pt")  # type: ignore[attr-defined]
    ids, mask = words["input_ids"], words["attention_mask"]
    with one_eps(mine, 1e-6):
        kv = mine.model.qformer.project_image(mine.model.vision(inputs["pixel_values"]))
        feats = mine.model.encode_image(kv).image_feats
        text_feat = mine.model.encode_text(ids, mask)[1]
        wanted = torch.einsum("bqe,te->btq", feats, text_feat).amax(-1)
        assert cosine.allclose(wanted, atol=1e-5)
        assert match.allclose(mine.model.match([(kv, 1)], ids, mask), atol=1e-5)

    one = processor(images=picture(0), text=texts, padding=True, return_tensors="pt")
    assert model(**one).logits_per_image.allclose(wanted[:1], atol=1e-5)  # an image, two texts
    long = {"padding": "max_length", "max_length": 20, "truncation": True}
    padded = processor(images=picture(0), text=texts[:1], return_tensors="pt", **long)
    assert padded["input_ids"].shape == (1, 20)
    assert model(**padded).logits_per_image.allclose(wanted[:1, :1], atol=1e-5)

    half = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert half(**inputs.to(dtype=torch.bfloat16)).logits_per_image.allclose(
        cosine.bfloat16(), atol=0.05
    )


@torch.no_grad()
def test_the_projections_alone(exports: dict[str, str], whole: dict[str, Whole]) -> None:
    folder, mine = exports["stage1"], whole["stage1"]
    processor = AutoProcessor.from_pretrained(folder)
    words = processor(text=["a red circle"], return_tensors="pt")
    text = Blip2TextModelWithProjection.from_pretrained(folder).eval()(**words).text_embeds
    ids, mask = words["input_ids"], words["attention_mask"]
    assert text[:, 0].allclose(mine.model.encode_text(ids, mask)[1], atol=1e-5)
    inputs = processor(images=picture(), return_tensors="pt")
    image = Blip2VisionModelWithProjection.from_pretrained(folder).eval()(**inputs).image_embeds
    with one_eps(mine, 1e-6):
        kv = mine.model.qformer.project_image(mine.model.vision(inputs["pixel_values"]))
        assert image.allclose(mine.model.encode_image(kv).image_feats, atol=1e-5)
