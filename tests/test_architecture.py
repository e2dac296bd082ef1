"""Rules as tests: imports point one way, only one module talks to other ranks, no file grows huge.

Read from the source, without importing anything.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "blip2_train"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a part may import from the package, itself aside.
MAY_IMPORT = {
    "errors": set(),
    "seeding": set(),
    "losses": set(),
    "distributed": set(),
    "rules": set(),
    "signals": set(),
    "slurm": {"signals"},
    "config": {"errors", "rules"},
    "models": {"errors", "losses"},
    "data": {"errors", "seeding", "distributed"},
    "checkpoint": {"errors", "models"},
    "evaluation": {"errors", "distributed", "models", "losses", "data"},
    "training": {
        "errors", "seeding", "config", "losses", "distributed", "models", "data", "checkpoint",
        "evaluation", "signals",
    },
    "interchange": {"errors", "config", "data", "models", "checkpoint", "training"},
    "convert": {"errors", "config", "interchange", "train"},
    "prepare": {"errors", "data", "config", "train", "training"},
    "sweep": {"errors", "config"},
    "train": {"errors", "rules", "config", "training", "signals", "slurm", "sweep"},
    "benchmark": {"errors", "benchmarks"},
    "benchmarks": {"errors", "config", "data", "distributed", "models", "training", "train"},
    "demo": {
        "errors", "prepare", "train", "data", "models", "losses", "evaluation", "training",
    },
}  # fmt: skip
# Third-party packages that only these parts may import.
RESERVED = {
    "pytorch_lightning": {"training"},
    "hydra": {"training", "train", "sweep"},
    "omegaconf": {"config", "train", "sweep"},
    "wandb": {"training"},
    "timm": {"models"},
    "webdataset": {"data", "benchmarks"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "blip2_train" else {node.module or ""}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert imports(path) == set()
        return
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == "blip2_train":
            other = rest.split(".")[0]
            allowed = other == part or other in MAY_IMPORT[part] or other == "__version__"
            assert allowed, f"{part} may not import {name}"
        elif head in RESERVED:
            assert part in RESERVED[head], f"{part} may not import {head}"


def test_only_one_module_talks_to_other_ranks() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.startswith("torch.distributed") for name in imports(path))
    }
    assert users <= {"distributed.py", "train.py"}  # train.py only leaves the group


def test_no_pickle() -> None:
    for path in FILES:
        text = path.read_text()
        assert "weights_only=False" not in text, path
        assert "allow_pickle=True" not in text, path
        # the name of an exception is all that is used of it
        used = re.findall(r"pickle\.(?!UnpicklingError)\w+", text)
        assert not used, f"{path} uses {used}"


def test_files_are_a_few_pages() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 450
    }
    assert not long, f"split {long}"
