"""The Q-Former's passes.

Proven: side by side, without padding and without what nobody reads, the passes give what each one
gives alone, forward and backward; captioning is causal, sees every query, and leaves the queries
alone; padding never matters; in the multimodal pass queries and text see each other; images that
rows share give what copied ones give, forward and backward; the folded `ln_vision` is the explicit
one; checkpointing changes neither losses nor gradients, dropout included; queries start different
from each other; bfloat16 autocast runs and is close; the paper's model has exactly the published
number of trainable parameters.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import PATCHES, TEXT, VOCAB, WIDTH, one_pass, tiny_batch, tiny_model
from torch import Tensor

from blip2_train.models.attention import attend, split_heads
from blip2_train.models.freezing import count_parameters
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.models.vision import VisionTower

B, Q, D = 3, 4, 16  # images, queries, width


def tiny_qformer(dropout: float = 0.0, **changes: Any) -> QFormer:
    return tiny_model(dropout, **changes).qformer.double()


@pytest.fixture
def qformer() -> QFormer:
    return tiny_qformer()


@pytest.fixture
def batch() -> dict[str, Any]:
    return tiny_batch(B, seed=3)


def other_token(ids: Tensor, position: int) -> Tensor:
    changed = ids.clone()
    changed[:, position] = (ids[:, position] + 1) % (VOCAB - 1)
    return changed


@pytest.mark.parametrize("position", [0, 1, 5, TEXT - 1])
@torch.no_grad()
def test_captioning_is_causal(qformer: QFormer, batch: dict[str, Any], position: int) -> None:
    query_output, kv = qformer.forward_queries(qformer.project_image(batch["image_embeds"]))
    assert query_output.shape == (B, Q, D)
    ids = torch.randint(5, VOCAB, (B, TEXT), generator=torch.Generator().manual_seed(0))
    before = qformer.forward_caption(ids, kv)
    after = qformer.forward_caption(other_token(ids, position), kv)
    assert before.shape == (B, TEXT, D)
    assert before[:, :position].equal(after[:, :position])
    changed = (before[:, position:] - after[:, position:]).abs().amax(dim=-1)
    assert (changed > 1e-6).all(), "later tokens must see it"


@torch.no_grad()
def test_a_caption_sees_every_query_and_its_own_image_only(
    qformer: QFormer, batch: dict[str, Any]
) -> None:
    _, kv = qformer.forward_queries(qformer.project_image(batch["image_embeds"]))
    before = qformer.forward_caption(batch["input_ids"], kv)
    for query in range(Q):
        changed = [(k.clone(), v.clone()) for k, v in kv]
        changed[-1][1][:, :, query] += 1
        after = qformer.forward_caption(batch["input_ids"], changed)
        assert ((before - after).abs().amax(dim=-1) > 1e-6).all(), f"query {query} is hidden"
    embeds = batch["image_embeds"].clone()
    embeds[1] += torch.randn_like(embeds[1])
    _, moved = qformer.forward_queries(qformer.project_image(embeds))
    gap = (qformer.forward_caption(batch["input_ids"], moved) - before).abs().amax(dim=(1, 2))
    assert gap[1] > 1e-6 and gap[0] == 0 and gap[2] == 0


@torch.no_grad()
def test_the_one_pass_mask_gives_the_same(qformer: QFormer, batch: dict[str, Any]) -> None:
    """Queries and text in one pass under UniLM's mask: what the two passes must add up to."""
    image = qformer.project_image(batch["image_embeds"])
    ids = batch["input_ids"]
    query_output, kv = qformer.forward_queries(image)
    text = qformer.forward_caption(ids, kv)
    T = ids.shape[1]
    mask = torch.zeros(Q + T, Q + T, dtype=torch.bool)
    mask[:, :Q] = True  # everybody sees the queries
    mask[Q:, Q:] = torch.ones(T, T).tril().bool()  # text sees earlier text, queries see none
    both = one_pass(qformer, image, ids, mask)
    torch.testing.assert_close(both[:, :Q], query_output, atol=1e-12, rtol=0)
    torch.testing.assert_close(both[:, Q:], text, atol=1e-12, rtol=0)


