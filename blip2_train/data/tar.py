"""WebDataset tars that strangers may have written: their members, and one sample's content.

Members are read by an allow-list of extensions, only regular files count, sizes are bounded,
nothing is extracted and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
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
MAX_HEADER_BYTES = 2**20  # of a header that holds a long name or other attributes
MAX_PADDING = 2**20  # zeros at the end of a tar: 10 KiB as a rule, more on tapes
MAX_CAPTIONS = 1000  # of one image

# Members that say something about the next one, or, POSIX `g`, about all that follow.
_EXTENDED = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
_OCTAL = re.compile(rb"([0-7]*)[ \0]*")  # a number in a header, as almost every program writes it
# Of mode, owner, group, time and device, which only have to be numbers.
_OTHER_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
_RENAMES = {"path", "size"}
_SPARSE = {"GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "GNU.sparse.name"}


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
    # "captions": list[str], none blank; at least one, unless that was not asked for;
    # "caption_weights", where the sample has them: one float of at least 0 per caption; the rest as
    # in the json member.
    meta: dict[str, Any]


def tar_members(file: BinaryIO, whole: bool = True) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield the members of an uncompressed tar with their past-the-end bytes.

    tarfile's own loop is not made for strangers: it takes a damaged header for the end of the
    archive, turns in circles on a negative size, reads an extended header of any claimed size, and
    needs hours for one made of digits. Here all of these are errors, and so is a header for all
    members (POSIX `g`) that would rename or resize them: a single sample is read without it.

    Args:
        file: the tar.
        whole: the tar must have its end marker and nothing behind; else it is a cut-out that ends
            with a member.

    Raises:
        tarfile.TarError: the tar is damaged, or cut.
    """
    size = file.seek(0, os.SEEK_END)
    position = 0
    while (found := _next_member(file, position)) is not None:
        member, end = found
        if end > size:
            raise tarfile.ReadError(f"{member.name[:100]!r} is cut off at the end of the file")
        if member.type != tarfile.XGLTYPE:
            yield member, end
        position = end
    rest = size - position
    if not whole and rest:
        raise tarfile.ReadError(f"damaged header at byte {position}")
    if whole and not rest:
        raise tarfile.ReadError("the end marker is missing, its writing was interrupted")
    if rest > MAX_PADDING or _read(file, position, rest).strip(b"\0"):
        raise tarfile.ReadError(
            f"there is more behind the end marker at byte {position}: joined tars, or a download "
            "that was not finished"
        )


def _next_member(file: BinaryIO, start: int) -> tuple[tarfile.TarInfo, int] | None:
    """Read the headers of the member at byte `start`.

    Returns:
        The member, `offset` and `offset_data` set, sparse ones with type GNUTYPE_SPARSE, and its
        past-the-end byte; None where no member begins, at zeros or the end of the file.
    """
    position = start
    records: dict[str, str] = {}
    while True:
        file.seek(position)
        block = file.read(tarfile.BLOCKSIZE)
        if position == start and not block.strip(b"\0"):
            return None
        try:
            member = _header(block)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {position}") from None
        position += tarfile.BLOCKSIZE
        if member.size < 0:
            raise tarfile.ReadError(f"negative size at byte {start}")
        if member.type not in _EXTENDED:
            break
        if member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"extended header of {member.size} bytes at byte {start}")
        content = _read(file, position, member.size)
        position += _padded(member.size)
        if member.type == tarfile.GNUTYPE_LONGNAME:
            records["path"] = _text(content.partition(b"\0")[0])
        elif member.type == tarfile.XGLTYPE:
            if any(name in _RENAMES or name in _SPARSE for name in _pax_records(content)):
                raise tarfile.ReadError(f"header at byte {start} renames or resizes all members")
            if not records:  # it belongs to no member; a sample may be read without it
                return member, position
        elif member.type != tarfile.GNUTYPE_LONGLINK:
            records |= _pax_records(content)
    is_file = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES  # else it has no content
    if member.type == tarfile.GNUTYPE_SPARSE:
        more = block[482]
        while more:
            block = _read(file, position, tarfile.BLOCKSIZE)
            position += tarfile.BLOCKSIZE
            more = block[504]
    elif is_file and not _SPARSE.isdisjoint(records):
        member.type = tarfile.GNUTYPE_SPARSE
    member.offset, member.offset_data = start, position
    member.name = records.get("path", member.name).rstrip("/")
    if "size" in records:
        if not re.fullmatch("[0-9]{1,30}", records["size"]):
            raise tarfile.ReadError(f"{records['size'][:30]!r} is no size, at byte {start}")
        member.size = int(records["size"])
    return member, position + (_padded(member.size) if is_file else 0)


