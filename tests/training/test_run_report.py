"""Every run leaves report.html: curves of its metrics, samples of its last validation.

- the same samples as the picture, what matching was shown, and chance beside the losses
- also without validation, and after a start that continues a run
- a run can be loaded from its folder again and measured: the same numbers as its last validation
- a language model by itself is no worse or better than what it says behind no queries
"""

import csv
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_run, tiny_stage_runs, train_in_process

from blip2_train.errors import UserError
from blip2_train.training.feeding import open_validation, validation_images
from blip2_train.training.loading import evaluate, load_run


@pytest.fixture(scope="module")
def stage1(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("reports")
    assert train_in_process(tiny_run(shards, runs, "run")) == 0
    return runs / "run"


@pytest.fixture(scope="module")
def stage2(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("reports2")
    overrides = tiny_stage_runs(shards, runs)["stage2"]
    assert train_in_process([*overrides, "run.name=run"]) == 0
    return runs / "run"


def titles(page: str) -> list[str]:
    return re.findall(r">([a-zA-Z][^<>]*(?:nats|accuracy|rate|%|norm)[^<>]*)</text>", page)


def test_stage1(stage1: Path) -> None:
    page = (stage1 / "report.html").read_text()
    assert "run, step 12" in page
    shown = " ".join(titles(page))
    for title in ("contrast (ITC)", "matching (ITM)", "captioning (LM)", "matching accuracy"):
        assert title in shown, title
    assert page.count('class="card"') == 2  # validation.samples
    assert "hard negative text" in page and "chance" in page and "floor" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_stage2(stage2: Path) -> None:
    page = (stage2 / "report.html").read_text()
    assert "loss with which image" in page and "alone" in page and page.count('class="card"') == 2


def test_without_validation_there_are_curves(shards: Path, tmp_path: Path) -> None:
    changes = {"validation.every": "null", "trainer.max_steps": 2}
    assert train_in_process(tiny_run(shards, tmp_path, "run", **changes)) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "contrast (ITC)" in page and 'class="card"' not in page


def test_a_continued_run_draws_all_of_it(shards: Path, tmp_path: Path) -> None:
    overrides = tiny_run(shards, tmp_path, "run", **{"validation.samples": 0})
    assert train_in_process([*overrides, "trainer.max_steps=6"]) == 0
    more = [*overrides, "trainer.max_steps=12", "resume.allow=[trainer.max_steps]"]
    first = (tmp_path / "run" / "report.html").read_text()
    assert train_in_process(more) == 0
    second = (tmp_path / "run" / "report.html").read_text()
    assert "step 6<" in first and "step 12<" in second
    assert titles(first) == titles(second) != []


def test_a_report_that_fails_does_not_stop_a_training(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such font")

    monkeypatch.setattr("blip2_train.training.run_report.write_page", fail)
    assert train_in_process(tiny_run(shards, tmp_path, "run", **{"trainer.max_steps": 2})) == 0
    assert "report.html could not be written" in caplog.text and "no such font" in caplog.text


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_run_can_be_loaded_and_measured(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    stage, model = load_run(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    source = open_validation(stage.cfg)
    assert source is not None
    images = validation_images(stage.cfg, source, stage.image_size(model))
    batch_size = stage.cfg["validation"]["batch_size"]
    found, evaluator = evaluate(stage, model, images, batch_size=batch_size)
    with (folder / "metrics.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["val/loss"]][-1]
    for key, value in found.metrics.items():
        assert value == pytest.approx(float(last[f"val/{key}"]), rel=1e-5, abs=1e-6), key
    pictures = torch.stack([images[i].image for i in range(3)])  # type: ignore[union-attr]
    assert len(evaluator.captions(pictures)) == 3  # type: ignore[attr-defined]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        load_run(tmp_path)


def test_the_language_model_alone(stage2: Path) -> None:
    """Its loss is that of the texts without queries, token by token."""
    from blip2_train.data.batch import Sample
    from blip2_train.data.language_batch import collate_causal

    stage, model = load_run(stage2)
    samples = [Sample(torch.zeros(3, 32, 32, dtype=torch.uint8), text, 0, text) for text in
               ("a small red star", "on pink")]  # fmt: skip
    batch = collate_causal(samples, [], text=stage.text, max_text_tokens=16, prompt="", bucket=1)  # type: ignore[attr-defined]
    logits, predicted = model.logits_without_image(batch)
    assert (~predicted).sum() == 2  # the start tokens, which nothing precedes
    whole = model.language_model.lm(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    rows = batch["lm_index"] // batch["input_ids"].shape[1]
    columns = batch["lm_index"] % batch["input_ids"].shape[1]
    expected = whole[rows[predicted], columns[predicted] - 1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
