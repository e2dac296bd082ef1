"""Real HTTP servers on loopback: one whose faults a test chooses, one that can be killed."""

import contextlib
import functools
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

STALL_SECONDS = 30.0


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        server: FaultyServer = self.server  # type: ignore[assignment]
        with server.lock:
            server.requests[name] += 1
            fault = server.faults.get(name, [])[:1]
            server.faults[name] = server.faults.get(name, [])[1:]
        if not fault:
            return super().do_GET()
        path = Path(self.translate_path(self.path))
        half = path.read_bytes()[: path.stat().st_size // 2]
        if fault == ["busy"]:
            return self.send_error(503)
        self.close_connection = True
        if fault == ["refuse"]:
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.send_response(200)
        if fault == ["truncate"]:  # as a proxy does that gave up: its own length, no error
            self.send_header("Content-Length", str(len(half)))
        else:
            self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        self.wfile.write(half)
        self.wfile.flush()
        if fault == ["stall"]:
            server.stop_stalling.wait(STALL_SECONDS)
        return None

    def log_message(self, *args: object) -> None:
        pass


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder; the first answers for a file are as its list of `faults` says.

    "refuse" closes at once, "busy" is status 503, "drop" closes in the middle, "truncate" says that
    half of the file is all of it, "stall" stops in the middle and keeps the connection open.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.stop_stalling = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """A faulty server in a thread."""
    with FaultyServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.stop_stalling.set()
        server.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(folder: Path, port: int) -> subprocess.Popen:
    """An ordinary server as a process that can be killed; returns when it answers."""
    words = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(
        [*words, "--directory", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process
        time.sleep(0.05)
    raise AssertionError("the server does not start")