@torch.no_grad()
def test_padding_never_matters(qformer: QFormer, batch: dict[str, Any]) -> None:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    real, longest = mask.bool(), batch["text_length"]
    lengths = mask.sum(dim=1)
    assert lengths.min() < longest, "the batch must have padding"
    image = qformer.project_image(batch["image_embeds"])
    _, kv = qformer.forward_queries(image)
    trimmed = ids[:, :longest], mask[:, :longest]
    noise = ids.masked_fill(~real, 7), mask

    def passes(ids: Tensor, mask: Tensor) -> list[Tensor]:
        real = mask.bool()
        text = [qformer.forward_text(ids, mask), qformer.forward_caption(ids, kv)]
        both = qformer.forward_multimodal([(image, 1)], ids, mask)
        return [both, *(t[real] for t in text)]

    want = passes(ids, mask)
    for variant in (trimmed, noise):
        for a, b in zip(want, passes(*variant), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    unmasked = passes(noise[0], torch.ones_like(mask))
    assert (unmasked[0] - want[0]).abs().max() > 1e-6  # without the mask it would matter


@torch.no_grad()
def test_queries_and_text_see_each_other(qformer: QFormer, batch: dict[str, Any]) -> None:
    image = qformer.project_image(batch["image_embeds"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    visible = F.pad(mask.bool(), (Q, 0), value=True)[:, None, None]
    before = one_pass(qformer, image, ids, visible)
    ours = qformer.forward_multimodal([(image, 1)], ids, mask)
    torch.testing.assert_close(ours, before[:, :Q], atol=1e-12, rtol=0)
    after = one_pass(qformer, image, other_token(ids, 1), visible)
    assert ((before - after)[:, :Q].abs().amax(dim=-1) > 1e-6).all(), "queries see the text"
    embeds = batch["image_embeds"] + torch.randn_like(batch["image_embeds"])
    after = one_pass(qformer, qformer.project_image(embeds), ids, visible)
    assert ((before - after)[:, Q:].abs().amax(dim=-1) > 1e-6).all(), "text sees the image"
    # both directions: the first token sees the last one
    last = int(mask[0].sum()) - 1
    after = qformer.forward_text(other_token(ids, last), mask)
    assert (after - qformer.forward_text(ids, mask))[0, 0].abs().max() > 1e-6


@torch.no_grad()
def test_text_alone_sees_neither_queries_nor_image(qformer: QFormer, batch: dict[str, Any]) -> None:
    before = qformer.forward_text(batch["input_ids"], batch["attention_mask"])
    qformer.query_tokens.add_(1)
    qformer.layers[0].query_ffn.inner.weight.add_(1)
    qformer.layers[0].cross_attention.value.weight.add_(1)
    assert qformer.forward_text(batch["input_ids"], batch["attention_mask"]).equal(before)


def gradients(loss: Tensor, qformer: QFormer, *inputs: Tensor) -> list[Tensor]:
    wanted = [*qformer.parameters(), *inputs]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def test_shared_images_equal_copied_ones(qformer: QFormer) -> None:
    """Rows: each image of a twice, then each of b three times; a has 2 images, b has 3."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(2, PATCHES, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    b = torch.randn(3, PATCHES, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    rows = tiny_batch(2 * 2 + 3 * 3, seed=5)
    text = rows["input_ids"], rows["attention_mask"]
    weights = torch.randn(13, Q, D, generator=generator, dtype=torch.float64)

    shared = qformer.forward_multimodal(
        [(qformer.project_image(a), 2), (qformer.project_image(b), 3)], *text
    )
    copied = torch.cat([a.repeat_interleave(2, dim=0), b.repeat_interleave(3, dim=0)])
    naive = qformer.forward_multimodal([(qformer.project_image(copied), 1)], *text)
    torch.testing.assert_close(shared, naive, atol=1e-12, rtol=0)
    ours = gradients((shared * weights).sum(), qformer, a, b)
    theirs = gradients((naive * weights).sum(), qformer, a, b)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)
    assert ours[-1].abs().max() > 1e-6
    reordered = qformer.forward_multimodal(
        [(qformer.project_image(torch.cat([a, a, b, b, b])), 1)], *text
    )
    assert (reordered - naive).abs().amax() > 1e-3  # the order of rows matters


def test_the_folded_norm_is_the_explicit_one(qformer: QFormer) -> None:
    torch.nn.init.normal_(qformer.ln_vision.weight, mean=1.0)
    torch.nn.init.normal_(qformer.ln_vision.bias)
    embeds = 3 * tiny_batch(B)["image_embeds"] + 1
    folded = [x for pair in qformer.project_image(embeds) for x in pair]
    tokens = qformer.ln_vision(embeds)
    explicit = []
    for layer in qformer.layers:
        if layer.cross_attention is not None:
            attention = layer.cross_attention
            for projection in (attention.key, attention.value):
                explicit.append(split_heads(projection(tokens), attention.num_heads))
    assert len(folded) == len(explicit) == 4  # blocks 0 and 2, keys and values
    assert folded[0].shape == (B, 2, PATCHES, D // 2)
    generator = torch.Generator().manual_seed(2)
    losses = []
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in folded]
    for way in (folded, explicit):
        losses.append(sum((x * w).sum() for x, w in zip(way, weights, strict=True)))
    for one, two in zip(folded, explicit, strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=0)
    for one, two in zip(*(gradients(loss, qformer) for loss in losses), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("contrast", "caption"), [(True, True), (True, False), (False, True)])
def test_side_by_side_is_one_after_the_other(
    qformer: QFormer, batch: dict[str, Any], contrast: bool, caption: bool, packed: bool
) -> None:
    image, again = (qformer.project_image(batch["image_embeds"]) for _ in range(2))
    ids, mask, index = batch["input_ids"], batch["attention_mask"], batch["text_index"]
    assert len(index) < ids.numel(), "the batch must have padding"
    decoder_ids = other_token(ids, 0)
    query_output, cls, states = qformer.forward_apart(
        image, ids, mask, decoder_ids if caption else None,
        slots=index if packed else None, contrast=contrast,
    )  # fmt: skip
    assert (cls is not None, states is not None) == (contrast, caption)
    ours, theirs = [], []
    queries, kv = qformer.forward_queries(again)
    if query_output is not None and cls is not None:
        ours += [query_output, cls]
        theirs += [queries, qformer.forward_text(ids, mask)[:, 0]]
    if states is not None:
        ours.append(states if packed else states[index])
        theirs.append(qformer.forward_caption(decoder_ids, kv).flatten(0, 1)[index])
    assert_same(qformer, ours, theirs)


def test_a_multimodal_pass_without_padding_is_the_padded_one(
    qformer: QFormer, batch: dict[str, Any]
) -> None:
    image, again = (qformer.project_image(batch["image_embeds"]) for _ in range(2))
    text = batch["input_ids"], batch["attention_mask"]
    assert_same(
        qformer,
        [qformer.forward_multimodal([(image, 1)], *text, batch["text_index"])],
        [qformer.forward_multimodal([(again, 1)], *text)],
    )


def assert_same(qformer: QFormer, ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Values and gradients."""
    generator = torch.Generator().manual_seed(2)
    totals = []
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)
        weights = torch.randn(one.shape, generator=generator, dtype=one.dtype)
        totals.append(((one * weights).sum(), (two * weights).sum()))
    a, b = (sum(values) for values in zip(*totals, strict=True))
    for one, two in zip(gradients(a, qformer), gradients(b, qformer), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_nothing(training: bool) -> None:
    results = []
    for checkpointing in (False, True):
        qformer = tiny_qformer(0.3, gradient_checkpointing=checkpointing).train(training)
        batch = tiny_batch(B, seed=4)
        torch.manual_seed(11)
        image = qformer.project_image(batch["image_embeds"])
        query_output, kv = qformer.forward_queries(image)
        caption = qformer.forward_caption(batch["input_ids"], kv)
        both = qformer.forward_multimodal([(image, 1)], batch["input_ids"], batch["attention_mask"])
        apart = qformer.forward_apart(
            image, batch["input_ids"], batch["attention_mask"], batch["input_ids"]
        )
        both = torch.cat([both.flatten(0, 1), *(part.flatten(0, -2) for part in apart)])
        loss = query_output.pow(3).sum() + caption.pow(3).sum() + both.pow(3).sum()
        results.append((loss, gradients(loss, qformer)))
    assert results[0][0].equal(results[1][0])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-10)


def plain(*heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads  # type: ignore[return-value]


def test_dropout_acts_in_training_only() -> None:
    qformer, batch = tiny_qformer(0.3), tiny_batch(B)
    text = batch["input_ids"], batch["attention_mask"]
    assert not qformer.train().forward_text(*text).equal(qformer.forward_text(*text))
    assert qformer.eval().forward_text(*text).equal(qformer.forward_text(*text))
    # of the attention weights, too
    value = torch.eye(6, dtype=torch.float64)[None, None]
    nothing = torch.zeros_like(value)
    dropout = torch.nn.Dropout(0.5)
    rows = attend(plain, (nothing, nothing, value), None, dropout)
    assert rows.unique().tolist() == [0.0, pytest.approx(2 / 6)]
    assert attend(plain, (nothing, nothing, value), None, dropout.eval()).unique().numel() == 1


def test_queries_start_small_and_different() -> None:
    torch.manual_seed(0)
    queries = QFormer(vocab_size=5, vision_width=8, num_layers=1).query_tokens
    assert queries.shape == (1, 32, 768)
    assert queries.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.pdist(queries[0]).min() > 0.5
    wide = QFormer(vocab_size=5, vision_width=8, num_layers=1, query_std=0.5).query_tokens
    assert wide.std().item() == pytest.approx(0.5, rel=0.05)
    qformer = tiny_qformer()
    embeds = tiny_batch(B)["image_embeds"]
    output, _ = qformer.forward_queries(qformer.project_image(embeds))
    assert all(torch.pdist(rows).min() > 1e-3 for rows in output)


def test_cross_attention_stands_in_every_nth_block() -> None:
    for frequency, blocks in ((1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])):
        with torch.device("meta"):
            qformer = QFormer(
                vocab_size=5, vision_width=8, num_layers=5, cross_attention_freq=frequency
            )
        found = [i for i, layer in enumerate(qformer.layers) if layer.cross_attention is not None]
        assert found == blocks


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"hidden_size=10 must be a multiple of num_heads=4"):
        QFormer(vocab_size=5, vision_width=8, hidden_size=10, num_heads=4)


def test_attention_is_the_textbook_one() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 5, 7)  # rows, heads, positions, width
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5, generator=generator) > 0.3
    mask[..., 0] = True
    scores = (q @ k.transpose(-1, -2) / 7**0.5).masked_fill(~mask, -torch.inf)
    ours = attend(plain, (q, k, v), mask, torch.nn.Dropout(0.0))
    torch.testing.assert_close(ours, scores.softmax(dim=-1) @ v, atol=1e-12, rtol=0)