def _header(block: bytes) -> tarfile.TarInfo:
    """Read a header block as `TarInfo.frombuf` does, that of an ordinary file much faster.

    Raises:
        tarfile.HeaderError: it is none.
    """
    name = block[:100].partition(b"\0")[0]
    size, checksum = _OCTAL.fullmatch(block[124:136]), _OCTAL.fullmatch(block[148:156])
    if (
        block[156:157] == tarfile.REGTYPE
        and not block[345:500].strip(b"\0")  # no more of the name there
        and name.isascii()
        and not name.endswith(b"/")
        and size
        and size[1]
        and checksum
        and checksum[1]
        and all(_OCTAL.fullmatch(block[start:end]) for start, end in _OTHER_NUMBERS)
        and sum(block) - sum(block[148:156]) + 8 * ord(" ") == int(checksum[1], 8)
        and len(block) == tarfile.BLOCKSIZE
    ):
        member = tarfile.TarInfo(name.decode("ascii"))
        member.size = int(size[1], 8)
        return member
    return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")


def _pax_records(content: bytes) -> dict[str, str]:
    """Read the records (length, keyword and value) of a POSIX extended header, in one pass."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content):
        length = content[position : position + 20].partition(b" ")[0]
        if not length.isdigit():
            raise tarfile.ReadError("damaged extended header")
        end = position + int(length)
        keyword, equals, value = content[position + len(length) + 1 : end].partition(b"=")
        if end > len(content) or not equals or not value.endswith(b"\n"):
            raise tarfile.ReadError("damaged extended header")
        records[_text(keyword)] = _text(value[:-1])
        position = end
    return records


def _read(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    data = file.read(count)
    if len(data) < count:
        raise tarfile.ReadError(f"header cut off at byte {position + len(data)}")
    return data


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _text(name: bytes) -> str:
    # Not "replace": names in another encoding would all become the same question marks.
    return name.decode("utf-8", "backslashreplace")


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
    regular = member.isreg() and member.type != tarfile.GNUTYPE_SPARSE
    if not (regular and stem and dot and allowed):
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


def raw_sample(key: str, contents: Mapping[str, bytes], *, need_captions: bool = True) -> RawSample:
    """Put a sample together from its members.

    The captions are `captions` (list) or `caption` (string) of the json member, else the txt
    member; blank ones are dropped, with their `caption_weights` if there are any. A key names an
    image: samples of one key in one shard show the same one, where no `image_id` says otherwise.

    Args:
        key: the members' common name.
        contents: bytes by extension; other extensions than the allowed ones are not looked at.
        need_captions: an image without any cannot be used.

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
    kept = [n for n, caption in enumerate(captions) if _says_something(caption)]
    if need_captions and not kept:
        only = ", only questions: for data.text=questions of stage 2" if "questions" in meta else ""
        raise SampleError(key, f"no captions{only}")
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
    captions = captions or []
    if len(captions) > MAX_CAPTIONS:
        raise SampleError(key, f"oversized: {len(captions)} captions")
    for caption in captions:
        # A lone surrogate ("\\ud800" in JSON) is no text: tokenizers refuse it much later.
        if not isinstance(caption, str) or not _is_unicode(caption):
            raise SampleError(key, "captions are not text")
    return captions


def _checked_weights(key: str, weights: Any, captions: int) -> list[float]:
    good = isinstance(weights, list) and len(weights) == captions
    for weight in weights if good else []:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        good = good and number and 0 <= weight <= MAX_WEIGHT
    if not good:
        raise SampleError(key, "caption_weights are not one number of at least 0 per caption")
    return [float(weight) for weight in weights]


def _says_something(text: str) -> bool:
    """Whether there is anything but spaces and control characters, which tokenizers drop."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
