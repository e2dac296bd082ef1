"""Where a run goes on: which checkpoint, and whether it is still the same run."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from blip2_train.checkpoint import io
from blip2_train.config import compare_for_resume
from blip2_train.data.stream import Source
from blip2_train.errors import UserError
from blip2_train.models.vision import VisionTower
from blip2_train.training.checkpointing import RunState

log = logging.getLogger(__name__)


def find_checkpoint(cfg: Mapping[str, Any], folder: Path) -> Path | None:
    """The checkpoint to go on from, by `resume.from`; None: a new run.

    Raises:
        UserError: a given file is missing or damaged, or a new run would overwrite another.
    """
    wanted = cfg["resume"]["from"]
    checkpoints = folder / "checkpoints"
    if wanted == "auto":
        return io.newest_valid(checkpoints)
    if wanted == "never":
        if io.steps(checkpoints):
            raise UserError(
                f"resume.from=never, but {folder} holds a run; give another run.name or delete it"
            )
        return None
    path = Path(wanted)
    if not path.is_file():
        raise UserError(f"resume.from={wanted}: there is no such file (or auto, or never)")
    return path


def check_resume(
    resume: Mapping[str, Any], cfg: Mapping[str, Any], state: RunState, path: Path
) -> None:
    """Compares configuration and data with the checkpoint's; logs what changed.

    Raises:
        UserError: something changed that may not.
    """
    saved = yaml.safe_load(resume["config"])
    for change in compare_for_resume(saved, cfg, cfg["resume"]["allow"]):
        log.info("changed since the checkpoint: %s", change)
    if resume["data"] != state.data:
        raise UserError(
            f"the shards are not those that {path} was trained on ({resume['data']} then, "
            f"{state.data} now); their order would differ: give the run a new run.name"
        )
    if resume["frozen"]["tokenizer"] != state.frozen["tokenizer"]:
        raise UserError(f"text.tokenizer is not the one that {path} was trained with")


def new_state(cfg: Mapping[str, Any], sources: list[Source], tokenizer: Any) -> RunState:
    """A run's state at step 0."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return RunState(
        drawn={source.name: 0 for source in sources},
        config=yaml.safe_dump(dict(cfg), sort_keys=False),
        frozen={
            "tokenizer": {"digest": hashlib.sha256(repr(vocabulary).encode()).hexdigest()},
        },
        data={
            source.name: {
                "samples": sum(info.samples for info in source.shards),
                "digest": hashlib.sha256(
                    "".join(f"{info.name}{info.sha256}" for info in source.shards).encode()
                ).hexdigest(),
            }
            for source in sources
        },
    )


def check_tower(
    vision: VisionTower, resume: Mapping[str, Any] | None, path: Path | None
) -> dict[str, str]:
    """Identity of the image tower, which checkpoints hold in place of its weights.

    Raises:
        UserError: the checkpoint was trained on another tower.
    """
    identity = {"name": vision.name, "weights": vision.weights, "digest": vision.digest()}
    if resume is not None:
        saved = resume["frozen"]["vision"]
        if saved["digest"] != identity["digest"]:
            raise UserError(
                f"the image tower {vision.name} has other weights than the one that {path} was "
                f"trained with ({saved['name']}, {saved['weights']}); set vision.* as it was"
            )
    return identity
