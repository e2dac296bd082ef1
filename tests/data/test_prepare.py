"""blip2-prepare: what it writes, what it refuses, and that nothing gets lost on the way.

- every file of realdata/hard ends in a shard, upright and RGB, or in report.json with its reason
- official layouts, explicit files and split lists; images that are missing
- killed at any moment and run again, it gives the same bytes; another command is refused
- a worker that dies is named by its shard; the tokenizer is what transformers loads
"""

import csv
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2_train.data.index import read_index
from blip2_train.data.plan import Item, PlannedShard, plan_shards
from blip2_train.data.shards import ShardReader
from blip2_train.data.tar import RawSample
from blip2_train.data.tokenizer import train_tokenizer
from blip2_train.data.writer import claimed, write_shards
from blip2_train.errors import UserError
from blip2_train.prepare import main


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def samples(out: Path, split: str | None = None) -> list[RawSample]:
    shards = [info for info in read_index(out).values() if split in (None, info.split)]
    readers = [ShardReader(out / info.name, info) for info in shards]
    return [reader.read(i) for reader in readers for i in range(len(reader))]


def reasons(out: Path) -> dict[str, str]:
    return {entry["file"]: entry["reason"] for entry in report(out)["skipped"]}


def jpeg(colour: object = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def image_folder(folder: Path, names: list[str], captions: str | None = None) -> Path:
    """Write small images, and captions.csv unless another table is given."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg((number % 256, number // 256, 99)))
    lines = "".join(f"{name},a picture of {name}\n" for name in names)
    (folder / "captions.csv").write_text(captions or f"image,caption\n{lines}")
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """All files but the report, whose seconds differ."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("report.json", "lock")
    }


# ----------------------------------------------------------------------------- hard real inputs


def test_every_hard_image_is_stored_or_listed(realdata: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (realdata / "hard" / "images").iterdir())
    table = tmp_path / "captions.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([name, f"the file {name}"] for name in names)
    out = tmp_path / "out"
    assert (
        run(
            *("folder", "--images", realdata / "hard" / "images", "--captions", table),
            *("--out", out, "--samples-per-shard", 5, "--workers", 2),
        )
        == 0
    )
    stored = {raw.meta["image_id"]: raw for raw in samples(out)}
    assert sorted([*stored, *reasons(out)]) == names
    assert {name: reason.split(":")[0] for name, reason in reasons(out).items()} == {
        "broken_header.png": "not a readable image",
        "corrupt_header.jpg": "undecodable",
        "giant_280mp.jpg": "too large",
        "truncated.png": "undecodable",
        "truncated_large_dims.jpg": "undecodable",
        "truncated_tail.jpg": "undecodable",
    }
    assert report(out)["reasons"] == {"undecodable": 4, "not a readable image": 1, "too large": 1}
    for raw in stored.values():
        image = Image.open(io.BytesIO(raw.image))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert image.size == (raw.meta["width"], raw.meta["height"])
        assert min(image.size) <= 256 and image.getexif().get(0x0112, 1) == 1
    assert stored["exif_orientation_5.jpg"].meta["height"] == 341  # stored lying, shown standing
    for name in ("wide_coco_000000527220.jpg", "invalid_exif.jpg"):
        assert stored[name].image == (realdata / "hard" / "images" / name).read_bytes()


@pytest.mark.parametrize(
    ("command", "file", "count", "problems"),
    [
        ("coco", "captions_val2017_awkward.json", 40, []),
        ("flickr8k", "Flickr8k.token_awkward.txt", 7, []),
        ("flickr8k", "Flickr8k.token_fused_line.txt", 2, ["Flickr8k.token_fused_line.txt:2"]),
        ("flickr8k", "captions_awkward.txt", 9, []),
        ("folder", "captions_awkward.txt", 9, []),
    ],
)
def test_hard_caption_files(
    realdata: Path, tmp_path: Path, command: str, file: str, count: int, problems: list[str]
) -> None:
    path = realdata / "hard" / file
    args = (command, "--captions", path, "--images", tmp_path, "--split", "val", "--workers", 1)
    assert run(*args, "--out", tmp_path / "none") == 2  # the images are not there
    missing = [name for name, reason in reasons(tmp_path / "none").items() if reason == "missing"]
    assert len(missing) == count
    assert "none of the" in report(tmp_path / "none")["error"]
    for name in missing[:-1]:
        (tmp_path / name).write_bytes(jpeg())
    assert run(*args, "--out", tmp_path / "out") == 0
    stored = samples(tmp_path / "out")
    assert len(stored) == count - 1 == report(tmp_path / "out")["splits"]["val"]["samples"]
    assert sorted(reasons(tmp_path / "out")) == sorted([*problems, missing[-1]])
    text = path.read_text()
    for caption in (caption for raw in stored for caption in raw.meta["captions"]):
        assert json.dumps(caption)[1:-1] in text or caption.replace('"', '""') in text


