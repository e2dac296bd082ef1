"""Files behind URLs: fetched whole into a cache on this machine, which all its processes share.

fsspec does the transport (http(s) as installed; s3, gs, az with the extras of the same names). Its
own file caches write into the final name, so that another process may read half a file; here a
file takes its name when it is complete, and only one process fetches it.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from blip2_train.errors import UserError

STALL_SECONDS = 60.0  # without a byte: the connection is given up and the fetch tried again
_LEFTOVER_SECONDS = 3600.0  # a part not written to for so long belongs to a killed process
_PART = ".part"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}


class MissingFile(Exception):
    """The server says that there is no such file: trying again is of no use."""


class WrongSize(OSError):
    """Another number of bytes came than the index says: cut on the way, or another file."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL of another machine (and not a path or file://)."""
    return "://" in location and not location.startswith("file://")


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the URL's path in it.

    Raises:
        UserError: the protocol is not known, or its package is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        # aiohttp ends a download after 5 minutes, however well it goes.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS
        )
        options = {"client_kwargs": {"timeout": timeout}}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'blip2-train[{extra}]'" if extra else str(error)
        raise UserError(f"{url}: {protocol}:// needs another package: {hint}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def read_remote(url: str) -> bytes:
    """The content of a small file.

    Raises:
        MissingFile: there is none.
        OSError: it could not be fetched.
    """
    with _transport_errors(url):
        system, path = file_system(url)
        return system.cat_file(path)


@contextlib.contextmanager
def _transport_errors(url: str) -> Iterator[None]:
    """Makes one kind out of what the libraries of a dozen protocols raise."""
    try:
        yield
    except (UserError, MissingFile):
        raise
    except FileNotFoundError:
        raise MissingFile(f"{url} does not exist") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise OSError(f"{url}: {error or type(error).__name__}") from error
    except Exception as error:  # aiohttp, botocore, ...: no common class
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Cache:
    """A folder of fetched files, shared by the processes of a machine.

    Names come from URL and version, never from what a stranger's index says. The files that were
    not used for the longest time make room for new ones.

    Attributes:
        folder: on a disk of this machine; made on first use.
        max_bytes: of all files together.
    """

    folder: Path
    max_bytes: int

    def open(self, url: str, version: str = "", size: int | None = None) -> BinaryIO:
        """Open a file, fetched if it is not there yet; a file that is open may leave the cache.

        Args:
            url: of the file.
            version: a file of another version is another file.
            size: that it must have, in bytes, where that is known.

        Raises:
            MissingFile: there is no such file.
            WrongSize: it has another size.
            OSError: it could not be fetched, or not be written.
        """
        path = self._path(url, version)
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb", buffering=0)
                _touch(path)
                return file
            self._fetch(url, path, size)

    def fetch_ahead(self, url: str, version: str = "", size: int | None = None) -> None:
        """Fetch a file that will be needed, unless it is there or somebody is at it.

        Raises:
            MissingFile, OSError: as for `open`.
        """
        path = self._path(url, version)
        if path.exists():
            _touch(path)
        else:
            with contextlib.suppress(Timeout):
                self._fetch(url, path, size, wait=0.0)

    def _path(self, url: str, version: str) -> Path:
        return self.folder / hashlib.sha256(f"{version} {url}".encode()).hexdigest()

    def _fetch(self, url: str, path: Path, size: int | None, wait: float = -1.0) -> None:
        """Fetch under a lock, so that it is done once; does nothing where the file is there then.

        Args:
            url: of the file.
            path: that it gets.
            size: as for `open`.
            wait: seconds to wait for another process that is at it, which is `Timeout` after that;
                -1: as long as it takes.
        """
        self.prepare()
        with FileLock(path.with_suffix(".lock"), timeout=wait):
            if path.exists():
                return
            self._make_room(size or 0)
            part = path.with_suffix(f".{os.getpid()}{_PART}")
            try:
                try:
                    self._download(url, part, size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    part.unlink(missing_ok=True)
                    self._make_room(self.max_bytes)  # by letting go of all else
                    self._download(url, part, size)
                part.rename(path)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise OSError(
                        errno.ENOSPC, f"the disk of data.cache_dir={self.folder} is full", url
                    ) from error
                raise
            finally:
                part.unlink(missing_ok=True)

    def _download(self, url: str, part: Path, size: int | None) -> None:
        with _transport_errors(url):
            system, path = file_system(url)
            system.get_file(path, str(part))
        found = part.stat().st_size
        if size is not None and found != size:
            raise WrongSize(f"{url}: {found} bytes came, the index says {size}")

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made, or is somebody else's.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir={self.folder} cannot be made: {error}") from None
        if self.folder.stat().st_uid != os.getuid():  # anybody may make a folder in /tmp
            raise UserError(f"data.cache_dir={self.folder} belongs to somebody else; name another")

    def _make_room(self, size: int) -> None:
        """Remove the files that were not used for the longest time until `size` bytes fit."""
        with FileLock(self.folder / "room.lock"):
            files = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    if entry.name.endswith(_PART):
                        if time.time() - stat.st_mtime > _LEFTOVER_SECONDS:
                            os.unlink(entry.path)
                    elif not entry.name.endswith(".lock"):
                        files.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
            total = sum(bytes_ for _, bytes_, _ in files)
            for _, bytes_, path in sorted(files):
                if total + size <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                total -= bytes_


def default_cache_dir() -> Path:
    """This user's folder on the machine's own temporary disk."""
    return Path(tempfile.gettempdir()) / f"blip2-train-{getpass.getuser()}"


def _touch(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
