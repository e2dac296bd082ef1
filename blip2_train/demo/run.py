"""The whole recipe on a laptop, offline: `blip2-demo`, or `make demo`.

    blip2-demo                     rendered scenes with one object, about 14 minutes on two cores
    blip2-demo --long              two objects and how they stand to each other, far longer
    blip2-demo --quick             a minute: shows that everything runs, learns nothing

Shards, an image tower, a language model, stage 1, stage 2, stage 2 without stage 1, evaluation on
scenes that were never rendered in training: the commands of real runs, one after the other. The
same command again goes on where it was stopped.
"""

import argparse
import gc
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2_train.demo.plan import PLANS, RUNS, Plan, render_command, train_command
from blip2_train.errors import UserError

SPLITS = ("novel", "compositional")
# How long each part takes, relative to the others; for the remaining time.
WEIGHTS = {"shards": 20, "clip": 200, "lm": 55, "stage1": 295, "stage2": 118, "evaluation": 33}


def demo(out: Path, kind: str = "", seed: int = 0) -> dict[str, Any]:
    """Renders, trains, evaluates and reports.

    Args:
        out: folder of everything that the demo writes.
        kind: "" or one of the other `PLANS`.
        seed: of scenes, weights and everything else that is random.

    Returns:
        The content of `out/report.json`.

    Raises:
        UserError: a part was refused; its message stands above.
    """
    from blip2_train import prepare, train

    plan = PLANS[kind]
    shards = out / "data" / "synthetic"
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(out, ["shards", *RUNS, "evaluation"])
    with progress.part("shards", f"{plan.samples:,} pictures of scenes with five captions each"):
        if prepare.main(render_command(plan, shards, seed)) != 0:
            raise UserError(f"the scenes were not written to {shards}; the message stands above")
    for run, purpose in RUNS.items():
        with progress.part(run, purpose):
            if train.run(train_command(plan, run, out, seed)) != 0:
                raise UserError(f"the training of {out / run} was refused; see above")
            gc.collect()  # loader processes of one training must be gone before the next forks its
    with progress.part("evaluation", "on scenes that were never rendered in training"):
        return report(out, plan, kind, seed, shards, progress)


def report(
    out: Path, plan: Plan, kind: str, seed: int, shards: Path, progress: "Progress"
) -> dict[str, Any]:
    """Measures everything and writes the reports."""
    import torch
    from tqdm import tqdm

    from blip2_train.data.atomic import write_json
    from blip2_train.data.synthetic import WORLDS
    from blip2_train.demo.measure import measure
    from blip2_train.demo.page import results, write_report

    world = WORLDS[plan.objects]
    total = 4 * len(SPLITS)  # four of the runs know images
    with tqdm(total=total, unit="part", disable=None) as bar:
        found = measure(out, shards, world, SPLITS, seed, bar.update)
    settings = {
        "kind": kind or "default",
        "seed": seed,
        "objects": plan.objects,
        "steps": plan.steps,
    }
    content = results(world, found, settings)
    seconds = progress.seconds()
    content["seconds"] = {**seconds, "threads": torch.get_num_threads()}
    minutes = sum(seconds.values()) / 60
    write_report(out, world, found, content, minutes)
    write_json(out / "report.json", content)
    return content


class Progress:
    """Says which part runs and how long the rest may take; remembers how long each part took.

    Args:
        out: folder of the demo; `progress.json` in it holds the seconds, over restarts.
        parts: in order.
    """

    def __init__(self, out: Path, parts: list[str]) -> None:
        self.path = out / "progress.json"
        self.parts = parts
        self.spent: dict[str, float] = {}
        if self.path.is_file():
            self.spent = json.loads(self.path.read_text())
        self.began = time.monotonic()
        self.running = ""

    @contextmanager
    def part(self, name: str, purpose: str) -> Iterator[None]:
        """Announces a part and measures it."""
        number = self.parts.index(name) + 1
        print(f"\n[{number}/{len(self.parts)}] {name}: {purpose}{self._left(name)}", flush=True)
        self.began, self.running = time.monotonic(), name
        try:
            yield
        finally:
            self.spent = self.seconds()
            self.path.write_text(json.dumps(self.spent) + "\n")
            self.running = ""

    def seconds(self) -> dict[str, float]:
        """Spent on each part so far, the running one included."""
        if not self.running:
            return self.spent
        own = self.spent.get(self.running, 0.0) + time.monotonic() - self.began
        return self.spent | {self.running: round(own, 1)}

    def _left(self, name: str) -> str:
        before = self.parts[: self.parts.index(name)]
        weights = {part: WEIGHTS[part.split("_")[0]] for part in self.parts}
        done = sum(weights[part] for part in before)
        if done < WEIGHTS["shards"] + WEIGHTS["clip"]:  # shards alone say little
            return ""
        pace = sum(self.spent.get(part, 0.0) for part in before) / done
        left = pace * sum(weights[part] for part in self.parts[len(before) :]) / 60
        return f" (about {max(1, round(left))} min left in all)"


def show(content: dict[str, Any], out: Path) -> None:
    """Prints the final table: what was reached, beside chance."""
    from rich.console import Console
    from rich.table import Table

    from blip2_train.data.synthetic import WORLDS
    from blip2_train.demo.page import table

    found = table(WORLDS[content["settings"]["objects"]], content)
    shown = Table(title="held-out scenes", title_justify="left")
    for number, column in enumerate(found.header):
        shown.add_column(column, justify="right" if number else "left")
    for row in found.rows:
        shown.add_row(*row)
    Console().print(shown)
    minutes = sum(v for k, v in content["seconds"].items() if k != "threads") / 60
    print(f"{minutes:.1f} minutes. Look at {out / 'report.html'}; numbers: {out}/report.json")


def log_to(path: Path) -> None:
    """Trainings write their log to a file; to the screen too where it shows no progress bars."""
    screen = logging.StreamHandler(sys.stdout)
    screen.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    form = "%(asctime)s %(message)s"
    logging.basicConfig(
        format=form, datefmt="%H:%M:%S", handlers=[screen, logging.FileHandler(path)]
    )


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def main() -> None:
    """Entry point of `blip2-demo`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("blip2-demo", description=__doc__, formatter_class=formatter)
    kinds = parser.add_mutually_exclusive_group()
    for kind, text in (("quick", "a minute, learns nothing"), ("long", "two objects, far longer")):
        kinds.add_argument(
            f"--{kind}", dest="kind", action="store_const", const=kind, default="", help=text
        )
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random (0)")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (runs/demo, runs/demo-KIND)"
    )
    arguments = parser.parse_args()
    name = f"demo-{arguments.kind}" if arguments.kind else "demo"
    out = arguments.out or Path("runs") / name
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out} is not a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        log_to(out / "demo.log")
        content = demo(out, arguments.kind, arguments.seed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: the same command again goes on", file=sys.stderr)
        sys.exit(130)
    show(content, out)


if __name__ == "__main__":
    main()
