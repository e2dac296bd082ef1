"""A trained model in five lines.

Proven: the lines of docs/evaluation.md run; features, matching, captions and answers are those of
the model itself, whatever way images are given and however many there are at once; a checkpoint
file needs nothing of its run; bfloat16 and int8 weights hardly change what comes out; wrong kinds,
damaged files, other towers and tokenizers are refused with one sentence; importing the package
brings nothing along.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import blip2_train
from blip2_train.data.batch import EvalSample
from blip2_train.data.language import decode, encode_prompts
from blip2_train.data.source import open_source
from blip2_train.data.stream import EvalStream
from blip2_train.data.transforms import EvalTransform
from blip2_train.errors import UserError
from blip2_train.evaluation import inference
from blip2_train.models.linear import Linear
from blip2_train.training.loading import from_checkpoint, load_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def samples(shards: Path) -> list[EvalSample]:
    images = EvalStream(open_source("validation", shards, "val"), EvalTransform(32))
    return [images[n] for n in range(5)]


@pytest.fixture(scope="module")
def pixels(samples: list[EvalSample]) -> torch.Tensor:
    return torch.stack([sample.image for sample in samples])


def pictures(samples: list[EvalSample]) -> list[Image.Image]:
    return [Image.fromarray(sample.image.permute(1, 2, 0).numpy()) for sample in samples]


def test_the_five_lines(
    finished: Path, samples: list[EvalSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line]
    assert len(lines) == 5
    shutil.copytree(finished, tmp_path / "runs")
    (tmp_path / "runs" / "stage1").rename(tmp_path / "runs" / "stage1_vitg")
    pictures(samples)[0].save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines).replace('device="cuda"', 'device="cpu"'), {})


def test_features_and_matching_are_the_models_own(
    finished: Path, samples: list[EvalSample], pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, model = load_run(finished / "stage1")
    texts = [sample.captions[0] for sample in samples]
    ids = stage.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        image = model.qformer.project_image(model.vision(pixels))
        want = model.encode_image(image).image_feats
        text = model.encode_text(ids["input_ids"], ids["attention_mask"])[1]
        logits = model.match([(image, 1)], ids["input_ids"], ids["attention_mask"])
    loaded = blip2_train.load(finished / "stage1")
    assert (loaded.kind, loaded.step, loaded.image_size) == ("stage1", 2, 32)
    monkeypatch.setattr(inference, "IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(inference, "TEXTS_AT_ONCE", 3)
    near = {"atol": 2e-6, "rtol": 0}
    torch.testing.assert_close(loaded.encode_image(pixels), want, **near)
    torch.testing.assert_close(loaded.encode_text(texts), text, **near)
    torch.testing.assert_close(loaded.encode_text([t.upper() + "." for t in texts]), text, **near)
    torch.testing.assert_close(loaded.match(pixels, texts), logits.softmax(dim=1)[:, 1], **near)
    assert want.std() > 0.01 and logits.std() > 1e-4  # they could differ


def test_ways_to_give_images(
    finished: Path, samples: list[EvalSample], pixels: torch.Tensor, tmp_path: Path
) -> None:
    clip = blip2_train.load(finished / "clip")
    want = clip.encode_image(pixels)
    assert want.shape == (5, 1, 16) and want.dtype == torch.float32
    torch.testing.assert_close(want.norm(dim=-1), torch.ones(5, 1))
    assert clip.encode_image(pictures(samples)).equal(want)
    paths = []
    for number, picture in enumerate(pictures(samples)):
        path = tmp_path / f"bild ü{number}.png"
        picture.convert("RGBA").save(path)
        paths.append(str(path) if number % 2 else path)
    assert clip.encode_image(paths).equal(want)
    assert clip.encode_image([]).shape == (0, 1, 16)
    assert clip.encode_image(pixels[:0]).shape == (0, 1, 16)
    assert clip.encode_text([]).shape == (0, 16)
    assert clip.encode_text(["", "ein Bär 🐻"]).isfinite().all()


def test_captions_and_answers_are_the_models_own(finished: Path, pixels: torch.Tensor) -> None:
    stage1 = blip2_train.load(finished / "stage1")
    model = stage1.model
    with torch.no_grad():
        image = model.qformer.project_image(model.vision(pixels))
        ids = model.generate(image, max_length=9, num_beams=3)
    want = stage1.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert stage1.caption(pixels, num_beams=3, max_new_tokens=8) == [t.strip() for t in want]

    stage2 = blip2_train.load(finished / "stage2")
    model, text = stage2.model, stage2.language
    assert text is not None
    prompts = ["red", "a grey circle", "", "blue", "a"]
    prompt_ids, mask = encode_prompts(prompts, text, encoder=False)
    with torch.no_grad():
        image = model.qformer.project_image(model.vision(pixels))
        ids = model.generate(
            image, prompt_ids, mask, end_token_id=text.end_id, pad_token_id=text.pad_id,
            num_beams=2, max_new_tokens=6, length_penalty=-1.0,
        )  # fmt: skip
    answers = stage2.generate(pixels, prompts, num_beams=2, max_new_tokens=6)
    assert answers == decode(ids, text) and any(answers)
    assert stage2.caption(pixels, num_beams=2, max_new_tokens=6) == stage2.generate(
        pixels, [""] * 5, num_beams=2, max_new_tokens=6, length_penalty=1.0
    )


def test_a_checkpoint_file_needs_nothing_of_its_run(
    finished: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    (file,) = (finished / "stage1" / "checkpoints").glob("*.ckpt")
    alone = tmp_path / "ein.ckpt"
    shutil.copy(file, alone)
    loaded, run = blip2_train.load(alone), blip2_train.load(str(finished / "stage1"))
    assert loaded.encode_image(pixels).equal(run.encode_image(pixels))
    assert loaded.digest == run.digest and loaded.path == alone


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "stage1", run)
    newer = run / "checkpoints" / "step-00000009.ckpt"
    data = (run / "checkpoints" / "step-00000002.ckpt").read_bytes()
    newer.write_bytes(data[: len(data) // 2])
    assert blip2_train.load(run).step == 2
    assert newer.is_file()  # whoever reads leaves a run as it is
    with pytest.raises(UserError, match="is damaged"):
        blip2_train.load(newer)


@pytest.mark.parametrize("kind", ["stage1", "stage2", "clip"])
def test_bfloat16(finished: Path, pixels: torch.Tensor, kind: str) -> None:
    exact = blip2_train.load(finished / kind)
    short = blip2_train.load(finished / kind, dtype="bfloat16")
    assert blip2_train.load(finished / kind, dtype=torch.bfloat16).dtype == short.dtype
    if kind == "stage2":
        assert short.model.vision.dtype == short.model.language_model.dtype == torch.bfloat16
        assert len(short.generate(pixels, ["a"] * 5)) == 5
        return
    ours, theirs = short.encode_image(pixels), exact.encode_image(pixels)
    assert ours.dtype == torch.float32 and not ours.equal(theirs)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99


def test_int8(finished: Path, pixels: torch.Tensor) -> None:
    exact = blip2_train.load(finished / "stage1")
    small = blip2_train.load(finished / "stage1", int8=True)
    texts = ["a red circle"] * 5
    packed = [
        type(m.weight.data) is not torch.Tensor
        for m in small.model.qformer.modules()
        if isinstance(m, Linear)
    ]
    assert sum(packed) > 10 and not all(packed)
    ours, theirs = small.encode_image(pixels), exact.encode_image(pixels)
    assert not ours.equal(theirs)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99
    torch.testing.assert_close(
        small.match(pixels, texts), exact.match(pixels, texts), atol=0.05, rtol=0
    )
    assert len(small.caption(pixels, num_beams=2, max_new_tokens=4)) == 5

    stage2 = blip2_train.load(finished / "stage2", int8=["language_model"])
    assert stage2.model.language_model.quantization == "torchao_int8"
    assert len(stage2.generate(pixels, ["a"] * 5)) == 5
    both = blip2_train.load(finished / "stage2", int8=True)
    assert len(both.caption(pixels, num_beams=2, max_new_tokens=4)) == 5


def test_what_cannot_be(finished: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    stage1 = blip2_train.load(finished / "stage1")
    stage2 = blip2_train.load(finished / "stage2")
    clip = blip2_train.load(finished / "clip")
    (tmp_path / "no.jpg").write_bytes(b"no image")
    cases = {
        "needs stage1 or clip": lambda: stage2.encode_image(pixels),
        "needs stage1;": lambda: clip.match(pixels, ["a"] * 5),
        "needs stage1 or stage2": lambda: clip.caption(pixels),
        "needs stage2": lambda: stage1.generate(pixels, ["a"] * 5),
        "5 images and 1 texts": lambda: stage1.match(pixels, ["a"]),
        "5 images and 0 prompts": lambda: stage2.generate(pixels, []),
        "put 'a' into one": lambda: stage1.encode_text("a"),
        "put the one image into a list": lambda: stage1.encode_image("cat.jpg"),
        r"uint8 \[B, 3, 32, 32\]": lambda: stage1.encode_image(pixels.float()),
        "gone.jpg cannot be read": lambda: stage1.encode_image([tmp_path / "gone.jpg"]),
        "no.jpg cannot be read": lambda: stage1.encode_image([tmp_path / "no.jpg"]),
        "continues no prompt": lambda: stage1.caption(pixels, prompt="a photo of"),
        "need 1[0-9]+; shorten": lambda: stage2.generate(pixels, ["a"] * 5, max_new_tokens=100),
        "there is no checkpoint and no run": lambda: blip2_train.load(tmp_path / "nothing"),
        "holds no run": lambda: blip2_train.load(tmp_path),
        "dtype=float16 must be": lambda: blip2_train.load(finished / "clip", dtype="float16"),
        "device=nonsense": lambda: blip2_train.load(finished / "clip", "nonsense"),
        "of a clip model no part": lambda: blip2_train.load(finished / "clip", int8=True),
        "int8=vision": lambda: blip2_train.load(finished / "stage1", int8=["vision"]),
        "has no vision.weigh": lambda: blip2_train.load(
            finished / "stage1", changes={"vision.weigh": "x"}
        ),
        "the vision here is not the one": lambda: blip2_train.load(
            finished / "stage1", changes={"vision": {"seed": 3}}
        ),
    }  # fmt: skip
    for message, action in cases.items():
        with pytest.raises(UserError, match=message):
            action()


def test_another_tokenizer_is_refused_and_a_moved_one_is_not(
    finished: Path, shards: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    moved = tmp_path / "tokenizer"
    shutil.copytree(shards / "tokenizer", moved)
    changes = {"text.tokenizer": str(moved)}
    loaded = blip2_train.load(finished / "clip", changes=changes)
    assert loaded.encode_text(["a"]).equal(blip2_train.load(finished / "clip").encode_text(["a"]))
    words = (moved / "vocab.txt").read_text().splitlines()
    words[-2:] = words[:-3:-1]
    (moved / "vocab.txt").write_text("\n".join(words) + "\n")
    (moved / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="the tokenizer here is not the one"):
        blip2_train.load(finished / "clip", changes=changes)


def test_a_loss_that_was_off_is_missing(finished: Path, pixels: torch.Tensor) -> None:
    loaded = blip2_train.load(finished / "stage1")
    loaded.cfg["loss"]["weights"]["itm"] = 0.0  # type: ignore[index]
    with pytest.raises(UserError, match=r"loss\.weights\.itm=0"):
        loaded.match(pixels, ["a"] * 5)


def test_a_language_model_alone_sees_no_images(tmp_path: Path) -> None:
    path, content = tmp_path / "lm.ckpt", {"config": "stage: lm", "model": {}, "step": 1}
    nothing: dict[str, Any] = {"dtype": None, "int8": False, "changes": {}}
    with pytest.raises(UserError, match=r"lm\.ckpt is of kind lm, which sees no images"):
        from_checkpoint(path, content, "cpu", **nothing)
    with pytest.raises(UserError, match="holds no configuration"):
        from_checkpoint(path, {"model": {}, "step": 1}, "cpu", **nothing)


def test_importing_the_package_brings_nothing_along() -> None:
    code = "import sys, blip2_train; assert 'torch' not in sys.modules and blip2_train.load"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_gpu_says_the_same(finished: Path, pixels: torch.Tensor) -> None:
    here, there = (blip2_train.load(finished / "stage1", device) for device in ("cpu", "cuda"))
    near = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(there.encode_image(pixels), here.encode_image(pixels), **near)
    small = blip2_train.load(finished / "stage2", "cuda", int8=True, dtype="bfloat16")
    assert len(small.generate(pixels, ["a"] * 5)) == 5
