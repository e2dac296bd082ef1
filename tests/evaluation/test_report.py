"""The HTML report: one file, nothing from a network, right words marked, curves of a run."""

import csv
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from blip2_train.evaluation.curves import read_metrics, run_charts
from blip2_train.evaluation.report import (
    Chart,
    Picture,
    Section,
    Series,
    Table,
    averaged,
    data_uri,
    draw,
    marked,
    write_page,
)
from blip2_train.evaluation.samples import Row


class Reader(HTMLParser):
    """Collects sources, links and text; complains of tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("img", "meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(tmp_path: Path) -> tuple[str, Reader]:
    red = Image.new("RGB", (48, 48), "red")
    row = Row(
        red,
        {"model": "a green square", "nobody": ""},
        ["a <b>red</b> square", "something & red"],
        [("text one", True), ("text two", False)],
        "query",
        [(red, True), (Image.new("RGB", (300, 200), "blue"), False)],
        red,
        "a hard text",
    )
    chart = Chart("loss, nats", [Series("train", [1, 2], [3.0, 2.0])], {"chance": 4.0})
    sections = [
        Section("One", "how to read it", charts=[chart], tables=[Table(["", "a"], [["b", "1"]])]),
        Section("Two", rows=[row], pictures=[[Picture(red, "query 1")]]),
    ]
    write_page(tmp_path / "report.html", "A <title>", ["intro"], sections)
    text = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    text, reader = page(tmp_path)
    assert not reader.open
    assert reader.sources and all(s.startswith(("data:image/", "#")) for s in reader.sources)
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    for words in ("A <title>", "intro", "how to read it", "query 1", "a hard text", "(nothing)"):
        assert words in reader.text, words
    assert "<b>red" not in text  # captions of strangers are text, never markup
    assert 'name="viewport"' in text


def test_the_same_page_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert page(tmp_path / "a")[0] == page(tmp_path / "b")[0]


def test_ids_of_two_charts_do_not_meet() -> None:
    ids = [
        set(re.findall(r'id="([^"]+)"', draw(Chart(title, [Series("a", [1, 2], [3, 4])]))))
        for title in ("one", "two")
    ]
    paths = [{i for i in found if re.fullmatch(r"[pm][0-9a-f]{10}", i)} for found in ids]
    assert paths[0] and not paths[0] & paths[1]


def test_words_are_marked_by_all_true_captions() -> None:
    truth = ["A small red star, on pink.", "the star is small"]
    assert marked("the RED star on blue", truth) == [
        ("the", True), ("RED", True), ("star", True), ("on", True), ("blue", False),
    ]  # fmt: skip
    assert marked("", truth) == []


def test_large_pictures_are_shrunk() -> None:
    small, large = (data_uri(Image.new("RGB", (side, side))) for side in (48, 2000))
    assert small.startswith("data:image/png") and large.startswith("data:image/jpeg")
    assert len(large) < 10_000


def test_long_curves_are_averaged_and_gaps_left_out() -> None:
    steps, values = averaged(range(1000), [float(i) for i in range(1000)], points=100)
    assert len(steps) == 100 and steps[0] == values[0] == 4.5
    assert averaged([1, 2, 3], [1.0, math.nan, 3.0]) == ([1, 3], [1.0, 3.0])
    assert averaged([], []) == ([], [])


def test_charts_of_a_run(tmp_path: Path) -> None:
    columns = ["step", "train/loss_itc", "val/loss_itc", "val/i2t_r1", "lr", "train/loss_itm"]
    rows = [[10, 4.0, "", "", 1e-3, 0.7], [20, 3.0, 3.5, 12.5, 1e-3, 0.6]]
    with (tmp_path / "metrics.csv").open("w") as file:
        csv.writer(file).writerows([columns, *rows])
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["val/loss_itc"].steps == [20] and metrics["val/loss_itc"].dashed
    charts = run_charts(metrics, {"loss_itc": {"chance": 4.85, "floor": 0.0}})
    titles = [chart.title for chart in charts]
    assert titles[:2] == ["contrast (ITC) loss, nats", "matching (ITM) loss, nats"]
    assert "retrieval R@1, %" in titles and "learning rate" in titles
    assert charts[0].levels == {"chance": 4.85}  # a floor of zero is no news
    assert [series.name for series in charts[0].series] == ["train", "val"]
    assert read_metrics(tmp_path / "none.csv") == {}


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], []])
def test_charts_of_little(values: list[float]) -> None:
    assert draw(Chart("t", [Series("a", range(len(values)), values)])).startswith("<svg")