# ----------------------------------------------------------------------------- official layouts


def test_flickr8k_layouts_agree(realdata: Path, tmp_path: Path) -> None:
    source = realdata / "flickr8k"
    out = tmp_path / "a"
    assert run("flickr8k", source, "--out", out, "--tokenizer", 600, "--workers", 2) == 0
    assert {split: counts["samples"] for split, counts in report(out)["splits"].items()} == {
        "train": 577,
        "val": 88,
        "test": 88,
    }
    assert report(out)["reasons"] == {"in no split list": 7}
    for raw in samples(out, "test"):
        assert raw.image == (source / "Images" / raw.meta["image_id"]).read_bytes()
        assert len(raw.meta["captions"]) == 5 and raw.meta["source"] == "flickr8k"
    # The official archives: other folder names, same shards.
    official = tmp_path / "official"
    (official / "Flickr8k_Dataset").mkdir(parents=True)
    (official / "Flickr8k_Dataset" / "Flicker8k_Dataset").symlink_to(source / "Images")
    shutil.copytree(
        source, official / "Flickr8k_text", ignore=shutil.ignore_patterns("Images", "*.json")
    )
    assert run("flickr8k", official, "--out", tmp_path / "b", "--workers", 2) == 0
    assert read_index(tmp_path / "b") == read_index(out)


