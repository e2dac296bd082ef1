"""Parts that several stages are built from."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from blip2_train.checkpoint.bert import init_from_bert, read_bert
from blip2_train.checkpoint.initial import Account
from blip2_train.data.features import CachedFeatures
from blip2_train.data.text import load_text_tokenizer
from blip2_train.errors import UserError
from blip2_train.models.cached_tower import CachedTower
from blip2_train.models.freezing import count_parameters, parameter_table
from blip2_train.models.qformer import QFormer
from blip2_train.models.vision import DTYPES, VisionTower
from blip2_train.seeding import stable_hash

log = logging.getLogger(__name__)


def build_text_tokenizer(settings: Mapping[str, Any]) -> Any:
    """A BERT tokenizer with [DEC], checked against `text.vocab_size`.

    Raises:
        UserError: it cannot be had, or has another vocabulary.
    """
    tokenizer = load_text_tokenizer(settings["tokenizer"])
    wanted = settings["vocab_size"]
    if wanted is not None and len(tokenizer) != wanted + 1:
        raise UserError(
            f"text.tokenizer={settings['tokenizer']} has {len(tokenizer) - 1} word pieces, "
            f"text.vocab_size={wanted}; give the tokenizer of that BERT, or text.vocab_size=null"
        )
    return tokenizer


def seed_weights(seed: int) -> None:
    """Before trained parts are drawn: they must not depend on anything that was built before."""
    torch.manual_seed(stable_hash("weights", seed))


def instantiate_group(name: str, settings: Mapping[str, Any], **values: Any) -> Any:
    """`hydra.utils.instantiate`, with the user's mistakes as `UserError`.

    Args:
        name: of the group, for messages.
        settings: with `_target_`.
        values: arguments that the configuration does not decide.
    """
    try:
        return instantiate(settings, _convert_="all", **values)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, TypeError | ValueError):
            raise UserError(f"{name}: {cause}") from error
        raise


def initialise_qformer(qformer: QFormer, source: str) -> None:
    """Gives the Q-Former its first weights and logs what came from where.

    Args:
        qformer: changed in place.
        source: "random", or a BERT by Hugging Face id or folder.
    """
    if source == "random":
        log.info("Q-Former: every weight is drawn at random")
        return
    origin = init_from_bert(qformer, read_bert(source), source)
    rows: dict[tuple[str, str], int] = {}
    sizes = {name: p.numel() for name, p in qformer.named_parameters()}
    for name, place in origin.items():
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
        key = (".".join(parts) or name, place)
        rows[key] = rows.get(key, 0) + sizes[name]
    log.info("Q-Former weights and where they come from:")
    for (part, place), count in rows.items():
        log.info("  %-36s %12s  %s", part, f"{count:,}", place)


def build_vision(
    cfg: Mapping[str, Any], features: CachedFeatures | None, *, shapes_only: bool = False
) -> VisionTower | CachedTower:
    """The image tower, or what stands for it.

    Args:
        cfg: resolved configuration.
        features: that were computed before; None: the tower itself is built.
        shapes_only: its weights do not matter.
    """
    if features is not None:
        table = features.table
        return CachedTower(
            cfg["vision"]["name"],
            cfg["vision"]["weights"],
            table.digest,
            image_size=table.image_size,
            num_tokens=table.tokens,
            width=table.width,
            dtype=DTYPES[table.dtype],
            blank=features.blank,
            precision=table.tower.get("precision", "native"),
        )
    settings = dict(cfg["vision"])
    if shapes_only:
        settings["weights"] = "random"
    vision = instantiate_group("vision", settings)
    if shapes_only and cfg["data"]["features"] == "cached":
        return CachedTower(
            vision.name,
            vision.weights,
            "",
            image_size=vision.image_size,
            num_tokens=vision.num_tokens,
            width=vision.width,
            dtype=vision.dtype,
            blank=torch.zeros(1, vision.num_tokens, vision.width, dtype=vision.dtype),
            precision=vision.precision,
        )
    return vision


def frozen_tower(vision: VisionTower | CachedTower) -> dict[str, dict[str, str]]:
    """{"vision": its identity}; nothing of a tower that is trained, whose weights are stored."""
    return {} if vision.trainable else {"vision": tower_identity(vision)}


def log_account(source: str, account: Account) -> None:
    """Logs what `init_from` did; warns where a tower was left behind, whose Q-Former was not."""
    log.info("init_from=%s: %s", source, account)
    if any(name.startswith("vision.") for name in account.dropped):
        log.warning(
            "init_from=%s holds an image tower, and its Q-Former may have been trained with it; "
            "vision.trainable=false takes the tower of vision.weights in its place",
            source,
        )


def tower_identity(vision: VisionTower | CachedTower) -> dict[str, str]:
    """What checkpoints hold in place of the tower's weights.

    Its precision too if it is not native, and how features are stored if that loses something.
    """
    identity = {"name": vision.name, "weights": vision.weights, "digest": vision.digest()}
    if vision.precision != "native":
        identity["precision"] = vision.precision
    if isinstance(vision, CachedTower) and vision.store != str(vision.dtype).removeprefix("torch."):
        identity["store"] = vision.store
    return identity


def made_up_text(words: int, samples: int = 2, length: int = 16, rank: int = 0) -> dict[str, Any]:
    """Random text, the same at every call; ids differ between ranks.

    Args:
        words: rows of the word table.
        samples: of the batch.
        length: tokens of each text.
        rank: of this process.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(words, 100), (samples, length), generator=generator)
    starts = torch.arange(samples)[:, None] * length
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_id": torch.arange(samples) + samples * rank,
        "text_index": torch.arange(samples * length),
        "lm_index": (starts + torch.arange(length - 1)).flatten(),
        "text_length": length,
    }


def log_parameters(model: nn.Module) -> None:
    """Logs what is trained and what is frozen, in which precision."""
    log.info("%-32s %15s  %-7s  %s", "module", "parameters", "state", "dtype")
    for row in parameter_table(model):
        log.info(
            "%-32s %15s  %-7s  %s",
            row["module"], f"{row['parameters']:,}", row["state"], row["dtype"],
        )  # fmt: skip
    parameters = list(model.parameters())
    log.info(
        "trained %s, frozen %s",
        f"{count_parameters(parameters, trainable=True):,}",
        f"{count_parameters(parameters, trainable=False):,}",
    )


def run_folder(cfg: Mapping[str, Any]) -> Path:
    """Where the run lives."""
    return Path(cfg["run"]["dir"]) / cfg["run"]["name"]
