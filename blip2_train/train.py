"""Trains: `blip2-train experiment=NAME [key=value ...]`.

    blip2-train experiment=stage1_flickr8k_tiny
    blip2-train experiment=stage1_vitg --dry-run
    torchrun --nproc-per-node 8 --module blip2_train.train experiment=stage1_vitg

    blip2-train -m experiment=stage1_flickr8k_tiny optimizer.lr=1e-4,3e-4

The same command again continues the run (with -m: the sweep). Exit codes: 0 finished; 2 something
given is wrong, one sentence says what; 3 trouble from outside, such as a data server or another
process that is gone; 128 + n signal n ended the run, which was saved (130, Ctrl-C: it was not); 1 a
bug, with its traceback.
"""

import logging
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from blip2_train import signals, slurm, sweep
from blip2_train.config import (
    Launch,
    conf_dir,
    dotted_keys,
    launch,
    to_plain,
    unknown_keys,
    validate,
    without_checkpoint,
)
from blip2_train.errors import RankError, UserError
from blip2_train.rules import GROUPS

# With one of these Hydra itself is asked for something; otherwise a training is.
HYDRA_FLAGS = re.compile(
    r"-h|--help|--hydra-help|--version|-c|--cfg(=.*)?|-i|--info(=.*)?|"
    r"-sc|--shell-completion|--experimental-rerun(=.*)?"
)
# Below these keys are the user's to add; the constructors that get them refuse unknown ones.
OPEN_KEYS = ("data.sources.", *GROUPS)


def train(cfg: DictConfig, *, dry_run: bool = False, patient: bool = False) -> Path | None:
    """Trains what a composed configuration says.

    Args:
        cfg: composed from `conf/train.yaml`.
        dry_run: show what would be trained instead.
        patient: wait for another process that trains in the run's folder, instead of refusing.

    Returns:
        The run's folder.

    Raises:
        UserError: something in the configuration or on the disk is wrong.
        Stopped: within `signals.caught`, one of them ended the run; where it asked for that, Slurm
            will start it again.
    """
    started = launch()
    plain = to_plain(cfg)
    if dry_run:
        plain = without_checkpoint(plain)
    devices = plain["trainer"]["devices"]
    if dry_run and started.world_size == 1 and isinstance(devices, int) and devices > 0:
        # nothing is started: the question is what that many devices would do
        started = Launch(world_size=devices, local_world_size=devices)
    validate(plain, started.world_size)
    if dry_run:
        from blip2_train.training.dry_run import describe

        describe(plain, started)
        return None
    try:
        from blip2_train.training.fit import fit

        return fit(plain, started, patient=patient)
    except signals.Stopped as stopped:
        if stopped.number in signals.REQUEUE:
            slurm.requeue(started.rank)
        raise


def compose(overrides: list[str], config_dirs: tuple[str, ...] = ()) -> DictConfig:
    """The configuration of a command line; unknown keys are refused, all at once.

    Args:
        overrides: `key=value` and `group=choice`.
        config_dirs: further folders of configuration files.

    Raises:
        UserError: an unknown key, experiment or choice, or a value that cannot be parsed.
    """
    folders = [conf_dir(), *map(Path, config_dirs)]
    groups: list[str] = []
    values: list[str] = []
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        is_group = any((folder / key.split("@")[0]).is_dir() for folder in folders)
        (groups if is_group else values).append(override)
    names = sorted(p.stem for folder in folders for p in (folder / "experiment").glob("*.yaml"))
    chosen = [g.split("=", 1)[1] for g in groups if g.lstrip("+").startswith("experiment=")]
    if len(chosen) != 1 or chosen[0] not in names:
        given = f"experiment={','.join(chosen)} is none of them" if chosen else "none is given"
        raise UserError(f"experiment=NAME names what to train and {given}: {', '.join(names)}")
    if config_dirs:
        paths = ",".join(f"file://{Path(d).resolve()}" for d in config_dirs)
        groups.append(f"hydra.searchpath=[{paths}]")
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            known = hydra.compose("train", groups)
            keys = [v.split("=", 1)[0].lstrip("~") for v in values]
            problems = unknown_keys(known, [k for k in keys if k[0] != "+" and k[:6] != "hydra."])
            if problems:
                raise UserError("; ".join(problems))
            cfg = hydra.compose("train", groups + values)
            plain = [g for g in groups if not g.lstrip("+").startswith(("experiment=", "stage="))]
            documented = dotted_keys(hydra.compose("train", [*plain, f"stage={cfg.stage}"]))
    except HydraException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(" ".join(lines)) from error
    extra = [
        key
        for key in sorted(dotted_keys(cfg))
        if key not in documented and not key.startswith(OPEN_KEYS)
    ]
    if extra:
        raise UserError(
            f"nothing reads {', '.join(extra)}; conf/train.yaml and conf/stage/{cfg.stage}.yaml "
            "name every key"
        )
    if lost := sorted(
        key for key in documented - dotted_keys(cfg) if not key.startswith(("data.", *GROUPS))
    ):
        raise UserError(f"{', '.join(lost)} may not be taken away")
    return cfg


