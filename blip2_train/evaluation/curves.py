"""Curves of a run, from its metrics.csv."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from blip2_train.evaluation.report import Chart, Series

# Which metrics share a chart: {title: names without their train/ or val/}. Losses come first.
TOGETHER = {
    "matching accuracy": ("itm_accuracy", "itm_accuracy_match", "itm_accuracy_no_match"),
    "retrieval R@1, %": ("i2t_r1", "t2i_r1", "itm_i2t_r1", "itm_t2i_r1"),
    "loss with which image, nats per token": ("lm_right", "lm_shuffled", "lm_blank", "lm_alone"),
    "grounding gap, nats per token": ("grounding_gap",),
    "perplexity": ("perplexity",),
}
OTHERS = {
    "learning rate": "lr",
    "gradient norm": "gradient_norm",
    "temperature": "temp",
    "samples per second": "samples_per_second",
}
LOSSES = {
    "loss_itc": "contrast (ITC) loss, nats",
    "loss_itm": "matching (ITM) loss, nats",
    "loss_lm": "captioning (LM) loss, nats per token",
}
# What a model that learned nothing has.
CHANCE = {"matching accuracy": {"chance": 2 / 3}, "grounding gap, nats per token": {"blind": 0.0}}


def read_metrics(path: Path) -> dict[str, Series]:
    """Columns of a metrics.csv, {name: values with their steps}; none where there is no file."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, text in row.items():
                    if name != "step" and text:
                        steps, values = columns.setdefault(name, ([], []))
                        steps.append(float(row["step"]))
                        values.append(float(text))
    return {
        name: Series(name, steps, values, dashed=name.startswith("val/"))
        for name, (steps, values) in columns.items()
    }


def run_charts(
    metrics: Mapping[str, Series], levels: Mapping[str, Mapping[str, float]]
) -> list[Chart]:
    """Losses beside their chance levels, then what validation measured, then how training went.

    Args:
        metrics: from `read_metrics`.
        levels: {"loss_itc": {"chance": nats, "floor": nats}, ...}.
    """
    charts = []
    for name, title in LOSSES.items():
        shown = {k: v for k, v in levels.get(name, {}).items() if v > 0}
        charts += _chart(title, {"train": f"train/{name}", "val": f"val/{name}"}, metrics, shown)
    for title, names in TOGETHER.items():
        kinds = ("train", "val") if title == "matching accuracy" else ("val",)
        wanted = {f"{kind} {name}": f"{kind}/{name}" for kind in kinds for name in names}
        if title == "matching accuracy":  # both kinds of each class would be a tangle
            wanted = {k: v for k, v in wanted.items() if v.startswith("val/") or v[6:] == names[0]}
        charts += _chart(title, wanted, metrics, CHANCE.get(title, {}))
    for title, name in OTHERS.items():
        charts += _chart(title, {title: name}, metrics, {})
    return charts


def _chart(
    title: str,
    wanted: Mapping[str, str],
    metrics: Mapping[str, Series],
    levels: Mapping[str, float],
) -> list[Chart]:
    series: Sequence[Series] = [
        Series(label, metrics[name].steps, metrics[name].values, metrics[name].dashed)
        for label, name in wanted.items()
        if name in metrics
    ]
    return [Chart(title, series, dict(levels))] if series else []
