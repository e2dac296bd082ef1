"""Shards from strangers, by the whole way that data goes: index, open, an epoch of training.

Each rule is attacked. Proven for each attack, over a whole epoch of `TrainStream` and of
`EvalStream`:

- nothing is executed, nothing hangs, nothing is written but the index, memory stays bounded
- every good sample comes at its place in the order, with its own picture and text
- every bad one is named with shard, key and reason, and replaced by the next in stored order
- a tar that cannot be read whole is refused by name; the others are used
- a shard or an index that is not what it was is an error, never a shorter epoch
"""

import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip2_train.data.batch import EvalSample, collate
from blip2_train.data.check import index_folder, verify_folder
from blip2_train.data.images import load_rgb
from blip2_train.data.index import ShardInfo, read_index, write_index
from blip2_train.data.order import ShuffledOrder
from blip2_train.data.shards import ShardError, offsets_path
from blip2_train.data.source import Source, open_source
from blip2_train.data.stream import EvalStream, TrainStream
from blip2_train.data.text import clean_caption, load_text_tokenizer
from blip2_train.errors import UserError

SEED, WINDOW = 3, 2
END = bytes(1024)  # of a tar
TIME_LIMIT = 300  # seconds, of one test; reached by what hangs, on however busy a machine
MEMORY = 2**30  # bytes, of what no picture here may need


@pytest.fixture(autouse=True)
def limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test may not hang, nor leave anything outside the folder of shards."""

    def late(*_: object) -> None:
        pytest.fail("it hangs")

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert list(work.iterdir()) == [], "something was written to the working directory"
    assert not CANARY.exists(), "something was executed"


# ----------------------------------------------------------------------------- how attacks are made

CANARY = Path(tempfile.gettempdir()) / f"blip2-train-canary-{os.getpid()}"


class Evil:
    """Unpickled anywhere, it makes a folder at CANARY."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(CANARY),)


EVIL = pickle.dumps(Evil())
EVIL_TEXT = pickle.dumps(Evil(), protocol=0)


