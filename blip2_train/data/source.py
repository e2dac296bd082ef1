"""Where the shards of a source lie: folders or URLs, with braces and globs, and their indexes."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from braceexpand import braceexpand

from blip2_train.data.index import INDEX_NAME, ShardInfo, parse_index, read_index
from blip2_train.data.remote import MissingFile, file_system, is_remote, read_remote
from blip2_train.data.retries import with_retries
from blip2_train.data.shards import OFFSETS_SUFFIX
from blip2_train.errors import UserError

RETRY_SECONDS = 120.0  # a file server that fails over needs some


@dataclass(frozen=True)
class StoredShard(ShardInfo):
    """A shard of an index, and where it lies."""

    folder: str  # path or URL

    @property
    def location(self) -> str:
        """Path or URL of the tar."""
        return join(self.folder, self.name)


@dataclass(frozen=True)
class Source:
    """One split of some indexed shards and its share of the mixture."""

    name: str
    split: str
    weight: float
    shards: list[StoredShard]  # sorted by name

    @property
    def samples(self) -> int:
        """Number of samples, the bad ones included."""
        return sum(shard.samples for shard in self.shards)

    @property
    def remote(self) -> bool:
        """Whether some of its shards are behind URLs."""
        return any(is_remote(folder) for folder in {shard.folder for shard in self.shards})

    def identity(self) -> dict[str, int | str]:
        """What must be the same for the order to be the same; where it lies is not part of it."""
        text = "".join(f"{shard.name}{shard.sha256}" for shard in self.shards)
        return {"samples": self.samples, "digest": hashlib.sha256(text.encode()).hexdigest()}


def open_source(
    name: str,
    shards: str | Path | Sequence[str],
    split: str,
    weight: float = 1.0,
    *,
    bad_shards: bool = False,
    retry_seconds: float = RETRY_SECONDS,
    key: str | None = None,
) -> Source:
    """Read which shards a source has.

    Args:
        name: the source's key in `data.sources`.
        shards: a folder with shards and their `index.json`, or tars in such folders; a path or a
            URL, with braces ({000..123}, {a,b}) and globs (*, ?, [...]), or several of them.
        split: the split to use.
        weight: relative weight in the mixture.
        bad_shards: local files need not be there and whole (`data.on_bad_shard=skip`).
        retry_seconds: for how long reading an index is tried again.
        key: that names the shards, for messages; None: that of the source in `data.sources`.

    Raises:
        UserError: a folder, index, shard or split is missing, or the split is empty; says what
            there is.
    """
    setting = f"{key or f'data.sources.{name}.shards'}={shards}"
    chosen: dict[str, StoredShard] = {}
    splits: set[str] = set()
    try:
        for folder, patterns in _folders(shards).items():
            index = _index_of(folder, retry_seconds)
            named = _matching(folder, index, patterns)
            splits |= {info.split for info in named if info.samples}
            found = [StoredShard(**asdict(i), folder=folder) for i in named if i.split == split]
            if not is_remote(folder) and not bad_shards:
                _check_files(folder, found)
            for shard in found:
                if shard.name in chosen:
                    raise UserError(
                        f"{chosen[shard.name].folder} and {folder} both have a {shard.name}; make "
                        "them two sources, weighted by their sizes if weight is null"
                    )
                chosen[shard.name] = shard
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None
    if not any(shard.samples for shard in chosen.values()):
        raise UserError(
            f"{setting}: there are no samples of split {split!r}; its splits are "
            f"{', '.join(sorted(splits)) or 'all empty'}. Name one of them, or add this one with "
            "blip2-prepare."
        )
    return Source(name, split, weight, [chosen[key] for key in sorted(chosen)])


@dataclass(frozen=True)
class UnindexedSource(Source):
    """Tars without an index, to be read front to back (`data.mode=stream`)."""

    urls: tuple[str, ...] = ()  # paths, URLs, and where they are allowed pipe: commands

    def identity(self) -> dict[str, int | str]:
        """The number of tars; nothing more is known of them."""
        return {"samples": 0, "digest": f"{len(self.urls)} tars without an index"}


def open_unindexed(
    name: str, shards: str | Path | Sequence[str], weight: float, *, allow_pipe: bool = False
) -> UnindexedSource:
    """Find the tars of a source that has no index.

    Args:
        name: the source's key in `data.sources`.
        shards: as for `open_source`; a folder stands for all its tars. `pipe:COMMAND` is a command
            that writes a tar.
        weight: relative weight in the mixture.
        allow_pipe: such commands may be run (`data.allow_pipe`).

    Raises:
        UserError: nothing is there, or a command is not allowed.
    """
    setting = f"data.sources.{name}.shards={shards}"
    urls: list[str] = []
    try:
        for text in expand_braces(shards):
            if text.startswith("pipe:"):
                if not allow_pipe:
                    raise UserError(
                        f"{text!r} would run a command; set data.allow_pipe=true if you trust it"
                    )
                urls.append(text)
                continue
            local = _local(text)
            is_folder = ".tar" not in local if is_remote(text) else Path(local).is_dir()
            if is_folder:
                local = f"{local}/*.tar"
            found = expand_globs(local)
            missing = [path for path in found if not is_remote(path) and not Path(path).is_file()]
            if missing or not found:
                raise UserError(f"there is no {(missing or [local])[0]}")
            urls += found
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None
    return UnindexedSource(name, "", weight, [], tuple(urls))


def join(folder: str, name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def expand_braces(shards: str | Path | Sequence[str]) -> list[str]:
    """The locations that a `shards` setting names, braces written out and globs kept.

    Raises:
        UserError: it names nothing, or its braces do not close.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    if not given or not all(isinstance(text, str | Path) and str(text) for text in given):
        raise UserError("give a folder, a pattern of tars, or a list of them")
    try:
        return [text for entry in given for text in braceexpand(str(entry))]
    except ValueError:
        raise UserError("its braces do not close") from None


