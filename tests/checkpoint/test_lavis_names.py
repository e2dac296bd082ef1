"""Names of the reference implementation.

Proven: renaming there and back is the identity for every weight of a model, one to one; names that
no rule covers are listed, also those that only begin like one; repeated weights are dropped by name
and must equal what they repeat; stage 2's projection and language model have a name per family.
"""

import pytest
import torch
from tiny import tiny_model

from blip2_train.checkpoint.lavis import (
    DROPPED,
    from_lavis,
    from_lavis_name,
    is_lavis,
    to_lavis_name,
)
from blip2_train.errors import UserError

TABLE = "Qformer.bert.embeddings.word_embeddings.weight"


@pytest.fixture
def foreign() -> dict[str, torch.Tensor]:
    """A LAVIS state dict: the tiny model's weights, and what LAVIS stores beside them."""
    state = {to_lavis_name(k): v for k, v in tiny_model().state_dict().items()}
    return state | {
        "Qformer.cls.predictions.decoder.weight": state[TABLE].clone(),
        "Qformer.cls.predictions.decoder.bias": state["Qformer.cls.predictions.bias"].clone(),
        "Qformer.bert.embeddings.position_ids": torch.arange(9)[None],
    }


def test_there_and_back_is_the_identity() -> None:
    names = list(tiny_model(num_layers=12).state_dict())
    foreign = [to_lavis_name(name) for name in names]
    assert [from_lavis_name(name) for name in foreign] == names
    assert len(set(foreign)) == len(names) > 250
    assert "Qformer.bert.encoder.layer.11.output_query.LayerNorm.bias" in foreign
    assert "Qformer.bert.encoder.layer.10.crossattention.self.value.weight" in foreign
    assert to_lavis_name("vision.tower.blocks.0.attn.proj.bias") == (
        "visual_encoder.blocks.0.attn.proj.bias"
    )


def test_every_key_is_accounted_for(foreign: dict[str, torch.Tensor]) -> None:
    model = tiny_model()
    account = from_lavis(foreign)
    assert account.unknown == [] and account.dropped.keys() == DROPPED.keys()
    assert account.state.keys() == model.state_dict().keys()
    model.load_state_dict(account.state, strict=True)
    for name, value in account.state.items():
        assert value is foreign[to_lavis_name(name)]  # not even copied


@pytest.mark.parametrize(
    "name",
    [
        "llm_proj.weight",
        "opt_projection.weight",
        "temperature",  # begins like "temp"
        "query_tokens_extra",
        "Qformer.bert.encoder.layer.0.attention.self.distance_embedding.weight",
        "Qformer.bert.pooler.dense.weight",
        "Qformer.cls.predictions.bias2",
    ],
)
def test_unknown_names_are_listed(foreign: dict[str, torch.Tensor], name: str) -> None:
    assert from_lavis(foreign | {name: torch.zeros(1)}).unknown == [name]
    with pytest.raises(KeyError):
        from_lavis_name(name)


def test_names_that_lavis_lacks_are_an_error() -> None:
    for name in (
        "language_model.weight",
        "qformer.layers.0.self_attention.nothing.weight",
        "temp2",
    ):
        with pytest.raises(KeyError):
            to_lavis_name(name)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_stage2_has_names_per_family(family: str) -> None:
    ours = ["lm_proj.weight", "language_model.lm.lm_head.weight", "qformer.query_tokens"]
    theirs = [to_lavis_name(name, family) for name in ours]
    assert theirs == [f"{family}_proj.weight", f"{family}_model.lm_head.weight", "query_tokens"]
    assert [from_lavis_name(name) for name in theirs] == ours


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_repeated_weights_must_equal(foreign: dict[str, torch.Tensor], kind: str) -> None:
    name = f"Qformer.cls.predictions.decoder.{kind}"
    foreign[name][0] += 1
    with pytest.raises(UserError, match=f"{name} differs from Qformer"):
        from_lavis(foreign)


def test_lavis_checkpoints_are_recognised(foreign: dict[str, torch.Tensor]) -> None:
    assert is_lavis(foreign)
    assert not is_lavis(tiny_model().state_dict())
    assert not is_lavis({k: v for k, v in foreign.items() if k != "query_tokens"})
    assert not is_lavis({0: torch.zeros(1), "query_tokens": 1})
    assert not is_lavis(torch.zeros(3))