def saved(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


EVIL_NPY = saved(np.array([Evil()], dtype=object))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(n: int) -> Image.Image:
    values = np.random.default_rng(n).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((16, 16), Image.Resampling.NEAREST)


@cache
def jpeg(n: int) -> bytes:
    return encoded(picture(n), "JPEG", quality=95)


@cache
def pixels(n: int) -> torch.Tensor:
    return as_tensor(Image.open(io.BytesIO(jpeg(n))))


def as_tensor(image: Image.Image, _: object = None) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_train_tensor(data: bytes, _: torch.Generator) -> tuple[torch.Tensor, bool]:
    return as_tensor(load_rgb(data)), False


def header(
    name: bytes, size: int | bytes, kind: bytes = b"0", patch: dict[int, bytes] | None = None
) -> bytes:
    """A tar header with a right checksum, whatever it says."""
    fields = {0: name[:100], 100: b"0000644\0", 108: b"0000000\0", 116: b"0000000\0"}
    fields |= {124: size if isinstance(size, bytes) else b"%011o\0" % size}
    fields |= {136: b"00000000000\0", 148: b" " * 8, 156: kind, 257: b"ustar\x0000"}
    block = bytearray(512)
    for position, value in (fields | (patch or {})).items():
        block[position : position + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: str | bytes, data: bytes, kind: bytes = b"0", **changes: object) -> bytes:
    """A member; a long name gets a GNU header of its own."""
    name = name.encode() if isinstance(name, str) else name
    long = b""
    if len(name) > 100:
        long = header(b"././@LongLink", len(name) + 1, b"L") + padded(name + b"\0")
    return long + header(name, changes.pop("size", len(data)), kind, **changes) + padded(data)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    lines = b""
    for keyword, value in records:
        line = b" %s=%s\n" % (keyword, value)
        length = len(line) + 1
        while len(b"%d" % length) + len(line) != length:
            length += 1
        lines += b"%d%s" % (length, line)
    return member(b"pax", lines, kind)


def meta(n: int, **changes: object) -> bytes:
    return json.dumps({"image_id": n, "captions": [f"Caption of {n}."]} | changes).encode()


def sample(n: int, key: str | None = None, image: bytes | None = None, **changes: object) -> bytes:
    """A good sample; of any key, with anything for its image."""
    key = key or f"k{n:03d}"
    data = jpeg(n) if image is None else image
    return member(f"{key}.jpg", data) + member(f"{key}.json", meta(n, **changes))


@dataclass(frozen=True)
class Stored:
    """A sample as it must come out: with the picture and text of `n`, or skipped for `reason`."""

    key: str
    n: int | None = None  # None: good, but not one of ours
    reason: str | None = None  # its beginning


def good(*numbers: int) -> list[Stored]:
    return [Stored(f"k{n:03d}", n) for n in numbers]


def bad(key: str, reason: str) -> list[Stored]:
    return [Stored(key, reason=reason)]


# ----------------------------------------------------------------------------- what must come of it


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "caption", "of", *map(str, range(10))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return load_text_tokenizer(folder)


def as_list(samples: list, skipped: list) -> tuple[list, list]:
    return samples, skipped


def train(source: Source, batch: int | None = None, **changes: object) -> TrainStream:
    return TrainStream(
        [source],
        {source.name: as_train_tensor},
        as_list,
        contrastive_batch=batch or sum(info.samples for info in source.shards),
        seed=SEED,
        shuffle_window=WINDOW,
        **changes,
    )


def first_batch(folder: Path) -> tuple[list, list]:
    """By default a whole epoch."""
    return next(iter(train(open_source("strange", folder, "train"))))


def fits(stored: Stored, found: object) -> None:
    assert found.key.split("/", 2)[2] == stored.key
    if stored.n is not None:
        assert torch.equal(found.image, pixels(stored.n)), stored.key
        assert found.captions == [f"caption of {stored.n}"]


def is_report(stored: Stored, shard: str, skip: dict) -> None:
    assert skip.keys() == {"shard", "key", "reason"}
    assert skip["shard"] == f"strange/{shard}"
    assert (skip["key"], skip["reason"][: len(stored.reason or "")]) == (stored.key, stored.reason)


def assert_epoch(folder: Path, shards: dict[str, list[Stored]], tokenizer) -> None:
    """Go through an epoch of both streams and hold every sample against what it must be."""
    source = open_source("strange", folder, "train")
    assert {info.name: info.samples for info in source.shards} == {
        name: len(stored) for name, stored in shards.items()
    }
    evaluation = EvalStream(source, as_tensor)
    in_order = [(info.name, entry) for info in source.shards for entry in shards[info.name]]
    for item, (shard, entry) in enumerate(in_order):
        found = evaluation[item]
        assert isinstance(found, EvalSample) == (entry.reason is None), (entry, found)
        fits(entry, found) if entry.reason is None else is_report(entry, shard, found)

    samples, skipped = next(iter(train(source)))
    collate(samples, skipped, tokenizer=tokenizer, max_text_tokens=8)
    order = ShuffledOrder([info.samples for info in source.shards], SEED, WINDOW)
    reports = iter(skipped)
    for n, found in enumerate(samples):
        _, number, place = order.locate(n)
        name = source.shards[number].name
        stored = shards[name][place:] + shards[name][:place]
        while (entry := stored.pop(0)).reason is not None:
            is_report(entry, name, next(reports))
        assert found.key.split("/")[1] == name
        fits(entry, found)
    assert next(reports, None) is None


def index(folder: Path) -> list[str]:
    """Index the folder; it may gain the index and nothing else. Returns what was refused."""
    before = set(folder.parent.rglob("*"))
    shards, refused = index_folder(folder, "train")
    new = {str(path.relative_to(folder)) for path in set(folder.parent.rglob("*")) - before}
    names = {info.name for info in shards}
    expected = {"index.json", ".index"} | {f".index/{name}.json" for name in names}
    assert new <= expected | {f"{name}.offsets.npy" for name in names}
    return refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "outer" / "strange"
    folder.mkdir(parents=True)
    return folder


def survives(folder: Path, attack: bytes, expected: list[Stored], tokenizer) -> None:
    """The attack lies between good samples, and another shard follows."""
    tar = sample(0) + sample(1) + attack + sample(2) + sample(3) + END
    (folder / "a-000000.tar").write_bytes(tar)
    (folder / "a-000001.tar").write_bytes(sample(4) + sample(5) + END)
    assert index(folder) == []
    shards = {"a-000000.tar": good(0, 1) + expected + good(2, 3), "a-000001.tar": good(4, 5)}
    assert_epoch(folder, shards, tokenizer)


def refused(folder: Path, tar: bytes, message: str, tokenizer) -> None:
    """The tar is not indexed, and says why; with a made-up index it is an error all the same."""
    (folder / "a-000000.tar").write_bytes(tar)
    (folder / "a-000001.tar").write_bytes(sample(4) + sample(5) + END)
    (said,) = index(folder)
    assert "a-000000.tar" in said and re.search(message, said), said
    assert len(said) < 1000
    assert_epoch(folder, {"a-000001.tar": good(4, 5)}, tokenizer)

    end = len(tar.removesuffix(END)) // 512 * 512
    np.save(offsets_path(folder / "a-000000.tar"), np.array([[0, end]]))
    write_index(folder, [ShardInfo("a-000000.tar", "train", 1, len(tar), "0")])
    with pytest.raises((ShardError, UserError), match=r"a-000000\.tar"):
        first_batch(folder)


# --------------------------------------------------------------------------------- members of a tar

K9 = "k009.jpg"
PICKLES = {
    "beside a good sample": (
        member(K9, jpeg(9))
        + b"".join(member(f"k009.{name}", EVIL) for name in ("pkl", "pyd", "pth", "cls", "npz"))
        + member("k009.npy", EVIL_NPY)
        + member("k009.json", meta(9)),
        good(9),
    ),
    "alone": (member("evil.pkl", EVIL) + member("evil.npy", EVIL_NPY), []),
    "as json": (member(K9, jpeg(9)) + member("k009.json", EVIL), bad("k009", "json is not UTF-8")),
    "as json, text": (
        member(K9, jpeg(9)) + member("k009.json", EVIL_TEXT),
        bad("k009", "bad json"),
    ),
    "as image": (sample(9, image=EVIL), bad("k009", "not a readable image")),
    "as text": (member(K9, jpeg(9)) + member("k009.txt", EVIL), bad("k009", "txt is not UTF-8")),
}


def named(path: bytes, n: int = 9) -> bytes:
    """A sample whose members' names are given by POSIX headers."""
    image, text = pax((b"path", path + b".jpg")), pax((b"path", path + b".json"))
    return image + member("x.jpg", jpeg(n)) + text + member("x.json", meta(n))


NAMES = {
    "upwards": (sample(9, "../../../up"), [Stored("../../../up", 9)]),
    "absolute": (sample(9, "/etc/passwd"), [Stored("/etc/passwd", 9)]),
    "newline": (named(b"new\nline"), [Stored("new\nline", 9)]),
    "NUL": (named(b"n\0ul"), [Stored("n\0ul", 9)]),
    "10 kB": (sample(9, "l" * 10_000), [Stored("l" * 10_000, 9)]),
    "10 kB, POSIX": (named(b"l" * 10_000), [Stored("l" * 10_000, 9)]),
    # Two samples: as question marks their names would be one.
    "another encoding": (
        b"".join(
            member(name + b".jpg", jpeg(n)) + member(name + b".json", meta(n))
            for n, name in ((8, b"\xd6\xd0"), (9, b"\xce\xc4"))
        ),
        [Stored("\\xd6\\xd0", 8), Stored("\\xce\\xc4", 9)],
    ),
    "another encoding, POSIX": (
        named(b"\xd6\xd0", 8) + named(b"\xed\xa0\x80", 9),
        [Stored("\\xd6\\xd0", 8), Stored("\\xed\\xa0\\x80", 9)],
    ),
    "no key": (member(".jpg", jpeg(9)) + member(".json", meta(9)) + member("", b""), []),
}


def only(kind: bytes, content: bytes = b"", **changes: object) -> tuple[bytes, list[Stored]]:
    """A sample whose image is no regular file."""
    image = member(K9, content, kind, **changes)
    return image + member("k009.json", meta(9)), bad("k009", "no image")


SPARSE = (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"k009.jpg")
KINDS = {
    "hard link": only(b"1", patch={157: b"k000.jpg"}),
    "symbolic link": only(b"2", patch={157: b"/etc/passwd"}),
    "character device": only(b"3"),
    "block device": only(b"4"),
    "folder": only(b"5"),
    "FIFO": only(b"6"),
    "unknown": only(b"Z", jpeg(9)),
    "sparse, GNU": only(
        b"S", header(b"", 0)[:504] + bytes(8) + jpeg(9), size=len(jpeg(9)), patch={482: b"\1"}
    ),
    "sparse, POSIX": (pax(*SPARSE) + only(b"0", jpeg(9))[0], bad("k009", "no image")),
    "attributes": (
        pax((b"mtime", b"1.5"), (b"comment", b"a=b\nc")) + sample(9) + pax(kind=b"g"),
        good(9),
    ),
    "a header for all": (pax((b"comment", b"0123abcd"), kind=b"g") + sample(9), good(9)),
    "3,000 headers of one member": (pax((b"comment", b"x")) * 3000 + sample(9), good(9)),
}

HEADERS = {
    "negative size": (pax((b"size", b"-5120")), "is no size"),
    "no number as size": (pax((b"size", b"1e3")), "is no size"),
    "5,000 digits as size": (pax((b"size", b"9" * 5000)), "is no size"),
    "terabytes, POSIX": (pax((b"size", b"9" * 13)), "cut off"),
    "more than there is, POSIX": (pax((b"size", b"100000")), "cut off"),
    "fewer than there are, POSIX": (pax((b"size", b"1")), "invalid header|checksum"),
    "header of terabytes": (
        header(b"pax", b"\x80" + bytes(4) + b"\x01" + bytes(6), b"x"),
        "header",
    ),
    "long name of terabytes": (
        header(b"L", b"\x80" + bytes(4) + b"\x01" + bytes(6), b"L"),
        "header",
    ),
    "record of length 0": (member("pax", b"0 path=k\n", b"x"), "extended header"),
    "record beyond the header": (member("pax", b"99999999999 path=k\n", b"x"), "extended header"),
    # tarfile needs hours for this.
    "a million digits": (member("pax", b"1" * 1_000_000, b"x"), "extended header"),
    "all members renamed": (pax((b"path", b"x.jpg"), kind=b"g"), "renames"),
    "all members resized": (pax((b"size", b"0"), kind=b"g"), "renames or resizes"),
    "sparse without an end": (header(b"x", 0, b"S", {482: b"\1"}) + b"\1" * 512, "header|checksum"),
    "8 GB": (header(b"k009.jpg", b"77777777777\0"), "cut off"),
    "a terabyte": (header(b"k009.jpg", b"\x80" + bytes(5) + b"\x01" + bytes(5)), "cut off"),
    "2 ** 88": (header(b"k009.jpg", b"\x80" + b"\xff" * 11), "cut off"),
    "negative": (header(b"k009.jpg", b"\xff" * 11 + b"\0"), "negative size"),
    "no number": (header(b"k009.jpg", b"1234567890x\0"), "invalid header"),
    "zeros in the middle": (END, "more behind the end"),
}


@pytest.mark.parametrize(
    ("attack", "expected"),
    [pytest.param(*case, id=name) for name, case in (PICKLES | NAMES | KINDS).items()],
)
def test_strange_members(folder: Path, tokenizer, attack: bytes, expected: list[Stored]) -> None:
    survives(folder, attack, expected, tokenizer)


@pytest.mark.parametrize(
    ("attack", "message"), [pytest.param(*case, id=name) for name, case in HEADERS.items()]
)
def test_strange_headers(folder: Path, tokenizer, attack: bytes, message: str) -> None:
    refused(folder, sample(0) + attack + sample(1) + END, message, tokenizer)


WHOLE = sample(0) + sample(1) + END
TARS = {
    "gzip": (gzip.compress(WHOLE), "uncompressed"),
    "bz2": (bz2.compress(WHOLE), "uncompressed"),
    "xz": (lzma.compress(WHOLE), "uncompressed"),
    "nothing": (b"", "end marker"),
    "joined": (WHOLE + WHOLE, "more behind the end"),
    "zeros instead of the second half": (sample(0) + bytes(2 * 2**20), "more behind the end"),
    "a web page": (b"<html>" * 100, "checksum|header"),
}


@pytest.mark.parametrize(
    ("tar", "message"), [pytest.param(*case, id=name) for name, case in TARS.items()]
)
def test_what_is_no_whole_tar(folder: Path, tokenizer, tar: bytes, message: str) -> None:
    refused(folder, tar, message, tokenizer)


# ------------------------------------------------------------------------------------------ samples

JSON = {
    "not UTF-8": (b"\xff\xfe{", "json is not UTF-8"),
    "UTF-16": (meta(9).decode().encode("utf-16"), "json is not UTF-8"),
    "deep": (b"[" * 100_000, "bad json"),
    "deep in a field": (b'{"captions": ["x"], "url": ' + b'{"a":' * 100_000, "bad json"),
    "an integer of 5,000 digits": (
        b'{"captions": ["x"], "image_id": %s}' % (b"1" * 5000),
        "bad json",
    ),
    "empty": (b"", "bad json"),
    "not an object": (b'["caption"]', "bad json: not an object"),
    "a number": (b"NaN", "bad json: not an object"),
    "no caption": (b"{}", "no captions"),
    "null": (b'{"captions": null}', "no captions"),
    "empty captions": (b'{"captions": ["", " ", "\\n\\t", "\\u00a0"]}', "no captions"),
    "control characters alone": (b'{"captions": ["\\u0000\\u0001\\u200b\\ufeff"]}', "no captions"),
    "signs alone": (b'{"captions": ["...", "!"]}', "no caption is left"),
    "a mapping": (b'{"captions": {"a": "b"}}', "captions are not text"),
    "a list in the list": (b'{"captions": [["a"]]}', "captions are not text"),
    "half a character": (b'{"captions": ["a", "\\ud800"]}', "captions are not text"),
    "a million captions": (
        b'{"captions": [%s"a"]}' % (b'"a",' * 999_999),
        "oversized: 1000000 cap",
    ),
    "5 MB": (b'{"captions": ["%s"]}' % (b"a" * 5_000_000), "oversized: json"),
    "duplicate fields": (b'{"captions": [], "captions": ["x"]}', None),
    "NaN as id": (b'{"captions": ["x"], "image_id": NaN}', None),
    "half a character as id": (b'{"captions": ["x"], "image_id": "\\udfff"}', None),
    "an object as id": (b'{"captions": ["x"], "image_id": {"b": [1], "a": null}}', None),
    "control characters": (b'{"captions": ["a\\u0000b\\u001b[31m\\u202ec"]}', None),
    # None of these may keep the tokenizer busy for minutes.
    "a word of 1 MB": (b'{"captions": ["%s"]}' % (b"a" * 1_000_000), None),
    "1 MB of signs": (b'{"captions": ["%s"]}' % (b"-" * 1_000_000), None),
    "1 MB of accents": (('{"captions": ["a%s"]}' % ("\u0301" * 500_000)).encode(), None),
    "1 MB of spaces": (b'{"captions": ["a%sb"]}' % (b" \\n" * 300_000), None),
    "1 MB of words": (b'{"captions": ["%s"]}' % (b"ab " * 333_333), None),
}


@pytest.mark.parametrize(
    ("text", "reason"), [pytest.param(*case, id=name) for name, case in JSON.items()]
)
def test_strange_json(folder: Path, tokenizer, text: bytes, reason: str | None) -> None:
    attack = member(K9, jpeg(9)) + member("k009.json", text)
    survives(folder, attack, bad("k009", reason) if reason else [Stored("k009")], tokenizer)


def test_ids_as_deep_as_json_can_be_read(folder: Path, tokenizer) -> None:
    """Where reading just succeeds, hashing must succeed too; the exact depth is Python's."""
    depths = range(850, 1010, 10)
    (folder / "a-000000.tar").write_bytes(
        b"".join(
            member(f"k{d}.jpg", jpeg(0))
            + member(f"k{d}.json", b'{"captions": ["x"], "image_id": %s%s}' % (b"[" * d, b"]" * d))
            for d in depths
        )
        + sample(1)
        + END
    )
    assert index(folder) == []
    source = open_source("strange", folder, "train")
    samples, skipped = next(iter(train(source)))
    assert {skip["reason"] for skip in skipped} <= {"bad json"}
    assert {sample.key for sample in samples} | {
        f"{skip['shard']}/{skip['key']}" for skip in skipped
    } == {f"strange/a-000000.tar/k{name}" for name in (*depths, "001")}


def test_a_long_caption_is_cut() -> None:
    assert clean_caption("a b " * 250_000, 3) == "a b a"
    assert len(clean_caption("a" * 1_000_000, 3)) == 300
    word = "a" * 299
    assert clean_caption(word, 3) == word


SAMPLES = {
    "no image": (member("k009.json", meta(9)), bad("k009", "no image")),
    "no text": (member(K9, jpeg(9)), bad("k009", "no captions")),
    "empty image": (sample(9, image=b""), bad("k009", "no image")),
    "text as image": (sample(9, image=b"a caption"), bad("k009", "not a readable image")),
    "a program as image": (sample(9, image=b"%!PS\n(x) run"), bad("k009", "not a readable image")),
    "SVG as image": (sample(9, image=b"<svg/>"), bad("k009", "not a readable image")),
    "another extension": (
        member("k009.gif", b"x") + member("k009.txt", b"x"),
        bad("k009", "no im"),
    ),
    "two images of one kind": (member(K9, jpeg(8)) + sample(9), bad("k009", "two jpg members")),
    "two texts of one kind": (
        sample(9) + member("k009.json", meta(8)),
        bad("k009", "two json members"),
    ),
    "two images of two kinds": (member("k009.png", b"not looked at") + sample(9), good(9)),
    "upper case": (member("k009.JPG", jpeg(9)) + member("k009.Json", meta(9)), good(9)),
    "one key, one after the other": (sample(9) + sample(9), bad("k009", "two jpg members")),
    "one key, far apart": (
        sample(9, "twin") + sample(8) + sample(7, "twin"),
        [Stored("twin", 9), *good(8), Stored("twin", 7)],
    ),
}


@pytest.mark.parametrize(
    ("attack", "expected"), [pytest.param(*case, id=name) for name, case in SAMPLES.items()]
)
def test_strange_samples(folder: Path, tokenizer, attack: bytes, expected: list[Stored]) -> None:
    survives(folder, attack, expected, tokenizer)


def test_a_key_names_an_image(folder: Path) -> None:
    """Two samples of one key in a shard: one image, unless `image_id` says otherwise.

    Taken for two they could be each other's negatives, though most twins are the same picture
    stored twice. Both are drawn once per epoch, each with its own content.
    """
    twins = [sample(n, "twin", image_id=None) + sample(n + 10) for n in (0, 1)]
    told_apart = [sample(n, "other") + sample(n + 10) for n in (2, 3)]
    (folder / "a-000000.tar").write_bytes(b"".join(twins + told_apart) + END)
    assert index(folder) == []
    samples, skipped = first_batch(folder)
    assert not skipped
    ids: dict[str, list[int]] = {}
    texts: dict[str, set[str]] = {}
    for found in samples:
        ids.setdefault(found.key[-5:], []).append(found.image_id)
        texts.setdefault(found.key[-5:], set()).add(found.text)
    assert len(ids["/twin"]) == 2 and len(set(ids["/twin"])) == 1
    assert len(ids["other"]) == 2 and len(set(ids["other"])) == 2
    assert texts["/twin"] == {"caption of 0", "caption of 1"}


# ------------------------------------------------------------------------------------------- images


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(*chunks: bytes, side: int | None = None) -> bytes:
    """A PNG file with more parts, and with another size in its header."""
    data = encoded(picture(9), "PNG")
    first = data[16:29] if side is None else struct.pack(">LL", side, side) + data[24:29]
    return data[:8] + chunk(b"IHDR", first) + b"".join(chunks) + data[33:]


def segments(*contents: bytes, marker: bytes = b"\xff\xe1") -> bytes:
    """A JPEG with more segments in front."""
    extra = (marker + struct.pack(">H", len(data) + 2) + data for data in contents)
    return jpeg(9)[:2] + b"".join(extra) + jpeg(9)[2:]


def directory(entries: int, size: int, length: int) -> bytes:
    """A TIFF directory whose every entry is the same `size` bytes, in a block of `length`."""
    lines = b"".join(struct.pack("<HHLL", tag, 1, size, 0) for tag in range(1, entries + 1))
    block = b"II*\0" + struct.pack("<LH", 8, entries) + lines + bytes(4)
    return block + bytes(length - len(block))


@cache
def zeros(megabytes: int) -> bytes:
    """Compressed; the first and every further megabyte are the same few bytes."""
    packer = zlib.compressobj(9)
    first, again = (
        packer.compress(bytes(2**20 - 1000)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    return first + again * (megabytes - 1) + packer.flush()


def scans(count: int) -> bytes:
    """A progressive JPEG of 4 megapixels whose last scan is repeated."""
    data = encoded(Image.new("RGB", (2000, 2000), "gray"), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def gif(*extensions: bytes, side: int | None = None) -> bytes:
    data = bytearray(encoded(picture(9).quantize(4), "GIF"))
    start = data.index(b"\x2c", 13 + 3 * 4)
    if side is not None:
        data[start + 5 : start + 9] = struct.pack("<HH", side, side)
    return bytes(data[:start]) + b"".join(extensions) + bytes(data[start:])


def resized(format: str, position: int, side: int, pack: str) -> bytes:
    """An image file whose header names another size."""
    data = bytearray(encoded(picture(9), format))
    size = struct.pack(pack, side, side)
    data[position : position + len(size)] = size
    return bytes(data)


def tiff(side: int) -> bytes:
    data = bytearray(encoded(picture(9), "TIFF", compression="tiff_lzw"))
    for tag in (256, 257):
        place = data.index(struct.pack("<H", tag), 8)
        data[place + 2 : place + 12] = struct.pack("<HLL", 4, 1, side)
    return bytes(data)


def tiled(side: int) -> bytes:
    """A TIFF of 16 x 16 pixels in one compressed tile of another size."""
    content = zeros(side * side // 2**20 + 1)
    values = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side}
    values |= {324: 8 + 2 + 12 * 10 + 4, 325: len(content)}
    lines = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<LH", 8, len(values)) + lines + bytes(4) + content


def webp_lossless(side: int) -> bytes:
    data = bytearray(encoded(picture(9), "WEBP", lossless=True))
    data[21:25] = (
        int.from_bytes(data[21:25], "little") >> 28 << 28 | (side - 1) * (1 + 2**14)
    ).to_bytes(4, "little")
    return bytes(data)


LARGE = "too large"
IMAGES = {
    "png": (png(side=40_000), LARGE),
    "gif": (gif(side=60_000), LARGE),
    "tiff": (tiff(40_000), LARGE),
    "bmp": (resized("BMP", 18, 40_000, "<LL"), LARGE),
    "webp": (resized("WEBP", 26, 16_383, "<HH"), LARGE),
    "webp-lossless": (webp_lossless(16_383), LARGE),
    "ztxt": (png(chunk(b"zTXt", b"a\0\0" + zeros(1000))), "undecodable"),
    "itxt": (
        png(chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(1000))),
        "undecodable",
    ),
    "iccp": (png(chunk(b"iCCP", b"a\0\0" + zeros(1000))), "undecodable"),
    "ztxt-many": (
        png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6), 9)) * 200),
        "undecodable",
    ),
    "exif-long": (segments(*[b"Exif\0\0" + bytes(60_000)] * 20), None),
    "exif-overlapping": (
        segments(*[b"Exif\0\0" + directory(4000, 60_000, 65_000)]),
        None,
    ),
    "tiff-tile": (tiled(30_016), LARGE + ": 30016x30016"),
    "tiff-small-tile": (tiled(16), None),
    "tiff-overlapping": (directory(60_000, 900_000, 2**20), "not a readable image"),
    "exif-pieces": (segments(*[b"Exif\0\0a"] * 50_000), "undecodable: it has too many parts"),
    "comments": (segments(*[b"a"] * 50_000, marker=b"\xff\xfe"), "undecodable: it has too many"),
    "padding": (jpeg(9)[:2] + b"\xff" * 10**6 + jpeg(9)[2:], "undecodable: it has too many"),
    "scans": (scans(20_000), "undecodable: it has too many parts"),
    "chunks": (png(chunk(b"prVt", b"a") * 50_000), "undecodable: it has too many parts"),
    "extensions": (gif(b"\x21\xfe\x01a\0" * 50_000), "undecodable: it has too many parts"),
    "usual-jpeg": (scans(0), None),
    "usual-png": (png(chunk(b"tEXt", b"a\0b") * 100), None),
    "usual-gif": (gif(b"\x21\xfe\x01a\0" * 100), None),
}  # fmt: skip


