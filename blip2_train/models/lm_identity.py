"""By what a language model is known again: digests of its weights and of their configuration."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Its weights: the first of these patterns that it has files of. OPT has torch files alone.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Keys that change nothing of what a model computes from its weights.
INCIDENTAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def weight_files(folder: Path) -> list[Path]:
    """The files that a model's weights are read from, sorted by name."""
    return next((found for kind in WEIGHTS if (found := sorted(folder.glob(kind)))), [])


def files_digest(folder: Path) -> str:
    """SHA-256 over the names and SHA-256 of the weight files, and config.json.

    The hub's cache names a large file's content after its SHA-256: such a file is not read.
    """
    sha = hashlib.sha256()
    for path in weight_files(folder):
        content = path.resolve().name
        if not re.fullmatch(r"[0-9a-f]{64}", content):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        sha.update(f"{path.name} {content}\n".encode())
    return with_architecture(sha.hexdigest(), json.loads((folder / "config.json").read_text()))


def with_architecture(weights: str, config: Mapping[str, Any]) -> str:
    """SHA-256 of a digest of weights and of the configuration that says what is done with them."""
    values = {key: value for key, value in config.items() if key not in INCIDENTAL}
    content = weights + json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()
