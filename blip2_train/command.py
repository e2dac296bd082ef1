"""What commands of Hydra share: composing our files, refusing, exit codes."""

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from blip2_train import signals
from blip2_train.config import conf_dir, launch, unknown_keys
from blip2_train.errors import RankError, UserError


def split(arguments: list[str], command: str) -> tuple[list[str], tuple[str, ...]]:
    """Overrides, and the folders of `--config-dir`.

    Args:
        arguments: of the command line.
        command: its name, for messages.

    Raises:
        UserError: an argument is neither.
    """
    overrides, folders = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--config-dir", "-cd"):
            folders.append(next(rest, ""))
        elif argument.startswith("--config-dir="):
            folders.append(argument.removeprefix("--config-dir="))
        elif argument.startswith("-"):
            raise UserError(f"unknown option {argument}; see {command} --help")
        elif "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument} is not of the form key=value; see {command} --help")
        else:
            overrides.append(argument)
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: there is no such folder")
    return overrides, tuple(folders)


class Overrides:
    """The overrides of a command line, groups apart from values.

    Args:
        overrides: `key=value` and `group=choice`.
        config_dirs: further folders of configuration files.

    Attributes:
        groups: `group=choice`, and where Hydra looks for files.
        values: `key=value`.
    """

    def __init__(self, overrides: list[str], config_dirs: tuple[str, ...] = ()) -> None:
        self.folders = [conf_dir(), *map(Path, config_dirs)]
        self.groups: list[str] = []
        self.values: list[str] = []
        for override in overrides:
            key = override.split("=", 1)[0].lstrip("+~")
            is_group = any((folder / key.split("@")[0]).is_dir() for folder in self.folders)
            (self.groups if is_group else self.values).append(override)
        if config_dirs:
            self._paths = ",".join(f"file://{Path(d).resolve()}" for d in config_dirs)
        else:
            self._paths = ""

    def choice(self, group: str, purpose: str) -> str:
        """The file that is chosen from a group.

        Args:
            group: that must be given.
            purpose: what it names, for messages.

        Raises:
            UserError: none is given, several are, or there is no such file.
        """
        names = sorted(p.stem for folder in self.folders for p in (folder / group).glob("*.yaml"))
        chosen = [g.split("=", 1)[1] for g in self.groups if g.lstrip("+").startswith(f"{group}=")]
        if len(chosen) != 1 or chosen[0] not in names:
            given = f"{group}={','.join(chosen)} is none of them" if chosen else "none is given"
            raise UserError(f"{group}=NAME names {purpose} and {given}: {', '.join(names)}")
        return chosen[0]

    def compose(self, name: str, *, values: bool = True) -> DictConfig:
        """The configuration of `conf/<name>.yaml`; within `composing`.

        Args:
            name: of the file.
            values: off: without what was given by `key=value`.

        Raises:
            UserError: values of unknown keys, all at once.
        """
        known = hydra.compose(name, self.with_paths(self.groups))
        if not values:
            return known
        keys = [v.split("=", 1)[0].lstrip("~") for v in self.values]
        keys = [k for k in keys if k[0] != "+" and k[:6] != "hydra."]
        problems = unknown_keys(known, keys, f"blip2-{name}")
        if problems:
            raise UserError("; ".join(problems))
        return hydra.compose(name, self.with_paths(self.groups) + self.values)

    def with_paths(self, groups: list[str]) -> list[str]:
        """Choices of groups, and where Hydra looks for their files."""
        return groups + ([f"hydra.searchpath=[{self._paths}]"] if self._paths else [])


@contextlib.contextmanager
def composing() -> Iterator[None]:
    """Within, Hydra composes our files; what it refuses is the user's mistake."""
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    except HydraException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(" ".join(lines)) from error


def set_up_logging() -> None:
    """Lines with their time on standard output; other ranks than the first tell errors alone."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    level = logging.INFO if launch().rank == 0 else logging.ERROR
    logging.getLogger("blip2_train").setLevel(level)
    # torch warns of every enum that torchao registers when it is imported.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def outside(error: RuntimeError, later: str) -> str | None:
    """What happened, where torch reports trouble from outside of this process.

    Args:
        error: of torch.
        later: what the same command will do, for messages.
    """
    text = str(error).strip()
    if text.startswith("DataLoader worker"):  # of torch's signal handler, in the midst of anything
        return (
            f"a loader process died ({text.rstrip('. ')}); if memory ran out, lower "
            f"data.num_workers; the same command {later}"
        )
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or "gloo" in text:
        return (
            "another process of this run is gone, or cannot be reached "
            f"({text.splitlines()[0].partition('. ')[0]}); the same command {later}"
        )
    return None


def guarded(action: Callable[[], object], later: str) -> int:
    """Does something and returns the exit code: 0, or what stands at the top of `train`.

    Args:
        action: what is to be done.
        later: what the same command will do, for messages.
    """
    try:
        action()
    except signals.Stopped as stopped:
        return 128 + stopped.number
    except KeyboardInterrupt:
        print(f"stopped; the same command {later}", file=sys.stderr)
        return 130
    except UserError as error:
        return refuse(error)
    except RuntimeError as error:
        if (reason := outside(error, later)) is None:
            raise
        return refuse(RankError(reason))
    return 0


def refuse(error: UserError) -> int:
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


def leave(code: int) -> None:
    """Ends the process with this exit code, which no signal changes any more."""
    for number in signals.CAUGHT:
        signal.signal(number, signal.SIG_IGN)
    if code == 2 and launch().launcher == "slurm":
        # srun ends all tasks with the first one that fails, and takes that for the job's exit code:
        # let each of them say by itself what is wrong
        time.sleep(15)
    sys.exit(code)
