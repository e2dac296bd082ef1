"""A real Slurm, where `../shared/slurm-local` can start one."""

import os
from collections.abc import Iterator

import pytest
from slurm_cluster import TOOL, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not TOOL.exists():
        pytest.skip(f"no {TOOL}")
    if os.geteuid() != 0:
        pytest.skip("slurm-local needs root")
    made = Cluster(TOOL, tmp_path_factory.mktemp("slurm"))
    made.start()
    yield made
    made.stop()
