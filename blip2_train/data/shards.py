"""Shards: plain WebDataset tars beside an index, so that any sample is one seek away.

A folder of shards holds
    <split>-000000.tar              samples; one sample = consecutive members <key>.jpg, <key>.json
    <split>-000000.tar.offsets.npy  int64 [samples, 2], first and past-the-end byte of each sample
    index.json                      what each shard is, see index.py

What is looked at inside a tar, and what is refused, is in tar.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from blip2_train.data.atomic import atomic_writer
from blip2_train.data.index import ShardInfo, split_of
from blip2_train.data.remote import Cache, MissingFile
from blip2_train.data.tar import (
    MAX_SAMPLE_BYTES,
    RawSample,
    SampleError,
    key_and_extension,
    raw_sample,
    tar_members,
)

OFFSETS_SUFFIX = ".offsets.npy"


class ShardError(RuntimeError):
    """The shard itself is unusable: missing, cut, damaged, or not what its index says."""


# -------------------------------------------------------------------------------- whole shards


def offsets_bytes(samples: int) -> int:
    """Size of the offsets of a shard: a header of two 64-byte blocks and two int64 per sample."""
    return 128 + 16 * samples


def offsets_path(path: Path) -> Path:
    """Where the offsets of the shard at `path` are."""
    return path.with_name(path.name + OFFSETS_SUFFIX)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scan_tar(path: Path) -> np.ndarray:
    """Find the samples of any uncompressed WebDataset tar by reading its headers.

    Consecutive members with one key (the path up to the first dot of its last part) are a sample;
    members that are not regular files or have no extension of the allow-list are not looked at.

    Returns:
        int64 [samples, 2], first and past-the-end byte of each sample.

    Raises:
        ShardError: the file cannot be read as a whole tar; a cut tar or one with a damaged header
            is refused rather than read up to there.
    """
    spans: list[list[int]] = []
    previous: str | None = None
    try:
        with path.open("rb") as file:
            for member, end in tar_members(file):
                key, extension = key_and_extension(member)
                if extension is None:
                    continue
                if key == previous:
                    spans[-1][1] = end
                else:
                    spans.append([member.offset, end])
                previous = key
    except FileNotFoundError:
        raise ShardError(f"{path} does not exist") from None
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"{path} is not a whole, uncompressed tar file: {error}") from error
    return np.asarray(spans, dtype=np.int64).reshape(-1, 2)


def write_offsets(path: Path, offsets: np.ndarray) -> None:
    """Write the offsets of the shard at `path` beside it, atomically."""
    with atomic_writer(offsets_path(path)) as file:
        np.save(file, offsets, allow_pickle=False)


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> ShardInfo:
    """Write a shard and its offsets; the same samples always give the same bytes.

    Args:
        path: `FOLDER/<split>-<number>.tar`; the folder exists.
        samples: WebDataset samples: `__key__` (unique, ASCII, without dots) and one value per
            extension, bytes or, for `json`, anything that JSON can hold.

    Returns:
        The shard's entry for the index.
    """
    # The standard library writes the same archive as webdataset's TarWriter, without its import of
    # torch (seconds in each worker process of blip2-prepare).
    count = 0
    with atomic_writer(path) as file:
        with tarfile.open(fileobj=file, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                count += 1
                for extension in sorted(sample.keys() - {"__key__"}):
                    value = sample[extension]
                    if not isinstance(value, bytes):
                        value = json.dumps(value).encode("ascii")
                    member = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                    member.size, member.mode, member.mtime = len(value), 0o444, 0
                    tar.addfile(member, io.BytesIO(value))
        file.flush()
        temp = Path(file.name)
        offsets = scan_tar(temp)
        assert len(offsets) == count, f"keys in {path} are not unique"
        info = ShardInfo(
            path.name, split_of(path.name) or "", count, temp.stat().st_size, file_sha256(temp)
        )
        # Before the tar takes its name, so that a tar that is there always has its offsets.
        write_offsets(path, offsets)
    return info


# ------------------------------------------------------------------------------- single samples


class ShardReader:
    """Random access to the samples of one shard.

    The file is opened and checked at the first `read`. Reads are positioned (`pread`), so a reader
    may be shared by threads and inherited by a fork; pickling carries only what it was made of.

    Args:
        location: path of the tar, or its URL where there is a cache.
        info: what the index says of it.
        cache: remote shards are fetched into; None: the shard is a file here.
        need_captions: a sample without captions is a bad one.

    Raises:
        ShardError: at the first `read`, if the file is missing, or its size or offsets are not
            what `info` says. Other operating-system errors pass through: they may be passing.
    """

    def __init__(
        self,
        location: Path | str,
        info: ShardInfo,
        cache: Cache | None = None,
        need_captions: bool = True,
    ) -> None:
        self.location = str(location)
        self.info = info
        self._cache = cache
        self._need_captions = need_captions
        self._file: BinaryIO | None = None
        self._offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return self.info.samples

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.location, self.info, self._cache, self._need_captions)

    def read(self, i: int) -> RawSample:
        """Read sample `i` with one positioned read.

        Raises:
            IndexError: `i` is not in [0, len).
            ShardError: the bytes there are not those members of a tar.
            SampleError: the sample has no image, no caption, or a member that cannot be used.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.info.name}")
        file, offsets = self._opened()
        start, end = int(offsets[i, 0]), int(offsets[i, 1])
        if end - start > MAX_SAMPLE_BYTES:
            raise SampleError(f"#{i}", f"oversized: {end - start} bytes in the tar")
        blob = os.pread(file.fileno(), end - start, start)
        if len(blob) < end - start:
            raise ShardError(
                f"{self.location} ends inside sample {i}: it was cut after it was opened"
            )
        key, contents = self._contents(i, blob)
        return raw_sample(key, contents, need_captions=self._need_captions)

    @property
    def offsets(self) -> np.ndarray:
        """int64 [samples, 2], first and past-the-end byte of each sample."""
        return self._opened()[1]

    def close(self) -> None:
        """Close the file; the next `read` opens it again."""
        if self._file is not None:
            self._file.close()
        self._file = self._offsets = None

    def _contents(self, i: int, blob: bytes) -> tuple[str, dict[str, bytes]]:
        """Cut the bytes of sample `i` into its members: the key, and the content by extension."""
        keys: set[str] = set()
        contents: dict[str, bytes] = {}
        try:
            for member, _ in tar_members(io.BytesIO(blob), whole=False):
                key, extension = key_and_extension(member)
                if extension is None:
                    continue
                keys.add(key)
                if extension in contents:
                    raise SampleError(key, f"two {extension} members")
                contents[extension] = blob[member.offset_data : member.offset_data + member.size]
        except SampleError:
            raise
        except tarfile.TarError as error:
            raise ShardError(f"{self.location}: bad tar header in sample {i}: {error}") from error
        if len(keys) != 1:
            raise ShardError(f"{self.location}: the offsets of sample {i} do not fit its members")
        return keys.pop(), contents

    def _opened(self) -> tuple[BinaryIO, np.ndarray]:
        if self._file is None or self._offsets is None:
            self._file, self._offsets = self._open()
        return self._file, self._offsets

    def _open(self) -> tuple[BinaryIO, np.ndarray]:
        remedy = f"run `blip2-prepare verify {os.path.dirname(self.location)}`"
        name = self.location + OFFSETS_SUFFIX
        length = offsets_bytes(self.info.samples)
        with self._open_file(OFFSETS_SUFFIX, length) as opened:
            content = io.BytesIO(opened.read(length + 1))  # never more, whatever it claims
        try:
            offsets = _read_offsets(content, self.info.samples)
        except Exception as error:  # numpy's reader of headers raises almost anything
            raise ShardError(f"{name} is damaged: {error}; {remedy}") from None
        bounds = offsets.reshape(-1)
        if len(bounds) and (bounds[0] < 0 or bounds[-1] > self.info.bytes or _decreases(bounds)):
            raise ShardError(f"{name} holds impossible offsets; {remedy}")
        file = self._open_file("", self.info.bytes)
        size = os.fstat(file.fileno()).st_size
        if size != self.info.bytes:
            file.close()
            raise ShardError(
                f"{self.location} has {size} bytes, the index says {self.info.bytes}; {remedy}"
            )
        return file, offsets

    def _open_file(self, suffix: str, size: int) -> BinaryIO:
        location = self.location + suffix
        try:
            if self._cache is not None:
                return self._cache.open(location, self.info.sha256, size)
            if os.path.exists(location) and not os.path.isfile(location):  # a FIFO would wait
                raise ShardError(f"{location} is not a regular file")
            return Path(location).open("rb", buffering=0)
        except (FileNotFoundError, MissingFile):
            raise ShardError(f"{location} does not exist, but the index lists it") from None


def _read_offsets(file: BinaryIO, samples: int) -> np.ndarray:
    """Read what `write_offsets` wrote and nothing else.

    `numpy.load` would open a zip archive as well, and allocate whatever a header says.

    Raises:
        ValueError: it is not of int64 [samples, 2]; other errors where it is no such file at all.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the format")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.int64 or shape != (samples, 2) or by_columns:
        raise ValueError(f"{dtype} {shape}, not int64 {(samples, 2)} as the index says")
    data = file.read(samples * 16 + 1)
    if len(data) != samples * 16:
        raise ValueError("not of the length that its header says")
    return np.frombuffer(data, dtype=np.int64).reshape(samples, 2)


def _decreases(values: np.ndarray) -> bool:
    return bool((np.diff(values) < 0).any())
