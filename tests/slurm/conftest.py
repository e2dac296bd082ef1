"""A real Slurm, where `../shared/slurm-local` can start one."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from slurm_cluster import TOOL, Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not TOOL.exists():
        pytest.skip(f"no {TOOL}")
    if os.geteuid() != 0:
        pytest.skip("slurm-local needs root")
    # Two of them on one machine disturb each other: steps of one were seen to end when jobs of the
    # other did.
    with FileLock(Path(tempfile.gettempdir()) / "blip2-train-tests-slurm.lock"):
        made = Cluster(TOOL, tmp_path_factory.mktemp("slurm"))
        made.start()
        yield made
        made.stop()
