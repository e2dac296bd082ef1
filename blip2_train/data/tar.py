"""WebDataset tars that strangers may have written: their members, and one sample's content.

Members are read by an allow-list of extensions, only regular files count, sizes are bounded,
nothing is extracted and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # in order of preference
TEXT_EXTENSIONS = ("json", "txt")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 4 * 2**20
MAX_WEIGHT = 1e30  # of a caption: keeps sums finite
# One read per sample is only safe if it is bounded; the slack is for headers and ignored members.
MAX_SAMPLE_BYTES = MAX_IMAGE_BYTES + 2 * MAX_TEXT_BYTES + 2**20


class SampleError(ValueError):
    """One sample of a good shard is bad; `reason` says why in a few words."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"sample {key}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # crosses from a loader worker to the trainer
        return SampleError, (self.key, self.reason)


@dataclass(frozen=True)
class RawSample:
    """One sample as stored: the encoded image and its metadata."""

    key: str
    image: bytes
    # "captions": list[str], never empty; "caption_weights", where the sample has them: one float of
    # at least 0 per caption; the rest as in the json member.
    meta: dict[str, Any]


def tar_members(file: BinaryIO, whole: bool = True) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield the members of an uncompressed tar with their past-the-end bytes.

    tarfile takes a damaged header for the end of the archive, and a negative size sends it back to
    where it was for ever. Both are errors here. Almost any exception may come out of a damaged
    header, down to struct.error and RecursionError: callers catch `Exception`.

    Args:
        file: the tar.
        whole: the tar must have its end marker; else it is a cut-out that ends with a member.
    """
    end = 0
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
        for member in tar:
            if member.offset < end or member.size < 0 or tar.offset < member.offset_data:
                raise tarfile.ReadError(f"impossible header at byte {member.offset}")
            end = tar.offset
            if end > size:
                raise tarfile.ReadError(f"{member.name} is cut off at the end of the file")
            yield member, end
    file.seek(end)
    rest = file.read(tarfile.BLOCKSIZE)
    if whole and not rest:
        raise tarfile.ReadError("the end marker is missing, its writing was interrupted")
    if rest.strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {end}")


def key_and_extension(member: tarfile.TarInfo) -> tuple[str, str | None]:
    """Split a member's name as WebDataset does: at the first dot of its last part.

    Returns:
        The key with its folder part, and the extension in lower case, or None where the member is
        not looked at.
    """
    folder, slash, name = member.name.rpartition("/")
    stem, dot, extension = name.partition(".")
    extension = extension.lower()
    allowed = extension in IMAGE_EXTENSIONS or extension in TEXT_EXTENSIONS
    if not (member.isreg() and not member.issparse() and stem and dot and allowed):
        return "", None
    return folder + slash + stem, extension


def tar_samples(file: BinaryIO) -> Iterator[RawSample | SampleError]:
    """Yield the samples of an uncompressed tar in their order, the bad ones as what is wrong.

    Args:
        file: the tar, a real file: its members are read where they lie.

    Raises:
        Exception: the tar is damaged or cut, see `tar_members`; after the samples before that.
    """
    key, contents = "", dict[str, bytes]()
    for member, _ in tar_members(file):
        name, extension = key_and_extension(member)
        if extension is None:
            continue
        if name != key:
            if contents:
                yield _sample_or_error(key, contents)
            key, contents = name, {}
        elif extension in contents:
            extension += "+"  # two of them: the sample is refused below
        # One byte more than is allowed is enough to refuse it.
        length = min(member.size, _limit(extension) + 1)
        contents[extension] = os.pread(file.fileno(), length, member.offset_data)
    if contents:
        yield _sample_or_error(key, contents)


def _sample_or_error(key: str, contents: Mapping[str, bytes]) -> RawSample | SampleError:
    for extension in contents:
        if extension.endswith("+"):
            return SampleError(key, f"two {extension.rstrip('+')} members")
    try:
        return raw_sample(key, contents)
    except SampleError as error:
        return error


def _limit(extension: str) -> int:
    return MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES


def raw_sample(key: str, contents: Mapping[str, bytes]) -> RawSample:
    """Put a sample together from its members.

    The captions are `captions` (list) or `caption` (string) of the json member, else the txt
    member; blank ones are dropped, with their `caption_weights` if there are any.

    Args:
        key: the members' common name.
        contents: bytes by extension; other extensions than the allowed ones are not looked at.

    Raises:
        SampleError: no image, no caption, or a member that cannot be used.
    """
    for extension in contents:
        if len(contents[extension]) > _limit(extension):
            raise SampleError(key, f"oversized: {extension} member")
    image = next((contents[name] for name in IMAGE_EXTENSIONS if name in contents), None)
    if not image:
        raise SampleError(key, "no image")
    meta = _json_object(key, contents["json"]) if "json" in contents else {}
    captions = meta.get("captions", meta.get("caption"))
    if captions is None and "txt" in contents:
        captions = _decode(key, "txt", contents["txt"])
    if isinstance(captions, str):
        captions = [captions]
    captions = _checked_captions(key, captions)
    kept = [n for n, caption in enumerate(captions) if caption.strip()]
    if not kept:
        raise SampleError(key, "no captions")
    meta = {**meta, "captions": [captions[n] for n in kept]}
    weights = meta.pop("caption_weights", None)
    if weights is not None:
        weights = _checked_weights(key, weights, len(captions))
        meta["caption_weights"] = [weights[n] for n in kept]
    return RawSample(key, image, meta)


def _json_object(key: str, data: bytes) -> dict[str, Any]:
    text = _decode(key, "json", data)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise SampleError(key, "bad json") from None
    if not isinstance(value, dict):
        raise SampleError(key, "bad json: not an object")
    return value


def _decode(key: str, extension: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SampleError(key, f"{extension} is not UTF-8") from None


def _checked_captions(key: str, captions: Any) -> list[str]:
    if captions is not None and not isinstance(captions, list):
        raise SampleError(key, "captions are not text")
    for caption in captions or []:
        # A lone surrogate ("\\ud800" in JSON) is no text: tokenizers refuse it much later.
        if not isinstance(caption, str) or not _is_unicode(caption):
            raise SampleError(key, "captions are not text")
    return captions or []


def _checked_weights(key: str, weights: Any, captions: int) -> list[float]:
    good = isinstance(weights, list) and len(weights) == captions
    for weight in weights if good else []:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        good = good and number and 0 <= weight <= MAX_WEIGHT
    if not good:
        raise SampleError(key, "caption_weights are not one number of at least 0 per caption")
    return [float(weight) for weight in weights]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