def run(arguments: list[str]) -> int:
    """Runs a command line and returns the exit code."""
    with signals.caught():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    _set_up_logging()
    dry_run = "--dry-run" in arguments
    arguments = [a for a in arguments if a != "--dry-run"]
    # `resume=never` is short for `resume.from=never`
    arguments = [re.sub(r"^resume=", "resume.from=", a) for a in arguments]
    if any(re.fullmatch("-m|--multirun", a) for a in arguments):
        return run_sweep([a for a in arguments if a not in ("-m", "--multirun")], dry_run)
    if any(HYDRA_FLAGS.fullmatch(a) for a in arguments):
        sys.argv[1:] = arguments
        _hydra_main()
        return 0
    try:
        train(compose(*_split(arguments)), dry_run=dry_run)
    except signals.Stopped as stopped:
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except UserError as error:
        return _refuse(error)
    except RuntimeError as error:
        if (reason := _outside(error)) is None:
            raise
        return _refuse(RankError(reason))
    _leave_group()
    return 0


def _set_up_logging() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    level = logging.INFO if launch().rank == 0 else logging.ERROR
    logging.getLogger("blip2_train").setLevel(level)
    # torch warns of every enum that torchao registers when it is imported.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def run_sweep(arguments: list[str], dry_run: bool = False) -> int:
    """Runs a sweep and returns the exit code: 0 where every run is finished, else 2.

    All its configurations are checked before the first one is trained; one that fails in training
    does not stop the others.
    """
    first: DictConfig | None = None
    try:
        overrides, folders = _split(arguments)
        jobs = sweep.jobs(overrides)
        for job in jobs:
            cfg = compose(job, folders)
            if dry_run:
                print(f"\n{' '.join(job)}")
                train(cfg, dry_run=True)
            else:
                validate(to_plain(cfg), launch().world_size)
            first = first or cfg
    except UserError as error:
        return _refuse(error)
    if dry_run:
        return 0
    assert first is not None
    folder = Path(first.run.dir) / first.sweep.name
    fixed = {o.split("=", 1)[0].lstrip("+~") for o in overrides} - sweep.keys(overrides)
    names = ",".join(sorted({*fixed, "sweep.name"}))
    sys.argv[1:] = [
        "-m", *arguments,
        # fixed here, for what they are made of may vary
        f"sweep.name='{first.sweep.name}'", f"hydra.sweep.dir='{folder}'",
        f"hydra.job.config.override_dirname.exclude_keys=[{names}]",
    ]  # fmt: skip
    stopped, unfinished = False, 0
    try:
        _hydra_main()
    except KeyboardInterrupt:
        stopped = True
    except SystemExit as error:
        if error.code != 1 or launch().world_size > 1:
            raise
        stopped = True  # Hydra has shown why; a job of Slurm may have died
    finally:
        if launch().rank == 0:
            unfinished = sweep.report(folder)
    if stopped:
        print(f"stopped; {sweep.LATER}", file=sys.stderr)
    elif unfinished:
        print(f"error: {unfinished} run(s) are not finished; {sweep.LATER}", file=sys.stderr)
    return 2 if stopped or unfinished else 0


