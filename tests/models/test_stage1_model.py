"""The stage-1 model around the Q-Former.

Proven: greedy captions start with [DEC], end with [SEP] and are the argmax of a full recomputation
(more in test_captioner); [DEC] takes the place of [CLS] in captioning and nothing is changed in
place; features are unit vectors of the right tokens; the matching logit is the mean over queries.
"""

import pytest
import torch
from tiny import VOCAB, tiny_batch, tiny_model

from blip2_train.models.stage1 import Blip2Stage1, unit

B, Q, E = 3, 4, 6
PAD, SEP, DEC = 0, 3, VOCAB - 1


@pytest.fixture
def model() -> Blip2Stage1:
    return tiny_model().double().eval()


def test_greedy_captions_are_the_argmax_of_a_full_pass(model: Blip2Stage1) -> None:
    batch = tiny_batch(B)
    # the tiny vocabulary's most likely next word is made [SEP] now and then
    model.qformer.lm_head.bias.data[SEP] = 3.0
    image = model.qformer.project_image(batch["image_embeds"])
    ids = model.generate(image, max_length=8)
    assert ids.shape[0] == B and ids.shape[1] <= 8
    assert (ids[:, 0] == DEC).all()
    logits = model.lm_logits(model.caption(ids, model.encode_image(image).query_kv))
    following = logits.argmax(dim=-1)[:, :-1]
    ended = (ids[:, :-1] == SEP).cumsum(dim=1) > 0
    assert ids[:, 1:].equal(following.masked_fill(ended, PAD))
    assert not ids.requires_grad


def test_generation_stops_when_all_have_ended(model: Blip2Stage1) -> None:
    image = model.qformer.project_image(tiny_batch(B)["image_embeds"])
    model.qformer.lm_head.bias.data[SEP] = 1e4
    assert model.generate(image, max_length=8).tolist() == [[DEC, SEP]] * B
    model.qformer.lm_head.bias.data[SEP] = -1e4
    ids = model.generate(image, max_length=8)
    assert ids.shape == (B, 8) and not (ids == SEP).any()


@torch.no_grad()
def test_dec_takes_the_place_of_cls(model: Blip2Stage1) -> None:
    batch = tiny_batch(B)
    ids = batch["input_ids"].clone()
    kv = model.encode_image(model.qformer.project_image(batch["image_embeds"])).query_kv
    decoder_ids = ids.clone()
    decoder_ids[:, 0] = DEC
    assert model.caption(ids, kv).equal(model.qformer.forward_caption(decoder_ids, kv))
    assert ids.equal(batch["input_ids"])


@torch.no_grad()
def test_features_and_matching(model: Blip2Stage1) -> None:
    batch = tiny_batch(B)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    image = model.qformer.project_image(batch["image_embeds"])
    out = model.encode_image(image)
    assert out.image_feats.shape == (B, Q, E)
    text_output, text_feat = model.encode_text(ids, mask)
    for feats in (out.image_feats, text_feat):
        torch.testing.assert_close(feats.norm(dim=-1), torch.ones(feats.shape[:-1]).double())
    projected = model.text_proj(text_output[:, 0])  # of [CLS]
    torch.testing.assert_close(text_feat * projected.norm(dim=-1, keepdim=True), projected)
    logits = model.match([(image, 1)], ids, mask)
    hidden = model.qformer.forward_multimodal([(image, 1)], ids, mask)
    each = torch.stack([model.itm_head(hidden[:, q]) for q in range(Q)])
    torch.testing.assert_close(logits, each.mean(dim=0))
    assert logits.shape == (B, 2)


def test_units_are_wide() -> None:
    x = torch.randn(5, 6)
    assert unit(x.bfloat16()).dtype == torch.float32
    assert unit(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert unit(x).dtype == torch.float32
