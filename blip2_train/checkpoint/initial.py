"""Initial weights of a training: `init_from` a checkpoint of ours, LAVIS or HF, key by key."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from blip2_train.checkpoint import files
from blip2_train.checkpoint.account import in_short
from blip2_train.checkpoint.foreign import to_ours
from blip2_train.errors import UserError
from blip2_train.models.vision import VisionTower

TOWER = "vision."  # prefix of the image tower's weights


@dataclass
class Account:
    """What `init_from` did with every key.

    Attributes:
        loaded: taken from the checkpoint.
        missing: kept their initial values.
        kept: of the image tower, where the checkpoint has none: they come from `vision.weights`.
        dropped: {name in the checkpoint: why it was not needed}.
        unexpected: names in the checkpoint that the model does not have.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{len(self.loaded)} weights loaded, {len(self.missing)} not in the checkpoint, "
            f"{len(self.dropped)} dropped on purpose, {len(self.unexpected)} unexpected"
        ]
        if self.kept:
            lines.append(f"  not in the checkpoint: an image tower; {len(self.kept)} weights stay")
        lines += [f"  not in the checkpoint: {name}" for name in in_short(self.missing)]
        for why in dict.fromkeys(self.dropped.values()):
            names = [name for name, reason in self.dropped.items() if reason == why]
            lines += [f"  dropped: {name} ({why})" for name in in_short(names)]
        lines += [f"  unexpected: {name}" for name in in_short(self.unexpected)]
        return "\n".join(lines)


def init_from(
    model: nn.Module,
    path: Path,
    frozen_prefixes: tuple[str, ...],
    left_behind: Mapping[str, str] | None = None,
) -> Account:
    """Loads what a checkpoint has for the trained part of the model.

    Args:
        model: changed in place.
        path: checkpoint of ours or of LAVIS, or a folder or file of safetensors of Hugging Face.
        frozen_prefixes: parts that never come from a checkpoint.
        left_behind: {regular expression: why}, weights of an earlier stage that this one may lack.

    Raises:
        UserError: as `files.read`; another shape; nothing that fits; a part of an image tower that
            is trained; or no query tokens, without which nothing of a Q-Former would be worth
            having.
    """
    own = model.state_dict()
    names = [name for name in own if not name.startswith(frozen_prefixes)]
    renamed = to_ours(files.read(path, f"init_from={path}"), names)
    weights = _with_fitting_positions(model, renamed.state)
    account = Account(dropped=renamed.dropped, unexpected=renamed.unknown)
    for name, value in weights.items():
        if name.startswith(frozen_prefixes):
            account.dropped[name] = "frozen, comes from its own weights"
        elif name not in own:
            reasons = [why for names, why in (left_behind or {}).items() if re.match(names, name)]
            if reasons:
                account.dropped[name] = reasons[0]
            else:
                account.unexpected.append(name)
        elif own[name].shape != value.shape:
            raise UserError(
                f"init_from={path}: {name} is {tuple(value.shape)}, the model's is "
                f"{tuple(own[name].shape)}; it was trained with another architecture"
            )
        else:
            account.loaded.append(name)
    account.missing = [
        name for name in own if name not in weights and not name.startswith(frozen_prefixes)
    ]
    lacking = [name for name in account.missing if name.startswith(TOWER)]
    if lacking and any(name.startswith(TOWER) for name in account.loaded):
        raise UserError(
            f"init_from={path} lacks {len(lacking)} weights of the image tower, the first is "
            f"{lacking[0]}; set vision.* as it was trained"
        )
    account.kept = lacking
    account.missing = [name for name in account.missing if not name.startswith(TOWER)]
    needed = "qformer.query_tokens"
    if needed in own and needed not in account.loaded:
        raise UserError(f"init_from={path} has no query tokens; it is no BLIP-2 checkpoint")
    if not account.loaded:
        raise UserError(f"init_from={path} has no weight that this stage trains")
    model.load_state_dict({name: weights[name] for name in account.loaded}, strict=False)
    return account


def _with_fitting_positions(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, a tower's positions among them interpolated to the model's image size."""
    vision = getattr(model, "vision", None)
    if not isinstance(vision, VisionTower):
        return weights
    return {
        name: vision.fitted(name.removeprefix(TOWER), value) if name.startswith(TOWER) else value
        for name, value in weights.items()
    }
