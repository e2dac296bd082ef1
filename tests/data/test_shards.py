"""Shards: what is written is read back by us and by webdataset, and nothing bad gets through.

- the same samples give the same bytes, mtime 0; offsets make any sample one read
- a cut, damaged, swapped or missing file is a ShardError that names it
- a bad sample is a SampleError with its reason, and leaves its neighbours readable
- shards of other tools are read; links, devices and unknown extensions are never looked at
- no bytes at all make the reader raise anything else
"""

import contextlib
import io
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2_train.data import tar as tar_module
from blip2_train.data.check import index_folder, verify_folder
from blip2_train.data.index import ShardInfo, read_index, split_of, write_index
from blip2_train.data.shards import ShardError, ShardReader, offsets_path, scan_tar, write_shard
from blip2_train.data.tar import SampleError, _header
from blip2_train.errors import UserError


def sample(number: int) -> dict:
    meta = {"image_id": number, "captions": [f"caption {number}", "é"], "source": "test"}
    return {"__key__": f"{number:08d}_x", "jpg": bytes([number]) * (100 * number + 1), "json": meta}


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, ShardInfo]:
    path = tmp_path / "train-000000.tar"
    return path, write_shard(path, [sample(number) for number in range(7)])


def foreign(folder: Path, members: list[tuple[str, bytes]], **header: object) -> ShardReader:
    """Write a tar as another tool would, index it, and open its only shard."""
    path = folder / "00000.tar"
    with tarfile.open(path, "w", **header) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (info,), bad = index_folder(folder, None)
    assert not bad
    return ShardReader(path, info)


def reason(reader: ShardReader, i: int = 0) -> str:
    with pytest.raises(SampleError) as caught:
        reader.read(i)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    return caught.value.reason


def test_round_trip(shard: tuple[Path, ShardInfo]) -> None:
    reader = ShardReader(*shard)
    assert len(reader) == 7
    for number in (6, 0, 3):
        raw = reader.read(number)
        assert raw.key == f"{number:08d}_x"
        assert raw.image == sample(number)["jpg"]
        assert raw.meta == sample(number)["json"]
    with pytest.raises(IndexError):
        reader.read(7)
    with pytest.raises(IndexError):
        reader.read(-1)
    reader.close()


def test_pickled_reader_reads(shard: tuple[Path, ShardInfo]) -> None:
    reader = ShardReader(*shard)
    reader.read(0)
    assert pickle.loads(pickle.dumps(reader)).read(5) == reader.read(5)


def test_same_samples_same_bytes(shard: tuple[Path, ShardInfo], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    info = write_shard(other / shard[0].name, [sample(number) for number in range(7)])
    assert info == shard[1]
    assert (other / shard[0].name).read_bytes() == shard[0].read_bytes()
    assert (info.bytes, info.split) == (shard[0].stat().st_size, "train")
    with tarfile.open(shard[0]) as tar:
        assert all(member.mtime == member.uid == member.gid == 0 for member in tar)


def test_webdataset_reads_it(shard: tuple[Path, ShardInfo]) -> None:
    import webdataset

    read = list(webdataset.WebDataset(str(shard[0]), shardshuffle=False))
    assert [entry["__key__"] for entry in read] == [f"{number:08d}_x" for number in range(7)]
    assert read[3]["jpg"] == sample(3)["jpg"]
    assert json.loads(read[3]["json"]) == sample(3)["json"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def samples():
        yield sample(1)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "train-000000.tar", samples())
    assert list(tmp_path.iterdir()) == []


def test_index_round_trip(shard: tuple[Path, ShardInfo], tmp_path: Path) -> None:
    write_index(tmp_path, [shard[1]])
    assert read_index(tmp_path) == {shard[1].name: shard[1]}
    assert json.loads((tmp_path / "index.json").read_text())[shard[1].name].keys() == {
        "split",
        "samples",
        "bytes",
        "sha256",
    }


GOOD = {"split": "train", "samples": 1, "bytes": 10, "sha256": "0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "blip2-prepare index"),
        ("{", "JSON"),
        ("[]", "object"),
        ('{"a.tar": 3}', "object"),
        (json.dumps({"../a.tar": GOOD}), "plain file name"),
        (json.dumps({"a.tar": {**GOOD, "samples": -1}}), "samples"),
        (json.dumps({"a.tar": {**GOOD, "bytes": True}}), "bytes"),
        (json.dumps({"a.tar": {"split": "train"}}), "samples"),
    ],
)
def test_bad_index_is_a_user_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_index(tmp_path)


