"""Stage 1 on rendered scenes made on the spot: `blip2-demo --out runs/demo`.

Offline, on a processor, in minutes: shards are rendered, `experiment=stage1_flickr8k_tiny` is
trained on them, and the losses are shown beside what a model that learned nothing would have.
Started again, it goes on where it was.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from blip2_train.errors import UserError

SCENES, SIZE, VOCABULARY = 3000, 64, 400


def demo(out: Path, steps: int) -> dict[str, Any]:
    """Renders, trains and reports.

    Args:
        out: folder of everything that the demo writes.
        steps: optimizer steps.

    Returns:
        The content of `out/report.json`: the last training and validation metrics.

    Raises:
        UserError: rendering or training was refused.
    """
    from blip2_train import prepare, train

    shards = out / "data" / "synthetic"
    scenes = ["synthetic", "--out", str(shards), "--samples", str(SCENES), "--size", str(SIZE)]
    if prepare.main([*scenes, "--tokenizer", str(VOCABULARY)]) != 0:
        raise UserError("the scenes of the demo were not written; the message stands above")
    run = ["experiment=stage1_flickr8k_tiny", "data=synthetic", f"data.root={out / 'data'}"]
    run += [f"text.tokenizer={shards / 'tokenizer'}", f"run.dir={out}", "run.name=stage1"]
    run += [f"vision.image_size={SIZE}", f"trainer.max_steps={steps}", "wandb.mode=disabled"]
    run += ["data.caption=uniform"]  # any of the five captions may be asked for on held-out scenes
    if train.run(run) != 0:
        raise UserError("the training of the demo was refused; the message stands above")
    report = {"steps": steps, **last_metrics(out / "stage1" / "metrics.csv")}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def last_metrics(path: Path) -> dict[str, dict[str, float]]:
    """The last training and the last validation row of a run's metrics.csv."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for part in ("train", "val"):
        row = [row for row in rows if row.get(f"{part}/loss")][-1]
        found[part] = {
            key.removeprefix(f"{part}/"): float(value)
            for key, value in row.items()
            if key.startswith(f"{part}/") and value
        }
    return found


def main() -> None:
    """Entry point of `blip2-demo`."""
    parser = argparse.ArgumentParser(prog="blip2-demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default 600)")
    arguments = parser.parse_args()
    try:
        report = demo(arguments.out, arguments.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    show(report, arguments.out)


def show(report: dict[str, Any], out: Path) -> None:
    """Prints the final table: what was reached, beside chance."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="stage 1 on rendered scenes", title_justify="left")
    for column in ("", "held-out scenes", "training batches", "without learning"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        ("matching accuracy", "itm_accuracy", "0.667"),
        ("  pairs that match", "itm_accuracy_match", "0 or 1"),
        ("  pairs that do not match", "itm_accuracy_no_match", "1 or 0"),
        ("matching loss", "loss_itm", "0.637"),
        ("contrastive loss", "loss_itc", "ln(batch) = 4.159"),
        ("captioning loss", "loss_lm", "ln(vocabulary)"),
        ("image to text, R@1 %", "i2t_r1", "1.1, of 88 images"),
        ("text to image, R@1 %", "t2i_r1", "1.1, of 88 images"),
    )
    for title, key, chance in rows:
        values = [report[part].get(key) for part in ("val", "train")]
        table.add_row(title, *("" if v is None else f"{v:.3f}" for v in values), chance)
    Console().print(table)
    print(f"pictures: {out}/stage1/samples   numbers: {out}/report.json, {out}/stage1/metrics.csv")


if __name__ == "__main__":
    main()