def test_coco_layout(realdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("coco", realdata / "coco", "--out", tmp_path / "a", "--workers", 1) == 0
    assert {s: c["samples"] for s, c in report(tmp_path / "a")["splits"].items()} == {
        "train": 60,
        "val": 146,
    }
    assert not report(tmp_path / "a")["skipped"]
    image_id = samples(tmp_path / "a", "val")[0].meta["image_id"]
    assert (realdata / "coco" / "val2017" / f"{image_id:012d}.jpg").exists()
    # By its parts: the split is in the file's name.
    val = realdata / "coco" / "annotations" / "captions_val2017.json"
    parts = ("--annotations", val, "--images", realdata / "coco" / "val2017")
    assert run("coco", *parts, "--out", tmp_path / "b", "--workers", 1) == 0
    (shard,) = read_index(tmp_path / "b").values()
    assert shard == read_index(tmp_path / "a")[shard.name]
    assert run("coco", realdata / "coco", "--year", 2014, "--out", tmp_path / "c") == 2
    assert "captions_{train,val}2014.json" in capsys.readouterr().err


def test_karpathy_and_lavis(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", ["v/a.jpg", "v/b.jpg"])

    def entry(name: str, split: str) -> dict:
        words = [{"raw": f"picture {name}"}]
        return {"filepath": "v", "filename": name, "split": split, "sentences": words, "cocoid": 5}

    data = {"images": [entry("a.jpg", "restval"), entry("b.jpg", "test")]}
    (folder / "dataset_coco.json").write_text(json.dumps(data))
    assert run("karpathy", folder, "--out", tmp_path / "k", "--workers", 1) == 0
    assert sorted(read_index(tmp_path / "k")) == ["test-000000.tar", "train-000000.tar"]
    lists = [folder / "coco_karpathy_train.json", folder / "coco_karpathy_val.json"]
    lists[0].write_text(json.dumps([{"image": "v/a.jpg", "caption": c} for c in ("one", "two")]))
    lists[1].write_text(json.dumps([{"image": "v/b.jpg", "caption": ["x"]}]))
    args = ("--images", folder, "--out", tmp_path / "l", "--workers", 1)
    assert run("lavis", "--annotations", *lists, *args) == 0
    (train,) = samples(tmp_path / "l", "train")
    assert train.meta["captions"] == ["one", "two"] and train.meta["image_id"] == "v/a.jpg"


def test_split_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "data", [f"{number}.jpg" for number in range(4)])
    (tmp_path / "one").write_text("1.jpg\n3.jpg\n")
    (tmp_path / "two").write_text("0.jpg")
    lists = (f"train={tmp_path / 'one'}", f"val={tmp_path / 'two'}")
    out = tmp_path / "out"
    assert run("folder", folder, "--split-list", *lists, "--out", out, "--workers", 1) == 0
    assert [raw.meta["image_id"] for raw in samples(out, "train")] == ["1.jpg", "3.jpg"]
    assert reasons(out) == {"2.jpg": "in no split list"}
    with pytest.raises(SystemExit):  # argparse
        run("folder", folder, "--split", "x", "--split-list", *lists, "--out", out)
    flickr = ("flickr30k", "--captions", folder / "captions.csv", "--images", folder)
    assert run(*flickr, "--out", tmp_path / "f") == 2
    assert "--split-list" in capsys.readouterr().err


# ------------------------------------------------------------------------- what is not as it was


def test_missing_and_outside_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a.jpg", "sub/b.jpg", "gone.jpg", "no/c.jpg", "../secret.jpg", "é.jpg"]
    folder = image_folder(tmp_path / "data", names)
    (folder / "gone.jpg").unlink()
    shutil.rmtree(folder / "no")
    (folder / "no").write_text("a file, not a folder")
    assert run("folder", folder, "--out", tmp_path / "out", "--workers", 1) == 0
    assert "3 of the 6 images" in capsys.readouterr().err
    assert reasons(tmp_path / "out") == {
        "gone.jpg": "missing",
        "no/c.jpg": "missing",
        "../secret.jpg": "outside the image folder",
    }
    ids = [raw.meta["image_id"] for raw in samples(tmp_path / "out")]
    assert ids == ["a.jpg", "sub/b.jpg", "é.jpg"]


def test_captions_of_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "data", ["a.jpg"], "image,caption\nx.jpg,one\ny.jpg,\n")
    out = tmp_path / "out"
    assert run("folder", folder, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: none of the 1 images") and "x.jpg" in error
    assert str(folder / "captions.csv") in error and str(folder) in error
    assert reasons(out) == {
        "captions.csv:3": "empty caption",
        "y.jpg": "no caption",
        "x.jpg": "missing",
    }
    # Put right, the same folder can be used.
    image_folder(tmp_path / "data", ["a.jpg"])
    assert run("folder", folder, "--out", out, "--workers", 1) == 0
    assert "error" not in report(out)


def test_bad_and_empty_shards_keep_the_others_in_place(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(6)]
    folder = image_folder(tmp_path / "data", names)
    args = ("folder", folder, "--samples-per-shard", 2, "--workers", 1, "--out")
    assert run(*args, tmp_path / "a") == 0
    for number in (2, 3, 4):
        (folder / names[number]).write_bytes(b"no image")
    assert run(*args, tmp_path / "b") == 0
    a, b = read_index(tmp_path / "a"), read_index(tmp_path / "b")
    assert sorted(b) == ["train-000000.tar", "train-000002.tar"]  # the second has no sample
    assert a["train-000000.tar"] == b["train-000000.tar"]
    assert [raw.key for raw in samples(tmp_path / "b")] == [
        "00000000_0",
        "00000001_1",
        "00000005_5",
    ]
    assert report(tmp_path / "b")["splits"]["train"] == {
        "records": 6,
        "samples": 3,
        "captions": 3,
        "shards": 2,
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["folder"], "give ROOT"),
        (["folder", "nowhere"], "no caption file"),
        (["lavis", "nowhere"], "--annotations"),
        (["karpathy", "nowhere"], "dataset"),
        (["coco", "--annotations", "captions.json"], "give ROOT"),
        (["coco", "--annotations", "captions.json", "--images", "."], "which split"),
        (["coco", "--annotations", "val=captions.json", "--images", "."], "No such file"),
        (["flickr8k", "--captions", "x=captions.json", "--images", "."], "--split here"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert run(*args, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_split_cannot_leave_the_folder(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", ["a.jpg"])
    assert run("folder", folder, "--split", "../x", "--out", tmp_path / "out") == 2


# ------------------------------------------------------------------------- restart, other folders


def test_killed_and_run_again(tmp_path: Path) -> None:
    names = [f"{number:03d}.jpg" for number in range(240)]
    folder = image_folder(tmp_path / "data", names)
    (folder / names[100]).write_bytes(b"bad")
    args = ["folder", folder, "--samples-per-shard", 10, "--workers", 2, "--tokenizer", 50]
    assert run(*args, "--out", tmp_path / "whole") == 0
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "blip2_train.prepare", *map(str, args), "--out", str(out)]
    codes = []
    for tars in (1, 9):  # killed twice, each time with about this many shards on the disk
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while len(list(out.glob("*.tar"))) < tars and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        workers = []
        if process.poll() is None:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        codes.append(process.wait())
        while any(Path(f"/proc/{pid}").exists() for pid in workers):  # a file may be half written
            assert time.monotonic() < deadline + 20
            time.sleep(0.01)
    assert -signal.SIGKILL in codes  # it may be done before the second
    (out / ".train-000099.tar.1.tmp").write_bytes(b"left over")
    assert run(*args, "--out", out) == 0
    found = contents(out)
    plan = str(Path(".prepare") / "plan.json")
    assert (
        json.loads(found.pop(plan))["fingerprint"] == json.loads(expected.pop(plan))["fingerprint"]
    )
    assert found == expected
    assert report(out)["skipped"] == report(tmp_path / "whole")["skipped"]
    # Finished: again is quick, and a shard that was lost is made again.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "train-000003.tar").unlink()
    assert run(*args, "--out", out) == 0
    changed = [path.name for path in before if path.stat().st_mtime_ns != before[path]]
    assert changed == ["train-000003.tar"]
    assert (out / "train-000003.tar").read_bytes() == expected["train-000003.tar"]


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    code = f"""
import functools, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_prepare import make_slowly, write_items
if __name__ == "__main__":
    write_items(Path({str(tmp_path / "out")!r}), make_slowly, workers=2)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    pids: list[int] = []
    deadline = time.monotonic() + 20
    while len(pids) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        pids = [int(path.name.split(".")[-2]) for path in (tmp_path / "out").glob(".*.tar.*.tmp")]
        time.sleep(0.01)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and Path("/proc").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "data", ["a.jpg", "b.jpg"])
    out = tmp_path / "out"
    args = ("folder", folder, "--out", out, "--workers", 1)
    assert run(*args) == 0
    before = contents(out)
    assert run(*args, "--resize", 100) == 2
    assert "made by: blip2-prepare folder" in capsys.readouterr().err
    (folder / "b.jpg").unlink()
    assert run(*args) == 2  # other inputs, too
    assert contents(out) == before
    assert run("folder", folder, "--out", folder, "--workers", 1) == 2
    assert "other data" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "captions.csv"]


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "data", ["a.jpg"])
    (tmp_path / "file").touch()
    assert run("folder", folder, "--out", tmp_path / "file") == 2
    assert run("folder", folder, "--out", tmp_path / "file" / "out") == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_recipes_may_be_where_the_shards_go(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", ["a.jpg"])
    (tmp_path / "README.md").write_text("data/<name>/README.md is tracked")
    assert run("folder", folder, "--out", tmp_path, "--workers", 1) == 2  # "data" is not ours
    (tmp_path / "data").rename(tmp_path.parent / f"{tmp_path.name}-data")
    assert run("folder", f"{tmp_path}-data", "--out", tmp_path, "--workers", 1) == 0


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = pytest.raises(UserError, match="another blip2-prepare")
    with claimed(out, "x", "command"), refused, claimed(out, "x", "command"):
        pass


# ----------------------------------------------------------------------------- workers that fail


def make_slowly(item: Item) -> tuple[bytes, dict]:
    time.sleep(0.05)
    return jpeg(), {"image_id": item.key, "captions": ["x"]}


def make_or_die(item: Item, key: str, flag: str = "") -> tuple[bytes, dict]:
    if item.key == key and (not flag or not os.path.exists(flag)):
        if flag:
            Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return jpeg(), {"image_id": item.key, "captions": ["x"]}


def make_on_full_disk(item: Item) -> tuple[bytes, dict]:
    raise OSError(28, "No space left on device")


def write_items(out: Path, make: object, workers: int) -> list:
    items = [("train", Item(f"{k:03d}", f"file {k}", ["x"], None)) for k in range(60)]
    shards, fingerprint = plan_shards(items, 10, {})
    with claimed(out, fingerprint, "command"):
        return write_shards(
            out,
            shards,
            make,  # type: ignore[arg-type]
            fingerprint=fingerprint,
            command="command",
            workers=workers,
            done=lambda count: None,
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dying_worker_is_named_by_its_shard(tmp_path: Path, workers: int) -> None:
    make = functools.partial(make_or_die, key="034")
    with pytest.raises(UserError, match=r"train-000003\.tar was killed"):
        write_items(tmp_path / "out", make, workers)
    assert (tmp_path / "out" / "train-000000.tar").exists()


def test_a_worker_that_died_once_is_made_good(tmp_path: Path) -> None:
    make = functools.partial(make_or_die, key="034", flag=str(tmp_path / "flag"))
    written = write_items(tmp_path / "out", make, 2)
    assert [result.shard.samples for result in written] == [10] * 6


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No space left.*again"):
        write_items(tmp_path / "out", make_on_full_disk, 1)


def test_the_plan_does_not_depend_on_what_is_skipped() -> None:
    def plan(skip: str | None) -> list[PlannedShard]:
        items = [("val" if k % 3 else "train", Item(str(k), "", [], k, skip)) for k in range(10)]
        return plan_shards(items, 3, {})[0]

    def names(shards: list[PlannedShard]) -> list:
        return [(shard.name, [item.key for item in shard.items]) for shard in shards]

    assert names(plan(None)) == names(plan("missing"))
    assert names(plan(None)) == [
        ("train-000000.tar", ["0", "3", "6"]),
        ("train-000001.tar", ["9"]),
        ("val-000000.tar", ["1", "2", "4"]),
        ("val-000001.tar", ["5", "7", "8"]),
    ]


# ----------------------------------------------------------------------------- tokenizer, startup


def test_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertTokenizerFast

    captions = ["A dog; a RED dog!", "two dogs (running)", "a red ball, naïve"] * 3
    size = train_tokenizer(tmp_path / "tok", captions, 40)
    assert size == 40
    for kind in (AutoTokenizer, BertTokenizerFast):
        tokenizer = kind.from_pretrained(tmp_path / "tok")
        assert len(tokenizer) == size
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert tokenizer.convert_ids_to_tokens(list(range(5))) == special
        assert sorted(tokenizer.all_special_tokens) == sorted(special)
        ids = tokenizer("A Red Dog").input_ids
        assert (ids[0], ids[-1]) == (2, 3) and 1 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a red dog"
        assert tokenizer("q").input_ids == [2, 1, 3]
    vocabulary = Counter((tmp_path / "tok" / "vocab.txt").read_text().split())
    assert max(vocabulary.values()) == 1 and "dog" in vocabulary and ";" not in vocabulary
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(tmp_path / "small", captions, 10)


def test_tokenizer_is_the_same_in_every_process(realdata: Path, tmp_path: Path) -> None:
    table = realdata / "flickr8k" / "Flickr8k.token.txt"
    code = f"""
import sys
from pathlib import Path
from blip2_train.data.tables import read_captions
from blip2_train.data.tokenizer import train_tokenizer
records = read_captions(Path({str(table)!r}), "").records
train_tokenizer(Path(sys.argv[1]), [text for r in records for text in r.captions], 1000)
"""
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_start_is_quick_and_torch_stays_out(tmp_path: Path) -> None:
    args = ["synthetic", "--samples", "20", "--held-out", "4", "--size", "32", "--workers", "1"]
    args += ["--tokenizer", "200"]
    code = f"""
import sys
from blip2_train.prepare import main
assert main({[*args, "--out", str(tmp_path / "out")]!r}) == 0
print([name for name in ("torch", "transformers", "webdataset") if name in sys.modules])
"""
    script = f"if __name__ == '__main__':\n    exec({code!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stderr
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "blip2_train.prepare", "--help"], check=True)
    assert time.monotonic() - start < 2


def test_index_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert (
        run(
            "synthetic",
            "--samples",
            30,
            "--held-out",
            6,
            "--size",
            32,
            "--out",
            out,
            "--workers",
            1,
        )
        == 0
    )
    assert run("verify", out) == 0
    written = (out / "index.json").read_bytes()
    (out / "index.json").unlink()
    assert run("verify", out) == 2
    assert run("index", out) == 0
    assert (out / "index.json").read_bytes() == written
    data = (out / "val-000000.tar").read_bytes()
    (out / "val-000000.tar").write_bytes(data[:-600])
    assert run("verify", out) == 1
    (out / "val-000000.tar").write_bytes(data[:600])
    assert run("index", out) == 1
    assert "val-000000.tar" in capsys.readouterr().err
    others = [f"{split}-000000.tar" for split in ("compositional", "novel", "text", "train")]
    assert list(read_index(out)) == others
    assert np.load(out / "train-000000.tar.offsets.npy", allow_pickle=False).shape == (30, 2)
