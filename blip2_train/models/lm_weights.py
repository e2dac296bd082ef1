"""Where a language model's weights come from: a folder, the Hugging Face hub, or a seed.

Safetensors are read where a model has them; otherwise torch files, as tensors only (nothing is
unpickled: `weights_only=True`). No code that comes with a model is run.
"""

import contextlib
import difflib
import fnmatch
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from blip2_train.errors import UserError
from blip2_train.models.lm_identity import WEIGHTS, weight_files

log = logging.getLogger(__name__)

# Packages of each quantization, and the extra of ours that brings them.
QUANTIZATIONS = {
    "torchao_int8": (["torchao", "accelerate"], "torchao"),
    "torchao_int4": (["torchao", "accelerate"], "torchao"),
    "bitsandbytes_int8": (["bitsandbytes", "accelerate"], "bitsandbytes"),
    "bitsandbytes_nf4": (["bitsandbytes", "accelerate"], "bitsandbytes"),
}
# Of the hub's files, those that a model and its tokenizer are made of, weights aside.
FILES = ["*.json", "*.txt", "*.model"]
# Keys of a configuration that the library takes though not every model has them.
COMMON_KEYS = {"decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"}
T5_FAMILY = ("t5", "mt5", "umt5")


def download(name: str) -> Path:
    """Folder of a model's files: fetched from the hub unless the cache holds them completely.

    Training calls it on one rank per node before the others build the model from the cache.

    Args:
        name: a local folder, or an id of the Hugging Face hub, with "@revision" where wanted.

    Raises:
        UserError: there is no such folder, and the hub cannot give it.
    """
    if (folder := _local(name)) is not None:
        return folder
    with contextlib.suppress(UserError):
        folder = _snapshot(name, local_files_only=True)
        if _is_complete(folder):
            return folder
    return _snapshot(name, local_files_only=False)


def parse_config(settings: Mapping[str, Any], setting: str = "language_model") -> PreTrainedConfig:
    """A library configuration from plain values.

    Args:
        settings: "model_type", and what deviates from the defaults of that type.
        setting: where in the configuration they stand, for messages.

    Raises:
        UserError: no such type, key or value.
    """
    values = dict(settings)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=3)
        raise UserError(
            f"{setting}.config.model_type={model_type} is unknown to transformers "
            f"{transformers.__version__}; close names: {close}"
        )
    default = CONFIG_MAPPING[model_type]()
    for key in values:
        if not hasattr(default, key) and key not in COMMON_KEYS:
            raise UserError(f"{setting}.config.{key}: {model_type} has no such key; remove it")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # each model has its own checks
        raise UserError(f"{setting}.config does not suit {model_type}: {_line(error)}") from error
    return with_exact_gelu(config)


def published_config(name: str, folder: Path | None = None) -> PreTrainedConfig:
    """The configuration that a model was published with; no weights are fetched for it.

    Raises:
        UserError: there is none, or it is of an unknown type.
    """
    repository, _, revision = name.partition("@")
    source: Any = folder or _local(name) or repository
    options: dict[str, Any] = {"revision": revision} if source == repository and revision else {}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"language_model.name={name} has no usable config.json ({_line(error)}); give a "
            "folder that save_pretrained wrote, or a hub id"
        ) from error
    return with_exact_gelu(config)


def check_config(name: str, documented: Mapping[str, Any], actual: PreTrainedConfig) -> None:
    """Compares what a configuration says about a model with the model.

    Raises:
        UserError: a key differs.
    """
    wanted = parse_config(documented)
    for key in documented:
        ours, theirs = getattr(wanted, key), getattr(actual, key, None)
        if key == "tie_word_embeddings":
            ours, theirs = not has_own_head(wanted), not has_own_head(actual)
        if ours != theirs:
            raise UserError(
                f"language_model.config.{key}={ours}, but language_model.name={name} has {theirs}; "
                "correct the value or name another model"
            )


def has_own_head(config: PreTrainedConfig) -> bool:
    """Whether the output matrix is another one than the word table.

    T5's configuration overwrites `tie_word_embeddings: false`, which the models since T5 1.1 are
    published with, and remembers it as `scale_decoder_outputs: false` alone.
    """
    return not getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)


