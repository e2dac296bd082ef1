"""Checkpoint files.

Proven: a file is written whole or not at all, on a full disk too; a flipped bit that changes
anything, a cut file and a file of another kind are detected, whatever the position; the newest
undamaged checkpoint is found and damaged ones are set aside; what would need unpickling is refused;
the rules of retention keep what they say.
"""

import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2_train.checkpoint import io
from blip2_train.errors import UserError


def content(step: int = 7) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "format": io.FORMAT,
        "step": step,
        "config": "seed: 42\n",
        "scores": {3: 1.5},
        "model": {
            "a": torch.randn(5, 300, generator=generator),
            "b": torch.arange(4),
            "c": torch.zeros(3, dtype=torch.bfloat16),
        },
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a.equal(b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = io.step_path(tmp_path / "checkpoints", 7)
    io.save(path, content())
    return path


def test_a_checkpoint_comes_back(path: Path) -> None:
    assert path.name == "step-00000007.ckpt"
    assert same(io.load(path), content())
    assert same(torch.load(path, weights_only=True), content())
    assert io.damage(path) is None
    io.save(path, content(8))  # over an old one
    assert io.load(path)["step"] == 8
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# -- written whole or not at all -------------------------------------------------------------------


def raises(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_save_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    monkeypatch.setattr(where, raises(error))
    with pytest.raises(type(error)):
        io.save(path, content(8))
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(io.load(path), content())


@pytest.mark.parametrize(
    ("limit", "numbers"),
    [(0, 50_000), (600, 50_000), (6_000, 50_000), (2_000, 10_000_000), (100_000, 10_000_000)],
)
def test_a_full_disk_is_an_oserror(path: Path, limit: int, numbers: int) -> None:
    """The writer of torch turns a failed write into a RuntimeError; callers wait for OSError."""
    big = content(8) | {"more": torch.zeros(numbers)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError):
            io.save(path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(io.load(path), content())


def test_the_data_is_on_the_disk_before_the_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("fsync"), fsync(f))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a))[1])
    io.save(path, content())
    assert events == ["fsync", "replace", "fsync"]  # file, name, folder


# -- damage ----------------------------------------------------------------------------------------


def test_a_flipped_bit_is_detected_or_changes_nothing(path: Path, tmp_path: Path) -> None:
    """Alignment and time stamps are the only bytes of the archive that nothing protects."""
    raw, copy = path.read_bytes(), tmp_path / "copy.ckpt"
    generator = random.Random(0)
    contents_table = raw.index(b"PK\x01\x02")
    # everywhere, and closely in the table of contents, which checksums do not cover
    positions = generator.sample(range(len(raw)), 250)
    positions += generator.sample(range(contents_table, len(raw)), 150)
    detected = 0
    for position in positions:
        flipped = bytearray(raw)
        flipped[position] ^= 1 << generator.randrange(8)
        copy.write_bytes(flipped)
        if io.damage(copy) is None:
            assert same(io.load(copy), content()), f"byte {position}"
        else:
            detected += 1
    assert detected > 150


