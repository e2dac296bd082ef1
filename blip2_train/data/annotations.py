"""Caption annotations, and readers of the JSON formats (those of text tables are in tables.py).

Each reader returns the records in the order of the file and lists every line or entry it could not
use; a file that is not of the format at all is a `UserError`. Captions stay as annotated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from blip2_train.errors import UserError

NO_CAPTION = "no caption"


@dataclass(frozen=True)
class Record:
    """One image and its captions."""

    image: str  # path relative to the image folder
    image_id: Any  # same id = same image; any JSON type
    captions: list[str]  # verbatim, none of them blank
    split: str
    questions: list[dict[str, Any]] = field(default_factory=list)  # as in shards, see questions.py
    domain: str = ""  # of NoCaps: in-domain, near-domain or out-domain


@dataclass(frozen=True)
class Annotations:
    """What a caption file holds."""

    records: list[Record] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (where, reason)


class Collector:
    """Groups captions by image, images in order of first appearance."""

    def __init__(self, path: Path) -> None:
        self._file = path.name
        self._images: dict[str, tuple[Any, str, list[str]]] = {}
        self._problems: list[tuple[str, str]] = []

    def problem(self, where: object, reason: str) -> None:
        """List what could not be used at `where` (a line number, an entry) of the file."""
        self._problems.append((f"{self._file}:{where}", reason))

    def image(self, image: str, image_id: Any, split: str) -> None:
        """Announce an image; later announcements of the same image change nothing."""
        self._images.setdefault(image, (image_id, split, []))

    def caption(self, image: str, caption: Any, where: object) -> None:
        """Add a caption, verbatim, to an image that was announced; list it if it is none."""
        if not isinstance(caption, str):
            self.problem(where, f"caption is not a string: {type(caption).__name__}")
        elif not is_unicode(caption):
            self.problem(where, "caption is not Unicode text")
        elif not caption.strip():
            self.problem(where, "empty caption")
        else:
            self._images[image][2].append(caption)

    def entry(self, entry: dict[str, Any], split: str, where: object) -> None:
        """Add an object with `image`, its caption or captions, and maybe its `image_id`."""
        image, image_id = entry["image"], entry.get("image_id")
        self.image(image, image if image_id is None else image_id, split)
        captions = entry.get("captions", entry.get("caption"))
        for caption in captions if isinstance(captions, list) else [captions]:
            self.caption(image, caption, where)

    def finish(self, *, need_captions: bool = True) -> Annotations:
        """Give the images that have a caption, and list those that have none; or give all."""
        records = []
        for image, (image_id, split, captions) in self._images.items():
            if captions or not need_captions:
                records.append(Record(image, image_id, captions, split))
            else:
                self._problems.append((image, NO_CAPTION))
        return Annotations(records, self._problems)


def read_coco(path: Path, split: str, *, need_captions: bool = True) -> Annotations:
    """Read the official COCO captions JSON (`images`, `annotations`), or NoCaps' of that schema.

    Args:
        path: `captions_train2017.json`, `nocaps_val_4500_captions.json` and the like.
        split: the split of all its images.
        need_captions: off, the file may have no `annotations` at all, as those of test splits
            (`image_info_test2014.json`); its images then have no captions.

    Raises:
        UserError: not such a file.
    """
    data = load_json(path)
    images = list_of_objects(path, data, "images", {"id", "file_name"})
    alone = not need_captions and "annotations" not in data
    annotations = (
        [] if alone else list_of_objects(path, data, "annotations", {"image_id", "caption"})
    )
    collector = Collector(path)
    names: dict[Any, str] = {}
    domains: dict[str, str] = {}
    for entry in images:
        name = text_of(path, entry, "file_name")
        names[_hashable(path, entry["id"])] = name
        collector.image(name, entry["id"], split)
        if "domain" in entry:
            domains[name] = text_of(path, entry, "domain")
    for number, entry in enumerate(annotations):
        where = f"annotation {entry.get('id', number)}"
        image = names.get(_hashable(path, entry["image_id"]))
        if image is None:
            collector.problem(where, f"unknown image: id {entry['image_id']}")
        else:
            collector.caption(image, entry["caption"], where)
    read = collector.finish(need_captions=not alone)
    records = [
        replace(record, domain=domains[record.image]) if record.image in domains else record
        for record in read.records
    ]
    return Annotations(records, read.problems)


def read_karpathy(path: Path, restval: str = "train") -> Annotations:
    """Read a Karpathy-split JSON (`dataset_coco.json`, `dataset_flickr30k.json`, ...).

    The id of an image is its COCO id, or its file name: `imgid` only counts the images of one data
    set and would make images of two data sets one.

    Args:
        path: the JSON file.
        restval: the split of the images in COCO's `restval`.

    Raises:
        UserError: not such a file.
    """
    entries = list_of_objects(path, load_json(path), "images", {"filename", "sentences", "split"})
    collector = Collector(path)
    for number, entry in enumerate(entries):
        image = "/".join(filter(None, (entry.get("filepath"), text_of(path, entry, "filename"))))
        split = text_of(path, entry, "split")
        collector.image(image, entry.get("cocoid", image), restval if split == "restval" else split)
        sentences = list_of_objects(path, entry, "sentences", {"raw"})
        for k, sentence in enumerate(sentences):
            collector.caption(image, sentence["raw"], f"image {number}, sentence {k}")
    return collector.finish()


def read_lavis(path: Path, split: str, strip: str = "") -> Annotations:
    """Read a JSON list as LAVIS and BLIP publish them: `[{"image", "caption", "image_id"?}, ...]`.

    Training lists repeat an image once per caption; they are grouped by image. Where there is no
    id, the image's path is the id.

    Args:
        path: `coco_karpathy_train.json`, `vg_caption.json` and the like.
        split: the split of all its images.
        strip: dropped from the front of the images' paths, where they have it; published lists
            hold paths of their authors' machines.

    Raises:
        UserError: not such a file.
    """
    entries = list_of_objects(path, {"": load_json(path)}, "", {"image", "caption"})
    collector = Collector(path)
    for number, entry in enumerate(entries):
        image = text_of(path, entry, "image").removeprefix(strip)
        collector.entry({**entry, "image": image}, split, f"entry {number}")
    return collector.finish()


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def list_of_objects(path: Path, data: Any, name: str, fields: set[str]) -> list[dict[str, Any]]:
    """Take list `name` out of `data` ("" for a file that is a list) and check its entries' keys."""
    what = f'"{name}"' if name else "the file"
    entries = data.get(name) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path} has another schema: {what} should be a list of objects")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not fields <= entry.keys():
            raise UserError(
                f"{path} has another schema: entry {number} of {what} should be an object with "
                + ", ".join(sorted(fields))
            )
    return entries


def text_of(path: Path, entry: dict[str, Any], name: str) -> str:
    """A name in an entry of a file.

    Raises:
        UserError: it is none.
    """
    value = entry[name]
    if not isinstance(value, str) or not value:
        raise UserError(f'{path} has another schema: "{name}" is {value!r}, not a name')
    return value


def is_unicode(text: Any) -> TypeGuard[str]:
    """Whether it is text that can be encoded: JSON may hold half of a surrogate pair."""
    return isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _hashable(path: Path, value: Any) -> int | str:
    if not isinstance(value, (int, str)):
        raise UserError(f"{path} has another schema: {value!r} is not an image id")
    return value