def read_in_little_memory(folder: str) -> None:
    """Print what comes of each sample, in a process that may not have MEMORY more than now."""
    import resource

    source = open_source("strange", folder, "train")
    items = EvalStream(source, lambda image: torch.tensor(image.size))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for n in range(len(items)):
        item = items[n]
        skipped = not isinstance(item, EvalSample)
        print(
            json.dumps([item["key"], item["reason"]] if skipped else [item.key, None]), flush=True
        )


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_small_files_that_want_much_memory_or_time(folder: Path) -> None:
    tar = b"".join(sample(9, name, image=data) for name, (data, _) in IMAGES.items())
    (folder / "a-000000.tar").write_bytes(tar + END)
    assert index(folder) == []
    code = f"import test_trust; test_trust.read_in_little_memory({str(folder)!r})"
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": here, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert len(found) == len(IMAGES)
    for name, (_, reason) in IMAGES.items():
        if reason is None:
            assert f"strange/a-000000.tar/{name}" in found, name
        else:
            assert found[name].startswith(reason), (name, found[name])


# --------------------------------------------------------------------------- damage and replacement


def test_a_tar_cut_at_any_block(folder: Path, tokenizer) -> None:
    """Never a shorter epoch: refused, or only the end marker was cut and all samples are there."""
    path = folder / "a-000000.tar"
    path.write_bytes(WHOLE)
    assert index(folder) == []
    source = open_source("strange", folder, "train")
    whole = (folder / "index.json").read_bytes()
    for size in range(0, len(WHOLE), 512):
        path.write_bytes(WHOLE[:size])
        with pytest.raises(UserError, match=rf"'a-000000\.tar' has {size} bytes"):
            open_source("strange", folder, "train")
        with pytest.raises(ShardError, match=rf"a-000000\.tar has {size} bytes"):
            next(iter(train(source)))
        if size > len(WHOLE) - len(END):
            assert index(folder) == []
            assert_epoch(folder, {"a-000000.tar": good(0, 1)}, tokenizer)
            (folder / "index.json").write_bytes(whole)
        else:
            with pytest.raises(UserError, match=r"no tar .* can be read, .*a-000000\.tar"):
                index(folder)
            assert (folder / "index.json").read_bytes() == whole