def test_split_of() -> None:
    assert split_of("val-000012.tar") == "val"
    assert split_of("00012.tar") is None


@pytest.mark.parametrize("keep", [0, 100, 512, 1000, 3000, 5120])
def test_cut_tar_is_not_scanned(shard: tuple[Path, ShardInfo], keep: int) -> None:
    data = shard[0].read_bytes()
    shard[0].write_bytes(data[:keep])
    with pytest.raises(ShardError, match=r"train-000000\.tar"):
        scan_tar(shard[0])


def test_tar_without_end_marker_is_not_scanned(shard: tuple[Path, ShardInfo]) -> None:
    end = int(ShardReader(*shard).offsets[-1, 1])
    shard[0].write_bytes(shard[0].read_bytes()[:end])
    with pytest.raises(ShardError, match="end marker"):
        scan_tar(shard[0])


def test_damaged_header_is_not_the_end(shard: tuple[Path, ShardInfo]) -> None:
    offsets = ShardReader(*shard).offsets
    data = bytearray(shard[0].read_bytes())
    data[int(offsets[3, 0]) + 10] ^= 0xFF
    shard[0].write_bytes(data)
    with pytest.raises(ShardError):
        scan_tar(shard[0])
    reader = ShardReader(*shard)
    assert reader.read(2).key == "00000002_x"
    with pytest.raises(ShardError, match="sample 3"):
        reader.read(3)


def test_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(ShardError, match="uncompressed"):
        scan_tar(tmp_path / "a.tar")


