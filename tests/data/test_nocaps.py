"""NoCaps and test splits in shards: numbers and domains are kept, images without captions too.

- val with captions and domains, test without either, in the layouts that people have
- COCO's image list of test is kept; an image of val that no one captioned is listed
- what is missing or of another schema is one sentence
"""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip2_train.data.index import read_index
from blip2_train.data.shards import ShardReader
from blip2_train.prepare import main

DOMAINS = ["in-domain", "near-domain", "out-domain"]


def info(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "file_name": f"{number:04x}.jpg",
        "open_images_id": f"{number:04x}",
        **more,
    }


def nocaps(root: Path, folders: str = "{split}") -> Path:
    """Images 0 to 2 of val with two captions each, images 8 and 9 of test."""
    captions = [
        {"id": 10 * n + k, "image_id": n, "caption": f"Caption {k}\nof {n}."}
        for n in range(3)
        for k in range(2)
    ]
    images = [info(n, domain=DOMAINS[n]) for n in range(3)]
    root.mkdir(parents=True)
    (root / "nocaps_val_4500_captions.json").write_text(
        json.dumps({"images": images, "annotations": captions})
    )
    tests = {"images": [info(n) for n in (8, 9)], "licenses": []}
    (root / "nocaps_test_image_info.json").write_text(json.dumps(tests))
    for split, numbers in {"val": range(3), "test": (8, 9)}.items():
        folder = root / folders.format(split=split)
        folder.mkdir(parents=True, exist_ok=True)
        for n in numbers:
            Image.new("RGB", (20, 16), (9 * n, 0, 0)).save(folder / f"{n:04x}.jpg")
    return root


def samples(folder: Path, split: str) -> list[dict[str, Any]]:
    index = read_index(folder)
    readers = [
        ShardReader(folder / n, i, need_captions=False)
        for n, i in index.items()
        if i.split == split
    ]
    return [reader.read(n).meta for reader in readers for n in range(len(reader))]


def refused(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("folders", ["{split}", "images/{split}", "images", "."])
def test_both_splits(tmp_path: Path, folders: str) -> None:
    root = nocaps(tmp_path / "nocaps", folders)
    assert main(["nocaps", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    val, test = (samples(tmp_path / "out", split) for split in ("val", "test"))
    assert [(s["image_id"], s["domain"]) for s in val] == list(enumerate(DOMAINS))
    assert val[1]["captions"] == ["Caption 0\nof 1.", "Caption 1\nof 1."]
    assert [s["image_id"] for s in test] == [8, 9]
    assert all(s["captions"] == [] and "domain" not in s for s in test)
    assert all(s["source"] == "nocaps" for s in [*val, *test])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["splits"]["val"]["captions"] == 6 and report["splits"]["test"]["samples"] == 2


def test_files_by_name(tmp_path: Path) -> None:
    root = nocaps(tmp_path / "nocaps", "all")
    (root / "nocaps_val_4500_captions.json").rename(root / "mine.json")
    words = ["nocaps", "--annotations", f"held={root / 'mine.json'}", "--images", str(root / "all")]
    assert main([*words, "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert [s["domain"] for s in samples(tmp_path / "out", "held")] == DOMAINS


def test_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = nocaps(tmp_path / "nocaps")
    for name in ("nocaps_val_4500_captions.json", "nocaps_test_image_info.json"):
        (root / name).rename(root / f"old_{name}")
    out = tmp_path / "out"
    assert "has no file of NoCaps, looked for" in refused(["nocaps", root, "--out", out], capsys)
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"images": [info(1, domain=3)]}))
    words = ["nocaps", root, "--annotations", path, "--out", out]
    assert '"domain" is 3, not a name' in refused(words, capsys)


def test_coco_without_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for n in (1, 2):
        Image.new("RGB", (20, 16)).save(images / f"{n:04x}.jpg")
    path = tmp_path / "image_info_test2014.json"
    path.write_text(json.dumps({"images": [info(1), info(2)]}))
    words = ["coco", "--annotations", path, "--images", images, "--workers", 1, "--out"]
    assert main([*map(str, words), str(tmp_path / "out")]) == 0
    assert [s["captions"] for s in samples(tmp_path / "out", "test")] == [[], []]
    # of another split, that is a file of another schema
    words[2] = f"val={path}"
    assert '"annotations" should be a list' in refused([*words, tmp_path / "val"], capsys)
    # an image that no one captioned, among others
    captions = [{"image_id": 2, "caption": "two"}]
    path.write_text(json.dumps({"images": [info(1), info(2)], "annotations": captions}))
    words[2] = path
    assert main([*map(str, words), str(tmp_path / "some")]) == 0
    assert [s["captions"] for s in samples(tmp_path / "some", "test")] == [["two"]]
    report = json.loads((tmp_path / "some" / "report.json").read_text())
    assert "no caption" in json.dumps(report)
