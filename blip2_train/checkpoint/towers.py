"""Image towers: timm's, LAVIS's and Hugging Face's names of the same vision transformer.

In the middle stands timm, as ours are built by it. Its models have two forms here: EVA's, where
query and value have a bias and key has none, and the plain one, where all three share one vector.
A bias of the key alone adds the same to all scores of a query, which the softmax does not see.

    timm EVA    = LAVIS's eva_vit, name by name
    timm plain -> LAVIS's eva_vit, without the bias of the key
    timm plain    with a norm in front (CLIP) = LAVIS's clip_vit
    timm EVA, plain without that norm         = HF's Blip2VisionModel
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from blip2_train.checkpoint.account import CONVERTED, KeyAccount, Row
from blip2_train.errors import UserError

KEY_BIAS = "the key's bias, which the softmax does not see"
JOINED = "q_bias, 0 and v_bias are one vector"
PARTED = "the parts of one vector"
SHAPED = "another shape, the same numbers"

# (timm, HF); {i} is a block.
HF = [
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.{i}.norm1.", "encoder.layers.{i}.layer_norm1."),
    ("blocks.{i}.norm2.", "encoder.layers.{i}.layer_norm2."),
    ("blocks.{i}.attn.qkv.", "encoder.layers.{i}.self_attn.qkv."),
    ("blocks.{i}.attn.proj.", "encoder.layers.{i}.self_attn.projection."),
    ("blocks.{i}.mlp.fc1.", "encoder.layers.{i}.mlp.fc1."),
    ("blocks.{i}.mlp.fc2.", "encoder.layers.{i}.mlp.fc2."),
]
# (timm, LAVIS's clip_vit); its class embedding and positions lack timm's leading dimensions.
CLIP = [
    ("cls_token", "class_embedding"),
    ("pos_embed", "positional_embedding"),
    ("patch_embed.proj.", "conv1."),
    ("norm_pre.", "ln_pre."),
    ("blocks.{i}.norm1.", "transformer.resblocks.{i}.ln_1."),
    ("blocks.{i}.norm2.", "transformer.resblocks.{i}.ln_2."),
    ("blocks.{i}.attn.qkv.", "transformer.resblocks.{i}.attn.in_proj_"),
    ("blocks.{i}.attn.proj.", "transformer.resblocks.{i}.attn.out_proj."),
    ("blocks.{i}.mlp.fc1.", "transformer.resblocks.{i}.mlp.c_fc."),
    ("blocks.{i}.mlp.fc2.", "transformer.resblocks.{i}.mlp.c_proj."),
]
EVA = [(name, name) for name, _ in HF]
_QUERY = re.compile(r"(blocks\.\d+\.attn\.)q_bias$")
_VALUE = re.compile(r"(blocks\.\d+\.attn\.)v_bias$")
_JOINT = re.compile(r"(blocks\.\d+\.attn\.)qkv\.bias$")


def has_parted_bias(names: Collection[str]) -> bool:
    """Whether query and value have a bias each: EVA's form."""
    return any(_QUERY.search(name) for name in names)


def has_first_norm(names: Collection[str]) -> bool:
    """Whether a norm stands in front of the blocks: CLIP's form, by timm's names or LAVIS's."""
    return any(name.startswith(("norm_pre.", "ln_pre.")) for name in names)


def timm_to_hf(state: Mapping[str, Tensor]) -> KeyAccount:
    """Names of `Blip2VisionModel`; what it has no place for is unknown in the account."""
    return _rename(_joined(state), HF)


def hf_to_timm(state: Mapping[str, Tensor], *, parted: bool) -> KeyAccount:
    """Names of timm, in EVA's form if `parted`, else the plain one."""
    account = _rename(_whole(state), [(theirs, ours) for ours, theirs in HF])
    return _in_form(account, parted)