def test_negative_size_does_not_loop(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.pax_headers = {"size": "-5120"}
    blob = member.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(blob + bytes(10240))
    with pytest.raises(ShardError):
        scan_tar(tmp_path / "a.tar")


def test_reader_checks_the_shard_before_the_first_read(shard: tuple[Path, ShardInfo]) -> None:
    path, info = shard
    name = path.name

    def fails(message: str, info: ShardInfo = info) -> None:
        with pytest.raises(ShardError, match=message) as caught:
            ShardReader(path, info).read(0)
        assert name in str(caught.value)

    fails("size|bytes", ShardInfo(name, "train", 7, info.bytes + 1, info.sha256))
    fails("offsets", ShardInfo(name, "train", 6, info.bytes, info.sha256))
    offsets = np.load(offsets_path(path))
    np.save(offsets_path(path), offsets * 1000)
    fails("impossible")
    np.save(offsets_path(path), np.array([print] * 7, dtype=object), allow_pickle=True)
    fails("damaged: object")
    np.save(offsets_path(path), offsets)
    path.write_bytes(path.read_bytes()[:-1])
    fails("bytes")
    path.unlink()
    fails("does not exist")
    offsets_path(path).unlink()
    fails("offsets")


def test_shifted_offsets_are_noticed(shard: tuple[Path, ShardInfo]) -> None:
    offsets = np.load(offsets_path(shard[0]))
    np.save(offsets_path(shard[0]), offsets + 512)
    with pytest.raises(ShardError):
        ShardReader(*shard).read(2)
    np.save(offsets_path(shard[0]), np.stack([offsets[:, 0], np.roll(offsets[:, 1], -1)], 1))
    with pytest.raises(ShardError):
        ShardReader(*shard).read(2)


def test_foreign_shards(tmp_path: Path) -> None:
    img2dataset = {"caption": "from json", "url": "https://x", "status": "success"}
    reader = foreign(
        tmp_path,
        [
            ("README", b"no sample"),
            ("0/000.jpg", b"A"),
            ("0/000.txt", b"from text"),
            ("0/000.json", json.dumps(img2dataset).encode()),
            ("1/000.PNG", b"B"),
            ("1/000.cls", b"7"),
            ("1/000.txt", "\ufeffonly text é".encode()),
            ("1/001.webp", b"C"),
            ("1/001.json", b'{"captions": [" ", "kept"]}'),
            ("a" * 150 + ".jpg", b"D"),  # a long name has a header of its own
            ("a" * 150 + ".json", b'{"caption": null}'),
            ("a" * 150 + ".txt", b"fallback"),
        ],
    )
    read = [reader.read(i) for i in range(len(reader))]
    assert [(raw.key[:5], raw.image) for raw in read] == [
        ("0/000", b"A"),
        ("1/000", b"B"),
        ("1/001", b"C"),
        ("aaaaa", b"D"),
    ]
    assert [raw.meta["captions"] for raw in read] == [
        ["from json"],
        ["only text é"],
        ["kept"],
        ["fallback"],
    ]
    assert read[0].meta["url"] == "https://x"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.json", b'{"caption": "x"}')], "no image"),
        ([("a.jpg", b""), ("a.txt", b"x")], "no image"),
        ([("a.jpg", b"x")], "no captions"),
        ([("a.jpg", b"x"), ("a.json", b'{"captions": [" "]}')], "no captions"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "bad json"),
        ([("a.jpg", b"x"), ("a.json", b"[1]")], "bad json: not an object"),
        ([("a.jpg", b"x"), ("a.json", b"[" * 100_000)], "bad json"),
        ([("a.jpg", b"x"), ("a.json", b'{"captions": [3]}')], "captions are not text"),
        ([("a.jpg", b"x"), ("a.json", b'{"caption": "\\ud800"}')], "captions are not text"),
        *(
            (
                [("a.jpg", b"x"), ("a.json", b'{"caption": "x", "caption_weights": %s}' % weights)],
                "caption_weights are not one number of at least 0 per caption",
            )
            for weights in (b"[]", b"[1, 2]", b"[-1]", b"[NaN]", b"[true]", b"[1e400]", b"7")
        ),
        ([("a.jpg", b"x"), ("a.txt", b"\xff")], "txt is not UTF-8"),
        ([("a.jpg", b"x"), ("a.json", b"\xff")], "json is not UTF-8"),
        ([("a.jpg", b"x"), ("a.jpg", b"y")], "two jpg members"),
    ],
)
def test_bad_samples(tmp_path: Path, members: list[tuple[str, bytes]], expected: str) -> None:
    reader = foreign(tmp_path, [*members, ("b.jpg", b"good"), ("b.txt", b"good")])
    assert reason(reader) == expected
    assert reader.read(1).image == b"good"


def test_oversized_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_module, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(tar_module, "MAX_TEXT_BYTES", 1000)
    reader = foreign(tmp_path, [("a.jpg", bytes(1001)), ("a.txt", b"x")])
    assert reason(reader) == "oversized: jpg member"
    reader = foreign(tmp_path, [("a.jpg", b"x"), ("a.txt", b"x" * 1001)])
    assert reason(reader) == "oversized: txt member"


def test_a_huge_sample_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = 100 * 2**20
        file.write(member.tobuf())
        file.seek(member.size, 1)  # a hole, no bytes on the disk
        tar.offset = file.tell()
    (info,), _ = index_folder(tmp_path, None)
    assert reason(ShardReader(path, info)).startswith("oversized")