def test_flipped_bits(folder: Path) -> None:
    """A flip hurts its own sample alone, and where it is seen it has a name."""
    path = folder / "a-000000.tar"
    original = b"".join(map(sample, range(6))) + END
    path.write_bytes(original)
    assert index(folder) == []
    source = open_source("strange", folder, "train")
    offsets = np.load(offsets_path(path))
    rng = random.Random(0)
    seen = {"error": 0, "skip": 0, "used": 0}
    for _ in range(500):
        data = bytearray(original)
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        evaluation = EvalStream(source, as_tensor)
        hurt = None
        for i, stored in enumerate(good(*range(6))):
            untouched = not offsets[i, 0] <= position < offsets[i, 1]
            try:
                found = evaluation[i]
            except ShardError:
                assert not untouched
                hurt = "error"
                continue
            if untouched:
                fits(stored, found)
            else:
                hurt = "used" if isinstance(found, EvalSample) else "skip"
        seen[hurt or "used"] += 1
        if hurt == "error":
            with pytest.raises(ShardError, match=r"a-000000\.tar"):
                next(iter(train(source)))
            continue
        samples, skipped = next(iter(train(source)))
        assert len(samples) == 6 and bool(skipped) == (hurt == "skip")
    assert min(seen.values()) > 10, seen


