"""Metrics of captions are those of `pycocoevalcap`, with and without Java.

- 200 real captions against other images' references: equal to the library's own evaluation
- without Java the same but for METEOR, which is None with the reason; without the package refused
- captions of several lines or none keep the others in place; no locale matters
- nothing is written beside the library, no process stays, one that dies is told from a score
"""

import contextlib
import importlib.util
import json
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blip2_train.errors import UserError
from blip2_train.evaluation import caption_metrics, java
from blip2_train.evaluation.caption_metrics import OWN_TOKENIZER, score_captions

METRICS = {
    "Bleu_1": "bleu1", "Bleu_2": "bleu2", "Bleu_3": "bleu3", "Bleu_4": "bleu4",
    "ROUGE_L": "rougeL", "CIDEr": "cider", "METEOR": "meteor",
}  # fmt: skip
SAID = ["a man's hat isn't here.", "two dogs run (fast)", "a cat"]
TRUTH = [["A man has no hat!", "the man's hat"], ["Dogs running"], ["a black cat", "a cat sits"]]

pytest.importorskip("pycocoevalcap", reason="pip install 'blip2-train[captions]'")


@pytest.fixture
def needs_java() -> None:
    if reason := java.problem():
        pytest.skip(reason)


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "JAVA", "no-such-program")


@pytest.fixture
def no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes ten seconds to start."""

    def refuse() -> None:
        raise java.JavaError("not now")

    monkeypatch.setattr(java, "meteor", refuse)


def real(realdata: Path, count: int) -> tuple[list[str], list[list[str]]]:
    """One caption of each image, and the other captions of another image for every third one."""
    by_image: dict[int, list[str]] = {}
    for path in sorted(realdata.glob("coco/annotations/captions_*.json")):
        for entry in json.loads(path.read_text())["annotations"]:
            by_image.setdefault(entry["image_id"], []).append(entry["caption"])
    images = list(by_image.values())[:count]
    said, truth = [texts[0] for texts in images], [texts[1:] for texts in images]
    moved = list(range(0, len(images), 3))
    shuffled = moved[:]
    random.Random(0).shuffle(shuffled)
    for place, other in zip(moved, shuffled, strict=True):
        truth[place] = images[other][1:]
    return said, truth


def official(said: list[str], truth: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`COCOEvalCap` as it is, but for SPICE."""
    from pycocoevalcap import eval as library

    none = SimpleNamespace(
        method=lambda: "none", compute_score=lambda gts, res: (0.0, [0.0] * len(gts))
    )
    monkeypatch.setattr(library, "Spice", lambda: none)
    ids = list(range(len(said)))
    truths = {n: [{"caption": text} for text in truth[n]] for n in ids}
    coco = SimpleNamespace(getImgIds=lambda: ids, imgToAnns=truths)
    results = SimpleNamespace(imgToAnns={n: [{"caption": said[n]}] for n in ids})
    evaluation = library.COCOEvalCap(coco, results)
    evaluation.evaluate()
    return evaluation


