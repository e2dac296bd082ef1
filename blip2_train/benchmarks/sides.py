"""Ours beside the textbook step: how they compare, as numbers and as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

OURS, TEXTBOOK = "ours", "textbook"
SIDES = (OURS, TEXTBOOK)


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Baseline over ours for speed, ours over baseline for memory."""
    ours, theirs = sides[OURS], sides[TEXTBOOK]

    def speedup(quantity: str) -> float:
        return ours[quantity] / theirs[quantity]

    ratios = {
        "speedup": speedup("samples_per_second"),
        "speedup_from_features": speedup("samples_per_second_from_features"),
        "memory_ratio": ours["saved_mib"] / theirs["saved_mib"],
    }
    if ours["cpu_seconds"]:
        parts = ("forward", "backward", "optimizer")
        cpu = [sum(side["cpu_seconds"][part] for part in parts) for side in (theirs, ours)]
        ratios["cpu_speedup_from_features"] = cpu[0] / cpu[1]
    return ratios


def table(record: dict[str, Any]) -> Table:
    """A record of `stage1.run` to look at."""
    shapes, ours, theirs = record["shapes"], record["ours"], record["baseline"]
    out = Table(
        title=f"{record['name']}: {shapes['batch']} samples, {record['device']}, "
        f"{shapes['precision']}",
        title_justify="left",
    )
    for column in ("", OURS, TEXTBOOK, "ratio"):
        out.add_column(column, justify="right" if column else "left")

    def row(name: str, one: float | None, two: float | None, unit: str = ".3f") -> None:
        cells = ["-" if value is None else f"{value:{unit}}" for value in (one, two)]
        ratio = "" if not one or not two else f"{max(one, two) / min(one, two):.2f}"
        out.add_row(name, *cells, ratio)

    row("samples per second", ours["samples_per_second"], theirs["samples_per_second"], ".1f")
    from_features = "samples_per_second_from_features"
    row("  from features", ours[from_features], theirs[from_features], ".1f")
    for phase, seconds in ours["seconds"].items():
        row(f"seconds: {phase}", seconds, theirs["seconds"][phase], ".4f")
    for part, seconds in record["parts"].items():
        row(f"  forward: {part}", seconds, None, ".4f")
    for phase, seconds in ours["cpu_seconds"].items():
        row(f"processor seconds: {phase}", seconds, theirs["cpu_seconds"][phase], ".4f")
    for part, flops in ours["gflop_per_sample"].items():
        row(f"GFLOP a sample: {part}", flops, theirs["gflop_per_sample"][part], ".1f")
    row("share of the matmul ceiling", ours["share_of_ceiling"], theirs["share_of_ceiling"], ".1%")
    row("kept for backward, MiB", ours["saved_mib"], theirs["saved_mib"], ".0f")
    row("peak memory, MiB", ours["peak_memory_mib"], theirs["peak_memory_mib"], ".0f")
    row("waits of the host", ours["host_waits"], theirs["host_waits"], "d")
    largest = record["largest_difference"]
    out.caption = (
        f"{'equal' if record['equal'] else 'DIFFERENT'}: losses differ by {largest['loss']:.1e}, "
        f"gradients by {largest['gradient']:.1e} of their largest element"
    )
    return out
