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
    "distributed": {"errors"},
    "rules": set(),
    "signals": set(),
    "slurm": {"signals"},
    "config": {"errors", "rules"},
    "models": {"errors", "losses"},
    "data": {"errors", "seeding", "distributed"},
    "checkpoint": {"errors", "models"},
    "evaluation": {"errors", "distributed", "models", "losses", "data", "checkpoint", "signals"},
    "command": {"errors", "config", "signals"},
    "training": {
        "errors", "seeding", "config", "losses", "distributed", "models", "data", "checkpoint",
        "evaluation", "signals",
    },
    "interchange": {"errors", "config", "data", "models", "checkpoint", "training"},
    "convert": {"errors", "config", "interchange", "train"},
    "prepare": {"errors", "data", "config", "train", "training"},
    "sweep": {"errors", "config"},
    "train": {"errors", "rules", "config", "command", "training", "signals", "slurm", "sweep"},
    "evaluate": {
        "errors", "rules", "config", "command", "distributed", "data", "checkpoint", "evaluation",
        "training", "signals",
    },
    "benchmark": {"errors", "benchmarks"},
    "benchmarks": {"errors", "config", "data", "distributed", "models", "training", "train"},
    "demo": {
        "errors", "prepare", "train", "data", "models", "losses", "evaluation", "training",
    },
}  # fmt: skip
# Third-party packages that only these parts may import.
RESERVED = {
    "pytorch_lightning": {"training"},
    "hydra": {"training", "command", "train", "sweep"},
    "omegaconf": {"config", "command", "train", "evaluate", "sweep"},
    "wandb": {"training"},
    "timm": {"models"},
    "webdataset": {"data", "benchmarks"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, when_imported: bool = False) -> set[str]:
    """Names that a file imports, or only what importing it brings along."""
    found = set()
    module = ast.parse(path.read_text())
    for node in module.body if when_imported else ast.walk(module):
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
        # `import blip2_train` brings nothing along; `load` imports what it needs when it is called
        at_once = imports(path, when_imported=True)
        assert {name.partition(".")[0] for name in at_once} <= {"__future__", "typing"}
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
    assert users <= {"distributed.py", "command.py"}  # which only knows its error


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
