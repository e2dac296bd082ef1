"""A whole training on a folder that strangers added a shard to.

Proven: the run goes through, executes nothing, and `skipped.jsonl` has step, shard, key and reason
of each sample that could not be used; with a lower `data.max_skip_fraction` it stops and says why.
"""

import io
import json
import os
import pickle
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest
from tiny import tiny_run, train_in_process

from blip2_train.data.index import read_index
from blip2_train.prepare import main as prepare


class Evil:
    """Unpickled anywhere, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


REASONS = {
    "bomb": "too large",
    "deep": "bad json",
    "half": "undecodable",
    "link": "no image",
    "pickle": "json is not UTF-8",
    "text": "not a readable image",
}


def strange_shard(path: Path, image: bytes, canary: Path) -> None:
    """One sample for each of REASONS, and a good one, with pickles beside."""
    evil = pickle.dumps(Evil(canary))
    text = b'{"captions": ["a red circle"]}'
    size = b"IHDR" + (10**6).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    contents = {name: {"jpg": image, "json": text} for name in (*REASONS, "good")}
    png = b"\x89PNG\r\n\x1a\n\0\0\0\r" + size + zlib.crc32(size).to_bytes(4, "big")
    contents["bomb"]["jpg"] = png + bytes(4) + b"IDAT" + bytes(100)
    contents["deep"]["json"] = b"[" * 100_000
    contents["half"]["jpg"] = image[: len(image) // 2]
    contents["pickle"]["json"] = evil
    contents["text"]["jpg"] = b"a red circle"
    contents["good"] |= {"pkl": evil, "pyd": evil}
    with tarfile.open(path, "w") as tar:
        for key, members in contents.items():
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                if (key, extension) == ("link", "jpg"):
                    member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
                tar.addfile(member, io.BytesIO(data))


def test_a_run_on_what_strangers_made(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, canary = tmp_path / "shards", tmp_path / "canary"
    shutil.copytree(shards, folder)
    with tarfile.open(folder / "train-000000.tar") as tar:
        image = next(tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg"))
    strange_shard(folder / "train-000009.tar", image, canary)
    assert prepare(["index", str(folder)]) == 0
    assert read_index(folder)["train-000009.tar"].samples == len(REASONS) + 1

    # 10 batches of 12 are more than an epoch: each sample is met.
    changes = {"data.max_skip_fraction": 0.9, "validation.every": "null", "trainer.max_steps": 10}
    assert train_in_process(tiny_run(folder, tmp_path, "run", **changes)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").open()]
    assert all(line.keys() == {"step", "shard", "key", "reason"} for line in lines)
    assert {line["shard"] for line in lines} == {"synthetic/train-000009.tar"}
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons.keys() == REASONS.keys()
    assert all(reasons[key].startswith(reason) for key, reason in REASONS.items()), reasons
    assert not canary.exists()

    del changes["data.max_skip_fraction"]
    capsys.readouterr()
    assert train_in_process(tiny_run(folder, tmp_path, "strict", **changes)) == 2
    message = capsys.readouterr().err
    assert "could not be used, more than data.max_skip_fraction=0.01; skipped.jsonl" in message
    assert (tmp_path / "strict" / "skipped.jsonl").exists()
