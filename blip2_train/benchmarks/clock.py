"""Times of the phases of a step, on the device where it runs."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import torch


class Clock:
    """Seconds between marks, of many steps; a GPU is waited for at the end of a step alone.

    Args:
        device: that computes. On a CPU its time is measured as well as the wall's.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.marks: list[tuple[str, torch.cuda.Event | tuple[float, float]]] = []

    def mark(self, phase: str) -> None:
        """Ends a phase; the first mark of a step begins its first phase."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, (time.perf_counter(), time.process_time())))

    def end(self, *, keep: bool = True) -> None:
        """Ends a step; `keep` its times."""
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            if keep and isinstance(before, tuple) and isinstance(after, tuple):
                self.wall[phase].append(after[0] - before[0])
                self.cpu[phase].append(after[1] - before[1])
            elif keep and not isinstance(before, tuple) and not isinstance(after, tuple):
                self.wall[phase].append(before.elapsed_time(after) / 1000)
        self.marks = []

    def medians(self) -> dict[str, float]:
        """Seconds of each phase on the wall."""
        return {phase: statistics.median(seconds) for phase, seconds in self.wall.items()}

    def cpu_medians(self) -> dict[str, float]:
        """Processor seconds of each phase; nothing on a GPU."""
        return {phase: statistics.median(seconds) for phase, seconds in self.cpu.items()}
