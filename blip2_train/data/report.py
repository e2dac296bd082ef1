"""What blip2-prepare says at its end: report.json for programs, a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip2_train.data.plan import PlannedShard
from blip2_train.data.writer import Written


def make_report(
    command: str,
    shards: list[PlannedShard],
    written: list[Written],
    problems: Iterable[tuple[str, str]],
    seconds: float,
) -> dict[str, Any]:
    """Count what was written and list all that was not.

    Args:
        command: the command line.
        shards: the plan.
        written: what came of each shard; empty if nothing was written.
        problems: (where, reason) of what the annotations did not give.
        seconds: that the run took.

    Returns:
        The content of report.json.
    """
    splits: dict[str, dict[str, int]] = {}
    skipped = list(problems)
    for shard in shards:
        counts = splits.setdefault(
            shard.split, {"records": 0, "samples": 0, "captions": 0, "shards": 0}
        )
        counts["records"] += len(shard.items)
        if not written:  # the run failed before: say what was known then
            skipped += [(item.file, item.skip) for item in shard.items if item.skip]
    for shard, result in zip(shards, written, strict=False):
        counts = splits[shard.split]
        counts["captions"] += result.captions
        if result.questions:
            counts["questions"] = counts.get("questions", 0) + result.questions
        skipped += result.skipped
        if result.shard is not None:
            counts["samples"] += result.shard.samples
            counts["shards"] += 1
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "splits": splits,
        "reasons": dict(Counter(reason.split(":")[0] for _, reason in skipped).most_common()),
        "skipped": [{"file": file, "reason": reason} for file, reason in skipped],
    }


def print_report(report: dict[str, Any], folder: Path) -> None:
    """Print the final table, and what was skipped by reason with an example each."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    columns = ["records", "samples", "captions", "shards"]
    if any("questions" in counts for counts in report["splits"].values()):
        columns.insert(3, "questions")
    table = Table("split", title=str(folder), title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for split, counts in report["splits"].items():
        table.add_row(split, *(f"{counts.get(column, 0):,}" for column in columns))
    console.print(table)
    if report["skipped"]:
        reasons = Table("skipped because", "count", "for example")
        for reason, count in report["reasons"].items():
            example = next(
                entry["file"]
                for entry in report["skipped"]
                if entry["reason"].split(":")[0] == reason
            )
            reasons.add_row(reason, f"{count:,}", example)
        console.print(reasons)
        console.print(f"all of them are listed in {folder / 'report.json'}", soft_wrap=True)
