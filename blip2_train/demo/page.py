"""The demo's results: one table, report.json, report.html and the pictures beside it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from blip2_train.data.synthetic import World
from blip2_train.demo.measure import RERANKED, Measured
from blip2_train.demo.plan import WITHOUT
from blip2_train.evaluation.attention import overlay
from blip2_train.evaluation.curves import read_metrics, run_charts
from blip2_train.evaluation.report import (
    Chart,
    Picture,
    Section,
    Series,
    Table,
    write_page,
)
from blip2_train.evaluation.samples import Row, draw_sheet
from blip2_train.evaluation.scenes import chance
from blip2_train.training.loading import load_run, loss_levels

ITM_CHANCE = 100 * 2 / 3  # by always saying no
NAMES = {
    "clip": "tower",
    "lm": "language model",
    "stage1": "stage 1",
    "stage2": "stage 2",
    WITHOUT: "stage 2 without stage 1",
}


def results(
    world: World, found: Mapping[str, Measured], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of report.json, but for the seconds it took."""
    return {
        "settings": dict(settings),
        "chance": chance(world),
        "images": {split: len(measured.images) for split, measured in found.items()},
        "splits": {split: measured.numbers for split, measured in found.items()},
    }


def table(world: World, report: Mapping[str, Any]) -> Table:
    """Every number that is claimed, with chance beside it."""
    splits = report["splits"]
    lucky = report["chance"]
    rows: list[list[str]] = []

    def heading(text: str) -> None:
        rows.append([text, *("" for _ in splits), ""])

    def add(label: str, values: Iterable[float | None], chance: str, form: str = "{:.1f}") -> None:
        shown = ("" if value is None else form.format(value) for value in values)
        rows.append([f"\u2003{label.replace('_', ' ')}", *shown, chance])

    def accuracies(title: str, key: str, of_two: bool = False, more: tuple[str, ...] = ()) -> None:
        heading(title)
        for name in (*world.attributes, *more):
            of = 50.0 if of_two else lucky[name]
            level = f"{of:.2g}" if of < 1 else f"{of:.1f}"
            add(name, [split[key][name] for split in splits.values()], level)

    accuracies("stage 2's captions, right %", "stage2_captions", more=("everything",))
    heading("the same where a pair is unseen")
    for pair in world.unseen:
        for name in pair:
            values = [split["stage2_unseen"].get(name) for split in splits.values()]
            other = pair[1] if name == pair[0] else pair[0]
            add(f"{name} (with {other})", values, f"{lucky[name]:.1f}")
    title = "captions of stage 2 without stage 1"
    accuracies(title, f"{WITHOUT}_captions", more=("everything",))
    accuracies("stage 1's captions", "stage1_captions", more=("everything",))
    accuracies("tower: best of all values, %", "tower_choice")
    accuracies("ITC: best of all values, %", "itc_choice")
    accuracies("ITC: truth before foil, %", "itc_foil", of_two=True)
    accuracies("ITM: truth before foil, %", "itm_foil", of_two=True)
    heading("stage 1, %")
    smallest = 100.0 / min(report["images"].values())
    for label, key in (
        ("image to text R@1, ITC", "i2t_r1"),
        ("text to image R@1, ITC", "t2i_r1"),
        (f"image to text, top {RERANKED} by ITM", "itm_i2t_r1"),
        (f"text to image, top {RERANKED} by ITM", "itm_t2i_r1"),
    ):
        add(label, [s["stage1"][key] for s in splits.values()], f"{smallest:.1f}")
    accuracy = [100 * s["stage1"]["itm_accuracy"] for s in splits.values()]
    add("ITM accuracy, hard negatives", accuracy, f"{ITM_CHANCE:.1f}")
    for run in ("stage2", WITHOUT):
        heading(f"{NAMES[run]}, nats/token")
        losses = [s[run] for s in splits.values()]
        seeing, blind = (f"{losses[0][key]:.2f} at best" for key in ("seeing", "blind"))
        for label, key, level in (
            ("loss, right image", "lm_right", seeing),
            ("loss, language model alone", "lm_alone", blind),
            ("loss, another image", "lm_shuffled", ""),
            ("grounding gap", "grounding_gap", "0"),
        ):
            add(label, [x[key] for x in losses], level, "{:.3f}")
    return Table(["", *splits, "chance"], rows)


