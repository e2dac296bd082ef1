"""A report as one HTML file: no request to any network, readable on a phone.

A page is sections, a section is blocks: charts (drawn by matplotlib as SVG), tables, samples with
what models say of them, and pictures. `report.html.j2` lays them out.
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from blip2_train.data.atomic import atomic_writer
from blip2_train.evaluation.samples import Row

THUMB = 160  # pixels; larger pictures are shrunk to it
POINTS = 400  # of a curve; longer ones are averaged
COLOURS = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490")


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: in the legend.
        steps: where it has values.
        values: as many.
        dashed: drawn as a dashed line with dots (validation).
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over optimizer steps, and levels to compare them with.

    Attributes:
        title: what is drawn, with its unit.
        series: the curves.
        levels: {name: value}, drawn as thin horizontal lines (chance, floor).
    """

    title: str
    series: Sequence[Series]
    levels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: of the columns; the first one names the rows.
        rows: of text.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture and what stands below it."""

    image: Image.Image
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: a paragraph that says how to read it.
        charts: drawn side by side where there is room.
        tables: below each other.
        rows: images and what is said of them, one card each.
        pictures: those of a list side by side, the lists below each other.
    """

    title: str
    text: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    rows: Sequence[Row] = ()
    pictures: Sequence[Sequence[Picture]] = ()


def write_page(path: Path, title: str, intro: Sequence[str], sections: Sequence[Section]) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: of the HTML file; its folder exists.
        title: of the page.
        intro: paragraphs below the title.
        sections: in order; the page begins with links to them.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "marked": marked, "svg": draw}
    template = environment.get_template("report.html.j2")
    html = template.render(title=title, intro=intro, sections=sections)
    with atomic_writer(path) as file:
        file.write(html.encode())


def marked(caption: str, truth: Sequence[str]) -> list[tuple[str, bool]]:
    """The words of a caption, and whether one of the image's true captions has them."""
    known = {word for caption in truth for word in _letters(caption)}
    return [(word, set(_letters(word)) <= known) for word in caption.split()]


def _letters(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def data_uri(image: Image.Image) -> str:
    """The image as text that a page can hold; PNG where it is small, else a JPEG thumbnail."""
    image = image.convert("RGB")
    small = max(image.size) <= THUMB
    if not small:
        image.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw(chart: Chart) -> Any:
    """The chart as an SVG element; the same chart always gives the same text."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    # Text stays text: smaller, and in the page's own font. The salt makes ids of one chart differ
    # from those of the others on the page.
    options: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.title,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(4.4, 2.9))
        axes = figure.add_axes((0.12, 0.15, 0.86, 0.75))  # a layout engine would draw it twice
        axes.set_title(chart.title, fontsize=10, loc="left")
        for number, series in enumerate(chart.series):
            steps, values = averaged(series.steps, series.values)
            axes.plot(
                steps,
                values,
                color=COLOURS[number % len(COLOURS)],
                linewidth=1.4,
                linestyle="--" if series.dashed else "-",
                marker="o" if series.dashed or len(steps) < 3 else None,
                markersize=3,
                label=series.name,
            )
        for name, value in chart.levels.items():
            axes.axhline(value, color="#777777", linewidth=0.8, linestyle=":")
            axes.annotate(
                name,
                (1.0, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color="#555555",
            )
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.08)
        if len(chart.series) > 1:
            axes.legend(fontsize=8, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])


def averaged(
    steps: Sequence[float], values: Sequence[float], points: int = POINTS
) -> tuple[list[float], list[float]]:
    """A curve of at most `points` points: the means of equal parts; gaps (NaN) are left out."""
    pairs = [pair for pair in zip(steps, values, strict=True) if math.isfinite(pair[1])]
    size = max(1, math.ceil(len(pairs) / points))
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    means = [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in parts]
    return [mean[0] for mean in means], [mean[1] for mean in means]
