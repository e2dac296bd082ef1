"""Sizes of our models as Hugging Face's BLIP-2 configuration, and back."""

from collections.abc import Mapping
from typing import Any

from blip2_train.checkpoint.tower_shape import shape_for_hf
from blip2_train.errors import UserError
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.models.stage2 import Blip2Stage2

# (ours, theirs) of the Q-Former.
QFORMER = [
    ("hidden_size", "hidden_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("intermediate_size", "intermediate_size"),
    ("cross_attention_freq", "cross_attention_frequency"),
    ("max_positions", "max_position_embeddings"),
    ("dropout", "hidden_dropout_prob"),
]
# timm's class of the same transformer as Blip2VisionModel
EVA = "eva_giant_patch14_clip_224"


def to_hf_config(model: Any, cfg: Mapping[str, Any], *, image_token: int, **text: Any) -> Any:
    """The configuration of the class that holds a model.

    Args:
        model: of ours, of stage 1 or 2.
        cfg: its configuration.
        image_token: id of the token in whose places the queries are put.
        text: of stage 2, what deviates from the language model's own configuration.

    Raises:
        UserError: their classes cannot be of this shape.
    """
    from transformers import Blip2Config

    shape = shape_for_hf(model.vision.tower, model.vision.name)
    names = model.vision.tower.state_dict()
    settings = cfg["qformer"]
    qformer = {theirs: settings[ours] for ours, theirs in QFORMER}
    qformer["attention_probs_dropout_prob"] = settings["dropout"]
    if isinstance(model, Blip2Stage1):
        own: dict[str, Any] = {"image_text_hidden_size": model.vision_proj.out_features}
        qformer["vocab_size"] = model.qformer.word_embeddings.num_embeddings
        qformer["use_qformer_text_input"] = True
    else:
        own = {"text_config": _text_config(model, text)}
        qformer["use_qformer_text_input"] = False
    config = Blip2Config(
        vision_config={
            "hidden_size": shape.width,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "image_size": model.vision.image_size,
            "patch_size": shape.patch,
            "hidden_act": shape.activation,
            "layer_norm_eps": shape.eps,
            "qkv_bias": any("bias" in name and ".attn.q" in name for name in names),
        },
        qformer_config=qformer,
        num_query_tokens=settings["num_query_tokens"],
        image_token_index=image_token,
        dtype="float32",
        **own,
    )
    config.architectures = [class_name(cfg["stage"])]
    return config


def class_name(stage: str) -> str:
    """Of their class that holds a stage."""
    return "Blip2ForImageTextRetrieval" if stage == "stage1" else "Blip2ForConditionalGeneration"


def stage_of(config: Mapping[str, Any]) -> str:
    """The stage that a configuration of theirs is of."""
    text_input = config.get("qformer_config", {}).get("use_qformer_text_input", False)
    return "stage1" if text_input else "stage2"


def _text_config(model: Blip2Stage2, changes: dict[str, Any]) -> dict[str, Any]:
    lm = model.language_model.lm
    settings = lm.config.to_dict() | {"dtype": "float32", "architectures": [type(lm).__name__]}
    for key in ("_name_or_path", "transformers_version", "quantization_config"):
        settings.pop(key, None)
    if lm.config.hidden_size != model.language_model.width:
        raise UserError(
            f"Hugging Face's BLIP-2 classes cannot hold language_model.name="
            f"{model.language_model.name}: they project to its width of {lm.config.hidden_size}, "
            f"and its tokens are {model.language_model.width} wide"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if lm.config.is_encoder_decoder and lm.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"Hugging Face's BLIP-2 classes take every {lm.config.model_type} for a decoder alone, "
            f"and language_model.name={model.language_model.name} has an encoder"
        )
    return settings | changes


def apply_hf_config(cfg: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Puts the sizes of a configuration of theirs in the place of a configuration's own.

    Args:
        cfg: changed in place.
        config: content of their config.json.

    Raises:
        UserError: ours cannot be of this shape.
    """
    from transformers import Blip2Config

    try:
        full: Any = Blip2Config.from_dict(dict(config))
    except Exception as error:  # each part has its own checks
        raise UserError(f"config.json is not BLIP-2's: {str(error).splitlines()[0]}") from error
    qformer = full.qformer_config
    if qformer.hidden_act != "gelu" or qformer.layer_norm_eps != 1e-12:
        raise UserError(
            f"config.json: a Q-Former with {qformer.hidden_act} and eps {qformer.layer_norm_eps:g} "
            "is none of ours, which has gelu and 1e-12"
        )
    cfg["qformer"] |= {ours: getattr(qformer, theirs) for ours, theirs in QFORMER}
    cfg["qformer"]["num_query_tokens"] = full.num_query_tokens
    if stage_of(config) == "stage1":
        cfg["model"]["embed_dim"] = full.image_text_hidden_size
        cfg["text"]["vocab_size"] = qformer.vocab_size - 1


def eva_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Keys of `vision` that build the tower of their configuration as timm's EVA.

    Args:
        config: content of their config.json, which `apply_hf_config` has read.

    Returns:
        None where timm's EVA computes otherwise.
    """
    from transformers import Blip2Config

    vision: Any = Blip2Config.from_dict(dict(config)).vision_config
    if vision.hidden_act != "gelu" or vision.layer_norm_eps != 1e-6 or not vision.qkv_bias:
        return None
    return {
        "name": EVA,
        "image_size": vision.image_size,
        "drop_last_block": True,
        "options": {
            "patch_size": vision.patch_size,
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers + 1,
            "num_heads": vision.num_attention_heads,
            # timm rounds down
            "mlp_ratio": (vision.intermediate_size + 0.5) / vision.hidden_size,
        },
    }
