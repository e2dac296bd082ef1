"""Ways from stored images to batches, each as its own documentation has it set up.

Each is set up by its call and starts its processes when it is first asked for a batch: a pair of
the images [B, 3, S, S] and the names of the shards that they come from.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from blip2_train.data import images as decoding
from blip2_train.data.batch import collate
from blip2_train.data.source import open_source
from blip2_train.data.stream import TrainStream
from blip2_train.data.text import load_text_tokenizer
from blip2_train.data.transforms import TrainTransform

SIDE = 224
CROP_SCALE = (0.5, 1.0)
MAX_TEXT_TOKENS = 32
SHUFFLE_BUFFER = 1000
Batches = Iterator[tuple[torch.Tensor, list[str]]]


@dataclass(frozen=True)
class Stored:
    """The same images in every form that a pipeline reads.

    Attributes:
        shards: folder of shards with an index.
        split: of the shards.
        files: folder with a folder of image files per shard.
        tokenizer: folder of a BERT tokenizer.
        images: to load.
        batch: images of a batch.
        workers: loader processes, at least 1.
    """

    shards: Path
    split: str
    files: Path
    tokenizer: Path
    images: int
    batch: int
    workers: int

    @property
    def batches(self) -> int:
        """Whole batches that `images` make, at least one."""
        return max(1, self.images // self.batch)


class _First(IterableDataset):
    """The first batches of an endless stream, over all workers."""

    def __init__(self, stream: TrainStream, batches: int) -> None:
        self._stream, self._batches = stream, batches

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        return itertools.islice(self._stream, len(range(info.id, self._batches, info.num_workers)))


def ours(stored: Stored, decode: str, simplejpeg: bool = True) -> Batches:
    """This package's loader: captions are cleaned and tokenised too.

    Args:
        stored: the data.
        decode: `fast` or `exact`.
        simplejpeg: use it where it is installed.
    """
    if not simplejpeg:
        decoding.simplejpeg = None  # this process measures nothing else
    source = open_source("benchmark", stored.shards, stored.split)
    stream = TrainStream(
        [source],
        {"benchmark": TrainTransform(SIDE, CROP_SCALE, decode=decode)},  # type: ignore[arg-type]
        functools.partial(
            collate,
            tokenizer=load_text_tokenizer(stored.tokenizer),
            max_text_tokens=MAX_TEXT_TOKENS,
        ),
        contrastive_batch=stored.batch,
        seed=0,
        shuffle_window=8,
    )
    loader = DataLoader(_First(stream, stored.batches), batch_size=None, num_workers=stored.workers)
    return _pairs(loader, lambda batch: (batch["image"], [k.split("/")[1] for k in batch["keys"]]))


def torchvision_transform() -> Callable[[Image.Image], torch.Tensor]:
    """What the reference does to a training image."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIDE, CROP_SCALE, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            ),
        ]
    )


def webdataset(stored: Stored) -> Batches:
    """A plain WebDataset pipeline."""
    import webdataset

    tars = sorted(str(path) for path in stored.shards.glob(f"{stored.split}-*.tar"))
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0)
        .shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", "json", "__url__")
        .map_tuple(torchvision_transform(), _first_caption, _file_name)
        .batched(stored.batch, partial=False)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=stored.workers)
    return _pairs(loader, lambda batch: (batch[0], list(batch[2])))


def energon(stored: Stored) -> Batches:
    """Megatron-Energon with the same transforms.

    Raises:
        ImportError: it is not installed.
    """
    from blip2_train.benchmarks.energon import batches

    return batches(stored, torchvision_transform())


class Files(Dataset):
    """Image files with a caption each, as the reference reads them."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(path for path in folder.glob("*/*") if path.suffix != ".txt")
        self._transform = torchvision_transform()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, str, str]:
        path = self._paths[item]
        image = self._transform(Image.open(path).convert("RGB"))
        return image, path.with_suffix(".txt").read_text(), path.parent.name


def files(stored: Stored) -> Batches:
    """A dataset over files, shuffled by the loader, as the reference has it."""
    loader = DataLoader(
        Files(stored.files),
        batch_size=stored.batch,
        shuffle=True,
        drop_last=True,
        num_workers=stored.workers,
    )
    return _pairs(loader, lambda batch: (batch[0], list(batch[2])))


def _pairs(loader: Iterable[Any], pick: Callable[[Any], tuple[torch.Tensor, list[str]]]) -> Batches:
    for batch in loader:
        yield pick(batch)


def _first_caption(meta: dict[str, Any]) -> str:
    return meta["captions"][0]


def _file_name(url: str) -> str:
    return url.rpartition("/")[2]


PIPELINES: dict[str, Callable[[Stored], Batches]] = {
    "ours, fast": functools.partial(ours, decode="fast"),
    "ours, fast, PIL alone": functools.partial(ours, decode="fast", simplejpeg=False),
    "ours, exact": functools.partial(ours, decode="exact"),
    "WebDataset + torchvision": webdataset,
    "Megatron-Energon": energon,
    "files, as the reference": files,
}


def is_installed(name: str) -> bool:
    """Whether what a pipeline needs is there."""
    if name == "Megatron-Energon":
        return bool(
            importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.energon")
        )
    return name != "ours, fast, PIL alone" or decoding.simplejpeg is not None
