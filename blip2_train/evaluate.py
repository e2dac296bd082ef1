"""Evaluates a checkpoint: `blip2-evaluate task=NAME ckpt=PATH data=NAME [key=value ...]`.

    blip2-evaluate task=retrieval ckpt=runs/stage1_vitg data=coco
    blip2-evaluate task=caption ckpt=runs/stage2/checkpoints/step-00005000.ckpt data=coco split=val
    torchrun --nproc-per-node 8 --module blip2_train.evaluate task=retrieval ckpt=... data=coco

The results are in eval/<task>-<data>-<step>/ of the run: metrics.json, report.html, samples/. The
same command again goes on where it was stopped; a finished evaluation says so. Exit codes: 0
finished; 2 something given is wrong, one sentence says what; 3 trouble from outside; 128 + n signal
n ended it; 130 Ctrl-C; 1 a bug, with its traceback.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip2_train import __version__, signals
from blip2_train.command import Overrides, composing, guarded, leave, set_up_logging, split
from blip2_train.config import Launch, conf_dir, dotted_keys, flatten, launch
from blip2_train.errors import UserError
from blip2_train.rules import at, value_problems

log = logging.getLogger(__name__)

LATER = "goes on with what is missing"  # the same command does
# Below these keys are the user's to add; constructors and checkpoints refuse unknown ones.
OPEN_KEYS = ("task.", "changes.")
SHARDS = ("data.validation", "data.validation.shards")  # some files of conf/data have none
# Of a file of conf/data, for training alone.
UNREAD = ("data.sources.", "data.validation.split")
UNNEEDED = ("task.", "data.sources", "data.validation.")
# What results do not depend on.
FREE = ("ckpt", "out", "accelerator", "batch_size", "samples", "data.")
VERSIONED = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow")
OPTIONAL = ("pycocoevalcap",)
# What the values of conf/evaluate.yaml may be; those of `data` as in a training.
RULES: dict[str, Any] = {
    "choices": {"accelerator": ("auto", "cpu", "gpu"), "dtype": ("float32", "bfloat16")},
    "counts": {"batch_size": 1, "max_images": 1, "samples": 0},
    "numbers": {},
    "texts": {"ckpt": False, "out": False, "split": False},
    "switches": (),
    "nullable": ("dtype", "max_images", "out"),
}
PATIENCE = 7 * 24 * 3600.0  # seconds that one rank waits for another, which may have more to do


def compose(overrides: list[str], config_dirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """The configuration of a command line, as plain values; unknown keys are refused, all at once.

    Args:
        overrides: `key=value` and `group=choice`.
        config_dirs: further folders of configuration files.

    Returns:
        `conf/evaluate.yaml`, with the names of task and data under `name`.

    Raises:
        UserError: an unknown key or choice, or a value that cannot be.
    """
    given = Overrides(overrides, config_dirs)
    name = {
        "task": given.choice("task", "what to measure"),
        "data": given.choice("data", "what to measure it on"),
    }
    keys = [value.split("=", 1)[0].lstrip("+~") for value in given.values]
    if unread := [key for key in keys if key.startswith(UNREAD)]:
        raise UserError(
            f"{', '.join(unread)}: an evaluation reads data.validation.shards, of the split that "
            "split=NAME names, and nothing else of conf/data"
        )
    with composing():
        documented = dotted_keys(given.compose("evaluate", values=False))
        cfg = given.compose("evaluate")
    found = dotted_keys(cfg)
    if extra := sorted(k for k in found - documented - {*SHARDS} if not k.startswith(OPEN_KEYS)):
        raise UserError(f"nothing reads {', '.join(extra)}; conf/evaluate.yaml names every key")
    if lost := sorted(k for k in documented - found - {*SHARDS} if not k.startswith(UNNEEDED)):
        raise UserError(f"{', '.join(lost)} may not be taken away")
    plain = {**_plain(cfg), "name": name}
    plain["data"].pop("sources", None)  # of a training
    _validate(plain)
    return plain


def evaluate(cfg: Mapping[str, Any], started: Launch) -> Path:
    """Evaluates what a composed configuration says.

    Args:
        cfg: from `compose`.
        started: how this process was started.

    Returns:
        The folder of the results.

    Raises:
        UserError: something given is wrong; raised before any long work, on all ranks alike.
    """
    import torch

    from blip2_train import distributed
    from blip2_train.checkpoint import io
    from blip2_train.distributed import on_every_rank, on_rank_zero
    from blip2_train.training import loading
    from blip2_train.training.build import instantiate_group
    from blip2_train.training.devices import check_devices, cluster_environment, use_cuda
    from blip2_train.training.fit import load_checkpoint
    from blip2_train.training.lock import RunLock

    cuda = use_cuda(cfg["accelerator"], "accelerator")
    check_devices(None, started, cuda)
    environment = cluster_environment(started)
    world = distributed.start(
        started.rank,
        started.local_rank,
        started.world_size,
        environment.main_address,
        environment.main_port,
        cuda=cuda,
        timeout=PATIENCE,
    )
    task = instantiate_group("task", cfg["task"])
    task.samples, task.batch_size = cfg["samples"], cfg["batch_size"]
    source = on_every_rank(functools.partial(_open_source, cfg), world)
    first = world.rank == 0
    path = on_rank_zero(functools.partial(loading.find, cfg["ckpt"]) if first else None, world)
    content = load_checkpoint(path, world)
    content.pop("optimizer", None)  # twice the size of the model
    folder = results_folder(cfg, path, content["step"])
    identity = {
        "settings": _settings(cfg),
        "task": task.identity(),
        "data": source.identity(),
        "checkpoint": io.identity(path),
        "version": __version__,
    }
    lock = RunLock(folder, other="out") if first else None
    try:
        on_rank_zero(lock.acquire if lock else None, world)
        done = on_rank_zero(
            functools.partial(is_finished, folder, identity) if first else None, world
        )
        work = _work(folder, identity, world, cfg["data"]["num_workers"])
        if done:
            log.info("%s is finished: %s", folder, folder / "metrics.json")
            work.close()
            return folder
        device = torch.device("cuda", started.local_rank) if cuda else torch.device("cpu")
        blip2 = on_every_rank(
            lambda: loading.from_checkpoint(
                path,
                content,
                device,
                dtype=cfg["dtype"],
                int8=cfg["int8"],
                changes=cfg["changes"] or {},
            ),
            world,
        )
        task.check(blip2)
        images = _images(cfg, source, task, blip2.image_size)
        log.info(
            "%s of %s (%s, step %d) on %d images of %s, split %s",
            cfg["name"]["task"], path, blip2.kind, blip2.step, len(images), cfg["name"]["data"],
            cfg["split"],
        )  # fmt: skip
        with torch.no_grad(), signals.noted():  # `work` obeys them, on all ranks together
            outcome = task.run(blip2, images, work)
        found = {
            "metrics": outcome.metrics,
            "counts": outcome.counts,
            "notes": outcome.notes,
            "checkpoint": {
                "path": str(path), "kind": blip2.kind, "step": blip2.step, "digest": blip2.digest,
            },
            "data": identity["data"],
            "config": cfg,
            "identity": identity,
            "versions": _versions(),
        }  # fmt: skip
        write = functools.partial(_write, folder, found, outcome)
        on_rank_zero(write if first else None, world)
        work.close()
    finally:
        if lock is not None:
            lock.release()
    if first:
        _show(found, folder, outcome.digits)
    return folder


def results_folder(cfg: Mapping[str, Any], path: Path, step: int) -> Path:
    """Where the results go.

    Args:
        cfg: from `compose`.
        path: of the checkpoint; of one outside of a run, they lie beside it.
        step: of the checkpoint.
    """
    if cfg["out"] is not None:
        return Path(cfg["out"])
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return run / "eval" / f"{cfg['name']['task']}-{cfg['name']['data']}-{step}"


def is_finished(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the results are there.

    Raises:
        UserError: others are.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return False
    try:
        before = flatten(json.loads(path.read_text())["identity"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no result of blip2-evaluate; give another out=") from error
    now = flatten(json.loads(json.dumps(identity)))
    changes = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(
            f"{folder} holds the results of another evaluation ({'; '.join(changes)}); give "
            "another out=FOLDER, or delete it"
        )
    return True


def _plain(cfg: DictConfig) -> dict[str, Any]:
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        if key == "ckpt":
            reason = "a run's folder or a checkpoint file is missing; give ckpt=PATH"
        raise UserError(f"{key}: {reason}" if key else reason) from error
    return plain


def _validate(cfg: Mapping[str, Any]) -> None:
    problems = value_problems(cfg) + value_problems(cfg, **RULES)
    if not at(cfg, "data.validation.shards"):
        problems.append(
            f"data={cfg['name']['data']} names no shards to evaluate on; give "
            "+data.validation.shards=FOLDER, or another data="
        )
    int8 = cfg["int8"]
    if not isinstance(int8, list) or not all(isinstance(part, str) for part in int8):
        problems.append(f"int8={int8} must be a list of parts, such as int8=[qformer]")
    if not isinstance(cfg["changes"] or {}, Mapping):
        problems.append(f"changes={cfg['changes']} must be keys and values")
    if problems:
        raise UserError("; ".join(problems))


def _open_source(cfg: Mapping[str, Any]) -> Any:
    from blip2_train.data.source import open_source

    data = cfg["data"]
    return open_source(
        cfg["name"]["data"],
        data["validation"]["shards"],
        cfg["split"],
        bad_shards=data["on_bad_shard"] == "skip",
        retry_seconds=data["retry_seconds"],
        key="data.validation.shards",
    )


def _images(cfg: Mapping[str, Any], source: Any, task: Any, image_size: int) -> Any:
    from blip2_train.data.stream import EvalStream
    from blip2_train.data.transforms import EvalTransform
    from blip2_train.training.feeding import reading

    return EvalStream(
        source,
        EvalTransform(image_size),
        max_images=cfg["max_images"],
        max_words=cfg["data"]["max_words"],
        reading=dataclasses.replace(reading(cfg["data"]), need_captions=task.need_captions),
        extra=task.extra,
    )


def _work(folder: Path, identity: Mapping[str, Any], world: Any, num_workers: int) -> Any:
    from blip2_train.evaluation.work import Work

    return Work(folder / "parts", identity, world, num_workers=num_workers)


def _settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What the results depend on of the configuration."""
    settings = {key: value for key, value in flatten(cfg).items() if not key.startswith(FREE)}
    settings |= {f"data.{key}": cfg["data"][key] for key in ("max_words", "on_bad_shard")}
    return settings


