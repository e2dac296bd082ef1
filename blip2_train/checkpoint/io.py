"""Checkpoint files: written whole or not at all, checked before they are believed.

A file holds tensors and plain values only, so it loads with `weights_only=True`.
"""

import contextlib
import hashlib
import logging
import os
import pickle
import re
import socket
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from blip2_train.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1
STEP_FILE = re.compile(r"step-(\d{8})\.ckpt")


def step_path(folder: Path, step: int) -> Path:
    """Name of a step's checkpoint."""
    return folder / f"step-{step:08d}.ckpt"


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint so that `path` never names a partial file.

    A temporary file in the same folder, flushed to the disk, renamed, the folder flushed.

    Raises:
        OSError: the disk is full or gone; the temporary file is removed, `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # what its writer makes of a failed write
                raise OSError(f"torch could not write {temporary}: {error}") from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def identity(path: Path) -> str:
    """Digest of a checkpoint by the checksums in its table of contents: hardly anything is read.

    Raises:
        OSError, zipfile.BadZipFile: there is no such file here, or not all of it.
    """
    with zipfile.ZipFile(path) as archive:
        entries = [(e.filename, e.file_size, e.CRC) for e in archive.infolist()]
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def wait_for(path: Path, wanted: str, patience: float) -> None:
    """Waits until a file is here as another machine sees it: a network file system may lag.

    Args:
        path: of the checkpoint.
        wanted: its `identity` over there.
        patience: seconds.

    Raises:
        UserError: it is missing, or another one, all the time.
    """
    end = time.monotonic() + patience
    while True:
        try:
            if identity(path) == wanted:
                return
            problem = "differs"
        except (OSError, zipfile.BadZipFile) as error:
            problem = f"cannot be read ({type(error).__name__}: {error})"
        if time.monotonic() > end:
            raise UserError(
                f"checkpoint {path.absolute()} {problem} on {socket.gethostname()}, but rank 0 "
                "has a good one there; run.dir must be one folder for all processes"
            )
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes a network file system look again
        time.sleep(min(1.0, patience / 10))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None; reads all of it.

    `torch.load` does not notice flipped bits; the checksums of the zip archive do. They do not
    cover the archive's table of contents, which torch reads with more care than `zipfile`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:  # torch never compresses
                    return f"{entry.filename} is compressed"
            if (bad := archive.testzip()) is not None:
                return f"wrong checksum of {bad}"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no tensor
    except pickle.UnpicklingError:  # whole, but not a file of plain values: the caller's matter
        return None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load(path: Path, *, checked: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of ours onto the CPU.

    Args:
        path: of the file.
        checked: its checksums were verified before (by rank 0), which takes reading all of it.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of blip2-train.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if not checked and (reason := damage(path)):
        raise UserError(f"checkpoint {path} is damaged ({reason})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors and plain values") from error
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    if not ours or not isinstance(content.get("step"), int):  # results are named after the step
        raise UserError(
            f"{path} is not a checkpoint of blip2-train (format {FORMAT}); of the files of others "
            "blip2-convert makes one"
        )
    return content


def steps(folder: Path) -> dict[int, Path]:
    """Checkpoints in a folder by step, oldest first; damaged ones included."""
    found = {
        int(match[1]): path
        for path in folder.glob("*")
        if (match := STEP_FILE.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def newest_valid(folder: Path, *, rename: bool = True) -> Path | None:
    """The newest undamaged checkpoint.

    Newer damaged ones are reported and renamed to `*.damaged`, so that they are neither taken for
    checkpoints again nor lost.

    Args:
        folder: of the checkpoints.
        rename: off: the folder is left as it is, for whoever only reads.

    Raises:
        UserError: there are checkpoints, but all of them are damaged.
    """
    candidates = list(steps(folder).values())
    for path in reversed(candidates):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, reason)
        if rename:
            path.rename(path.with_suffix(".ckpt.damaged"))
    if candidates:
        raise UserError(
            f"every checkpoint in {folder} is damaged; start again with another run.name, or "
            "give a good file with resume.from=PATH"
        )
    return None


def set_aside(folder: Path, after: int) -> list[Path]:
    """Renames checkpoints of later steps to `*.abandoned`: a run that goes back leaves them behind.

    Args:
        folder: of the checkpoints.
        after: step that the run goes back to.

    Returns:
        The new names.
    """
    return [
        path.rename(path.with_suffix(".ckpt.abandoned"))
        for step, path in steps(folder).items()
        if step > after
    ]


def remove_leftovers(folder: Path) -> None:
    """Deletes what a process killed while saving left behind; nobody else may be saving there."""
    for path in folder.glob(".step-*.tmp"):
        path.unlink(missing_ok=True)


def prune(
    folder: Path,
    *,
    keep_last: int,
    keep_every: int | None,
    keep_best: int,
    scores: dict[int, float],
) -> list[Path]:
    """Deletes checkpoints that no rule keeps.

    Args:
        folder: of the checkpoints.
        keep_last: newest files that stay.
        keep_every: files at multiples of it stay; None: no such rule.
        keep_best: files of the highest scores that stay.
        scores: {step: score} of validated steps, higher is better.

    Returns:
        What was deleted.
    """
    found = steps(folder)
    keep = set(list(found)[-keep_last:])
    if keep_every:
        keep |= {step for step in found if step % keep_every == 0}
    scored = sorted((step for step in found if step in scores), key=lambda step: -scores[step])
    keep |= set(scored[:keep_best])
    deleted = [path for step, path in found.items() if step not in keep]
    for path in deleted:
        path.unlink(missing_ok=True)
    return deleted