def write_report(
    out: Path,
    world: World,
    found: Mapping[str, Measured],
    report: Mapping[str, Any],
    minutes: float,
) -> None:
    """Writes `out/report.html` and the pictures."""
    first = next(iter(found))
    measured = found[first]
    numbers = report["splits"][first]
    said, alone = numbers["stage2_captions"], numbers["stage2"]
    intro = [
        f"BLIP-2 pre-trained from nothing on rendered scenes in {minutes:.0f} minutes on this "
        "machine: an image tower, a language model, stage 1 and stage 2, with the modules, "
        "configurations and commands of real runs.",
        f"On scenes that were never rendered in training, {said['everything']:.1f} % of the "
        f"captions of stage 2 are right in every attribute (by guessing: "
        f"{report['chance']['everything']:.2g} %). The right image saves "
        f"{alone['grounding_gap']:.2f} nats per token against another one.",
    ]
    captioned = _captioned(world, measured)
    of_what = "the image" if world.objects == 1 else "one object or the other"
    sections = [
        Section(
            "Captions",
            "Held-out scenes and what each stage says of them. Green words are true of "
            f"{of_what}; underlined ones are not.",
            rows=captioned,
        ),
        Section(
            "Losses",
            "Solid: training batches; dashed: validation. Dotted lines: a model that learned "
            "nothing (chance), and the lowest loss there is (floor).",
            charts=_charts(out, numbers),
        ),
        Section(
            "All numbers",
            "novel: scenes never rendered in training. compositional: scenes with pairs of values "
            "that no training scene has together, such as this colour at that place. A foil is the "
            "true caption with a single attribute changed: harder than retrieval suggests.",
            tables=[table(world, report)],
        ),
        Section(
            "Where the queries look",
            "Cross-attention of the last layer, one picture per query, mean over heads: dark where "
            "it does not look. The tower has spread what it sees over its tokens before.",
            pictures=_attention(measured),
        ),
        Section(
            "Hard negatives and retrieval",
            "For each image the text, and for its text the image, that matching is given to tell "
            "apart: drawn by similarity within held-out batches as in training. And what contrast "
            "finds, best first; green if it belongs to the image.",
            rows=[replace(row, said={}) for row in measured.rows],
        ),
    ]
    write_page(out / "report.html", "blip2-train: the demo", intro, sections)
    draw_sheet(measured.rows, f"stage 1 on {first} scenes", out / "stage1.png")
    only = [replace(row, said={"says": row.said[NAMES["stage2"]]}) for row in captioned]
    draw_sheet(only, f"stage 2 on {first} scenes", out / "stage2.png")


def _captioned(world: World, measured: Measured, count: int = 12) -> list[Row]:
    images = measured.images
    rows = []
    for number in range(min(count, len(images))):
        place = number * len(images) // min(count, len(images))
        item = images[place]
        picture = Image.fromarray(item.image.permute(1, 2, 0).numpy())
        said = {NAMES[run]: captions[place] for run, captions in measured.captions.items()}
        rows.append(Row(picture, said, _paraphrases(world, item.captions[0])))
    return rows


def _paraphrases(world: World, caption: str) -> list[str]:
    """The caption and all others that are as true."""
    found = world.read(caption)
    assert found is not None, caption
    others = [world.caption(found[0], number) for number in range(len(world.captions))]
    return [caption, *others]


def _attention(measured: Measured, count: int = 4) -> list[list[Picture]]:
    return [
        [Picture(row.image, row.truth[0])]
        + [
            Picture(overlay(row.image, weights), f"query {number}")
            for number, weights in enumerate(maps, start=1)
        ]
        for row, maps in list(zip(measured.rows, measured.attention, strict=True))[:count]
    ]


def _charts(out: Path, numbers: Mapping[str, Mapping[str, float]]) -> list[Chart]:
    """Losses of all runs; stage 2 with and without stage 1 in one chart."""
    charts = []
    losses = ("loss_itc", "loss_itm", "loss_lm")
    for run in ("clip", "lm", "stage1"):
        metrics = read_metrics(out / run / "metrics.csv")
        levels = {k: level._asdict() for k, level in loss_levels(*load_run(out / run)).items()}
        own = {k: v for k, v in metrics.items() if k.split("/")[-1] in (*losses, "itm_accuracy")}
        for chart in run_charts(own, levels):
            charts.append(Chart(f"{NAMES[run]}: {chart.title}", chart.series, chart.levels))
    series = []
    for run in ("stage2", WITHOUT):
        metrics = read_metrics(out / run / "metrics.csv")
        for kind in ("train", "val"):
            curve = metrics[f"{kind}/loss_lm"]
            name = f"{kind}{'' if run == 'stage2' else ', without stage 1'}"
            series.append(Series(name, curve.steps, curve.values, curve.dashed))
    title = f"{NAMES['stage2']}: captioning (LM) loss, nats per token"
    reached = {"without looking": numbers["stage2"]["lm_alone"]}
    reached |= {"best possible": numbers["stage2"]["seeing"]}
    charts.append(Chart(title, series, reached))
    return charts