def test_links_and_devices_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("a.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("a.webp")
        member.type = tarfile.CHRTYPE
        tar.addfile(member)
        member = tarfile.TarInfo("a.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    (info,), _ = index_folder(tmp_path, None)
    assert info.samples == 1
    assert reason(ShardReader(path, info)) == "no image"


def test_random_damage_raises_only_our_errors(shard: tuple[Path, ShardInfo]) -> None:
    original = shard[0].read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.randrange(1, 20)):
            # Half of the damage in headers, where it does harm.
            start = rng.randrange(0, len(data), 512)
            data[min(len(data) - 1, start + rng.randrange(512))] = rng.randrange(256)
        shard[0].write_bytes(data)
        with contextlib.suppress(ShardError):
            scan_tar(shard[0])
        reader = ShardReader(*shard)
        for i in range(len(reader)):
            with contextlib.suppress(ShardError, SampleError):
                reader.read(i)
        reader.close()


def test_index_and_verify(tmp_path: Path) -> None:
    for name in ("train-000000.tar", "val-000000.tar", "extra.tar"):
        write_shard(tmp_path / name, [sample(1), sample(2)])
        offsets_path(tmp_path / name).unlink()
    (tmp_path / "cut.tar").write_bytes((tmp_path / "extra.tar").read_bytes()[:700])
    shards, bad = index_folder(tmp_path, None)
    assert [(shard.name, shard.split, shard.samples) for shard in shards] == [
        ("extra.tar", "train", 2),
        ("train-000000.tar", "train", 2),
        ("val-000000.tar", "val", 2),
    ]
    assert len(bad) == 1 and "cut.tar" in bad[0]
    assert verify_folder(tmp_path) == (3, [f"{tmp_path / 'cut.tar'} is not in the index"])
    (tmp_path / "cut.tar").unlink()
    assert verify_folder(tmp_path) == (3, [])

    data = bytearray((tmp_path / "extra.tar").read_bytes())
    data[600] ^= 1  # inside an image
    (tmp_path / "extra.tar").write_bytes(data)
    np.save(offsets_path(tmp_path / "train-000000.tar"), np.zeros((2, 2), dtype=np.int64))
    (tmp_path / "val-000000.tar").unlink()
    count, bad = verify_folder(tmp_path)
    assert count == 3
    assert all(
        word in message for word, message in zip(("SHA", "offsets", "exist"), bad, strict=True)
    )


def test_indexing_goes_on_where_it_was_and_gives_the_same_in_any_number_of_processes(
    tmp_path: Path,
) -> None:
    for number in range(3):
        write_shard(tmp_path / f"train-00000{number}.tar", [sample(number), sample(number + 9)])
        offsets_path(tmp_path / f"train-00000{number}.tar").unlink()
    path, other = tmp_path / "train-000000.tar", tmp_path / "train-000001.tar"
    assert index_folder(tmp_path, None, workers=2)[1] == []
    index = (tmp_path / "index.json").read_bytes()
    assert verify_folder(tmp_path, workers=2) == (3, [])

    # A tar of the same size and time is not read again ...
    data, stat = path.read_bytes(), path.stat()
    path.write_bytes(b"x" * len(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "index.json").unlink()
    assert index_folder(tmp_path, None)[1] == [] and (tmp_path / "index.json").read_bytes() == index
    assert verify_folder(tmp_path)[1] == [f"{path} has another SHA-256 than the index says"]
    path.write_bytes(data)
    # ... one that was changed is, and so is one whose offsets or entry are lost.
    write_shard(other, [sample(7)])
    offsets_path(path).unlink()
    (tmp_path / ".index" / "train-000002.tar.json").write_text("{")
    shards, bad = index_folder(tmp_path, None)
    assert [shard.samples for shard in shards] == [2, 1, 2] and not bad
    assert verify_folder(tmp_path) == (3, [])


def test_a_folder_without_tars_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar"):
        index_folder(tmp_path, None)
    (tmp_path / "a.tar").write_bytes(b"x" * 600)
    with pytest.raises(UserError, match="can be read"):
        index_folder(tmp_path, None)


@given(
    name=st.one_of(
        st.text("ab/.\u00e4", min_size=1, max_size=120), st.just("k.jpg"), st.just("a/")
    ),
    size=st.one_of(st.integers(0, 2**40), st.just(0)),
    kind=st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]),
    layout=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=2),
    mend=st.booleans(),
)
@settings(max_examples=500)
def test_a_header_is_read_as_tarfile_reads_it(name, size, kind, layout, changes, mend):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    try:
        block = bytearray(member.tobuf(layout, "utf-8", "surrogateescape")[-512:])
    except ValueError:  # too long for the format
        return
    for position, value in changes:
        block[position] = value
    if mend:
        total = sum(block) - sum(block[148:156]) + 256
        block[148:156] = b"%06o\0 " % total

    def read(function, *how):
        try:
            found = function(bytes(block), *how)
        except tarfile.HeaderError as error:
            return type(error)
        return found.name, found.size, found.type

    assert read(_header) == read(tarfile.TarInfo.frombuf, "utf-8", "backslashreplace")
