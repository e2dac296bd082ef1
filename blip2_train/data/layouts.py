"""Where the published data sets keep their files, and which reader each file needs.

Every function takes what the user gave and returns the annotations with their image folders. ROOT
is searched by the official names only; whatever was given explicitly comes first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blip2_train.data.annotations import Annotations, read_coco, read_karpathy, read_lavis
from blip2_train.data.plan import Source
from blip2_train.data.questions import read_gqa, read_vqa
from blip2_train.data.tables import apply_splits, read_captions, read_split_lists
from blip2_train.errors import UserError

IMAGE_FOLDERS = (
    "Images",
    "images",
    "flickr30k-images",
    "flickr30k_images",
    "Flickr8k_Dataset/Flicker8k_Dataset",  # the official archive spells it so
    "Flicker8k_Dataset",
)
FLICKR8K_CAPTIONS = (
    "Flickr8k.token.txt",
    "Flickr8k_text/Flickr8k.token.txt",
    "captions.txt",
    "dataset_flickr8k.json",
)
FLICKR8K_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
FLICKR30K_CAPTIONS = (
    "dataset_flickr30k.json",
    "results_20130124.token",
    "results.csv",
    "flickr30k_images/results.csv",
)
FOLDER_CAPTIONS = ("captions.csv", "captions.jsonl", "captions.txt")
COCO_YEARS = ("2017", "2014")
VQA_SETS = {"VQAv2": "v2_", "OK-VQA": ""}  # what their files' names begin with
VQA_PARTS = {"train": "train2014", "val": "val2014", "test": "test2015", "testdev": "test-dev2015"}
NOCAPS = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
GQA_PARTS = ("train", "val", "testdev", "test")


@dataclass(frozen=True)
class Given:
    """What the user gave: a folder in the official layout, or its parts, or both."""

    root: Path | None = None
    images: Path | None = None
    annotations: list[tuple[str | None, Path]] = field(default_factory=list)  # (split, file)
    questions: list[tuple[str | None, Path]] = field(default_factory=list)  # (split, file)
    split: str | None = None  # of every file that does not say
    split_lists: list[tuple[str, Path]] = field(default_factory=list)  # (split, file)
    year: str | None = None  # of COCO
    restval: str = "train"  # split of Karpathy's restval
    strip: str = ""  # dropped from the front of the paths in LAVIS's lists


def coco(given: Given) -> list[Source]:
    """COCO captions in the official layout, or any files of that schema."""
    if given.annotations:
        images = given.images or _need_root(given)
        return [
            Source("coco", path, images, _read_coco(path, _split(path, split, given)))
            for split, path in given.annotations
        ]
    root = _need_root(given)
    years = (given.year,) if given.year else COCO_YEARS
    files = {
        year: [
            (split, root / "annotations" / f"captions_{split}{year}.json", root / f"{split}{year}")
            for split in ("train", "val")
            if (root / "annotations" / f"captions_{split}{year}.json").is_file()
        ]
        for year in years
    }
    found = [year for year in years if files[year]]
    if len(found) != 1:
        names = ", ".join(f"annotations/captions_{{train,val}}{year}.json" for year in years)
        raise UserError(
            f"{root} holds both years of COCO: choose one with --year"
            if found
            else f"{root} has no COCO captions, looked for {names}"
        )
    # The captions come in one archive for train and val, the images in one each.
    there = [entry for entry in files[found[0]] if given.images or entry[2].is_dir()]
    if not there:
        folders = ", ".join(folder.name for _, _, folder in files[found[0]])
        raise UserError(f"{root} has captions but no image folder ({folders})")
    return [
        Source("coco", path, given.images or folder, read_coco(path, given.split or split))
        for split, path, folder in there
    ]


def karpathy(given: Given) -> list[Source]:
    """The data set of a Karpathy-split JSON."""
    names = sorted(path.name for path in given.root.glob("dataset*.json")) if given.root else []
    if len(names) > 1 and not given.annotations:
        raise UserError(f"{given.root} holds {', '.join(names)}: choose one with --annotations")
    path = _one_file(given, names, "dataset*.json")
    return [_source(path.stem, path, given, read_karpathy(path, given.restval))]


def lavis(given: Given) -> list[Source]:
    """JSON lists as LAVIS and BLIP publish them, one per split."""
    if not given.annotations:
        raise UserError("give the JSON lists: --annotations [SPLIT=]FILE ...")
    return [
        _source(path.stem, path, given, read_lavis(path, _split(path, split, given), given.strip))
        for split, path in given.annotations
    ]


def flickr30k(given: Given) -> list[Source]:
    """Flickr30k: Karpathy's JSON, the token file or the Kaggle table."""
    return [_flickr("flickr30k", given, FLICKR30K_CAPTIONS, [])]


