"""Writes a folder that Hugging Face's BLIP-2 classes and processor open."""

import json
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from safetensors.torch import save_file

from blip2_train import __version__
from blip2_train.checkpoint.account import KeyAccount
from blip2_train.checkpoint.foreign import TOWER, prefixed
from blip2_train.checkpoint.hf import EXTRA, LANGUAGE, OUR_LANGUAGE, to_hf
from blip2_train.checkpoint.hf import TOWER as HF_TOWER
from blip2_train.checkpoint.towers import timm_to_hf
from blip2_train.errors import UserError
from blip2_train.interchange.hf_config import class_name, to_hf_config
from blip2_train.interchange.language import save_weights, with_rows
from blip2_train.interchange.tokenizers import hf_tokenizer, save_own
from blip2_train.interchange.whole import Whole
from blip2_train.models.lm_weights import quiet_library


def write_hf(whole: Whole, folder: Path, max_shard_size: str) -> KeyAccount:
    """Writes configuration, weights, processor and generation configuration.

    Args:
        whole: the model.
        folder: exists and is empty.
        max_shard_size: of a file of weights, such as "5GB".

    Returns:
        What became of every weight.

    Raises:
        UserError: their classes cannot hold the model.
    """
    processor = build_processor(whole)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    text, added = text_settings(whole, token)
    config = to_hf_config(whole.model, whole.cfg, image_token=token, **text)
    account, extra = to_hf(whole.own, whole.cfg["stage"])
    account.update(prefixed(timm_to_hf(whole.tower), TOWER, HF_TOWER))
    if whole.language:
        words = with_rows(whole.language, whole.model.language_model.lm, added)
        for part, value in words.items():
            grown = value.shape != whole.language[part].shape
            why = f"{added} row(s) more, for <image>" if grown else ""
            account.take(OUR_LANGUAGE + part, LANGUAGE + part, value, why)
    account.check("the model")
    config.save_pretrained(folder)
    save_weights(account.state, folder, max_shard_size)
    notes = {
        "format": "blip2-train 1",
        "config": yaml.safe_dump(_remembered(whole.cfg), sort_keys=False),
        "added_rows": str(added),
        "step": str(whole.step),
    }
    if whole.language:
        settings = whole.model.language_model.lm.config.to_dict()
        notes["language_config"] = json.dumps(settings, default=str)
    save_file({k: v.contiguous() for k, v in extra.items()}, folder / EXTRA, notes)
    processor.save_pretrained(folder)
    save_own(whole.stage, folder)
    if whole.language:
        generation_config(config).save_pretrained(folder)
    return account


def _remembered(cfg: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the places of the frozen parts, which are in the folder."""
    out = {**cfg, "vision": {**cfg["vision"], "weights": "random"}}
    if "language_model" in cfg:
        own = {"name": None, "weights": "random", "config": None}
        out["language_model"] = cfg["language_model"] | own
    return out


def build_processor(whole: Whole) -> Any:
    """Images in the tower's size and colours; texts with the queries' places in front."""
    from transformers import Blip2Processor, BlipImageProcessor

    vision = whole.model.vision
    images = BlipImageProcessor(
        size={"height": vision.image_size, "width": vision.image_size},
        image_mean=list(vision.mean),
        image_std=list(vision.std),
    )
    encoder = bool(whole.language) and whole.model.language_model.is_encoder_decoder
    tokenizer = hf_tokenizer(whole.stage, encoder=encoder)
    return Blip2Processor(
        images, tokenizer, num_query_tokens=whole.cfg["qformer"]["num_query_tokens"]
    )


def text_settings(whole: Whole, image_token: int) -> tuple[dict[str, Any], int]:
    """What the language model's configuration must say, and rows that its word table lacks.

    `generate` of their class reads the tokens around a text from that configuration alone.
    """
    if not whole.language:
        return {}, 0
    lm, text = whole.model.language_model, whole.stage.text  # type: ignore[attr-defined]
    added = max(0, image_token + 1 - lm.vocab_size)
    start = text.encoder_end_id if lm.is_encoder_decoder else text.start_id
    settings = {
        "vocab_size": lm.vocab_size + added,
        "eos_token_id": text.end_id,
        "pad_token_id": text.pad_id,
        "bos_token_id": text.end_id if start is None else start,  # a text must begin with something
    }
    if lm.is_encoder_decoder:
        settings["decoder_start_token_id"] = lm.decoder_start_token_id
    return settings, added


def generation_config(config: Any) -> Any:
    """Greedy captions of at most 30 tokens."""
    from transformers import GenerationConfig

    text = config.text_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    tokens = {name: getattr(text, name, None) for name in names}
    return GenerationConfig(
        max_new_tokens=30, **{name: value for name, value in tokens.items() if value is not None}
    )


def load_hf(folder: Path, stage: str) -> Any:
    """Their model, in float32 and evaluation mode.

    Raises:
        UserError: it does not find all of its weights in the folder, or others.
    """
    import transformers

    cls = getattr(transformers, class_name(stage))
    with quiet_library():
        model, report = cls.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[problem])):
            raise UserError(f"{class_name(stage)}: {len(names)} {problem}, such as {names[0]}")
    return model.eval()


def write_card(whole: Whole, folder: Path, name: str, model: Any, difference: float) -> None:
    """Writes the model card.

    Args:
        whole: the model.
        folder: written by `write_hf`.
        name: of the model, as users will call it.
        model: of their class, from the folder.
        difference: of outputs, that their eps makes.
    """
    added = 0
    if whole.language:
        added = model.config.text_config.vocab_size - whole.model.language_model.vocab_size
    source = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    template = jinja2.Template(source, keep_trailing_newline=True)
    qformer, language = whole.cfg["qformer"], ""
    if whole.language:
        lm = whole.model.language_model.lm
        language = f"{lm.config.model_type}, {lm.num_parameters():,} parameters"
    text = template.render(
        name=name,
        version=__version__,
        stage=whole.cfg["stage"],
        step=f"{whole.step:,}",
        kind=whole.cfg["kind"],
        tower=whole.model.vision.name,
        image_size=whole.model.vision.image_size,
        language=language,
        queries=qformer["num_query_tokens"],
        layers=qformer["num_layers"],
        width=qformer["hidden_size"],
        architecture=class_name(whole.cfg["stage"]),
        prompt=whole.cfg["data"]["prompt"] or "a photo of",
        eps=f"{model.config.vision_config.layer_norm_eps:g}",
        difference=f"{difference:.1e}",
        added=added,
        extra=EXTRA,
        asks=getattr(whole.stage, "asks", False),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
