"""Retrieval scores and recalls equal the reference's, contrastive and re-ranked."""

from pathlib import Path

import pytest
import torch
from parity.reference import assert_close, build_stage1, load_case, section

from blip2_train.evaluation.matching import Pairs
from blip2_train.evaluation.ranking import contrast
from blip2_train.evaluation.retrieval import pairs_to_match, recalls, recalls_of_ranks, rerank
from blip2_train.evaluation.retrieval_task import rerank as rerank_lists
from blip2_train.evaluation.stage1 import match_captions
from blip2_train.losses import max_similarity

NAMES = {"txt_r1": "i2t_r1", "txt_r5": "i2t_r5", "txt_r10": "i2t_r10"}
NAMES |= {"img_r1": "t2i_r1", "img_r5": "t2i_r5", "img_r10": "t2i_r10", "r_mean": "r_mean"}


@torch.no_grad()
def test_retrieval(oracle: Path) -> None:
    info, tensors = load_case(oracle, "retrieval")
    model = build_stage1(info, section(tensors, "weights/")).eval()
    features = tensors["inputs/image_features"]
    ids, mask = tensors["inputs/input_ids"], tensors["inputs/attention_mask"]
    want = section(tensors, "outputs/")

    image_feats = model.encode_image(model.qformer.project_image(features)).image_feats
    _, text_feat = model.encode_text(ids, mask)
    assert_close(image_feats, want["image_embeds"], 2e-5, "image_embeds")
    assert_close(text_feat, want["text_embeds"], 2e-5, "text_embeds")
    sims = max_similarity(image_feats, text_feat)
    assert_close(sims, want["itc_sims"], 2e-5, "itc_sims")

    everything = torch.arange(len(ids))
    match = torch.stack([match_captions(model, f[None], ids, mask, everything) for f in features])
    assert_close(match, want["itm_scores"], 2e-5, "itm_scores")

    caption_image = torch.tensor(info["txt2img"])
    got = recalls(sims, sims.T, caption_image)
    assert_recalls(got, info["metrics"]["itc_only"], ("txt_r1", "img_r1", "r_mean"))
    for title, metrics in info["metrics"].items():
        if not title.startswith("k_test="):
            continue
        k = int(title.removeprefix("k_test="))
        i2t, t2i = rerank(sims, match, k), rerank(sims.T, match.T, k)
        assert_close(i2t, want[f"score_i2t_k{k}"], 2e-5, f"score_i2t_k{k}")
        assert_close(t2i, want[f"score_t2i_k{k}"], 2e-5, f"score_t2i_k{k}")
        # below the whole list, R@5 and R@10 depend on how the reference orders ties
        complete = k >= len(features)
        names = tuple(NAMES) if k >= len(ids) else ("txt_r1", "img_r1")
        if complete and k < len(ids):
            names = ("txt_r1", "txt_r5", "img_r1", "img_r5", "img_r10")
        assert_recalls(recalls(i2t, t2i, caption_image), metrics, names)
        # the same without whole matrices, as blip2-evaluate does it
        found = contrast(image_feats, text_feat, caption_image, k=k)
        got = recalls_of_ranks(found.rank_i2t, found.rank_t2i)
        assert_recalls(got, info["metrics"]["itc_only"], ("txt_r1", "img_r1", "r_mean"))
        pairs = Pairs(found.captions, found.images)
        logits = match[pairs.image, pairs.caption]
        rank_i2t, rank_t2i, captions, images = rerank_lists(
            pairs, logits, found.captions, found.images, caption_image
        )
        assert_recalls(recalls_of_ranks(rank_i2t, rank_t2i), metrics, names)
        for listed, scores in ((captions, i2t), (images, t2i)):
            assert_close(listed.score, scores.gather(1, listed.index), 2e-5, "listed scores")
            assert listed.index.shape[1] == min(k, scores.shape[1])
        outside = ~pairs_to_match(sims, k)
        assert (i2t[outside] == -100).all() and (t2i.T[outside] == -100).all()


def assert_recalls(got: dict[str, float], want: dict[str, float], names: tuple[str, ...]) -> None:
    for name in names:
        assert got[NAMES[name]] == pytest.approx(want[name], abs=1e-9), name