def random_model(
    config: Mapping[str, Any] | PreTrainedConfig,
    seed: int,
    setting: str = "language_model",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A language model with random weights, trainable.

    Args:
        config: as of `parse_config`, or a library configuration.
        seed: all that the weights depend on. On the meta device nothing is drawn.
        setting: where in the configuration `config` stands, for messages.
        dtype: in which they are drawn.
        device: that draws them; a GPU does so in no time, by its own generator as it stands.

    Raises:
        UserError: this is not a language model's configuration.
    """
    settings = config if isinstance(config, PreTrainedConfig) else parse_config(config, setting)
    # The draw must not depend on, or disturb, anybody else's random numbers, nor on the device
    # where the model will run.
    device = "meta" if on_meta() else device
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            lm = _auto_class(settings).from_config(settings, dtype=dtype)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{setting}.config of type {settings.model_type} gives no language model: "
                f"{_line(error)}"
            ) from error
        head, table = lm.get_output_embeddings(), lm.get_input_embeddings()
        if has_own_head(settings) and head is not None and head.weight is table.weight:
            # Tied all the same (see `has_own_head`). This spread gives logits of unit variance.
            std = head.in_features**-0.5
            head.weight = nn.Parameter(torch.empty_like(table.weight).normal_(std=std))
    return lm


def load_model(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: str | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """A language model from a folder; with `accelerate`, weights go straight to the device.

    Args:
        name: for messages.
        folder: holds config.json and weights.
        dtype: of weights that are not quantized.
        quantization: a key of `QUANTIZATIONS`, or None.
        device: None leaves the weights where the library puts them, which is the CPU.

    Raises:
        UserError: weights are missing, of another model, or cannot be quantized here.
    """
    config = published_config(name, folder)
    files = weight_files(folder)
    if not files:
        raise UserError(
            f"language_model.name={name} has no weights ({' or '.join(WEIGHTS)}); give a folder "
            "that save_pretrained wrote, or a hub id"
        )
    options: dict[str, Any] = {}
    if quantization is not None:
        if quantization == "torchao_int4" and (device is None or device.type != "cuda"):
            raise UserError(
                "language_model.quantization=torchao_int4 computes on CUDA devices alone; use "
                "torchao_int8 elsewhere"
            )
        options["quantization_config"] = _quantization_config(quantization, dtype)
    if device is not None and _installed("accelerate"):
        options["device_map"] = {"": device}
    with quiet_library():
        try:
            lm, report = _auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=files[0].suffix == ".safetensors",
                weights_only=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # files of another kind fail in as many ways as there are kinds
            raise UserError(
                f"the weights of language_model.name={name} could not be loaded: {_line(error)}"
            ) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"language_model.name={name} lacks {len(missing)} weights, the first is {missing[0]}; "
            "give the files of the whole model"
        )
    return lm if device is None or "device_map" in options else lm.to(device)


def quantize(
    name: str,
    lm: PreTrainedModel,
    *,
    dtype: torch.dtype,
    quantization: str,
    device: torch.device | None,
) -> PreTrainedModel:
    """Quantizes random weights as published ones are, by way of a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(lm, Path(folder))
        return load_model(name, Path(folder), dtype=dtype, quantization=quantization, device=device)


def save_model(lm: PreTrainedModel, folder: Path) -> None:
    """Writes config.json and safetensors, as `load_model` reads them."""
    with quiet_library():
        lm.save_pretrained(folder)


def cast(lm: PreTrainedModel, dtype: torch.dtype) -> None:
    """Changes the weights' dtype in place, as loading them in it does.

    Buffers that are not weights, as rotary frequencies, keep their precision; and so does T5's
    `wo` where the rest is float16, in which its outputs overflow.
    """
    wide = dtype == torch.float16 and lm.config.model_type in T5_FAMILY
    for name, value in lm.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if wide and ".wo." in name else dtype)


def check_dtype(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | None) -> None:
    """Refuses T5 in float16 where bfloat16 can be had.

    Raises:
        UserError: it can.
    """
    if dtype == torch.float16 and config.model_type in T5_FAMILY:
        if has_bfloat16(device):
            raise UserError(
                "language_model.dtype=float16: plain fp16 T5 overflows; use bfloat16, which this "
                "device computes in"
            )
        log.info("T5 in float16 keeps its `wo` weights in float32: this device has no bfloat16")


def has_bfloat16(device: torch.device | None) -> bool:
    """Whether the device, or the one that None will become, computes in bfloat16 by itself."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)


def check_packages(quantization: str) -> None:
    """Whether a quantization's packages are installed.

    Raises:
        UserError: one is not.
    """
    packages, extra = QUANTIZATIONS[quantization]
    if missing := [package for package in packages if not _installed(package)]:
        raise UserError(
            f"language_model.quantization={quantization} needs {' and '.join(missing)}; "
            f"pip install 'blip2-train[{extra}]'"
        )


def on_meta() -> bool:
    """Whether tensors are being made on the meta device, without values."""
    return torch.empty(0).device.type == "meta"


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def with_exact_gelu(config: PreTrainedConfig) -> PreTrainedConfig:
    """Flan-T5 as BLIP-2 runs it: the exact (erf) gelu, where the library takes its tanh form."""
    if config.model_type == "t5" and config.feed_forward_proj == "gated-gelu":
        config.dense_act_fn = "gelu"
    return config


def _quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    if quantization.startswith("bitsandbytes"):
        # it warns in every call that inputs are cast to float16, which is how it works
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if quantization == "bitsandbytes_int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if quantization == "torchao_int8":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.TorchAoConfig(
        Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    )


def _local(name: str) -> Path | None:
    """The folder of this name, None where it must be an id of the hub.

    Raises:
        UserError: it reads like a path, and there is no such folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    inside = name.count("/") == 1 and Path(name).parent.is_dir()
    if inside or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"language_model.name={name}: there is no such folder; correct the path, or train the "
            "model first (blip2-train experiment=lm_flickr8k_tiny leaves such a folder)"
        )
    return None


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot in the cache has all that a model needs, and not its tokenizer alone."""
    names = {"config.json"}
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            names |= {single}
        elif index.is_file():
            names |= set(json.loads(index.read_text())["weight_map"].values())
        else:
            continue
        return all((folder / name).is_file() for name in names)
    return False


def _snapshot(name: str, *, local_files_only: bool) -> Path:
    repository, _, revision = name.partition("@")
    where: dict[str, Any] = {"revision": revision or None}
    weights: tuple[str, ...] = WEIGHTS
    try:
        if not local_files_only:  # torch files stand beside safetensors that say the same
            files = huggingface_hub.list_repo_files(repository, **where)
            weights = next(((kind,) for kind in WEIGHTS if fnmatch.filter(files, kind)), ())
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=[*FILES, *weights],
                local_files_only=local_files_only,
                **where,
            )
        )
    except Exception as error:  # of several packages: names, networks, permissions
        raise UserError(
            f"language_model.name={name} is no local folder, and the Hugging Face hub does not "
            f"give it ({_line(error)}); without a network give a folder that holds the model"
        ) from error


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Without progress bars, and without the warning that T5's head is not tied, as it should."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
