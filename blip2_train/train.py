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

import re
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from blip2_train import signals, slurm, sweep
from blip2_train.command import (
    Overrides,
    composing,
    guarded,
    leave,
    outside,
    refuse,
    set_up_logging,
)
from blip2_train.command import split as split_arguments
from blip2_train.config import (
    Launch,
    conf_dir,
    dotted_keys,
    launch,
    to_plain,
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
LATER = "goes on from the last checkpoint"  # the same command does
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
    given = Overrides(overrides, config_dirs)
    given.choice("experiment", "what to train")
    with composing():
        cfg = given.compose("train")
        plain = [g for g in given.groups if not g.lstrip("+").startswith(("experiment=", "stage="))]
        own = given.with_paths([*plain, f"stage={cfg.stage}"])
        documented = dotted_keys(hydra.compose("train", own))
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
    set_up_logging()
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
    code = guarded(
        lambda: train(compose(*split_arguments(arguments, "blip2-train")), dry_run=dry_run), LATER
    )
    if code == 0:
        _leave_group()
    return code


def run_sweep(arguments: list[str], dry_run: bool = False) -> int:
    """Runs a sweep and returns the exit code: 0 where every run is finished, else 2.

    All its configurations are checked before the first one is trained; one that fails in training
    does not stop the others.
    """
    first: DictConfig | None = None
    try:
        overrides, folders = split_arguments(arguments, "blip2-train")
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
        return refuse(error)
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
    set_up_logging()  # this may be a process of Slurm's
    folder = Path(HydraConfig.get().runtime.output_dir)
    cfg.run.dir, cfg.run.name = str(folder.parent), folder.name
    if launch().rank == 0:
        sweep.note_failure(folder, None)
    try:
        train(cfg, patient=True)
    except RankError as error:
        raise SystemExit(refuse(error)) from error
    except UserError as error:
        if launch().rank == 0:
            sweep.note_failure(folder, str(error))
        refuse(error)
    except Exception as error:
        if isinstance(error, RuntimeError) and (reason := outside(error, LATER)):
            raise SystemExit(refuse(RankError(reason))) from error
        traceback.print_exc()
        sweep.note_failure(folder, f"{type(error).__name__}: {error}".splitlines()[0])
        if launch().world_size > 1:  # the others may wait in a collective for ever
            raise SystemExit(1) from error
    _leave_group()


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
    leave(code)


if __name__ == "__main__":
    main()