def _train_one(cfg: DictConfig) -> None:
    """One run of a sweep: whatever ends it, on all ranks alike, does not end the sweep."""
    _set_up_logging()  # this may be a process of Slurm's
    folder = Path(HydraConfig.get().runtime.output_dir)
    cfg.run.dir, cfg.run.name = str(folder.parent), folder.name
    if launch().rank == 0:
        sweep.note_failure(folder, None)
    try:
        train(cfg, patient=True)
    except RankError as error:
        raise SystemExit(_refuse(error)) from error
    except UserError as error:
        if launch().rank == 0:
            sweep.note_failure(folder, str(error))
        _refuse(error)
    except Exception as error:
        if isinstance(error, RuntimeError) and (reason := _outside(error)):
            raise SystemExit(_refuse(RankError(reason))) from error
        traceback.print_exc()
        sweep.note_failure(folder, f"{type(error).__name__}: {error}".splitlines()[0])
        if launch().world_size > 1:  # the others may wait in a collective for ever
            raise SystemExit(1) from error
    _leave_group()


def _outside(error: RuntimeError) -> str | None:
    """What happened, where torch reports trouble from outside of this process."""
    text = str(error).strip()
    if text.startswith("DataLoader worker"):  # of torch's signal handler, in the midst of anything
        return (
            f"a loader process died ({text.rstrip('. ')}); if memory ran out, lower "
            "data.num_workers; the same command goes on from the last checkpoint"
        )
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or "gloo" in text:
        return (
            "another process of this run is gone, or cannot be reached "
            f"({text.splitlines()[0].partition('. ')[0]}); the same command goes on from the last "
            "checkpoint"
        )
    return None


def _refuse(error: UserError) -> int:
    """Prints one line on each machine and returns the exit code.

    The other ranks of a machine would repeat it, unless one is alone with it; another machine may
    have trouble of its own.
    """
    started = launch()
    alone = isinstance(error, RankError)
    if started.local_rank == 0 or alone:
        where = f"[rank {started.rank}] " if started.rank else ""
        print(f"{where}error: {error}", file=sys.stderr, flush=True)
    return 3 if alone else 2


def _split(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Overrides, and the folders of `--config-dir`."""
    overrides, folders = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--config-dir", "-cd"):
            folders.append(next(rest, ""))
        elif argument.startswith("--config-dir="):
            folders.append(argument.removeprefix("--config-dir="))
        elif argument.startswith("-"):
            raise UserError(f"unknown option {argument}; see blip2-train --help")
        elif "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument} is not of the form key=value; see blip2-train --help")
        else:
            overrides.append(argument)
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: there is no such folder")
    return overrides, tuple(folders)


def _leave_group() -> None:
    if "blip2_train.training.fit" in sys.modules:
        from blip2_train.training.fit import leave

        leave()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def _hydra_main(cfg: DictConfig) -> Any:
    """Help, `--cfg job` and sweeps are Hydra's."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        with signals.caught():
            _train_one(cfg)
            if number := signals.received():  # after an error it was only noted
                raise signals.Stopped(number)
            return None
    return str(train(cfg))


def main() -> None:
    """Entry point of `blip2-train`."""
    code = run(sys.argv[1:])
    for number in signals.CAUGHT:
        signal.signal(number, signal.SIG_IGN)  # the exit code is decided
    if code == 2 and launch().launcher == "slurm":
        # srun ends all tasks with the first one that fails, and takes that for the job's exit code:
        # let each of them say by itself what is wrong
        time.sleep(15)
    sys.exit(code)


if __name__ == "__main__":
    main()