def test_a_flipped_bit_of_a_weight_is_detected(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    weight = content()["model"]["a"].numpy().tobytes()
    start = raw.index(weight)
    for offset in (0, 1, len(weight) // 2, len(weight) - 1):
        for bit in (0, 5):
            raw[start + offset] ^= 1 << bit
            path.write_bytes(raw)
            torch.load(path, weights_only=True)  # notices nothing
            assert "checksum" in (io.damage(path) or "")
            with pytest.raises(UserError, match="damaged"):
                io.load(path)
            raw[start + offset] ^= 1 << bit


def test_a_cut_file_is_detected(path: Path) -> None:
    raw = path.read_bytes()
    for length in [0, 1, 30, *range(100, len(raw), 97), len(raw) - 1]:
        path.write_bytes(raw[:length])
        assert io.damage(path) is not None, length
        with pytest.raises(UserError, match="damaged"):
            io.load(path)


def test_what_is_no_checkpoint_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*nowhere"):
        io.load(tmp_path / "nowhere.ckpt")
    for other in ({"model": {}}, {"format": 999}, [1, 2], torch.zeros(3)):
        torch.save(other, path)
        with pytest.raises(UserError, match="not a checkpoint of blip2-train"):
            io.load(path)
    torch.save(content(), path, _use_new_zipfile_serialization=False)  # has no checksums
    with pytest.raises(UserError, match="damaged"):
        io.load(path)
    assert io.damage(tmp_path) is not None  # a folder


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_nothing_is_unpickled(path: Path, tmp_path: Path) -> None:
    torch.save(content() | {"extra": Malicious(tmp_path / "executed")}, path)
    with pytest.raises(UserError, match="more than tensors and plain values"):
        io.load(path)
    assert not (tmp_path / "executed").exists()


# -- a folder of them ------------------------------------------------------------------------------


def fill(folder: Path, *steps: int) -> dict[int, Path]:
    for step in steps:
        io.save(io.step_path(folder, step), {"format": io.FORMAT, "step": step})
    return io.steps(folder)


def test_steps_are_found_in_order(tmp_path: Path) -> None:
    fill(tmp_path, 10, 2, 300)
    for name in ("step-00000004.ckpt.damaged", "step-5.ckpt", "last.ckpt", ".step-00000006.ckpt"):
        (tmp_path / name).touch()
    assert list(io.steps(tmp_path)) == [2, 10, 300]
    assert io.steps(tmp_path / "nowhere") == {}


def test_the_newest_undamaged_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert io.newest_valid(tmp_path) is None
    found = fill(tmp_path, 1, 2, 3, 4)
    assert io.newest_valid(tmp_path) == found[4]
    raw = found[4].read_bytes()
    found[4].write_bytes(raw[: len(raw) // 2])
    found[3].write_bytes(b"")
    assert io.newest_valid(tmp_path) == found[2]
    assert "step-00000004.ckpt is damaged" in caplog.text and "step-00000003" in caplog.text
    assert list(io.steps(tmp_path)) == [1, 2]
    set_aside = tmp_path / "step-00000004.ckpt.damaged"
    assert set_aside.read_bytes() == raw[: len(raw) // 2]  # renamed, not lost
    io.save(found[4], content(4))  # its step may be written again
    assert io.newest_valid(tmp_path) == found[4]


def test_when_all_are_damaged_somebody_must_decide(tmp_path: Path) -> None:
    for path in fill(tmp_path, 1, 2).values():
        path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        io.newest_valid(tmp_path)


@pytest.mark.parametrize(
    ("rules", "scores", "kept"),
    [
        ({"keep_last": 1, "keep_every": None, "keep_best": 0}, {}, [600]),
        ({"keep_last": 3, "keep_every": None, "keep_best": 0}, {}, [400, 500, 600]),
        ({"keep_last": 9, "keep_every": None, "keep_best": 0}, {}, [100, 200, 300, 400, 500, 600]),
        ({"keep_last": 1, "keep_every": 200, "keep_best": 0}, {}, [200, 400, 600]),
        ({"keep_last": 1, "keep_every": None, "keep_best": 1}, {100: 5.0, 300: 4.0}, [100, 600]),
        ({"keep_last": 1, "keep_every": None, "keep_best": 2}, {100: 5.0, 300: 4.0, 200: 3.0},
         [100, 300, 600]),
        # the best of those that are still there: 50's file is long gone
        ({"keep_last": 1, "keep_every": None, "keep_best": 1}, {50: 9.0, 200: 1.0}, [200, 600]),
        ({"keep_last": 2, "keep_every": 300, "keep_best": 1}, {100: 0.0}, [100, 300, 500, 600]),
    ],
)  # fmt: skip
def test_retention(
    tmp_path: Path, rules: dict[str, Any], scores: dict[int, float], kept: list[int]
) -> None:
    found = fill(tmp_path, 100, 200, 300, 400, 500, 600)
    other = tmp_path / "step-00000100.ckpt.damaged"
    other.touch()
    deleted = io.prune(tmp_path, scores=scores, **rules)
    assert list(io.steps(tmp_path)) == kept
    assert deleted == [path for step, path in found.items() if step not in kept]
    assert other.exists()
