"""What models say of images and find for them, and pictures of it: one sheet per validation."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

THUMB = 160  # pixels
GAP = 12
COLUMN = 46  # characters of a text column
LINE = 17  # pixels
Item = TypeVar("Item")
INK, FAINT, RIGHT, WRONG = "#1a1a1a", "#6b6b6b", "#1a7f37", "#b3261e"


@dataclass
class Row:
    """One image of a sheet, or of a page (`report`).

    Attributes:
        image: as the model saw it.
        said: {who: caption}.
        truth: captions that people gave it; none: nothing is marked as right or wrong.
        texts: (retrieved text, whether it belongs to the image), best first.
        query: the text whose retrieved images are shown.
        images: (retrieved image, whether it is the text's), best first.
        negative_image: that matching was shown with the image's text, None for none.
        negative_text: that matching was shown with the image.
        notes: {what: text}, as it stands, such as the rank of the right one.
    """

    image: Image.Image
    said: dict[str, str]
    truth: list[str]
    texts: list[tuple[str, bool]] = field(default_factory=list)
    query: str = ""
    images: list[tuple[Image.Image, bool]] = field(default_factory=list)
    negative_image: Image.Image | None = None
    negative_text: str = ""
    notes: dict[str, str] = field(default_factory=dict)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many of them, evenly spaced."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def draw_sheet(rows: list[Row], title: str, path: Path) -> None:
    """Draws the rows below each other and writes a PNG."""
    font = ImageFont.load_default(size=13)
    bold = ImageFont.load_default(size=15)
    column = COLUMN * 7
    found = max((len(row.images) for row in rows), default=0)
    width = GAP + THUMB + GAP + column + GAP + max(column, found * (THUMB + GAP)) + GAP
    height = THUMB + 4 * GAP
    sheet = Image.new("RGB", (width, 3 * GAP + LINE + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, INK, bold)
    for number, row in enumerate(rows):
        top = 3 * GAP + LINE + number * height
        draw.line([(GAP, top - GAP), (width - GAP, top - GAP)], "#dddddd")
        sheet.paste(_fit(row.image), (GAP, top))
        x, y = GAP + THUMB + GAP, top
        for who, caption in row.said.items():
            y = _text(draw, (x, y), f"{who}: {caption or '(nothing)'}", INK, bold)
        for name, text in row.notes.items():
            y = _text(draw, (x, y + 2), f"{name}: {text}", FAINT, font, lines=1)
        for truth in row.truth[:1]:
            y = _text(draw, (x, y + 2), f"truth: {truth}", FAINT, font)
        for text, right in row.texts[: max(0, (top + THUMB + GAP - y) // LINE)]:
            mark = "+" if right else "-"
            y = _text(draw, (x, y + 2), f"{mark} {text}", RIGHT if right else WRONG, font, lines=1)
        x += column + GAP
        if row.query:
            _text(draw, (x, top), f"finds for: {row.query}", FAINT, font, lines=1)
        for image, right in row.images:
            thumb = _fit(image)
            sheet.paste(thumb, (x, top + LINE + 4))
            box = [x - 2, top + LINE + 2, x + thumb.width + 1, top + LINE + 5 + thumb.height]
            draw.rectangle(box, outline=RIGHT if right else WRONG, width=2)
            x += THUMB + GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _fit(image: Image.Image) -> Image.Image:
    copy = image.convert("RGB").resize((THUMB, THUMB), Image.Resampling.BICUBIC)
    return copy


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    lines: int = 2,
) -> int:
    x, y = place
    for line in textwrap.wrap(text, COLUMN, max_lines=lines, placeholder=" ..."):
        draw.text((x, y), line, colour, font)
        y += LINE
    return y
