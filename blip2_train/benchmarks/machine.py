"""What was measured on what: processor, versions; processor time and memory of processes."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import re
import time
from pathlib import Path


def processor() -> str:
    """Name of this machine's processor, with the number of its cores that this process sees."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {multiprocessing.cpu_count()} cores"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the packages; those that are not installed are left out."""
    out = {"python": platform.python_version()}
    for package in packages:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def cpu_seconds() -> float:
    """Processor time so far of this process and of its living children, user and system.

    Of children Linux alone tells, in steps of 1/100 s; elsewhere they count as nothing.
    """
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended, or this is no Linux
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def private_bytes() -> int:
    """Largest memory that one child process has to itself; 0 where the system does not say."""
    largest = 0
    for child in multiprocessing.active_children():
        try:
            text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended, or this is no Linux
            continue
        kilobytes = re.findall(r"^Private_(?:Clean|Dirty):\s*(\d+)", text, flags=re.MULTILINE)
        largest = max(largest, 1024 * sum(map(int, kilobytes)))
    return largest
