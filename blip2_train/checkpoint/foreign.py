"""Weights of any origin under our names, with an account of every key."""

from collections.abc import Collection, Mapping

from torch import Tensor

from blip2_train.checkpoint import hf, lavis, towers
from blip2_train.checkpoint.account import KeyAccount, Row
from blip2_train.checkpoint.files import HF, LAVIS, Contents

TOWER = "vision.tower."
LAVIS_TOWER = "visual_encoder."


def to_ours(contents: Contents, names: Collection[str]) -> KeyAccount:
    """Renames what was read.

    Args:
        contents: of `files.read`.
        names: of the model's weights, which say the form of its image tower; without one the tower
            keeps its names below `TOWER`.

    Raises:
        UserError: the weights contradict each other.
    """
    if contents.kind == LAVIS:
        tower, rest = split(contents.state, LAVIS_TOWER)
        account = lavis.from_lavis(rest)
        account.update(_tower(tower, LAVIS_TOWER, names))
    elif contents.kind == HF:
        norm, others = split(contents.state, hf.LAST_NORM)
        tower, rest = split(others, hf.TOWER)
        rest |= {hf.LAST_NORM + name: value for name, value in norm.items()}
        account = hf.from_hf(rest, contents.extra)
        account.update(_tower(tower, hf.TOWER, names))
    else:
        account = KeyAccount()
        for name, value in contents.state.items():
            account.take(name, name, value)
    return account


def split(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is below a prefix, without it, and the rest."""
    below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return below, {k: v for k, v in state.items() if not k.startswith(prefix)}


def prefixed(account: KeyAccount, source: str, target: str) -> KeyAccount:
    """An account of parts, by their names in the whole."""
    return KeyAccount(
        {target + name: value for name, value in account.state.items()},
        [
            Row(row.status, source + row.source, row.target and target + row.target, row.why)
            for row in account.rows
        ],
    )


def _tower(tower: dict[str, Tensor], prefix: str, names: Collection[str]) -> KeyAccount:
    own = [name.removeprefix(TOWER) for name in names if name.startswith(TOWER)]
    if not own:
        account = KeyAccount()
        for name, value in tower.items():
            account.take(name, name, value)
    else:
        rename = towers.lavis_to_timm if prefix == LAVIS_TOWER else towers.hf_to_timm
        account = rename(tower, parted=towers.has_parted_bias(own))
    return prefixed(account, prefix, TOWER)
