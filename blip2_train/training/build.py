"""From a resolved configuration to the parts of a stage-1 training."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from blip2_train.checkpoint.bert import init_from_bert, read_bert
from blip2_train.data.text import load_text_tokenizer
from blip2_train.errors import UserError
from blip2_train.models.freezing import count_parameters, parameter_table
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.seeding import stable_hash
from blip2_train.training.objectives import ItcConfig, LmConfig, LossConfig

log = logging.getLogger(__name__)

# Parts of the stage-1 model that are frozen: they are not stored in checkpoints.
FROZEN_PREFIXES = ("vision.",)


def build_tokenizer(settings: Mapping[str, Any]) -> Any:
    """The Q-Former's tokenizer, checked against `text.vocab_size`.

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


def build_model(
    cfg: Mapping[str, Any], *, vocab_size: int, dec_token_id: int, end_token_id: int
) -> Blip2Stage1:
    """The stage-1 model with random weights in its trained parts.

    Args:
        cfg: resolved configuration.
        vocab_size: rows of the word table, [DEC] included.
        dec_token_id: id of [DEC].
        end_token_id: id of [SEP].
    """
    vision = instantiate_group("vision", cfg["vision"])
    settings = {k: v for k, v in cfg["qformer"].items() if k != "init"}
    # the draw must not depend on the tower, nor on anything that ran before
    torch.manual_seed(stable_hash("weights", cfg["seed"]))
    qformer = instantiate_group(
        "qformer", settings, vocab_size=vocab_size, vision_width=vision.width
    )
    return Blip2Stage1(
        vision, qformer, dec_token_id=dec_token_id, end_token_id=end_token_id, **cfg["model"]
    )


def instantiate_group(name: str, settings: Mapping[str, Any], **values: Any) -> Any:
    """`hydra.utils.instantiate`, with the user's mistakes as `UserError`.

    Args:
        name: of the group, for messages.
        settings: with `_target_`.
        values: arguments that the configuration does not decide.
    """
    try:
        return instantiate(settings, **values)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, TypeError | ValueError):
            raise UserError(f"{name}: {cause}") from error
        raise


def initialise_qformer(model: Blip2Stage1, source: str) -> None:
    """Gives the Q-Former its first weights and logs what came from where.

    Args:
        model: changed in place.
        source: "random", or a BERT by Hugging Face id or folder.
    """
    if source == "random":
        log.info("Q-Former: every weight is drawn at random")
        return
    origin = init_from_bert(model.qformer, read_bert(source), source)
    rows: dict[tuple[str, str], int] = {}
    sizes = {name: p.numel() for name, p in model.qformer.named_parameters()}
    for name, place in origin.items():
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
        key = (".".join(parts) or name, place)
        rows[key] = rows.get(key, 0) + sizes[name]
    log.info("Q-Former weights and where they come from:")
    for (part, place), count in rows.items():
        log.info("  %-36s %12s  %s", part, f"{count:,}", place)


def build_loss(cfg: Mapping[str, Any]) -> LossConfig:
    """The objectives of `loss.*`."""
    return LossConfig(
        weights=cfg["weights"],
        normalise=cfg["normalise"],
        itc=ItcConfig(**cfg["itc"]),
        lm=LmConfig(**cfg["lm"]),
    )


def log_parameters(model: Blip2Stage1) -> None:
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