def test_random_blocks_as_a_tar(folder: Path) -> None:
    """Headers with a right checksum and anything else in them: no other error, and an end."""
    rng = random.Random(1)
    path = folder / "a-000000.tar"
    (folder / "a-000001.tar").write_bytes(sample(4) + END)
    for _ in range(100):
        blocks = []
        for _ in range(rng.randrange(1, 12)):
            name, size = rng.choice([b"a.jpg", b"a.json", b"b.txt"]), rng.choice([0, 5, 600, 10**7])
            kind = rng.choice([b"\0", *(b"%c" % c for c in b"0123456789LKSxgXVZ")])
            patch = {
                rng.randrange(500): rng.randbytes(rng.randrange(1, 8))
                for _ in range(rng.randrange(3))
            }
            blocks.append(header(name, size, kind, patch))
            blocks.append(
                padded(rng.choice([b"", b"30 path=x.jpg\n", jpeg(0), rng.randbytes(512)]))
            )
        path.write_bytes(b"".join(blocks) + END)
        index(folder)
        samples = read_index(folder).get(path.name)
        if samples is not None and samples.samples:
            source = open_source("strange", folder, "train")
            evaluation = EvalStream(source, as_tensor)
            assert all(evaluation[i] is not None for i in range(len(evaluation)))


