"""Annotations: every published format gives the same records, and every bad line is listed.

- COCO, Karpathy, LAVIS lists, token file, both Kaggle tables, CSV and JSON lines
- captions are verbatim; empty ones, malformed lines and images left without any are problems
- another schema is one UserError that names the file
"""

import json
from pathlib import Path
from typing import Any

import pytest

from blip2_train.data.annotations import Record, read_coco, read_karpathy, read_lavis
from blip2_train.data.tables import apply_splits, read_captions, read_split_lists
from blip2_train.errors import UserError


def dump(folder: Path, data: Any) -> Path:
    path = folder / "file.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def table(folder: Path, text: str | bytes) -> Path:
    path = folder / "table"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_coco(tmp_path: Path) -> None:
    data = {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": 1},
            {"id": 3, "file_name": "a.jpg"},
            {"id": 4, "file_name": "c.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": " First\nline. "},
            {"id": 2, "image_id": 9, "caption": "b"},
            {"id": 5, "image_id": 3, "caption": "second"},
            {"id": 6, "image_id": 4, "caption": " \n"},
            {"id": 7, "image_id": 8, "caption": "whose?"},
            {"id": 8, "image_id": 3, "caption": None},
            {"id": 9, "image_id": 3, "caption": "\ud800"},
        ],
    }
    read = read_coco(dump(tmp_path, data), "val")
    assert read.records == [
        Record("b.jpg", 9, ["b"], "val"),
        Record("a.jpg", 3, [" First\nline. ", "second"], "val"),
    ]
    assert read.problems == [
        ("file.json:annotation 6", "empty caption"),
        ("file.json:annotation 7", "unknown image: id 8"),
        ("file.json:annotation 8", "caption is not a string: NoneType"),
        ("file.json:annotation 9", "caption is not Unicode text"),
        ("c.jpg", "no caption"),
    ]


def test_karpathy(tmp_path: Path) -> None:
    def image(name: str, split: str, **more: Any) -> dict:
        return {"filename": name, "split": split, "imgid": 0, "sentences": [{"raw": "x"}], **more}

    data = {"images": [image("a.jpg", "restval", filepath="val2014", cocoid=7), image("b", "test")]}
    path = dump(tmp_path, data)
    assert read_karpathy(path).records == [
        Record("val2014/a.jpg", 7, ["x"], "train"),
        Record("b", "b", ["x"], "test"),
    ]
    assert read_karpathy(path, "restval").records[0].split == "restval"


def test_lavis(tmp_path: Path) -> None:
    data = [
        {"image": "v/a.jpg", "caption": "one", "image_id": "coco_1"},
        {"image": "b.jpg", "caption": ["x", " ", "y"]},
        {"image": "v/a.jpg", "caption": "two", "image_id": "coco_1"},
    ]
    read = read_lavis(dump(tmp_path, data), "train")
    assert read.records == [
        Record("v/a.jpg", "coco_1", ["one", "two"], "train"),
        Record("b.jpg", "b.jpg", ["x", "y"], "train"),
    ]
    assert read.problems == [("file.json:entry 1", "empty caption")]
    stripped = read_lavis(tmp_path / "file.json", "train", strip="v/").records
    assert [(r.image, r.image_id) for r in stripped] == [("a.jpg", "coco_1"), ("b.jpg", "b.jpg")]


