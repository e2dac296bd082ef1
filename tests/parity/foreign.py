"""The oracle's weights as files of LAVIS, and what blip2-convert must be told about them."""

import json
from pathlib import Path
from typing import Any

import torch
from parity.reference import load_case, section
from parity.test_stage2 import language_config
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip2_train.models.vision import VisionTower

SECTIONS = ("weights", "weights_after")
EVA = "eva_giant_patch14_clip_224"


def cases(oracle: Path) -> list[tuple[str, str]]:
    """(file, section) of all weights of whole models in a folder of reference values."""
    found = []
    for path in sorted(oracle.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        found += [(path.stem, part) for part in SECTIONS if f"{part}/query_tokens" in names]
    return found


def is_stage2(info: dict[str, Any]) -> bool:
    return "lm" in info


def tower_settings(oracle: Path, info: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys of `vision`, and weights by LAVIS's names: the oracle's tower, or a random one where a
    case's features are of another size."""
    width, tokens = info["dims"]["feat_dim"], info["dims"]["feat_tokens"]
    tower, tensors = load_case(oracle, "image_tower")
    state = section(section(tensors, "weights/"), "visual_encoder.")
    fits = tower["width"] == width and state["pos_embed"].shape[1] == tokens
    options = {
        "patch_size": tower["patch"],
        "embed_dim": width,
        "depth": (tower["depth"] if fits else 2) + 1,
        "num_heads": tower["heads"] if fits else 1,
        "mlp_ratio": tower["mlp_ratio"] if fits else 2.0,
    }
    size = tower["patch"] * round((tokens - 1) ** 0.5)
    settings = {"name": EVA, "image_size": size, "options": options}
    if not fits:
        state = VisionTower(**settings, weights="random").tower.state_dict()
    return settings, {f"visual_encoder.{name}": value for name, value in state.items()}


def lavis_state(oracle: Path, name: str, part: str, *, tower: bool = True) -> dict[str, Tensor]:
    """A case's weights, with a tower that gives features of its size."""
    info, tensors = load_case(oracle, name)
    state = section(tensors, f"{part}/")
    return state | (tower_settings(oracle, info)[1] if tower else {})


def bert_folder(folder: Path, info: dict[str, Any]) -> Path:
    """A tokenizer of the case's word pieces; [DEC] is not one of them."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(info["vocab"][: info["dims"]["vocab_size"]]) + "\n")
    return folder


def language_folder(folder: Path, lm: dict[str, Any], end: int) -> Path:
    """A tokenizer that knows all the language model's tokens by made-up names."""
    words = {f"w{number}": number for number in range(lm["vocab"])}
    backend = Tokenizer(models.WordLevel(words, unk_token=f"w{lm['pad']}"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"eos_token": f"w{end}", "pad_token": f"w{lm['pad']}", "unk_token": f"w{lm['pad']}"}
    if "bos" in lm:
        tokens["bos_token"] = f"w{lm['bos']}"
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return folder


def overrides(oracle: Path, name: str, folder: Path) -> list[str]:
    """What blip2-convert must be told of a case.

    Args:
        oracle: folder of reference values.
        name: of the case.
        folder: for tokenizers.
    """
    info, _ = load_case(oracle, name)
    dims = info["dims"]
    vision, _ = tower_settings(oracle, info)
    settings: dict[str, Any] = {
        "experiment": "stage2_flickr8k_tiny" if is_stage2(info) else "stage1_flickr8k_tiny",
        "vision": "tiny_random",
        "vision.name": vision["name"],
        "vision.image_size": vision["image_size"],
        **{f"+vision.options.{key}": value for key, value in vision["options"].items()},
        "qformer.hidden_size": dims["hidden"],
        "qformer.num_layers": dims["layers"],
        "qformer.num_heads": dims["heads"],
        "qformer.intermediate_size": dims["inter"],
        "qformer.num_query_tokens": dims["queries"],
        "qformer.cross_attention_freq": dims["caf"],
        "qformer.max_positions": dims["max_pos"],
    }
    if is_stage2(info):
        end = info.get("settings", {}).get("eos", info["lm"]["eos"])
        config = json.dumps(language_config(info["lm"])).replace('"', "")
        settings |= {
            "language_model.name": "null",
            "language_model.weights": "random",
            "language_model.config": config,
            "language_model.tokenizer": language_folder(folder / "language", info["lm"], end),
        }
    else:
        settings |= {
            "text.tokenizer": bert_folder(folder / "bert", info),
            "model.embed_dim": dims["embed_dim"],
        }
    return [f"{key}={value}" for key, value in settings.items()]


def save_lavis(state: dict[str, Tensor], path: Path, *, archive: bool = True) -> Path:
    """As LAVIS saves; without `archive` in the format of torch before 1.6."""
    content = {"model": state, "epoch": 9}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path