def flickr8k(given: Given) -> list[Source]:
    """Flickr8k: the token file or the Kaggle table with the official lists, or Karpathy's JSON."""
    lists = []
    for split, name in FLICKR8K_LISTS.items():
        places = [given.root / name, given.root / "Flickr8k_text" / name] if given.root else []
        lists += [(split, path) for path in places if path.is_file()][:1]
    return [_flickr("flickr8k", given, FLICKR8K_CAPTIONS, lists)]


def folder(given: Given) -> list[Source]:
    """A folder of images with a table of captions."""
    path = _one_file(given, FOLDER_CAPTIONS, ", ".join(FOLDER_CAPTIONS))
    annotations = read_captions(path, given.split or "train")
    return [_source("folder", path, given, _listed(annotations, given.split_lists))]


def vqa(given: Given) -> list[Source]:
    """VQAv2 or OK-VQA, in folders as they come or by their files; or any files of that schema."""
    sources = []
    for split, path, truth in _vqa_files(given):
        read, images = read_vqa(path, truth, split), given.images or _need_root(given)
        for record in read.records[:1]:
            # COCO's archives unpack to a folder each
            named = re.fullmatch(r"COCO_(\w+)_\d{12}\.jpg", record.image)
            if named and (images / named[1]).is_dir():
                images = images / named[1]
        sources.append(Source("vqa", path, images, read))
    return sources


def gqa(given: Given) -> list[Source]:
    """GQA: the balanced questions that ROOT has, or files of questions."""
    names = {split: f"{split}_balanced_questions.json" for split in GQA_PARTS}
    files = [(_split(path, split, given), path) for split, path in given.questions]
    files = files or _files_of(given, names, "questions", "questions of GQA")
    return [_source("gqa", path, given, read_gqa(path, split)) for split, path in files]


def nocaps(given: Given) -> list[Source]:
    """NoCaps: the captions of val and the image list of test, or any files of that schema."""
    files = [(_split(path, split, given), path) for split, path in given.annotations]
    files = files or _files_of(given, NOCAPS, "annotations", "file of NoCaps")
    sources = []
    for split, path in files:
        read = read_coco(path, split, need_captions=False)  # there is a val without captions, too
        folders = [given.root / name for name in (split, f"images/{split}")] if given.root else []
        for images in folders if given.images is None else []:
            if any((images / record.image).is_file() for record in read.records[:100]):
                sources.append(Source("nocaps", path, images, read))
                break
        else:
            sources.append(_source("nocaps", path, given, read))
    return sources


LAYOUTS: dict[str, Callable[[Given], list[Source]]] = {
    "coco": coco,
    "karpathy": karpathy,
    "lavis": lavis,
    "flickr30k": flickr30k,
    "flickr8k": flickr8k,
    "folder": folder,
    "vqa": vqa,
    "gqa": gqa,
    "nocaps": nocaps,
}


def _files_of(
    given: Given, names: Mapping[str, str], option: str, what: str
) -> list[tuple[str, Path]]:
    """The files of a data set that ROOT has, in it or in a folder named as the option, by split."""
    root = _need_root(given)
    places = [(split, _there(root, name, option)) for split, name in names.items()]
    files = [(given.split or split, path) for split, path in places if path]
    if not files:
        raise UserError(
            f"{root} has no {what}, looked for {', '.join(names.values())}; or give --{option}"
        )
    return files


def _read_coco(path: Path, split: str) -> Annotations:
    """Test splits are published without captions."""
    return read_coco(path, split, need_captions=not split.startswith("test"))


