"""One run, one folder: lock.json says who trains there, and whether it is still alive."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from blip2_train.errors import UserError

log = logging.getLogger(__name__)

NAME = "lock.json"
INTERVAL = 10.0  # seconds between heartbeats
BEATS = 5  # a lock whose last heartbeat is so many intervals old belongs to nobody


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        token: of this one locking, random.
        host: name of the machine.
        boot: of the machine and, after a colon, the namespace in which `pid` counts: containers of
            one machine do not see each other's processes. Empty where the system does not say.
        pid: of the process.
        started: when it started, in clock ticks after boot: numbers of processes are used again.
        slurm_job: "" outside of Slurm.
        slurm_restarts: how often Slurm has started the job again.
    """

    token: str
    host: str
    boot: str
    pid: int
    started: int
    slurm_job: str
    slurm_restarts: int

    @classmethod
    def this_process(cls, environ: Mapping[str, str] = os.environ) -> "Holder":
        """With a new token."""
        boot = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            boot += f":{os.readlink('/proc/self/ns/pid')}"
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=boot,
            pid=os.getpid(),
            started=_start_time(os.getpid()),
            slurm_job=environ.get("SLURM_JOB_ID", ""),
            slurm_restarts=int(environ.get("SLURM_RESTART_COUNT", 0)),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"

    def is_alive(self, asker: "Holder") -> bool | None:
        """Whether the holder still runs; None: that cannot be told from here."""
        same_job = self.slurm_job and self.slurm_job == asker.slurm_job
        if same_job and self.slurm_restarts < asker.slurm_restarts:
            return False  # Slurm has ended the job before it started it again
        if self.boot and self.boot == asker.boot:
            return self.started == _start_time(self.pid)
        return None


@dataclass(frozen=True)
class _Seen:
    text: str  # of the file
    holder: Holder | None  # None: it is being written, or is damaged
    beat: float  # time of the last heartbeat, by the file server's clock
    age: float  # seconds since then, by the same clock


class RunLock:
    """Held from `acquire` to `release`, kept alive by a thread; for one process of a run.

    Args:
        folder: of the run.
        interval: seconds between heartbeats; the same for all that use the folder.
        other: key that names another folder, for messages.

    Attributes:
        lost: another process has taken the folder over; it saw no heartbeat for a long time.
    """

    def __init__(
        self, folder: Path, interval: float = INTERVAL, *, other: str = "run.name"
    ) -> None:
        self.path = folder / NAME
        self.interval = interval
        self.other = other
        self.me = Holder.this_process()
        self.lost = False
        self.file: int | None = None
        self.ended = threading.Event()
        self.heart = threading.Thread(target=self._beat, daemon=True)

    def acquire(self, patience: float | None = None) -> bool:
        """Takes the lock, also from a holder that is gone.

        Whether a holder on another machine is gone is seen from its heartbeat, so this may take
        five intervals.

        Args:
            patience: seconds to wait for a holder that is alive; None: it is an error.

        Returns:
            Whether it was taken; False only after waiting for as long as `patience`.

        Raises:
            UserError: somebody else holds it, or the folder cannot be written.
        """
        began = time.monotonic()
        first: _Seen | None = None
        while not self._create():
            seen = self._look()
            if seen is None:
                continue  # just released
            alive = seen.holder.is_alive(self.me) if seen.holder is not None else None
            if alive is False or (alive is None and seen.age > BEATS * self.interval):
                log.warning("%s left %s behind; it is taken over", seen.holder or "nobody", NAME)
                if self._take_over(seen.text):
                    break
                continue
            beating = first is not None and (first.text, first.beat) != (seen.text, seen.beat)
            if patience is None and (alive or beating):
                raise UserError(
                    f"{self.path.parent} is in use by {seen.holder or 'another process'}; wait for "
                    f"it, end it, or give another {self.other}"
                )
            if patience is not None and time.monotonic() - began > patience:
                log.info("waiting for %s, which trains in %s", seen.holder, self.path.parent)
                return False
            first = first or seen
            time.sleep(self.interval / 10)
        self.heart.start()
        return True

    def release(self) -> None:
        """Gives it back; without effect where it is not held."""
        self.ended.set()
        if self.file is None:
            return
        if self.heart.is_alive():
            self.heart.join()
        os.close(self.file)
        self.file = None
        seen = None
        with contextlib.suppress(OSError):
            seen = self._look()
        if seen is not None and seen.holder == self.me:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self._write(self.path)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self.path.parent} cannot be written: {error}") from error
        return True

    def _take_over(self, text: str) -> bool:
        """Puts an own lock where one says `text`; whether it has stayed there.

        Several may do so at the same time. There is always a lock, so nobody creates one; the last
        to come has it, and each looks again after all of them have come.
        """
        new = self.path.with_name(f".{NAME}.{self.me.token}.new")
        try:
            file = self._write(new)
            seen = self._look()
            if seen is not None and seen.text == text:
                os.rename(new, self.path)
                time.sleep(self.interval / 10)
                seen = self._look()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
        if seen is not None and seen.holder == self.me:
            self.file = file
            return True
        os.close(file)
        return False

    def _write(self, path: Path) -> int:
        """A new file that says who holds the lock, open."""
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            os.write(file, (json.dumps(asdict(self.me), indent=1) + "\n").encode())
            os.fsync(file)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        return file

    def _look(self) -> _Seen | None:
        """The lock as it stands now; opening it makes a network file system ask its server."""
        probe = self.path.with_name(f".{NAME}.{self.me.token}")
        try:
            with self.path.open() as file:
                beat = os.fstat(file.fileno()).st_mtime
                text = file.read()
            probe.touch()  # this machine's clock may be another than the server's
            now = probe.stat().st_mtime
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
        try:
            entry = json.loads(text)
            holder = Holder(**{field.name: entry[field.name] for field in fields(Holder)})
        except (ValueError, KeyError, TypeError):
            return _Seen(text, None, beat, now - beat)
        return _Seen(text, holder, beat, now - beat)

    def _beat(self) -> None:
        while not self.ended.wait(self.interval):
            try:
                seen = self._look()
                if seen is None:
                    continue  # deleted by hand, or with the whole folder: nobody else's
                if seen.holder != self.me:
                    self.lost = True
                    return
                assert self.file is not None
                os.utime(self.file)  # of the open file: never of one that has taken its place
            except (OSError, UserError) as error:
                log.warning("no heartbeat in %s: %s", self.path, error)


def _start_time(pid: int) -> int:
    """Clock ticks between boot and the start of a process; 0 where there is none or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, *rest = text.rpartition(")")[2].split()  # its name, in brackets, may hold anything
    return 0 if state in "ZX" else int(rest[18])
