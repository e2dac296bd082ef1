"""A model with all its frozen parts, in float32 on the CPU: what files are made of."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2_train.checkpoint.account import CONVERTED, KeyAccount, Row
from blip2_train.checkpoint.foreign import TOWER, split
from blip2_train.checkpoint.hf import OUR_LANGUAGE
from blip2_train.errors import UserError
from blip2_train.models.freezing import state_digest
from blip2_train.models.vision import DTYPES
from blip2_train.training.checkpointing import load_trained
from blip2_train.training.fit import STAGES
from blip2_train.training.loading import check_classes
from blip2_train.training.stage import Stage

CONVERTIBLE = ("stage1", "stage2")


@dataclass
class Whole:
    """A model of ours, and where it came from.

    Attributes:
        cfg: its configuration, as a run would have it.
        stage: that built it.
        model: in float32 and evaluation mode.
        account: of every weight of the source; its weights themselves are in the model.
        step: optimizer steps that it was trained for; 0 where the source does not say.
    """

    cfg: dict[str, Any]
    stage: Stage
    model: Any
    account: KeyAccount = field(default_factory=KeyAccount)
    step: int = 0

    @property
    def trained(self) -> dict[str, Tensor]:
        """Weights that checkpoints of ours store."""
        frozen = self.stage.frozen_prefixes
        return {k: v for k, v in self.model.state_dict().items() if not k.startswith(frozen)}

    @property
    def own(self) -> dict[str, Tensor]:
        """Weights without image tower and language model."""
        state = self.model.state_dict()
        return {k: v for k, v in state.items() if not k.startswith((TOWER, OUR_LANGUAGE))}

    @property
    def tower(self) -> dict[str, Tensor]:
        """The image tower's, by timm's names."""
        return split(self.model.state_dict(), TOWER)[0]

    @property
    def language(self) -> dict[str, Tensor]:
        """The language model's, by the library's names; {} in stage 1."""
        return split(self.model.state_dict(), OUR_LANGUAGE)[0]


def build(cfg: Mapping[str, Any]) -> tuple[Stage, Any]:
    """The model of a configuration, in float32, with nothing quantized; weights as it starts with.

    Args:
        cfg: resolved configuration of a run.

    Raises:
        UserError: of another stage, or a part cannot be had.
    """
    check_classes(cfg)
    if cfg["stage"] not in CONVERTIBLE:
        raise UserError(
            f"stage={cfg['stage']} has no counterpart elsewhere; its product, beside its "
            "checkpoints, is an ordinary timm or transformers model already"
        )
    exact = copy.deepcopy(dict(cfg))
    exact["vision"] |= {"dtype": "float32", "precision": "native"}
    if "language_model" in exact:
        exact["language_model"] |= {"dtype": "float32", "quantization": None}
    stage = STAGES[cfg["stage"]](exact)
    model = stage.build_model()
    return stage, model.requires_grad_(False).eval()


def check_dtypes(account: KeyAccount) -> None:
    """Enters into the account which weights become float32."""
    for place, row in enumerate(account.rows):
        value = account.state.get(row.target)
        if value is not None and value.is_floating_point() and value.dtype != torch.float32:
            was = str(value.dtype).removeprefix("torch.")
            done = "rounded to" if value.dtype == torch.float64 else "the same numbers in"
            why = f"{row.why}; {was}, {done} float32".removeprefix("; ")
            account.rows[place] = Row(CONVERTED, row.source, row.target, why)


def fill(whole: Whole, state: dict[str, Tensor], path: Path) -> None:
    """Loads trained weights, strictly.

    Raises:
        UserError: listing every key that is missing, unexpected or of another shape.
    """
    load_trained(whole.model, state, whole.stage.frozen_prefixes, path)


def check_frozen_parts(whole: Whole, saved: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Whether the frozen parts are those that a checkpoint was trained with.

    Args:
        whole: with its frozen parts as the configuration builds them.
        saved: their identities, as the checkpoint has them.
        path: of the checkpoint.

    Raises:
        UserError: they are not.
    """
    digests = {"vision": tower_digest(whole)}
    if whole.language:
        digests["language_model"] = whole.model.language_model.identity()["digest"]
    for part, digest in digests.items():
        if part in saved and saved[part]["digest"] != digest:
            raise UserError(
                f"{part} ({whole.cfg[part]['name']}) has other weights than the one that {path} "
                f"was trained with ({saved[part]['name']}, {saved[part]['weights']}); bring it back"
            )


def tower_digest(whole: Whole) -> str:
    """Of the image tower's weights as the configuration has them computed with."""
    dtype = DTYPES[whole.cfg["vision"]["dtype"]]
    return state_digest(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in whole.tower.items()}
    )