def _vqa_files(given: Given) -> list[tuple[str, Path, Path | None]]:
    """Split, questions and annotations: those that were given, else those that ROOT has."""
    if given.questions:
        truths = {_split(path, split, given): path for split, path in given.annotations}
        files = [(_split(path, split, given), path) for split, path in given.questions]
        if len(truths) < len(given.annotations):
            raise UserError("--annotations names two files of one split: give SPLIT=FILE each")
        if unused := sorted(truths.keys() - {split for split, _ in files}):
            raise UserError(
                f"--annotations of split {', '.join(unused)} have no --questions of that split"
            )
        return [(split, path, truths.get(split)) for split, path in files]
    if given.annotations:
        raise UserError("--annotations answer questions: give --questions as well")
    root = _need_root(given)
    found: dict[str, list[tuple[str, Path, Path | None]]] = {}
    for name, prefix in VQA_SETS.items():
        for split, part in VQA_PARTS.items():
            path = _there(root, f"{prefix}OpenEnded_mscoco_{part}_questions.json", "questions")
            truth = _there(root, f"{prefix}mscoco_{part}_annotations.json", "annotations")
            if path:
                found.setdefault(name, []).append((given.split or split, path, truth))
    if len(found) != 1:
        raise UserError(
            f"{root} holds {' and '.join(found)}: give --questions and --annotations of one"
            if found
            else f"{root} has no questions, looked for (v2_)OpenEnded_mscoco_*_questions.json; or "
            "give --questions"
        )
    return next(iter(found.values()))


def _there(root: Path, name: str, folder: str) -> Path | None:
    """A file in ROOT or in a folder there."""
    return next((path for path in (root / name, root / folder / name) if path.is_file()), None)


def _flickr(
    name: str, given: Given, captions: tuple[str, ...], lists: list[tuple[str, Path]]
) -> Source:
    path = _one_file(given, captions, ", ".join(captions))
    if path.suffix == ".json":
        if given.split:
            raise UserError(f"{path} says the split of each image: leave --split out")
        annotations = _listed(read_karpathy(path), given.split_lists)
    else:
        lists = given.split_lists or ([] if given.split else lists)
        if not lists and not given.split:
            raise UserError(
                f"{path} does not say the splits: give --split-list train=FILE val=FILE ..., "
                "or --split NAME for all images"
            )
        annotations = _listed(read_captions(path, given.split or ""), lists)
    return _source(name, path, given, annotations)


def _listed(annotations: Annotations, lists: list[tuple[str, Path]]) -> Annotations:
    return apply_splits(annotations, read_split_lists(lists)) if lists else annotations


def _need_root(given: Given) -> Path:
    if given.root is None:
        raise UserError("give ROOT, the folder of the data set, or --annotations and --images")
    return given.root


def _one_file(given: Given, names: tuple[str, ...] | list[str], looked_for: str) -> Path:
    """The annotation file: the one given, else the first of `names` that ROOT has."""
    if len(given.annotations) > 1:
        raise UserError("--annotations takes one file here")
    for split, path in given.annotations:
        if split is not None:
            raise UserError(f"{split}={path}: give the split with --split here")
        return path
    root = _need_root(given)
    for name in names:
        if (root / name).is_file():
            return root / name
    raise UserError(f"{root} has no caption file, looked for {looked_for}; or give --annotations")


def _split(path: Path, split: str | None, given: Given) -> str:
    """The split of a file: the one given, else what its name says (`coco_karpathy_val` -> val)."""
    if split or given.split:
        return split or given.split or ""
    if re.search("test-?dev", path.stem.lower()):
        return "testdev"
    match = re.search(r"(?:^|[^a-z])(train|val|dev|test)(?:[^a-z]|$)", path.stem.lower())
    if match is None:
        raise UserError(f"which split is {path}? Give SPLIT={path} or --split NAME")
    return "val" if match[1] == "dev" else match[1]


def _source(name: str, path: Path, given: Given, annotations: Annotations) -> Source:
    """Find the folder that the records' image paths start at."""
    if given.images is not None:
        return Source(name, path, given.images, annotations)
    root = _need_root(given)
    folders = [folder for folder in (root, *map(root.joinpath, IMAGE_FOLDERS)) if folder.is_dir()]
    # The first few records will do: some images may be missing, not the first hundred of them.
    for record in annotations.records[:100]:
        for images in folders:
            if (images / record.image).is_file():
                return Source(name, path, images, annotations)
    return Source(name, path, folders[-1] if folders else root, annotations)
