"""The Q-Former's start from a BERT.

Proven: without BERT's segment embeddings the text pass and the prediction head are BERT's own; both
feed-forwards start as BERT's one; what BERT lacks keeps its random draw and is accounted for; a
shorter Q-Former takes the first layers; a BERT of another shape, vocabulary, number of heads or
activation, one without its head, and what is no BERT are refused.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

from blip2_train.checkpoint.bert import bert_sources, init_from_bert, read_bert
from blip2_train.errors import UserError
from blip2_train.models.qformer import QFormer

VOCAB, D, POSITIONS = 29, 16, 11
SIZES = {"hidden_size": D, "num_layers": 3, "num_heads": 4, "intermediate_size": 24}


def config(**changes: Any) -> BertConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": POSITIONS,
    }
    return BertConfig(**(sizes | changes))


def save_bert(folder: Path, kind: type = BertForMaskedLM, **changes: Any) -> Any:
    torch.manual_seed(1)
    bert = kind(config(**changes)).eval()
    for parameter in bert.parameters():  # biases and norms, too
        nn.init.normal_(parameter, std=0.3)
    bert.save_pretrained(folder)
    return bert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder)
    return folder


@pytest.fixture(scope="module")
def bert(folder: Path) -> Any:
    return BertForMaskedLM.from_pretrained(folder).eval()


def tiny_qformer(**changes: Any) -> QFormer:
    torch.manual_seed(2)
    sizes = SIZES | {"vocab_size": VOCAB + 1, "vision_width": 7, "max_positions": POSITIONS}
    return QFormer(**(sizes | {"num_query_tokens": 5} | changes)).eval()


def text() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long()
    return ids, mask


@torch.no_grad()
def test_the_text_pass_is_berts(folder: Path, bert: Any) -> None:
    qformer = tiny_qformer()
    init_from_bert(qformer, read_bert(str(folder)), str(folder))
    segments = bert.bert.embeddings.token_type_embeddings.weight
    segments.zero_()  # the Q-Former has none, as the reference
    ids, mask = text()
    theirs = bert.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    ours = qformer.forward_text(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
    logits = bert.cls(theirs)
    ours_logits = qformer.lm_head(ours, qformer.word_embeddings.weight)
    torch.testing.assert_close(ours_logits[real][:, :VOCAB], logits[real], atol=1e-4, rtol=0)


def test_every_weight_is_accounted_for(folder: Path, bert: Any) -> None:
    qformer, untouched = tiny_qformer(), tiny_qformer()
    origin = init_from_bert(qformer, read_bert(str(folder)), "some-bert")
    names = dict(qformer.named_parameters())
    assert origin.keys() == names.keys()
    drawn = {name for name, place in origin.items() if place == "random"}
    assert drawn == {
        n for n in names if "cross_attention" in n or n == "query_tokens" or "ln_vision" in n
    }
    assert set(origin.values()) == {"random", "bert some-bert"}
    theirs, before = bert.state_dict(), dict(untouched.named_parameters())
    for name, parameter in names.items():
        if name in drawn:
            assert parameter.equal(before[name]), name
        else:
            wanted = theirs[bert_sources(3)[name]]
            assert parameter[: len(wanted)].equal(wanted), name
    # the row of [DEC] is drawn, too
    assert qformer.word_embeddings.weight[VOCAB].equal(untouched.word_embeddings.weight[VOCAB])
    assert qformer.lm_head.bias[VOCAB] == 0
    for layer in qformer.layers:
        pairs = zip(layer.query_ffn.parameters(), layer.text_ffn.parameters(), strict=True)
        assert all(a.equal(b) and a is not b for a, b in pairs)


def test_fewer_layers_positions_and_a_table_with_dec(tmp_path: Path, folder: Path) -> None:
    bert = read_bert(str(folder))
    short = tiny_qformer(num_layers=2, max_positions=8)
    init_from_bert(short, bert, "b")
    wanted = bert.weights["bert.embeddings.position_embeddings.weight"]
    assert short.position_embeddings.weight.equal(wanted[:8])
    longer = tiny_qformer(max_positions=POSITIONS + 2)
    init_from_bert(longer, bert, "b")
    assert longer.position_embeddings.weight[:POSITIONS].equal(wanted)
    save_bert(tmp_path, vocab_size=VOCAB + 1)  # somebody's BERT that knows [DEC]
    whole = tiny_qformer()
    known = read_bert(str(tmp_path))
    init_from_bert(whole, known, "b")
    table = known.weights["bert.embeddings.word_embeddings.weight"]
    assert whole.word_embeddings.weight.equal(table)


def test_half_precision_files_give_single_precision_weights(tmp_path: Path, bert: Any) -> None:
    BertForMaskedLM(bert.config).half().save_pretrained(tmp_path)
    qformer = tiny_qformer()
    init_from_bert(qformer, read_bert(str(tmp_path)), "b")
    assert {p.dtype for p in qformer.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 4}, r"has no bert.encoder.layer.3.*num_layers"),
        ({"hidden_size": 20}, r"is \(29, 16\), the Q-Former's is \(30, 20\)"),
        ({"intermediate_size": 25}, r"is \(16, 24\), the Q-Former's is \(16, 25\)"),
        ({"vocab_size": VOCAB + 2}, r"vocabulary of 29, the tokenizer one of 30"),
        ({"num_heads": 2}, r"num_heads=2, but my-bert has 4"),
    ],
)
def test_another_shape_is_refused(folder: Path, changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        init_from_bert(tiny_qformer(**changes), read_bert(str(folder)), "my-bert")


def test_a_bert_without_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would draw the head at random and only warn."""
    save_bert(tmp_path, BertModel)
    with pytest.raises(UserError, match=r"has no cls.predictions.*prediction head"):
        init_from_bert(tiny_qformer(), read_bert(str(tmp_path)), "b")


def test_what_is_no_bert_is_refused(tmp_path: Path, folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)).save_pretrained(
        tmp_path / "gpt"
    )
    save_bert(tmp_path / "relu", hidden_act="relu")
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for name, said in (
        ("gpt", "is a gpt2, not a bert"),
        ("relu", "hidden_act=relu"),
        ("empty", "could not be loaded.*qformer.init=random"),
        ("cut", "could not be loaded"),
        ("nowhere", "could not be loaded"),
    ):
        with pytest.raises(UserError, match=f"qformer.init=.*{name}.*{said}"):
            read_bert(str(tmp_path / name))
