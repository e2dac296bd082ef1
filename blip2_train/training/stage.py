"""What a kind of training is made of; `fit` joins the parts, one file per stage fills them in."""

import abc
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blip2_train.config import BatchPlan, trains_tower
from blip2_train.data.batch import collate, collate_eval
from blip2_train.data.features import CachedFeatures
from blip2_train.data.stream import EvalStream
from blip2_train.training.build import build_text_tokenizer
from blip2_train.training.module import StageModule
from blip2_train.training.validation import Evaluator

TOWER = "vision."  # prefix of the image tower's parameters


class Stage(abc.ABC):
    """Builds the parts of one kind of training from a resolved configuration.

    Nothing is read or built before it is asked for: `--dry-run` asks for shapes alone.

    Args:
        cfg: resolved and validated configuration.
    """

    frozen_prefixes: tuple[str, ...] = ()  # of parameters that checkpoints name and do not store
    product: str | None = None  # file or folder that the run leaves for others to load
    text_bucket: int | None = None  # where ranks agree on the length of text (see `Feeder`)

    # of the frozen tower, in whose place they are then; a training sets it before it builds
    features: CachedFeatures | None = None

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        self.cfg = cfg
        if trains_tower(cfg):
            kept = tuple(prefix for prefix in self.frozen_prefixes if prefix != TOWER)
            self.frozen_prefixes = kept

    @abc.abstractmethod
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers that made the data what it is; checkpoints hold their digests.

        Raises:
            UserError: one cannot be had, or does not fit.
        """

    @abc.abstractmethod
    def build_model(self, *, shapes_only: bool = False, device: torch.device | None = None) -> Any:
        """The model, random where it is trained (from `seed` alone).

        Args:
            shapes_only: on the meta device, without reading a tokenizer or a weight.
            device: where frozen parts too large for the host are loaded to.
        """

    @abc.abstractmethod
    def initialise(self, model: Any) -> None:
        """First weights of a new run, where they are not random; logs what came from where.

        Raises:
            UserError: they cannot be had, or do not fit.
        """

    def download(self) -> None:
        """Brings what is read from the network into this machine's cache.

        Raises:
            UserError: it cannot be had.
        """
        self.tokenizers()

    def frozen_parts(self, model: Any) -> dict[str, dict[str, str]]:
        """Identity of every frozen part, {part: {name, weights, digest}}."""
        return {}

    def start_frozen(self, model: Any, device: torch.device) -> None:
        """Brings frozen parts into the precision that they compute in, on the device that trains.

        Raises:
            UserError: this device or these weights do not allow it.
        """

    @abc.abstractmethod
    def build_module(self, model: Any, batch: BatchPlan) -> StageModule:
        """The Lightning module around the model."""

    def image_size(self, model: Any) -> int | None:
        """Side in pixels of what the model sees; None: no images."""
        return model.vision.image_size

    @abc.abstractmethod
    def collate(self) -> Any:
        """(samples, skipped) -> training batch; runs in the loader's workers."""

    @abc.abstractmethod
    def collate_eval(self) -> Any:
        """Evaluation items -> batch; runs in the loader's workers."""

    @abc.abstractmethod
    def build_evaluator(self, module: StageModule, images: EvalStream) -> Evaluator:
        """What validation computes."""

    def export(self, model: Any, path: Path) -> None:
        """Writes `product`, whole or not at all."""

    def common(self, batch: BatchPlan) -> dict[str, Any]:
        """Arguments that every `StageModule` takes beside its own."""
        return {
            "batch": batch,
            "seed": self.cfg["seed"],
            "optimizer": self.cfg["optimizer"],
            "schedule": {**self.cfg["schedule"], "max_steps": self.cfg["trainer"]["max_steps"]},
        }


class BertTextStage(Stage):
    """A stage whose text passes a BERT tokenizer and is exchanged between ranks (stage 1, clip)."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__(cfg)
        self.text_bucket = cfg["text"]["bucket"]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """With [DEC]."""
        return build_text_tokenizer(self.cfg["text"])

    def word_pieces(self, *, shapes_only: bool) -> int:
        """Size of the vocabulary, without [DEC]; where it is given, shapes need no tokenizer."""
        given = self.cfg["text"]["vocab_size"]
        return given if shapes_only and given is not None else len(self.tokenizer) - 1

    def tokenizers(self) -> dict[str, Any]:
        """The one of all texts."""
        return {"tokenizer": self.tokenizer}

    def collate(self) -> Any:
        """Puts training batches together."""
        return functools.partial(
            collate, tokenizer=self.tokenizer, max_text_tokens=self.cfg["text"]["max_tokens"]
        )

    def collate_eval(self) -> Any:
        """Puts evaluation batches together."""
        return functools.partial(
            collate_eval, tokenizer=self.tokenizer, max_text_tokens=self.cfg["text"]["max_tokens"]
        )