@torch.no_grad()
def test_bfloat16_autocast_is_close() -> None:
    model, batch = tiny_model().eval(), tiny_batch(B)
    embeds = batch["image_embeds"].float()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            image = model.qformer.project_image(embeds.bfloat16() if enabled else embeds)
            assert image[0][0].dtype == (torch.bfloat16 if enabled else torch.float32)
            out = model.encode_image(image)
            logits = model.match([(image, 1)], ids, mask)
            caption = model.lm_logits(model.caption(ids, out.query_kv))
            _, text_feat = model.encode_text(ids, mask)
        assert out.image_feats.dtype == text_feat.dtype == torch.float32
        results.append([out.image_feats, text_feat, logits.float(), caption.float()])
    for full, half in zip(*results, strict=True):
        assert F.cosine_similarity(full.flatten(), half.flatten(), dim=0) > 0.999
        assert not full.equal(half)


def test_the_papers_model_has_the_published_size() -> None:
    with torch.device("meta"):
        vision = VisionTower("eva_giant_patch14_clip_224.laion400m", weights="random")
        qformer = QFormer(vocab_size=30523, vision_width=vision.width)
        model = Blip2Stage1(vision, qformer, dec_token_id=30522, end_token_id=102)
    parameters = list(model.train().parameters())
    assert count_parameters(parameters, trainable=True) == 186_705_470
    assert count_parameters(vision.parameters(), trainable=True) == 0
    assert not vision.tower.training
