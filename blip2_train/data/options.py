"""Options that commands of blip2-prepare share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def split_and_path(text: str) -> tuple[str | None, Path]:
    """Read `[SPLIT=]FILE`; a file whose name has a = in it exists as it is."""
    split, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return None, Path(text)
    return split, Path(path)


def split_list(text: str) -> tuple[str, Path]:
    """Read `SPLIT=FILE`."""
    split, path = split_and_path(text)
    if split is None:
        raise argparse.ArgumentTypeError(f"{text} should be SPLIT=FILE")
    return split, path


def whole(low: int, high: float = float("inf")) -> Callable[[str], int]:
    """A command line type: whole numbers in a range."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            upper = "" if high == float("inf") else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{value} should be at least {low}{upper}")
        return value

    parse.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"
    return parse


def add_input_options(command: argparse.ArgumentParser, name: str) -> None:
    """Where a data set of some kind is, and what of it is meant."""
    # What a data set has no use for is no option of its command.
    command.set_defaults(split=None, split_list=[], year=None, restval="train", strip="")
    command.set_defaults(annotations=[], questions=[])
    add = command.add_argument
    add("root", type=Path, nargs="?", metavar="ROOT", help="the data set, in its official layout")
    add("--images", type=Path, metavar="DIR", help="folder that the image names start at")
    file: dict[str, Any] = {
        "type": split_and_path,
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "[SPLIT=]FILE",
    }
    if name in ("vqa", "gqa"):
        add("--questions", **file, help="files of questions, one for each split")
    else:
        several = "caption file; several with coco, lavis and nocaps"
        add("--annotations", "--captions", **file, help=several)
    if name == "vqa":
        add("--annotations", **file, help="their annotations; test splits have none")
    splits = command.add_mutually_exclusive_group()
    if name != "karpathy":
        splits.add_argument("--split", metavar="NAME", help="split of files that do not say theirs")
    if name in ("flickr8k", "flickr30k", "folder"):
        splits.add_argument(
            "--split-list",
            type=split_list,
            nargs="+",
            action="extend",
            default=[],
            metavar="SPLIT=FILE",
            help="lists of image names, one per line",
        )
    if name == "coco":
        add("--year", choices=("2014", "2017"), help="where ROOT holds both")
    if name == "lavis":
        add(
            "--strip",
            metavar="PREFIX",
            help="drop this from the front of the image paths in the lists",
        )
    if name == "karpathy":
        add(
            "--restval",
            default="train",
            metavar="SPLIT",
            help="split of the images in Karpathy's restval (default: train)",
        )


def add_output_options(command: argparse.ArgumentParser) -> None:
    """What the shards become."""
    add = command.add_argument
    add("--out", type=Path, required=True, help="folder of the shards")
    add_workers(command)
    add("--quality", type=whole(1, 95), default=90, help="of new JPEGs, 1 to 95 (default: 90)")
    add(
        "--samples-per-shard",
        type=whole(1),
        default=1000,
        metavar="N",
        help="records per shard; skipped ones leave it smaller (default: 1000)",
    )
    add(
        "--tokenizer",
        type=whole(5),
        metavar="N",
        help="train a lower-case BERT WordPiece of N entries on the train captions",
    )


def add_workers(command: argparse.ArgumentParser) -> None:
    """How many processes do the work."""
    command.add_argument(
        "--workers",
        type=whole(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per CPU)",
    )
