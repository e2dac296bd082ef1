"""Ours beside the textbook step: how they compare, as numbers and as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

OURS, TEXTBOOK = "ours", "textbook"
SIDES = (OURS, TEXTBOOK)

Row = tuple[str, float | None, float | None, str]


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
        cpu = [
            sum(seconds for part, seconds in side["cpu_seconds"].items() if part != "tower")
            for side in (theirs, ours)
        ]
        ratios["cpu_speedup_from_features"] = cpu[0] / cpu[1]
    return ratios


def table(record: dict[str, Any]) -> Table:
    """A record of `step.run_steps` to look at."""
    shapes, ours, theirs = record["shapes"], record["ours"], record["baseline"]
    rows: list[Row] = []

    def row(name: str, key: str, unit: str) -> None:
        rows.append((name, ours[key], theirs[key], unit))

    row("samples per second", "samples_per_second", ".1f")
    row("  from features", "samples_per_second_from_features", ".1f")
    for phase, seconds in ours["seconds"].items():
        rows.append((f"seconds: {phase}", seconds, theirs["seconds"][phase], ".4f"))
    for part, seconds in record.get("parts", {}).items():
        rows.append((f"  forward: {part}", seconds, None, ".4f"))
    for phase, seconds in ours["cpu_seconds"].items():
        rows.append((f"processor seconds: {phase}", seconds, theirs["cpu_seconds"][phase], ".4f"))
    for part, flops in ours["gflop_per_sample"].items():
        rows.append((f"GFLOP a sample: {part}", flops, theirs["gflop_per_sample"][part], ".1f"))
    row("share of the matmul ceiling", "share_of_ceiling", ".1%")
    row("kept for backward, MiB", "saved_mib", ".0f")
    row("peak memory, MiB", "peak_memory_mib", ".0f")
    row("waits of the host", "host_waits", "d")
    largest = record["largest_difference"]
    return comparison(
        f"{record['name']}: {shapes['batch']} samples, {record['device']}, {shapes['precision']}",
        rows,
        f"{'equal' if record['equal'] else 'DIFFERENT'}: losses differ by {largest['loss']:.1e}, "
        f"gradients by {largest['gradient']:.1e} of their largest element",
    )


def comparison(title: str, rows: list[Row], caption: str) -> Table:
    """Ours beside the textbook's.

    Args:
        title: above the table.
        rows: name, ours, the textbook's (None where there is none), format.
        caption: below.
    """
    out = Table(title=title, title_justify="left", caption=caption)
    for column in ("", OURS, TEXTBOOK, "ratio"):
        out.add_column(column, justify="right" if column else "left")
    for name, one, two, unit in rows:
        cells = ["-" if value is None else f"{value:{unit}}" for value in (one, two)]
        ratio = "" if not one or not two else f"{max(one, two) / min(one, two):.2f}"
        out.add_row(name, *cells, ratio)
    return out