def timm_to_lavis(state: Mapping[str, Tensor]) -> KeyAccount:
    """Names of LAVIS's eva_vit or clip_vit."""
    if has_first_norm(state):
        account = _rename(_whole(state), CLIP)
        _reshape(account, "class_embedding", 2)
        _reshape(account, "positional_embedding", 1)
        return account
    return _in_form(_rename(_joined(state), EVA), parted=True)


def lavis_to_timm(state: Mapping[str, Tensor], *, parted: bool) -> KeyAccount:
    """Names of timm; EVA's form if `parted`, which clip_vit has not."""
    if has_first_norm(state):
        account = _rename(_whole(state), [(theirs, ours) for ours, theirs in CLIP])
        _reshape(account, "cls_token", -2)
        _reshape(account, "pos_embed", -1)
        return account
    return _in_form(_rename(_joined(state), EVA), parted)


def _whole(state: Mapping[str, Tensor]) -> KeyAccount:
    account = KeyAccount()
    for name, value in state.items():
        account.take(name, name, value)
    return account


def _joined(state: Mapping[str, Tensor]) -> KeyAccount:
    """The plain form of either."""
    account = KeyAccount()
    for name, value in state.items():
        if match := _QUERY.search(name):
            other = state.get(f"{match[1]}v_bias")
            if other is None:
                raise UserError(f"the image tower has {name} and no bias of the value beside it")
            joint = torch.cat([value, torch.zeros_like(value), other])
            account.take(name, f"{match[1]}qkv.bias", joint, JOINED)
        elif match := _VALUE.search(name):
            if f"{match[1]}q_bias" not in state:
                raise UserError(f"the image tower has {name} and no bias of the query beside it")
            account.rows.append(Row(CONVERTED, name, f"{match[1]}qkv.bias", JOINED))
        else:
            account.take(name, name, value)
    return account


def _in_form(account: KeyAccount, parted: bool) -> KeyAccount:
    """EVA's form of a plain one, if asked for."""
    if not parted:
        return account
    out = KeyAccount()
    for row in account.rows:
        match = _JOINT.search(row.target)
        if match is None or row.target not in account.state:
            out.rows.append(row)
            if row.target in account.state:
                out.state[row.target] = account.state[row.target]
            continue
        query, key, value = account.state[row.target].chunk(3)
        parts = {f"{match[1]}q_bias": query, f"{match[1]}v_bias": value}
        if row.source in parts:  # it was in parts before
            out.take(row.source, row.source, parts[row.source].clone())
            continue
        for name, part in parts.items():
            out.take(row.source, name, part.clone(), PARTED)
        if key.any():
            out.drop(f"{row.source} (the key's third)", KEY_BIAS)
    return out


def _rename(account: KeyAccount, table: list[tuple[str, str]]) -> KeyAccount:
    """Renames the targets of an account; what the table lacks is unknown."""
    out = KeyAccount()
    for row in account.rows:
        new = _new_name(row.target, table)
        if new is None:
            out.refuse(row.source)
        else:
            out.take(row.source, new, account.state[row.target], row.why)
    return out


def _new_name(name: str, table: list[tuple[str, str]]) -> str | None:
    for old, new in table:
        pattern = re.escape(old).replace(r"\{i\}", r"(\d+)")
        rest = "(weight|bias)" if old.endswith((".", "_")) else "()"
        if match := re.fullmatch(pattern + rest, name):
            number, end = match[1], match[match.lastindex or 1]
            return new.replace("{i}", number) + end
    return None


def _reshape(account: KeyAccount, name: str, leading: int) -> None:
    """Takes away (or, below zero, puts in front) so many dimensions of size 1."""
    if name not in account.state:
        return
    value = account.state[name]
    shape = value.shape[leading:] if leading > 0 else (1,) * -leading + tuple(value.shape)
    account.state[name] = value.reshape(shape)
    for place, row in enumerate(account.rows):
        if row.target == name:
            account.rows[place] = Row(CONVERTED, row.source, name, SHAPED)
