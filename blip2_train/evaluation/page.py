"""What an evaluation leaves to look at: report.html, samples/, files for a benchmark's server."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2_train.data.atomic import atomic_writer, write_json
from blip2_train.evaluation.report import Section, Table, write_page
from blip2_train.evaluation.samples import draw_sheet
from blip2_train.evaluation.task import Outcome


def write_results(folder: Path, content: Mapping[str, Any], outcome: Outcome) -> None:
    """Writes all but metrics.json.

    Args:
        folder: of the results; it exists.
        content: of metrics.json.
        outcome: of the task.

    Raises:
        OSError: something cannot be written.
    """
    for name, value in outcome.files.items():
        write_json(folder / name, value)
    if outcome.skipped:
        with atomic_writer(folder / "skipped.jsonl") as file:
            file.write("".join(json.dumps(line) + "\n" for line in outcome.skipped).encode())
    title = f"{content['config']['name']['task']} on {content['config']['name']['data']}"
    checkpoint = content["checkpoint"]
    intro = [
        f"{checkpoint['path']} ({checkpoint['kind']}, step {checkpoint['step']}), digest "
        f"{checkpoint['digest'][:16]}",
        "split " + content["config"]["split"] + ": "
        + ", ".join(f"{count:,} {name}" for name, count in outcome.counts.items()),
    ]  # fmt: skip
    intro += [f"{about}: {sentence}" for about, sentence in outcome.notes.items()]
    rows = [
        [name, "-" if value is None else f"{value:.{outcome.digits}f}"]
        for name, value in outcome.metrics.items()
    ]
    sections = [Section("Metrics", tables=[Table(["metric", "value"], rows)])]
    for name, shown in (("best", outcome.best), ("worst", outcome.worst)):
        if shown:
            sections.append(Section(f"The {name}", outcome.text, rows=shown))
            draw_sheet(shown, f"{title}: the {name}", folder / "samples" / f"{name}.png")
    write_page(folder / "report.html", title, intro, sections)
