"""Trains: `blip2-train experiment=NAME [key=value ...]`.

    blip2-train experiment=stage1_flickr8k_tiny
    blip2-train experiment=stage1_vitg --dry-run
    torchrun --nproc-per-node 8 --module blip2_train.train experiment=stage1_vitg

The same command again continues the run. Exit codes: 0 finished, 2 something given is wrong (one
sentence says what), 1 a bug (with its traceback).
"""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from blip2_train.config import (
    Launch,
    conf_dir,
    dotted_keys,
    launch,
    to_plain,
    unknown_keys,
    validate,
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


def train(cfg: DictConfig, *, dry_run: bool = False) -> Path | None:
    """Trains what a composed configuration says.

    Args:
        cfg: composed from `conf/train.yaml`.
        dry_run: show what would be trained instead.

    Returns:
        The run's folder.

    Raises:
        UserError: something in the configuration or on the disk is wrong.
    """
    started = launch()
    plain = to_plain(cfg)
    devices = plain["trainer"]["devices"]
    if dry_run and started.world_size == 1 and isinstance(devices, int) and devices > 0:
        # nothing is started: the question is what that many devices would do
        started = Launch(world_size=devices, local_world_size=devices)
    validate(plain, started.world_size)
    if dry_run:
        from blip2_train.training.dry_run import describe

        describe(plain, started)
        return None
    from blip2_train.training.fit import fit

    return fit(plain, started)


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
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    level = logging.INFO if launch().rank == 0 else logging.ERROR
    logging.getLogger("blip2_train").setLevel(level)
    # torch warns of every enum that torchao registers when it is imported.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    dry_run = "--dry-run" in arguments
    arguments = [a for a in arguments if a != "--dry-run"]
    # `resume=never` is short for `resume.from=never`
    arguments = [re.sub(r"^resume=", "resume.from=", a) for a in arguments]
    if any(re.fullmatch("-m|--multirun", a) for a in arguments):
        return _refuse("sweeps (-m) are not supported yet; start one run per configuration")
    if any(HYDRA_FLAGS.fullmatch(a) for a in arguments):
        sys.argv[1:] = arguments
        _hydra_main()
        return 0
    try:
        train(compose(*_split(arguments)), dry_run=dry_run)
    except UserError as error:
        return _refuse(str(error), alone=isinstance(error, RankError))
    except RuntimeError as error:  # of torch's signal handler, wherever the trainer is just then
        if not str(error).startswith("DataLoader worker"):
            raise
        return _refuse(
            f"a loader process died ({str(error).rstrip('. ')}); if memory ran out, lower "
            "data.num_workers; the same command goes on from the last checkpoint",
            alone=True,
        )
    _leave_group()
    return 0


def _refuse(message: str, alone: bool = False) -> int:
    """Prints one line on each machine and returns the exit code.

    The other ranks of a machine would repeat it, unless this one is `alone` with it; another
    machine may have trouble of its own.
    """
    started = launch()
    if started.local_rank == 0 or alone:
        where = f"[rank {started.rank}] " if started.rank else ""
        print(f"{where}error: {message}", file=sys.stderr)
    return 2


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
    """After success only: after a failure other ranks may wait in a collective for ever."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def _hydra_main(cfg: DictConfig) -> Any:
    """Help and `--cfg job` are Hydra's."""
    return str(train(cfg))


def main() -> None:
    """Entry point of `blip2-train`."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
