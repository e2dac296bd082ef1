"""Stage 2 with the question in the Q-Former.

Proven: what the queries give depends on the question, for the same image; padding of questions and
the other rows of a batch never matter; without a question it is the plain stage 2; gradients reach
the text side and the tower's tokens; `generate` continues with what the queries found; two images
with two questions each are learned by heart, which neither image nor question alone could tell.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_steps import OPT, T5
from language_steps import VOCAB as WORDS
from tiny import PATCHES, WIDTH, NoTower
from torch import Tensor, nn

from blip2_train.evaluation.stage2 import stage2_grounding
from blip2_train.models.language import LanguageModel
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage2 import Blip2Stage2, question_of

PIECES = 20  # word pieces of the Q-Former


def model(config: dict[str, Any], *, text: bool = True) -> Blip2Stage2:
    torch.manual_seed(0)
    qformer = QFormer(
        text=text, vocab_size=PIECES, vision_width=WIDTH, hidden_size=16, num_layers=2, num_heads=2,
        intermediate_size=24, num_query_tokens=4, dropout=0.0,
    )  # fmt: skip
    language_model = LanguageModel(config=config, weights="random", dtype="float32")
    made = Blip2Stage2(NoTower(), qformer, language_model)  # type: ignore[arg-type]
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made.double()


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, PATCHES, WIDTH, generator=generator, dtype=torch.float64)


def questions(*rows: list[int]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, (torch.arange(longest) < torch.tensor([[len(row)] for row in rows])).long()


def test_the_queries_hear_the_question() -> None:
    made = model(OPT)
    one = made.qformer.project_image(images(1).expand(3, -1, -1))
    same, other, none = [2, 7, 3], [2, 8, 3], [2, 3]
    found = made.encode_image(one, questions(same, other, none))
    assert found.shape == (3, 4, 16)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (found[a] - found[b]).abs().max() > 1e-2
    plain = made.encode_image(one)
    assert (plain[0] - found[0]).abs().max() > 1e-2
    # and they still see the image
    two = made.encode_image(made.qformer.project_image(images(2)), questions(same, same))
    assert (two[0] - two[1]).abs().max() > 1e-2


def test_padding_and_other_rows_do_not_matter() -> None:
    made = model(OPT)
    alone = made.encode_image(made.qformer.project_image(images(2)[:1]), questions([2, 7, 3]))
    batch = questions([2, 7, 3], [2, 7, 8, 9, 10, 3])
    together = made.encode_image(made.qformer.project_image(images(2)), batch)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-12)
    batch[0][0, 3:] = 11  # what stands in padding
    again = made.encode_image(made.qformer.project_image(images(2)), batch)
    assert again.equal(together)


def test_without_a_question_it_is_the_plain_stage_2() -> None:
    made, plain = model(OPT), model(OPT, text=False)
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if k in plain.state_dict()})
    one = images(2)
    ours = made.encode_image(made.qformer.project_image(one))
    assert ours.equal(plain.encode_image(plain.qformer.project_image(one)))
    with pytest.raises(AssertionError, match="text=False"):
        plain.encode_image(plain.qformer.project_image(one), questions([2, 3], [2, 3]))


ROWS = [(0, [2, 7, 3], 30), (0, [2, 8, 3], 31), (1, [2, 7, 3], 32), (1, [2, 8, 3], 33)]
PROMPT = [5, 6]  # tells nothing of the question


def answers(*, encoder: bool) -> dict[str, Tensor]:
    """Prompts and answers of one token each."""
    said = torch.tensor([[answer] for *_, answer in ROWS])
    prompt = torch.tensor([PROMPT] * len(ROWS))
    text = {"lm_targets": said.flatten()}
    if encoder:
        text |= {"input_ids": prompt, "target_ids": said, "lm_index": torch.arange(len(ROWS))}
        text["target_mask"] = torch.ones_like(said)
    else:
        text |= {"input_ids": torch.cat([prompt, said], dim=1)}
        text["lm_index"] = torch.arange(len(ROWS)) * 3 + 2
    return text | {"attention_mask": torch.ones_like(text["input_ids"])}


@pytest.mark.parametrize("config", [OPT, T5], ids=["opt", "t5"])
def test_gradients_reach_tower_and_text_side(config: dict[str, Any]) -> None:
    made = model(config)
    tokens = images(2)[[image for image, *_ in ROWS]].requires_grad_()
    found = made.encode_image(
        made.qformer.project_image(tokens), questions(*(question for _, question, _ in ROWS))
    )
    made.text_loss_sum(found, answers(encoder=config is T5)).backward()
    assert tokens.grad is not None and tokens.grad.abs().sum(dim=(1, 2)).min() > 0
    words = made.qformer.word_embeddings.weight.grad
    assert words is not None
    assert words.abs().sum(dim=1).nonzero().flatten().tolist() == [2, 3, 7, 8]
    assert made.qformer.layers[0].text_ffn.inner.weight.grad is not None
    assert all(p.grad is None for p in made.language_model.parameters())


def test_two_questions_about_two_images_are_learned_by_heart() -> None:
    made = model(OPT | {"hidden_size": 64, "word_embed_proj_dim": 64})
    tokens = images(2)[[image for image, *_ in ROWS]]
    asked, batch = questions(*(question for _, question, _ in ROWS)), answers(encoder=False)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        found = made.encode_image(made.qformer.project_image(tokens), asked)
        loss = made.text_loss_sum(found, batch) / len(ROWS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # of ln 40 = 3.7

    def said(question: tuple[Tensor, Tensor]) -> list[int]:
        prompt = torch.tensor([PROMPT] * len(ROWS))
        ids = made.generate(
            made.qformer.project_image(tokens), prompt, torch.ones_like(prompt),
            question=question, end_token_id=1, pad_token_id=0, max_new_tokens=2,
        )  # fmt: skip
        return ids[:, 0].tolist()

    assert said(asked) == [30, 31, 32, 33]
    assert said((asked[0][[1, 0, 3, 2]], asked[1])) == [31, 30, 33, 32]
    # the probe of grounding keeps the question and takes another image, the next that differs
    batch |= {"image_id": torch.tensor([0, 0, 1, 1])}
    batch |= {"question_ids": asked[0], "question_mask": asked[1]}
    blank = torch.zeros(1, PATCHES, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        right, shuffled, *_ = stage2_grounding(made, tokens, blank, batch)
        found = made.encode_image(made.qformer.project_image(tokens[[2, 2, 0, 0]]), asked)
        expected = F.cross_entropy(
            made.text_logits(found, batch), batch["lm_targets"], reduction="none"
        )
    torch.testing.assert_close(shuffled, expected.double(), rtol=0, atol=1e-6)
    assert (shuffled - right).min() > 1


def test_a_batch_says_whether_it_has_questions() -> None:
    ids, mask = questions([2, 3])
    assert question_of({"question_ids": ids, "question_mask": mask}) == (ids, mask)
    assert question_of({"input_ids": ids}) is None
    assert WORDS > 33
