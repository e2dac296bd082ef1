"""Where a run goes on: which checkpoint, and whether it is still the same run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from blip2_train.checkpoint import io
from blip2_train.config import flatten
from blip2_train.data.language import tokenizer_digest
from blip2_train.data.source import Source
from blip2_train.errors import UserError
from blip2_train.training.checkpointing import RunState

log = logging.getLogger(__name__)

# May change freely: where and on what it runs, what it logs, how much it keeps.
RESUME_FREE = (
    "run.",
    "sweep.",
    "resume.",
    "init_from",
    "batch.",
    "qformer.gradient_checkpointing",
    "qformer.init",
    "init",
    "language_model.gradient_checkpointing",
    "vision.gradient_checkpointing",
    "image_encoder.gradient_checkpointing",
    "text.bucket",
    "text.parts",
    "trainer.accelerator",
    "trainer.compile",
    "trainer.devices",
    "trainer.log_every",
    "trainer.max_consecutive_skips",
    "trainer.hang_seconds",
    "trainer.overlap",
    "data.root",
    "data.num_workers",
    "data.max_skip_fraction",
    "data.on_bad_shard",
    "data.allow_pipe",
    "data.cache_dir",
    "data.cache_gb",
    "data.retry_seconds",
    # places, whose content the checkpoint identifies by a digest
    "vision.weights",
    "text.tokenizer",
    "language_model.name",
    "language_model.tokenizer",
    "causal_lm.tokenizer",
    "data.validation.",
    "validation.",
    "checkpoint.",
    "wandb.",
)
# Keys that checkpoints of earlier versions lack, and what these did.
ADDED = {
    "data.features": "computed",
    "data.text": "captions",
    "loss.itc.cache": False,
    "optimizer.layer_decay": 1.0,
    "text.max_question_tokens": 32,
    "trainer.compile": None,
    "trainer.overlap": False,
    "vision.precision": "native",
    "vision.trainable": False,
    "vision.gradient_checkpointing": False,
}
# Never: another model, other data, other random numbers. That is another run.
RESUME_REFUSED = (
    "stage", "kind", "seed", "data.", "text.", "vision.", "qformer.", "model.", "language_model.",
    "image_encoder.", "text_encoder.", "causal_lm.",
)  # fmt: skip


def compare_for_resume(
    saved: Mapping[str, Any], current: Mapping[str, Any], allow: list[str]
) -> list[str]:
    """What changed since the checkpoint was written.

    Args:
        saved: the checkpoint's configuration.
        current: this start's.
        allow: keys (or their parents) that the user allows to change.

    Returns:
        A line "key: old -> new" for each permitted change.

    Raises:
        UserError: naming every change that is not permitted.
    """
    old, new = flatten(saved), flatten(current)
    old = {key: value for key, value in ADDED.items() if key in new} | old
    permitted, problems = [], []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        change = f"{key}: {before} -> {after}"
        if key.startswith("loss.weights.") and bool(before) != bool(after):
            problems.append(f"{change} (turning a loss on or off trains other weights)")
            continue
        if key == "optimizer.layer_decay" and 1 in (before, after):
            problems.append(f"{change} (turning it on or off puts weights into other groups)")
            continue
        allowed = any(key == a or key.startswith(a + ".") for a in allow)
        where = key.startswith("data.sources.") and key.endswith(".shards")
        if key.startswith(RESUME_FREE) or where:
            permitted.append(change)
        elif key.startswith(RESUME_REFUSED):
            problems.append(f"{change} (another {key.split('.')[0]} is another run)")
        elif allowed:
            permitted.append(change)
        else:
            problems.append(f"{change} (permit it with resume.allow=[{key}])")
    if problems:
        raise UserError(
            "the run cannot be continued with a changed configuration: "
            + "; ".join(problems)
            + "; or give it a new run.name"
        )
    return permitted


def find_checkpoint(cfg: Mapping[str, Any], folder: Path) -> Path | None:
    """The checkpoint to go on from, by `resume.from`; None: a new run. Rank 0 decides.

    With a path, the run goes back to that checkpoint once: its own later ones are set aside, and
    the same command given again goes on from what it has saved since.

    Raises:
        UserError: a given file is missing or damaged, or a new run would overwrite another.
    """
    wanted = cfg["resume"]["from"]
    checkpoints = folder / "checkpoints"
    io.remove_leftovers(checkpoints)
    if wanted == "auto":
        return io.newest_valid(checkpoints)
    if wanted == "never":
        if io.steps(checkpoints):
            raise UserError(
                f"resume.from=never, but {folder} holds a run; give another run.name or delete it"
            )
        return None
    own = io.newest_valid(checkpoints)
    if own is not None and io.load(own, checked=True)["origin"] == wanted:
        return own
    path = Path(wanted)
    if not path.is_file():
        raise UserError(f"resume.from={wanted}: there is no such file (or auto, or never)")
    step = io.load(path)["step"]
    for abandoned in io.set_aside(checkpoints, step):
        log.warning("going back to step %d: %s is set aside", step, abandoned)
    return path


def check_configuration(resume: Mapping[str, Any], cfg: Mapping[str, Any], world_size: int) -> None:
    """Compares the configuration with the checkpoint's; logs what changed.

    Raises:
        UserError: something changed that may not.
    """
    if resume["optimizer"] is None:
        raise UserError(
            "the run's checkpoint comes from blip2-convert and has no optimizer to go on with; "
            "give the training another run.name, and init_from= that checkpoint"
        )
    saved = {"stage": "stage1", **yaml.safe_load(resume["config"])}  # 0.1 knew no other stage
    for change in compare_for_resume(saved, cfg, cfg["resume"]["allow"]):
        log.info("changed since the checkpoint: %s", change)
    if resume["world_size"] != world_size:
        log.info("devices since the checkpoint: %d -> %d", resume["world_size"], world_size)


def check_data(resume: Mapping[str, Any], state: RunState, path: Path) -> None:
    """Compares shards and tokenizer with the checkpoint's.

    Raises:
        UserError: they are others.
    """
    if resume["data"] != state.data:
        raise UserError(
            f"the shards are not those that {path} was trained on ({resume['data']} then, "
            f"{state.data} now); their order would differ: give the run a new run.name"
        )
    for name, identity in state.frozen.items():
        if resume["frozen"].get(name) != identity:
            raise UserError(f"the {name} is not the one that {path} was trained with")


def new_state(
    cfg: Mapping[str, Any], sources: list[Source], tokenizers: Mapping[str, Any], world_size: int
) -> RunState:
    """A run's state at step 0.

    Args:
        cfg: resolved configuration.
        sources: of the data.
        tokenizers: {what they are called in messages: tokenizer}.
        world_size: number of processes.
    """
    given = cfg["resume"]["from"]
    origin = given if given not in ("auto", "never") else ""
    return RunState(
        drawn={source.name: 0 for source in sources},
        config=yaml.safe_dump(dict(cfg), sort_keys=False),
        origin=origin,
        world_size=world_size,
        frozen={name: {"digest": tokenizer_digest(t)} for name, t in tokenizers.items()},
        data={source.name: source.identity() for source in sources},
    )


def check_frozen(
    parts: Mapping[str, Mapping[str, str]], resume: Mapping[str, Any] | None, path: Path | None
) -> None:
    """Compares the frozen parts' identities with the checkpoint's.

    Args:
        parts: {part: {"name", "weights", "digest"}}, and more, see `build.tower_identity`.
        resume: content of the checkpoint, None for a new run.
        path: of the checkpoint.

    Raises:
        UserError: one has other weights, or computes with them in another precision.
    """
    for part, identity in parts.items():
        saved = resume["frozen"][part] if resume is not None else identity
        if saved["digest"] != identity["digest"]:
            raise UserError(
                f"{part} ({identity['name']}) has other weights than the one that {path} was "
                f"trained with ({saved['name']}, {saved['weights']}); set {part}.* as it was"
            )
        before, now = (each.get("precision", "native") for each in (saved, identity))
        if before != now:
            raise UserError(
                f"{part}.precision={now}, and {path} was trained with {before}; set "
                f"{part}.precision={before}, or give the run a new run.name"
            )
        before, now = (each.get("store", "the tower's own") for each in (saved, identity))
        if before != now:
            raise UserError(
                f"the cached features are stored in {now} precision, and {path} was trained with "
                f"{before}; compute them again as they were (blip2-prepare features --store), or "
                "give the run a new run.name"
            )
