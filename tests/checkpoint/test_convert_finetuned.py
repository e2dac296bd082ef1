"""Conversion of fine-tuned runs.

Proven: with a trained tower, and with a Q-Former that reads questions by a tokenizer of its own,
ours -> HF -> ours -> LAVIS -> ours gives the same weights and answers; what is trained stays in the
checkpoint, and a run that was moved finds both of its tokenizers.
"""

import shutil
from pathlib import Path

import pytest
from asking import question_shards, vqa_run
from checkpoint.converting import convert
from PIL import Image
from tiny import tiny_finetuning, train_in_process

import blip2_train
from blip2_train.checkpoint import io
from blip2_train.interchange.read import read_ours
from blip2_train.interchange.tokenizers import ASKING

QUICK = {"validation.every": "null", "trainer.max_steps": 2, "schedule.warmup_steps": 1}
KINDS = ("retrieval", pytest.param("caption", marks=pytest.mark.slow), "vqa")


@pytest.fixture(scope="module")
def told(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides of each run, whose folder is `<kind>-fine`."""
    folder = tmp_path_factory.mktemp("fine")
    asked = question_shards(folder / "shards")
    found = tiny_finetuning(shards, folder, "fine", **QUICK)
    return {**found, "vqa": vqa_run(asked, folder, "vqa-fine", **QUICK)}


def folder_of(words: list[str], kind: str) -> Path:
    place = next(word for word in words if word.startswith("run.dir="))
    return Path(place.removeprefix("run.dir=")) / f"{kind}-fine"


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(told: dict[str, list[str]], tmp_path: Path, kind: str) -> None:
    assert train_in_process(told[kind]) == 0
    run, hf, file = folder_of(told[kind], kind), tmp_path / "hf", tmp_path / "file.pth"
    assert convert("blip2-train", "hf", run, hf) == 0
    assert convert("hf", "blip2-train", hf, tmp_path / "back") == 0
    assert convert("blip2-train", "lavis", tmp_path / "back", file) == 0
    assert convert("lavis", "blip2-train", file, tmp_path / "again", *told[kind]) == 0

    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "back").rename(tmp_path / "elsewhere" / "back")
    if kind == "vqa":
        assert (hf / ASKING).is_dir() and "before it" in (hf / "README.md").read_text()
    shutil.rmtree(hf)
    first, states = read_ours(run).model.state_dict(), {}
    for name, folder in {"hf": moved, "lavis": tmp_path / "again"}.items():
        states[name] = read_ours(folder).model.state_dict()
        assert states[name].keys() == first.keys()
        path = io.newest_valid(folder / "checkpoints")
        assert path is not None
        content = io.load(path)
        assert any(key.startswith("vision.tower.") for key in content["model"])
        assert "vision" not in content["frozen"]
    for name, value in first.items():
        assert states["hf"][name].equal(value), name
        if name.endswith("attn.qkv.bias"):  # LAVIS has no bias of the key
            value = value.clone()
            value.chunk(3)[1].zero_()
        assert states["lavis"][name].equal(value), name

    ours, theirs = blip2_train.load(run), blip2_train.load(moved)
    image = Image.new("RGB", (40, 30), (200, 30, 30))
    if kind == "retrieval":
        assert theirs.encode_text(["a red circle"]).equal(ours.encode_text(["a red circle"]))
        assert theirs.encode_image([image]).equal(ours.encode_image([image]))
    elif kind == "caption":
        assert theirs.caption([image]) == ours.caption([image])
    else:
        prompt, question = ["question: what color? answer:"], ["what color?"]
        said = theirs.generate([image], prompt, questions=question)
        assert theirs.asks and said == ours.generate([image], prompt, questions=question)
