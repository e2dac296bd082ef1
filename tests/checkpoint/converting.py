"""The command `blip2-convert` in this process."""

import os
from pathlib import Path

import pytest

from blip2_train.convert import main


def convert(source: str, target: str, src: Path, dst: Path, *more: str) -> int:
    return main(["--from", source, "--to", target, str(src), str(dst), *more])


def refused(
    capsys: pytest.CaptureFixture, source: str, target: str, src: Path, dst: Path, *more: str
) -> str:
    """The one sentence that says why, after checking that nothing is left."""
    before = sorted(os.listdir(dst.parent))
    capsys.readouterr()
    assert convert(source, target, src, dst, *more) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and said.count("\n") == 0, said
    assert sorted(os.listdir(dst.parent)) == before
    return said
