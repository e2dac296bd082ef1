"""Readers of caption tables (Flickr8k, Flickr30k, folders of images) and of split lists."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from blip2_train.data.annotations import NO_CAPTION, Annotations, Collector
from blip2_train.errors import UserError

NO_SPLIT = "in no split list"


def read_captions(path: Path, split: str) -> Annotations:
    """Read a caption table, whichever of the four known ones it is.

    JSON lines (`{"image", "caption" or "captions", "image_id"?}`), CSV with the columns `image` and
    `caption`, Flickr30k's `image_name| comment_number| comment`, or Flickr's token file
    (`NAME.jpg#k<TAB>caption`).

    Args:
        path: the file; the format is known by its first line that is not blank.
        split: the split of all its images.

    Raises:
        UserError: none of these formats.
    """
    lines = _lines(path)
    first = next((line for _, line in lines if line.strip()), "")
    columns = [column.strip().lower() for column in next(csv.reader([first]), [])]
    if first.lstrip().startswith("{"):
        reader: Callable[[Path, str, list[tuple[int, str]]], Annotations] = _read_jsonl
    elif {"image", "caption"} <= set(columns):
        reader = _read_csv
    elif re.match(r"\s*image_name\s*\|", first):
        reader = _read_bars
    elif "\t" in first and "#" in first:
        reader = _read_token
    else:
        raise UserError(
            f"{path} is no caption table: its first line is {first[:80]!r}, expected the header "
            "`image,caption`, `image_name| comment_number| comment`, JSON lines, or "
            "`NAME.jpg#0<TAB>caption`"
        )
    return reader(path, split, lines)


def _read_token(path: Path, split: str, lines: list[tuple[int, str]]) -> Annotations:
    collector = Collector(path)
    for number, line in lines:
        if not line.strip():
            continue
        key, *captions = line.split("\t")
        if len(captions) != 1:
            # Two records run together on one line: neither caption can be trusted.
            collector.problem(number, f"malformed line: {len(captions)} tabs instead of one")
            continue
        image, _, count = key.rpartition("#")  # the last one: a caption file may have # in names
        if not image or not count.isdecimal():
            collector.problem(number, f"malformed line: key {key[:80]!r} is not NAME#NUMBER")
            continue
        collector.image(image, image, split)
        collector.caption(image, captions[0], number)
    return collector.finish()


def _read_csv(path: Path, split: str, lines: list[tuple[int, str]]) -> Annotations:
    collector = Collector(path)
    rows = _csv_rows("\n".join(line for _, line in lines))
    _, columns = next(rows)
    if isinstance(columns, csv.Error):
        raise UserError(f"{path}: malformed header: {columns}")
    header = [column.strip().lower() for column in columns]
    image_column, caption_column = header.index("image"), header.index("caption")
    for where, row in rows:
        if isinstance(row, csv.Error):
            collector.problem(where, f"malformed line: {row}")
        elif len(row) != len(header):
            collector.problem(where, f"malformed line: {len(row)} fields instead of {len(header)}")
        else:
            image = row[image_column].strip()
            collector.image(image, image, split)
            collector.caption(image, row[caption_column], where)
    return collector.finish()


def _csv_rows(text: str) -> Iterator[tuple[str, list[str] | csv.Error]]:
    """Yield the rows that are not blank, or the error in one, with the lines they are on."""
    # Strict: else a quote that is never closed silently swallows the lines up to the next quote.
    rows = csv.reader(io.StringIO(text), strict=True)
    while True:
        start = rows.line_num + 1
        row: list[str] | csv.Error | None
        try:
            row = next(rows, None)
        except csv.Error as error:  # the reader goes on with the next line
            row = error
        if row is None:
            return
        if row:
            yield (str(start) if start == rows.line_num else f"{start}-{rows.line_num}"), row


def _read_bars(path: Path, split: str, lines: list[tuple[int, str]]) -> Annotations:
    collector = Collector(path)
    for number, line in lines[1:]:
        if not line.strip():
            continue
        fields = line.split("|", maxsplit=2)
        if len(fields) != 3:
            collector.problem(number, f"malformed line: {len(fields)} fields instead of 3")
            continue
        image = fields[0].strip()
        collector.image(image, image, split)
        # The space after the bar belongs to the format, not to the caption.
        collector.caption(image, fields[2].removeprefix(" "), number)
    return collector.finish()


def _read_jsonl(path: Path, split: str, lines: list[tuple[int, str]]) -> Annotations:
    collector = Collector(path)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
                raise ValueError
        except (ValueError, RecursionError):
            collector.problem(number, 'malformed line: not a JSON object with "image"')
            continue
        collector.entry(entry, split, number)
    return collector.finish()


def read_split_lists(paths: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """Read split lists, one image name per line.

    Args:
        paths: (split, file) pairs.

    Returns:
        The split of each image name.

    Raises:
        UserError: a file cannot be read, or one image is in two splits.
    """
    splits: dict[str, str] = {}
    for split, path in paths:
        for number, line in _lines(path):
            name = line.strip()
            if name and splits.setdefault(name, split) != split:
                raise UserError(f"{path}, line {number}: {name} is in split {splits[name]} already")
    return splits


def apply_splits(annotations: Annotations, splits: Mapping[str, str]) -> Annotations:
    """Give each record the split that the lists say; what is not in both becomes a problem."""
    records = [
        replace(record, split=splits[record.image])
        for record in annotations.records
        if record.image in splits
    ]
    listed = {record.image for record in annotations.records}
    problems = annotations.problems + [
        (record.image, NO_SPLIT) for record in annotations.records if record.image not in splits
    ]
    known = listed | {where for where, _ in annotations.problems}
    problems += [
        (name, f"{NO_CAPTION}: in the list of {split}")
        for name, split in splits.items()
        if name not in known
    ]
    return Annotations(records, problems)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a UTF-8 text file, without their ends."""
    return list(_decoded_lines(path))


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            # Not str.splitlines: captions may hold form feeds and Unicode line separators.
            yield number, line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}, is not UTF-8: convert the file") from None
