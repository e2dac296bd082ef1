"""Shards that whole runs are tested on."""

from pathlib import Path

import pytest

from blip2_train.prepare import main as prepare


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 rendered scenes of 32 pixels, and a tokenizer trained on their captions."""
    folder = tmp_path_factory.mktemp("shards") / "synthetic"
    options = (
        "--samples 108 --held-out 24 --size 32 --samples-per-shard 40 --workers 1 --tokenizer 160"
    )
    prepare(["synthetic", "--out", str(folder), *options.split()])
    return folder
