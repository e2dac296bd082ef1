"""The image tower equals the reference's: a small timm EVA, by LAVIS names."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from parity.reference import assert_close, load_case, section

from blip2_train.checkpoint.lavis import from_lavis
from blip2_train.models.qformer import QFormer
from blip2_train.models.vision import VisionTower, image_tokens


def test_features(oracle: Path) -> None:
    info, tensors = load_case(oracle, "image_tower")
    tower = timm.models.eva.Eva(
        img_size=info["img_size"],
        patch_size=info["patch"],
        embed_dim=info["width"],
        depth=info["depth"],
        num_heads=info["heads"],
        mlp_ratio=info["mlp_ratio"],
        num_classes=0,
        global_pool="",
    )
    assert tower.blocks[0].mlp.fc1.out_features == info["mlp_hidden"]
    assert tower.blocks[0].norm1.eps == info["block_ln_eps"]
    tower.prune_intermediate_layers([info["depth"] - 1], prune_norm=True, prune_head=True)
    state = section(from_lavis(section(tensors, "weights/")).state, "vision.tower.")
    tower.load_state_dict(state, strict=True)
    with torch.no_grad():
        features = image_tokens(tower.eval(), tensors["inputs/image"])
    assert_close(features, tensors["outputs/features"], 2e-5, "features")
    normed = F.layer_norm(
        features,
        features.shape[-1:],
        tensors["weights/ln_vision.weight"],
        tensors["weights/ln_vision.bias"],
        eps=info["ln_vision_eps"],
    )
    assert_close(normed, tensors["outputs/features_after_ln"], 2e-5, "features after ln_vision")
    ours = QFormer(vocab_size=5, vision_width=info["width"], hidden_size=8, num_heads=2)
    assert ours.ln_vision.eps == info["ln_vision_eps"]


@pytest.mark.parametrize(
    ("name", "blocks", "width", "activation"),
    [
        ("eva_giant_patch14_clip_224.laion400m", 39, 1408, "GELU"),
        ("vit_large_patch14_clip_quickgelu_224.openai", 23, 1024, "QuickGELU"),
    ],
)
def test_published_towers_lose_their_last_block(
    name: str, blocks: int, width: int, activation: str
) -> None:
    with torch.device("meta"):
        vision = VisionTower(name, weights="random")
    assert len(vision.tower.blocks) == blocks
    assert (vision.num_tokens, vision.width, vision.image_size) == (257, width, 224)
    assert type(vision.tower.blocks[0].mlp.act).__name__ == activation
    assert isinstance(vision.tower.norm, torch.nn.Identity)