def replace(path: Path, data: bytes) -> None:
    """As `mv` and most programs write: another file takes the name."""
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


ORIGINAL = b"".join(map(sample, range(8))) + END
LAYOUTS = {  # another tar of the same size
    "reversed": b"".join(sample(n) for n in reversed(range(8))) + END,
    "shifted": member("x", b"") + b"".join(map(sample, range(8))) + END[512:],
}
CHANGES = {
    "deleted": (lambda path: path.unlink(), "does not exist", None),
    "another size": (lambda path: replace(path, ORIGINAL + END), "bytes, the index says", None),
    "truncated": (
        lambda path: os.truncate(path, 1024),
        "bytes, the index says",
        "cut after it was",
    ),
    "emptied": (lambda path: os.truncate(path, 0), "bytes, the index says", "cut after it was"),
    "shifted": (lambda path: path.write_bytes(LAYOUTS["shifted"]), "sample", "sample"),
    "zeros": (lambda path: path.write_bytes(bytes(len(ORIGINAL))), "sample", "sample"),
}


@pytest.mark.parametrize("is_open", [False, True], ids=["before it is open", "while it is open"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_changed_during_the_run(folder: Path, change: str, is_open: bool) -> None:
    """What was opened stays readable where the file is only renamed or removed; else it is said."""
    path = folder / "a-000000.tar"
    path.write_bytes(ORIGINAL)
    assert index(folder) == []
    batches = iter(train(open_source("strange", folder, "train"), batch=2))
    drawn = next(batches)[0] if is_open else []
    act, unopened, opened = CHANGES[change]
    act(path)
    message = opened if is_open else unopened
    if message is None:
        for _ in range(3):
            samples, skipped = next(batches)
            drawn += samples
            assert not skipped
        assert sorted(found.text for found in drawn) == [f"caption of {n}" for n in range(8)]
        assert all(torch.equal(found.image, pixels(int(found.text[-1]))) for found in drawn)
    else:
        with pytest.raises(ShardError, match=message):
            list(itertools.islice(batches, 4))


@pytest.mark.parametrize("is_open", [False, True])
def test_another_order_in_the_same_bytes_gives_no_wrong_pairs(folder: Path, is_open: bool) -> None:
    """Where a tar of equal layout takes the place, a sample is still whole: key, image and text."""
    path = folder / "a-000000.tar"
    path.write_bytes(ORIGINAL)
    assert index(folder) == []
    batches = iter(train(open_source("strange", folder, "train"), batch=2))
    if is_open:
        next(batches)
    path.write_bytes(LAYOUTS["reversed"])
    with contextlib.suppress(ShardError):
        for _ in range(3):
            for found in next(batches)[0]:
                fits(Stored(found.key[-4:], int(found.key[-3:])), found)
    assert any("SHA-256" in message for message in verify_folder(folder)[1])


# ---------------------------------------------------------------------------------------- the index


def npy_header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + data


@cache
def offsets_of_two() -> np.ndarray:
    ends = [len(sample(0)), len(sample(0) + sample(1))]
    return np.array([[0, ends[0]], ends])


def offsets(change: object) -> bytes:
    return saved(np.array(change))


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, offsets=offsets_of_two())
    return buffer.getvalue()


NPY = "{'descr': %s, 'fortran_order': False, 'shape': %s}\n"
OFFSETS = {
    "a pickle": EVIL,
    "a pickle inside": saved(np.array([[Evil(), 1], [2, 3]], dtype=object)),
    "nothing": b"",
    "text": b"0 2048\n2048 4096\n",
    "a zip archive": zipped(),
    "int32": saved(offsets_of_two().astype(np.int32)),
    "uint64": saved(offsets_of_two().astype(np.uint64)),
    "float64": saved(offsets_of_two().astype(float)),
    "other byte order": saved(offsets_of_two().astype(">i8")),
    "strings": saved(offsets_of_two().astype(str)),
    "flat": saved(offsets_of_two().ravel()),
    "three columns": saved(np.zeros((2, 3), dtype=np.int64)),
    "one row": saved(offsets_of_two()[:1]),
    "three rows": saved(np.zeros((3, 2), dtype=np.int64)),
    "by columns": saved(np.asfortranarray(offsets_of_two())),
    "reversed": saved(offsets_of_two()[::-1]),
    "ends first": saved(offsets_of_two()[:, ::-1]),
    "negative": saved(offsets_of_two() - 512),
    "beyond the end": saved(offsets_of_two() + 2**40),
    "nearly 2 ** 63": saved(np.array([[0, 1024], [2**62, 2**63 - 1]])),
    "all zero": saved(np.zeros((2, 2), dtype=np.int64)),
    "the same twice": saved(offsets_of_two()[[0, 0]]),
    "shifted": saved(offsets_of_two() + 512),
    "all of it": saved(np.array([[0, offsets_of_two()[1, 1]], [offsets_of_two()[1, 1]] * 2])),
    "no whole blocks": saved(offsets_of_two() + np.array([[0, -5], [-5, 0]])),
    "too short": saved(offsets_of_two())[:-8],
    "too long": saved(offsets_of_two()) + bytes(8),
    "claims terabytes": npy_header(NPY % ("'<i8'", (10**12, 2))),
    "claims a long element": npy_header(NPY % ("'|V2000000000'", (2, 2))),
    "nested header": npy_header("(" * 5000),
    "signs": npy_header("-" * 9000 + "1"),
    "code": npy_header(f"{{'descr': __import__('os').mkdir('{CANARY}')}}"),
    "unsortable keys": npy_header("{'descr': 1, 2: 3, None: 4}"),
    "odd type": npy_header(NPY % ("[('a', ('b',), ())]", (2, 2))),
    "long header": npy_header(" " * 60_000 + NPY % ("'<i8'", (2, 2))),
    "another version": b"\x93NUMPY\3\0" + saved(offsets_of_two())[8:],
}


@pytest.mark.parametrize("content", OFFSETS.values(), ids=OFFSETS)
def test_offsets_that_do_not_belong(folder: Path, content: bytes) -> None:
    path = folder / "a-000000.tar"
    path.write_bytes(WHOLE)
    assert index(folder) == []
    offsets_path(path).write_bytes(content)
    source = open_source("strange", folder, "train")
    with pytest.raises(ShardError, match=r"a-000000\.tar"):
        next(iter(train(source)))
    with pytest.raises(ShardError, match=r"a-000000\.tar"):
        list(map(EvalStream(source, as_tensor).__getitem__, range(2)))
    assert len(verify_folder(folder)[1]) == 1


def test_offsets_of_two_shards_swapped(folder: Path) -> None:
    paths = [folder / "a-000000.tar", folder / "a-000001.tar"]
    paths[0].write_bytes(sample(0) + sample(1, image=jpeg(1) + bytes(2000)) + END)
    paths[1].write_bytes(sample(2, image=jpeg(2) + bytes(2000)) + sample(3) + END)
    assert index(folder) == []
    first, second = (offsets_path(path).read_bytes() for path in paths)
    offsets_path(paths[0]).write_bytes(second)
    offsets_path(paths[1]).write_bytes(first)
    with pytest.raises(ShardError, match=r"a-00000\d\.tar"):
        first_batch(folder)
    assert len(verify_folder(folder)[1]) == 2


def test_the_index_of_another_folder(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "strange"
    other.mkdir(parents=True)
    for place, numbers in ((folder, (0, 1, 2)), (other, (0, 1))):
        (place / "a-000000.tar").write_bytes(b"".join(map(sample, numbers)) + END)
        assert index(place) == []
    shutil.copy(other / "index.json", folder / "index.json")
    with pytest.raises(UserError, match=r"'a-000000\.tar' has \d+ bytes, index.json says \d+"):
        open_source("strange", folder, "train")
    # Even of one size it would not do: the number of samples is another.
    table = json.loads((folder / "index.json").read_text())
    table["a-000000.tar"]["bytes"] = (folder / "a-000000.tar").stat().st_size
    (folder / "index.json").write_text(json.dumps(table))
    with pytest.raises(ShardError, match=r"offsets.*\(3, 2\), not int64 \(2, 2\)"):
        first_batch(folder)


ENTRY = {"split": "train", "samples": 2, "bytes": len(WHOLE), "sha256": "0"}
LONG = "l" * 10_000
INDEXES = {
    "a pickle": (EVIL, "JSON"),
    "a pickle, text": (EVIL_TEXT, "JSON"),
    "not UTF-8": (b'{"\xff.tar": {}}', "JSON"),
    "deep": (b"[" * 100_000, "JSON"),
    "an integer of 5,000 digits": (b"1" * 5000, "JSON"),
    **{
        f"the name {name[:20]!r}": (json.dumps({name: ENTRY}).encode(), "plain file name")
        for name in ("../a.tar", "/etc/a.tar", "..", "", "a\0b.tar", "a\nb.tar", "x/a.tar", LONG)
    },
    "pipe:": (json.dumps({"pipe:mkdir x": ENTRY}).encode(), "'pipe:mkdir x' is missing"),
    "pipe: with a path": (json.dumps({f"pipe:mkdir {CANARY}": ENTRY}).encode(), "plain file name"),
    "half a character": (json.dumps({"\ud800.tar": ENTRY}).encode(), r"ud800.tar' is missing"),
    **{
        f"{field} {value}"[:40]: (
            json.dumps({"a-000000.tar": ENTRY | {field: value}}).encode(),
            said,
        )
        for field, value, said in (
            ("samples", 10**18, "cannot have"),
            ("samples", 10**30, "cannot have"),
            ("samples", len(WHOLE), "cannot have"),
            ("samples", 0, "no samples"),
            ("samples", 2.0, "not a int"),
            ("bytes", 10**30, "bytes"),
            ("bytes", 5, "cannot have"),
            ("sha256", None, "sha256"),
            ("split", ["train"], "split"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"), [pytest.param(*case, id=name) for name, case in INDEXES.items()]
)
def test_strange_indexes(folder: Path, content: bytes, message: str) -> None:
    (folder / "a-000000.tar").write_bytes(WHOLE)
    assert index(folder) == []
    (folder / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source("strange", folder, "train")
    assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)


def test_what_an_earlier_indexing_left_may_be_a_strangers_too(folder: Path, tokenizer) -> None:
    path = folder / "a-000000.tar"
    path.write_bytes(WHOLE)
    for left in (EVIL, EVIL_TEXT, b"[" * 100_000, b"{}", b"[]", b""):
        (folder / ".index").mkdir(exist_ok=True)
        (folder / ".index" / f"{path.name}.json").write_bytes(left)
        offsets_path(path).write_bytes(EVIL)
        assert index(folder) == []
        assert_epoch(folder, {path.name: good(0, 1)}, tokenizer)


@pytest.mark.parametrize(
    "shards",
    ["pipe:mkdir x", "pipe:cat a.tar", "pipe:", f"pipe:mkdir {CANARY}"],
    ids=["folder", "tar", "nothing", "canary"],
)
def test_pipes_are_never_run(shards: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source("strange", shards, "train")
    assert "data.sources.strange.shards=pipe:" in str(caught.value)
    with pytest.raises(UserError, match="there is no folder"):
        index_folder(Path(shards), "train")


def test_names_of_tars(folder: Path, tokenizer) -> None:
    """A file is opened, never a command; a name in another encoding is a name."""
    pipe, foreign = "pipe:mkdir x;.tar", os.fsdecode(b"\xd6\xd0-0.tar")
    for name, n in ((pipe, 0), (foreign, 2), ("new\nline.tar", 4)):
        (folder / name).write_bytes(sample(n) + sample(n + 1) + END)
    (said,) = index(folder)
    assert "new\\nline.tar' is not a plain file name" in said and "\n" not in said
    assert_epoch(folder, {pipe: good(0, 1), foreign: good(2, 3)}, tokenizer)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_files_that_never_end(folder: Path, tokenizer) -> None:
    """A FIFO waits for its writer, /dev/zero goes on and on: neither is opened."""
    path = folder / "a-000001.tar"
    path.write_bytes(sample(4) + sample(5) + END)
    os.mkfifo(folder / "a-000000.tar")
    (folder / "a-000002.tar").symlink_to("/dev/zero")
    (folder / "a-000003.tar").mkdir()
    assert [message[-30:] for message in index(folder)] == [
        f"a-00000{n}.tar is not a regular file"[-30:] for n in (0, 2, 3)
    ]
    assert_epoch(folder, {path.name: good(4, 5)}, tokenizer)
    for name in (offsets_path(path).name, path.name):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=r"a-000001\.tar"):
            open_source("strange", folder, "train")
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    path.unlink()
    os.mkfifo(path)
    messages = verify_folder(folder)[1]
    assert f"{path} is not a regular file" in messages
    (folder / "index.json").unlink()
    os.mkfifo(folder / "index.json")
    with pytest.raises(UserError, match=r"index\.json is not a regular file"):
        open_source("strange", folder, "train")
