"""Stage 2: the Q-Former in front of a frozen language model.

Proven: soft prompts and text stand where they should, for decoder-only models and for
encoder-decoders, with and without a prefix; the logits are those of the target tokens, the first
one included, in the order asked for; padding never matters; gradients reach what is trained and
nothing else; captions of a batch of prompts of different lengths, padded on either side, are those
of each alone; a Q-Former without a text side has nothing of it, trains every parameter, and has
the published size with its projection; what does not fit is refused.
"""

from typing import Any

import pytest
import torch
from tiny import PATCHES, WIDTH, NoTower, tiny_model
from torch import Tensor, nn

from blip2_train.models.freezing import count_parameters, freeze_unreached
from blip2_train.models.language import LanguageModel
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage2 import Blip2Stage2
from blip2_train.models.vision import VisionTower

B, Q, T, P, V = 3, 4, 6, 5, 41  # images, queries, caption, prompt or prefix, vocabulary
END, PAD = 1, 0
KINDS: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "vocab_size": V,
        "hidden_size": 16,
        "word_embed_proj_dim": 8,  # the first layer takes this width
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": V,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "bart": {  # counts positions from the left, padding included
        "model_type": "bart",
        "vocab_size": V,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 32,
    },
}


def tiny_stage2(kind: str, **options: Any) -> Blip2Stage2:
    """In float64, with weights so large that every token matters."""
    torch.manual_seed(0)
    qformer = QFormer(
        vision_width=WIDTH,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
        num_query_tokens=Q,
        text=False,
    )
    lm = LanguageModel(config=KINDS[kind], weights="random", dtype="float32", **options)
    model = Blip2Stage2(NoTower(), qformer, lm).double()  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return model.train()


def image_embeds(rows: int = B, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, PATCHES, WIDTH, generator=generator, dtype=torch.float64)


def tokens(lengths: list[int], width: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, V, mask.shape, generator=generator)
    return ids * mask, mask


def causal_text(lengths: list[int], width: int = T) -> dict[str, Tensor]:
    """Every token of a caption is a target, the first one too; in an order of no meaning."""
    ids, mask = tokens(lengths, width)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "lm_index": mask.flatten().nonzero().flatten().flip(0),
    }


def seq2seq_text(prefix: list[int], lengths: list[int], width: int = T) -> dict[str, Tensor]:
    ids, mask = tokens(prefix, max(prefix), seed=2)
    target_ids, target_mask = tokens(lengths, width)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "target_ids": target_ids,
        "target_mask": target_mask,
        "lm_index": target_mask.flatten().nonzero().flatten().flip(0),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_decoder_predicts_each_token_from_those_before(kind: str) -> None:
    model = tiny_stage2(kind).eval()
    text = causal_text([6, 2, 4])
    query_output = model.encode_image(model.qformer.project_image(image_embeds()))
    logits = model.text_logits(query_output, text)
    table = model.language_model.lm.get_input_embeddings().weight
    wanted = []
    for position in text["lm_index"].tolist():
        row, t = divmod(position, T)
        seen = torch.cat([model.lm_proj(query_output[row]), table[text["input_ids"][row, :t]]])
        wanted.append(model.language_model.lm(inputs_embeds=seen[None]).logits[0, -1])
    torch.testing.assert_close(logits, torch.stack(wanted))


@torch.no_grad()
@pytest.mark.parametrize("prefix", [[5, 1, 2], [0, 0, 0], [3, 0, 1]])
def test_an_encoder_reads_queries_and_prefix(prefix: list[int]) -> None:
    model = tiny_stage2("t5").eval()
    text = seq2seq_text(prefix, [6, 2, 4])
    query_output = model.encode_image(model.qformer.project_image(image_embeds()))
    logits = model.text_logits(query_output, text)
    table = model.language_model.lm.get_input_embeddings().weight
    wanted = []
    for position in text["lm_index"].tolist():
        row, t = divmod(position, T)
        read = torch.cat(
            [model.lm_proj(query_output[row]), table[text["input_ids"][row, : prefix[row]]]]
        )
        before = torch.tensor([PAD, *text["target_ids"][row, :t].tolist()])  # T5 starts with <pad>
        out = model.language_model.lm(inputs_embeds=read[None], decoder_input_ids=before[None])
        wanted.append(out.logits[0, -1])
    torch.testing.assert_close(logits, torch.stack(wanted))


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
@torch.no_grad()
def test_padding_never_matters(kind: str) -> None:
    model = tiny_stage2(kind).eval()
    query_output = model.encode_image(model.qformer.project_image(image_embeds()))
    lengths = [3, 1, 2]
    if kind == "t5":
        narrow, wide = seq2seq_text([2, 0, 1], lengths, 3), seq2seq_text([2, 0, 1], lengths, T)
        wide["target_ids"][:, :3] = narrow["target_ids"]
        wide["input_ids"] = nn.functional.pad(wide["input_ids"], (0, 3), value=7)
        wide["attention_mask"] = nn.functional.pad(wide["attention_mask"], (0, 3))
    else:
        narrow, wide = causal_text(lengths, 3), causal_text(lengths, T)
        wide["input_ids"] = torch.full_like(wide["input_ids"], 7)
        wide["input_ids"][:, :3] = narrow["input_ids"]
    torch.testing.assert_close(
        model.text_logits(query_output, wide), model.text_logits(query_output, narrow)
    )


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_gradients_reach_all_that_is_trained(kind: str) -> None:
    model = tiny_stage2(kind)
    text = seq2seq_text([2, 1, 3], [6, 2, 4]) if kind == "t5" else causal_text([6, 2, 4])

    def loss() -> Tensor:
        query_output = model.encode_image(model.qformer.project_image(image_embeds()))
        return model.text_logits(query_output, text).square().sum()

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("language_model.") for name in trained)
    assert freeze_unreached(model, loss) == []
    loss().backward()
    silent = {n for n in trained if not model.get_parameter(n).grad.abs().any()}
    # a key bias moves all scores of a query alike
    assert silent <= {n for n in trained if n.endswith(".key.bias")}
    assert all(p.grad is None for p in model.language_model.parameters())


def pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    order = mask.argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_do_not_depend_on_other_prompts(kind: str, side: str, beams: int) -> None:
    model = tiny_stage2(kind).eval()
    lengths = [5, 0, 3]
    ids, mask = tokens(lengths, P)
    right_ids = ids
    if side == "left":
        ids, mask = pad_left(ids, mask)
    settings = {
        "end_token_id": END,
        "pad_token_id": PAD,
        "max_new_tokens": 7,
        "min_new_tokens": 7,
        "num_beams": beams,
    }
    embeds = image_embeds()
    together = model.generate(model.qformer.project_image(embeds), ids, mask, **settings)
    assert together.shape == (B, 7)
    for row, length in enumerate(lengths):
        alone = model.generate(
            model.qformer.project_image(embeds[row : row + 1]),
            right_ids[row : row + 1, :length],
            torch.ones(1, length, dtype=torch.int64),
            **settings,
        )
        assert alone[0].equal(together[row])
    assert len({tuple(row) for row in together.tolist()}) > 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_greedy_captions_are_the_argmax_of_text_logits(kind: str) -> None:
    model = tiny_stage2(kind).eval()
    image = model.qformer.project_image(image_embeds())
    prompt, mask = tokens([P] * B, P)
    settings = {"end_token_id": END, "pad_token_id": PAD, "max_new_tokens": T, "min_new_tokens": T}
    ids = model.generate(image, prompt, mask, **settings)
    query_output = model.encode_image(image)
    if kind == "t5":
        text = {"input_ids": prompt, "attention_mask": mask, "target_ids": ids}
        text |= {"target_mask": torch.ones_like(ids), "lm_index": torch.arange(B * T)}
    else:
        whole = torch.cat([prompt, ids], dim=1)
        index = torch.arange(whole.numel()).view(B, P + T)[:, P:].flatten()
        text = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "lm_index": index}
    logits = model.text_logits(query_output, text)
    logits[:, END] = -torch.inf  # as the least length asks
    assert logits.argmax(dim=-1).equal(ids.flatten())


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_bfloat16_language_model_under_autocast(kind: str) -> None:
    model = tiny_stage2(kind).float()
    model.language_model.bfloat16()
    text = seq2seq_text([2, 1, 3], [6, 2, 4]) if kind == "t5" else causal_text([6, 2, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query_output = model.encode_image(model.qformer.project_image(image_embeds().float()))
        assert model.soft_prompt(query_output).dtype == torch.bfloat16
        logits = model.text_logits(query_output, text)
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert model.lm_proj.weight.grad.dtype == torch.float32
    assert model.qformer.query_tokens.grad.isfinite().all()


def test_without_a_text_side() -> None:
    qformer = tiny_stage2("opt").qformer
    names = {name.split(".")[-2] for name, _ in qformer.named_parameters() if "." in name}
    assert not names & {"word_embeddings", "position_embeddings", "transform"}
    assert not any("text_ffn" in name or "lm_head" in name for name in qformer.state_dict())
    assert qformer.word_embeddings is None and qformer.lm_head is None
    assert all(layer.text_ffn is None for layer in qformer.layers)
    with pytest.raises(AssertionError, match="reads no text"):
        qformer.embed_text(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs vocab_size"):
        QFormer(vision_width=WIDTH)


@torch.no_grad()
def test_the_query_side_is_that_of_stage_1() -> None:
    whole = tiny_model().qformer.double()
    state = whole.state_dict()
    sizes = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 24}
    half = QFormer(vision_width=WIDTH, num_query_tokens=4, dropout=0.0, text=False, **sizes)
    half.double().load_state_dict({k: state[k] for k in half.state_dict()}, strict=True)
    ours, _ = half.forward_queries(half.project_image(image_embeds()))
    theirs, _ = whole.forward_queries(whole.project_image(image_embeds()))
    assert ours.equal(theirs)


def test_the_papers_model_has_the_published_size() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([QFormer(vision_width=1408, text=False), nn.Linear(768, 2560)])
    assert count_parameters(model.parameters(), trainable=True) == 107_133_696


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_stage2("opt")
    image = model.qformer.project_image(image_embeds())
    ids, mask = tokens([2, 2], 2)
    with pytest.raises(ValueError, match=r"3 images need prompt_ids and prompt_mask of shape"):
        model.generate(image, ids, mask, end_token_id=END, pad_token_id=PAD)
    tower = VisionTower("test_vit", weights="random", image_size=32)
    with pytest.raises(ValueError, match=f"of width {WIDTH}, the tower test_vit gives 64"):
        Blip2Stage2(tower, model.qformer, model.language_model)