def test_it_equals_the_library(
    needs_java: None, realdata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, truth = real(realdata, 200)
    assert len(said) == 200
    with java.meteor() as scorer:  # loads while the library's own one does
        monkeypatch.setattr(java, "meteor", lambda: contextlib.nullcontext(scorer))
        wanted = official(said, truth, monkeypatch)
        found = score_captions(said, truth)
    for theirs, ours in METRICS.items():
        assert found.metrics[ours] == pytest.approx(wanted.eval[theirs], abs=1e-12), ours
    assert found.cider == pytest.approx([entry["CIDEr"] for entry in wanted.evalImgs], abs=1e-12)
    assert 0.05 < found.metrics["cider"] < 3 and min(found.cider) < 0.1 < max(found.cider)
    assert "Java" in found.notes["tokenizer"] and "meteor" not in found.notes
    print({name: round(value, 4) for name, value in found.metrics.items()})

    monkeypatch.setattr(java, "JAVA", "no-such-program")
    alone = score_captions(said, truth)
    assert alone.metrics.pop("meteor") is None
    assert alone.metrics == {k: v for k, v in found.metrics.items() if k != "meteor"}
    assert alone.cider == found.cider


def test_without_java(no_java: None) -> None:
    found = score_captions(SAID, TRUTH)
    assert found.metrics["meteor"] is None and found.metrics["cider"] > 0
    assert found.notes["meteor"] == "there is no java on the PATH"
    assert found.notes["tokenizer"].startswith(OWN_TOKENIZER)


def test_a_java_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the one of macOS, which only tells where to get it."""
    (tmp_path / "java").write_text("#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\nexit 1")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = score_captions(SAID, TRUTH)
    assert found.metrics["meteor"] is None
    assert found.notes["meteor"] == "java does not work: Unable to locate a Java Runtime."


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def missing(name: str, *args: Any) -> Any:
        return None if name == "pycocoevalcap" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(UserError, match=r"pip install 'blip2-train\[captions\]'"):
        score_captions(SAID, TRUTH)


def test_groups_are_sets_of_their_own(no_java: None) -> None:
    groups = ["in-domain", "out-domain", "in-domain"]
    found = score_captions(SAID, TRUTH, groups).metrics
    part = score_captions([SAID[0], SAID[2]], [TRUTH[0], TRUTH[2]]).metrics
    assert {f"{name}_in_domain": value for name, value in part.items()}.items() <= found.items()
    assert score_captions(SAID, TRUTH).metrics.items() <= found.items()
    assert found["rougeL_out_domain"] > 0 == found["cider_out_domain"]  # of one image it is 0
    assert score_captions(SAID, TRUTH, [None] * 3).metrics.keys() == part.keys()


@pytest.mark.parametrize("with_java", [True, False])
def test_lines_stay_in_place(
    with_java: bool, monkeypatch: pytest.MonkeyPatch, no_meteor: None
) -> None:
    if not with_java:
        monkeypatch.setattr(java, "JAVA", "no-such-program")
    elif reason := java.problem():
        pytest.skip(reason)
    odd = ["", "\n", "a\nb\r\nc", "x\u2028y\u2029z\x0bw\x0cv", "\x00", "...", "é\x85"]
    said = [*odd, "a red bus", *odd, "two dogs"]
    truth = [["a b c", *odd] for _ in said]
    truth[len(odd)], truth[-1] = ["a red bus", ""], ["two dogs", "\r"]
    plain = ["", "", "a b c", "x y z w v", "", "", "é"]
    clean = [*plain, "a red bus", *plain, "two dogs"]
    wanted = [["a b c", *plain] for _ in said]
    wanted[len(odd)], wanted[-1] = ["a red bus", ""], ["two dogs", ""]
    found, expected = score_captions(said, truth), score_captions(clean, wanted)
    assert found.cider == expected.cider and max(found.cider) == found.cider[len(odd)]
    assert found.metrics == expected.metrics


def test_nothing_but_one_empty_caption(no_java: None) -> None:
    found = score_captions([""], [["a cat"]])
    assert set(found.metrics.values()) == {0.0, None} and found.cider == [0.0]


def test_java_is_as_any_locale(
    needs_java: None, no_meteor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = java.tokenize(["Ein Bär – “naïve”"])
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=US-ASCII -Duser.language=de")
    assert java.tokenize(["Ein Bär – “naïve”"]) == wanted == ["ein bär naïve"]
    assert os.environ["JAVA_TOOL_OPTIONS"].endswith("=de")


class FakeMeteor:
    """In place of the Java program: a shell that answers as it is told."""

    script = ""

    def __init__(self) -> None:
        import threading

        self.lock = threading.Lock()
        self.options = os.environ["JAVA_TOOL_OPTIONS"]
        self.meteor_p = subprocess.Popen(
            ["sh", "-c", self.script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def compute_score(self, gts: Any, res: Any) -> tuple[float, list[float]]:
        self.lock.acquire()
        value = float(self.meteor_p.stdout.readline().strip())
        self.lock.release()
        return value, [value]


@pytest.fixture
def fake(needs_java: None, monkeypatch: pytest.MonkeyPatch) -> type[FakeMeteor]:
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "Meteor", FakeMeteor)
    return FakeMeteor


def test_a_meteor_that_dies_is_no_score(
    fake: type[FakeMeteor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers for the whole set and dies in a group: then there is none at all."""
    monkeypatch.setattr(fake, "script", "echo 0.5; echo 'Not enough memory' >&2; exit 1")
    monkeypatch.delenv("JAVA_TOOL_OPTIONS", raising=False)
    found = score_captions(SAID, TRUTH, ["a", "b", "a"])
    assert {found.metrics[name] for name in ("meteor", "meteor_a", "meteor_b")} == {None}
    assert found.notes["meteor"] == "METEOR failed: Not enough memory"
    assert "JAVA_TOOL_OPTIONS" not in os.environ


def test_meteor_is_ended(fake: type[FakeMeteor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "script", "sleep 600")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de")
    with java.meteor() as scorer:
        scorer.lock.acquire()  # as an error within would leave it
        assert scorer.options.startswith("-Duser.language=de ")
        assert scorer.options.index("language=en") > scorer.options.index("language=de")
        assert scorer.meteor_p.poll() is None
    assert scorer.meteor_p.poll() is not None and not scorer.lock.locked()
    assert os.environ["JAVA_TOOL_OPTIONS"] == "-Duser.language=de"


def test_a_tokenizer_that_fails_is_replaced(
    needs_java: None, no_meteor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "")
    monkeypatch.setattr(java, "OPTIONS", "-Xmx1m -XX:NoSuchOption")
    monkeypatch.setattr(java, "problem", lambda: None)
    with pytest.raises(java.JavaError, match="exit code 1 and 0 lines for 1 captions"):
        java.tokenize(["a cat"])
    found = score_captions(SAID, TRUTH)
    assert found.notes["tokenizer"].startswith(OWN_TOKENIZER)


def test_the_librarys_folder_may_be_read_only(
    needs_java: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own tokenizer puts a file there."""
    import tempfile

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", None)
    assert java.tokenize(["A cat.", "Two"]) == ["a cat", "two"]
    assert caption_metrics.java is java
