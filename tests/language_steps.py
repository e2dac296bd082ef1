"""Small stage-2 models and texts that several tests need."""

from typing import Any

import torch
from tiny import WIDTH, NoTower
from torch import Tensor, nn

from blip2_train.models.language import LanguageModel
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage2 import Blip2Stage2

N, T, VOCAB = 12, 7, 40
OPT = {
    "model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "ffn_dim": 24, "max_position_embeddings": 32, "vocab_size": VOCAB,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": VOCAB,
}  # fmt: skip


def stage2(config: dict[str, Any]) -> Blip2Stage2:
    torch.manual_seed(0)
    qformer = QFormer(
        text=False, vision_width=WIDTH, hidden_size=16, num_layers=2, num_heads=2,
        intermediate_size=24, num_query_tokens=4, dropout=0.0,
    )  # fmt: skip
    language_model = LanguageModel(config=config, weights="random", dtype="float32")
    model = Blip2Stage2(NoTower(), qformer, language_model)  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.double()


def texts(rows: slice, *, encoder: bool) -> dict[str, Tensor]:
    """Rows of the global batch, captions of 2 to T tokens; encoders also read 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (N, T), generator=generator)
    mask = (torch.arange(T) < torch.randint(2, T + 1, (N, 1), generator=generator)).long()
    prefix = torch.randint(3, VOCAB, (N, 3), generator=generator)
    shown = (torch.arange(3) < torch.randint(1, 4, (N, 1), generator=generator)).long()
    ids, mask, prefix, shown = ids[rows], mask[rows], prefix[rows], shown[rows]
    index = mask.flatten().nonzero().squeeze(1)
    text = {"lm_index": index, "lm_targets": ids.flatten()[index]}
    if encoder:
        text |= {"input_ids": prefix, "attention_mask": shown}
        return text | {"target_ids": ids, "target_mask": mask}
    return text | {"input_ids": ids, "attention_mask": mask}
