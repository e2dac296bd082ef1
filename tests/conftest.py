"""Options and fixtures of the whole suite; no test may reach a network."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("WANDB_SILENT", "true")

# One thread: tests share the cores, and the order of float sums must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

# A busy machine is no fault of the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--oracle",
        default=str(SHARED / "oracle"),
        help="folder of reference values (FORMAT.md there describes it)",
    )
    parser.addoption("--kills", type=int, default=3, help="of tests/test_kill.py")
    parser.addoption("--preemptions", type=int, default=2, help="of tests/slurm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first: as the last one each would have the machine to itself."""
    items.sort(key=lambda item: next(i for i, part in enumerate(LONGEST) if part in item.nodeid))


# ... but for a second Slurm, which waits for the first to end.
LONGEST = ("slurm/test_job", "test_demo", "test_kill", "training/", "slurm/", "")


@pytest.fixture(scope="session")
def oracle(request: pytest.FixtureRequest) -> Path:
    folder = Path(request.config.getoption("--oracle"))
    if not (folder / "facts.json").exists():
        pytest.skip(f"no reference values at {folder}; give another folder with --oracle")
    return folder


@pytest.fixture(scope="session")
def realdata() -> Path:
    folder = SHARED / "realdata"
    if not folder.exists():
        pytest.skip(f"no real photographs at {folder}")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 rendered scenes of 32 pixels, and a tokenizer trained on their captions."""
    from blip2_train.prepare import main as prepare

    folder = tmp_path_factory.mktemp("shards") / "synthetic"
    options = (
        "--samples 108 --held-out 24 --size 32 --samples-per-shard 40 --workers 1 --tokenizer 160"
    )
    prepare(["synthetic", "--out", str(folder), *options.split()])
    return folder