def expand_globs(location: str) -> list[str]:
    """The existing locations that match, sorted; the location itself where it has no glob.

    Raises:
        UserError: its file system cannot be listed.
    """
    if not has_glob(location):
        return [location]
    protocol = location.partition("://")[0] + "://" if is_remote(location) else ""
    system, pattern = file_system(location)
    try:
        found = sorted(system.glob(pattern))
    except Exception as error:  # of any file system
        raise UserError(f"{location} cannot be listed ({error}); write it out by braces") from None
    return [text if "://" in text else protocol + text for text in found]


def has_glob(text: str) -> bool:
    """Whether `*`, `?` or `[` is in it; a URL's query is none."""
    return bool(re.search(r"[*\[]" if is_remote(text) else r"[*?\[]", text))


def _folders(shards: str | Path | Sequence[str]) -> dict[str, list[str] | None]:
    """The folders that a setting names; with patterns of tars, or None for all of the index."""
    folders: dict[str, list[str] | None] = {}
    for text in expand_braces(shards):
        if text.startswith("pipe:"):
            raise UserError("the output of a command has no index; see data.mode=stream")
        head, slash, last = text.rstrip("/").rpartition("/")
        one_of_folder = last.endswith(".tar") or (has_glob(last) and ".tar" in last)
        folder, pattern = (head + slash, last) if one_of_folder else (text, None)
        for place in expand_globs(folder or "."):
            known = folders.setdefault(_local(place), [] if pattern else None)
            if pattern is None:
                folders[_local(place)] = None
            elif known is not None:
                known.append(pattern)
    return folders


def _local(location: str) -> str:
    """A path from file://, which fsspec knows, and without a slash at its end."""
    return location.removeprefix("file://").rstrip("/") or "/"


def _index_of(folder: str, retry_seconds: float) -> dict[str, ShardInfo]:
    if is_remote(folder):
        url = join(folder, INDEX_NAME)
        try:
            return with_retries(lambda: _remote_index(url), retry_seconds, url)
        except MissingFile:
            raise UserError(
                f"{url} does not exist: index the shards with blip2-prepare index where they are "
                "files, and put index.json and the .offsets.npy files beside them; or set "
                "data.mode=stream"
            ) from None
        except OSError as error:
            raise UserError(f"the index cannot be fetched: {error}") from None
    path = Path(folder)
    if not path.is_dir():
        near = sorted(entry.name for entry in path.parent.glob("*") if entry.is_dir())
        there = f"{path.parent} holds {', '.join(near[:20]) or 'no folders'}"
        there = there if path.parent.is_dir() else f"nor is {path.parent}"
        raise UserError(f"there is no such folder; {there}. Make shards with blip2-prepare.")
    return read_index(path)


def _remote_index(url: str) -> dict[str, ShardInfo]:
    data = read_remote(url)
    try:
        return parse_index(data, url)
    except UserError as error:  # it may have been cut on its way
        raise OSError(str(error)) from None


def _matching(
    folder: str, index: dict[str, ShardInfo], patterns: list[str] | None
) -> list[ShardInfo]:
    if patterns is None:
        return list(index.values())
    names: set[str] = set()
    for pattern in patterns:
        # Most are plain names that braces gave: a hundred thousand, each to be looked up at once.
        found = fnmatch.filter(index, pattern) if has_glob(pattern) else [pattern]
        if not set(found) & index.keys():
            raise UserError(f"the index of {folder} has no {pattern}")
        names.update(found)
    return [index[name] for name in names]


def _check_files(folder: str, shards: Sequence[StoredShard]) -> None:
    """Refuse shards that are missing or not of the index's size; costs one directory listing."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    for info in shards:
        size = sizes.get(info.name)
        if size is None:
            found = "is missing"
        elif size != info.bytes:
            found = f"has {size} bytes, index.json says {info.bytes}"
        elif info.name + OFFSETS_SUFFIX not in sizes:
            found = f"has no {OFFSETS_SUFFIX} beside it"
        else:
            continue
        raise UserError(
            f"{info.name!r} {found}. Prepare the folder again; blip2-prepare verify checks all "
            "of it."
        )
