"""Count what an image file is made of: very many tiny parts keep a decoder busy for hours.

A JPEG may repeat a scan of a few bytes as often as it likes, each time over all pixels; comments
and EXIF blocks of one byte are joined one by one. No size limit notices that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_PARTS = 20_000  # an honest PNG of 64 MiB has 8,000
# A JPEG may have 2,000 segments (EXIF is copied with each of its) or 200 scans (ten are usual).
SEGMENT_PARTS, SCAN_PARTS = 10, 100

# The next JPEG marker with a segment behind it, or the end. Among the pixels 0xFF is followed by
# zero or a restart marker.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_SCAN, _END = 0xDA, 0xD9


def has_too_many_parts(data: bytes) -> bool:
    """Whether a JPEG, PNG or GIF file has more parts than decoding it safely allows.

    Looks no further than a decoder of the first frame; damaged files are left to the decoder.
    """
    if data[:2] == b"\xff\xd8":
        return _more_than(MAX_PARTS, _jpeg_parts(data))
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _more_than(MAX_PARTS, _png_parts(data))
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _more_than(MAX_PARTS, _gif_parts(data))
    return False


def _more_than(limit: int, parts: Iterator[int]) -> bool:
    total = 0
    for part in parts:
        total += part
        if total > limit:
            return True
    return False


def _jpeg_parts(data: bytes) -> Iterator[int]:
    position, scans = 2, 0
    while marker := _MARKER.search(data, position):
        kind = data[marker.end() - 1]
        if kind == _END:
            return
        if not scans:
            yield marker.start() - position  # padding, which PIL reads byte by byte
        scans += kind == _SCAN
        yield SCAN_PARTS if kind == _SCAN else SEGMENT_PARTS
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _png_parts(data: bytes) -> Iterator[int]:
    position = 8
    while position < len(data):
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        yield 1


def _gif_parts(data: bytes) -> Iterator[int]:
    """The extensions before the first frame and their blocks."""
    position = 13 + _gif_palette(data[10:11])
    while data[position : position + 1] == b"!":
        position += 2
        while length := int.from_bytes(data[position : position + 1], "big"):
            position += 1 + length
            yield 1
        position += 1
        yield 1


def _gif_palette(flags: bytes) -> int:
    """Bytes of the palette."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0