READERS = {
    "coco": lambda path: read_coco(path, "x"),
    "karpathy": read_karpathy,
    "lavis": lambda path: read_lavis(path, "x"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "data",
    [
        "",
        "{",
        "[" * 100_000,
        "3",
        "[3]",
        {"images": 3},
        {"images": [3], "annotations": []},
        {"images": [{"id": 1, "file_name": 2}], "annotations": []},
        {"images": [{"id": [], "file_name": "a"}], "annotations": []},
        {"images": [{"filename": "a", "split": "x", "sentences": 3}]},
        [{"image": "a"}],
        [{"image": None, "caption": "x"}],
    ],
)
def test_another_schema_is_one_user_error(tmp_path: Path, reader: str, data: Any) -> None:
    with pytest.raises(UserError, match=r"file\.json") as caught:
        READERS[reader](dump(tmp_path, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_file_is_a_user_error(tmp_path: Path, reader: str) -> None:
    with pytest.raises(UserError, match="No such file"):
        READERS[reader](tmp_path / "none.json")


def test_token_file(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "a#1.jpg#0\tNumber # 25 .\r\nb.jpg#0\tx#1\n\nb.jpg#1\ty\tz\nb.jpg\tx\nb.jpg#k\tx\n"
        "c.jpg#0\t \nno tab#1\nb.jpg#2\tlast\u2028line",
    )
    read = read_captions(path, "all")
    assert read.records == [
        Record("a#1.jpg", "a#1.jpg", ["Number # 25 ."], "all"),
        Record("b.jpg", "b.jpg", ["x#1", "last\u2028line"], "all"),
    ]
    assert read.problems == [
        ("table:4", "malformed line: 2 tabs instead of one"),
        ("table:5", "malformed line: key 'b.jpg' is not NAME#NUMBER"),
        ("table:6", "malformed line: key 'b.jpg#k' is not NAME#NUMBER"),
        ("table:7", "empty caption"),
        ("table:8", "malformed line: 0 tabs instead of one"),
        ("c.jpg", "no caption"),
    ]


def test_csv(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        '\ufeffcaption,Image,url\n"a ""b"", c",a.jpg,u\n\nshort,a.jpg\n"two\nlines",a.jpg,u\n'
        'x,b.jpg,u\n"never closed,a.jpg,u\nlost,b.jpg,u',
    )
    read = read_captions(path, "all")
    assert read.records == [
        Record("a.jpg", "a.jpg", ['a "b", c', "two\nlines"], "all"),
        Record("b.jpg", "b.jpg", ["x"], "all"),
    ]
    assert read.problems == [
        ("table:4", "malformed line: 2 fields instead of 3"),
        ("table:8-9", "malformed line: unexpected end of data"),
    ]


def test_flickr30k_table(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "image_name| comment_number| comment\na.jpg| 0| One | two .\na.jpg| 4   Broken .\n",
    )
    read = read_captions(path, "all")
    assert read.records == [Record("a.jpg", "a.jpg", ["One | two ."], "all")]
    assert read.problems == [("table:3", "malformed line: 2 fields instead of 3")]


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        {"image": "a.jpg", "caption": "x", "image_id": {"any": 1}},
        {"image": "b.jpg", "captions": ["y", "z"]},
        {"image": "c.jpg"},
        {"caption": "whose?"},
    ]
    path = table(tmp_path, "\n".join(map(json.dumps, lines)) + "\n{\n")
    read = read_captions(path, "all")
    assert read.records == [
        Record("a.jpg", {"any": 1}, ["x"], "all"),
        Record("b.jpg", "b.jpg", ["y", "z"], "all"),
    ]
    assert [where for where, _ in read.problems] == ["table:3", "table:4", "table:5", "c.jpg"]


@pytest.mark.parametrize("text", ["", "name,text\na,b\n", "hello", b"image,caption\na,\xff\n"])
def test_no_caption_table(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(UserError, match="table"):
        read_captions(table(tmp_path, text), "x")


def test_split_lists(tmp_path: Path) -> None:
    read = read_captions(table(tmp_path, "a#0\tx\nb#0\tx\nc#0\t \n"), "")
    (tmp_path / "1").write_text("a\r\n\n d \nc")
    (tmp_path / "2").write_text("b")
    lists = [("train", tmp_path / "1"), ("val", tmp_path / "2")]
    assert [r.split for r in apply_splits(read, read_split_lists(lists)).records] == [
        "train",
        "val",
    ]
    split = apply_splits(read, read_split_lists(lists[:1]))
    assert split.problems == [
        ("table:3", "empty caption"),
        ("c", "no caption"),
        ("b", "in no split list"),
        ("d", "no caption: in the list of train"),
    ]
    (tmp_path / "2").write_text("a")
    with pytest.raises(UserError, match="a is in split train already"):
        read_split_lists(lists)


def test_real_files_agree(realdata: Path) -> None:
    folder = realdata / "flickr8k"
    token = read_captions(folder / "Flickr8k.token.txt", "")
    kaggle = read_captions(folder / "captions.txt", "")
    karpathy = read_karpathy(folder / "dataset_flickr8k.json")
    assert not token.problems + kaggle.problems + karpathy.problems
    assert len(token.records) == 760 and sum(len(r.captions) for r in token.records) == 3800
    assert token.records == kaggle.records
    splits = read_split_lists(
        (split, folder / f"Flickr_8k.{name}Images.txt")
        for split, name in (("train", "train"), ("val", "dev"), ("test", "test"))
    )
    listed = apply_splits(token, splits)
    assert len(listed.problems) == 7

    def table(records: list[Record]) -> dict[str, tuple[str, list[str]]]:
        return {r.image: (r.split, [caption.strip() for caption in r.captions]) for r in records}

    assert table(listed.records) == table(karpathy.records)


def test_hard_caption_files(realdata: Path) -> None:
    folder = realdata / "hard"
    coco = read_coco(folder / "captions_val2017_awkward.json", "val")
    raw = json.loads((folder / "captions_val2017_awkward.json").read_text())
    assert sorted(caption for record in coco.records for caption in record.captions) == sorted(
        annotation["caption"] for annotation in raw["annotations"]
    )
    token = read_captions(folder / "Flickr8k.token_awkward.txt", "x")
    assert token.records[0].image == "2258277193_586949ec62.jpg.1"
    assert not token.problems
    fused = read_captions(folder / "Flickr8k.token_fused_line.txt", "x")
    assert [where for where, _ in fused.problems] == ["Flickr8k.token_fused_line.txt:2"]
    kaggle = read_captions(folder / "captions_awkward.txt", "x")
    assert not kaggle.problems
    assert 'Young boy with a black " ADHD " t-shirt nodding off' in kaggle.records[0].captions