def _versions() -> dict[str, str]:
    found = {"blip2_train": __version__, "python": platform.python_version()}
    for name in (*VERSIONED, *OPTIONAL):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _write(folder: Path, content: Mapping[str, Any], outcome: Any) -> None:
    """Writes everything, metrics.json last: where it is, all is."""
    from blip2_train.data.atomic import write_json
    from blip2_train.evaluation.page import write_results

    try:
        write_results(folder, content, outcome)
        write_json(folder / "metrics.json", content)
    except OSError as error:
        raise UserError(
            f"the results could not be written to {folder} ({error}); make room, and give the same "
            "command again"
        ) from error


def _show(content: Mapping[str, Any], folder: Path, digits: int) -> None:
    """Prints the final table."""
    from rich.console import Console
    from rich.table import Table

    counts = ", ".join(f"{value:,} {name}" for name, value in content["counts"].items())
    print(f"{folder.name}: {counts}")
    shown = Table()
    shown.add_column("metric")
    shown.add_column("value", justify="right")
    for name, value in content["metrics"].items():
        shown.add_row(name, "-" if value is None else f"{value:.{digits}f}")
    Console().print(shown)
    for about, sentence in content["notes"].items():
        print(f"{about}: {sentence}")
    print(f"{folder / 'report.html'} shows the best and the worst")


def _finish(arguments: list[str]) -> None:
    evaluate(compose(*split(arguments, "blip2-evaluate")), launch())
    from blip2_train import distributed

    distributed.stop()


def run(arguments: list[str]) -> int:
    """Runs a command line and returns the exit code."""
    set_up_logging()
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        lines = (conf_dir() / "evaluate.yaml").read_text().split("\nhydra:")[0].splitlines()
        print("\n".join(line for line in lines if "hydra/" not in line))
        return 0
    with signals.caught():
        return guarded(lambda: _finish(arguments), LATER)


def main() -> None:
    """Entry point of `blip2-evaluate`."""
    leave(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
