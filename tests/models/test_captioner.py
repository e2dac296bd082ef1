"""Captions by the searches of the library.

Proven: a wide beam finds what trying every caption finds; a batch gives the captions of its images
one by one, for beams and draws; nucleus sampling draws from the nucleus and follows the global
generator; lengths, repetition penalty, padding; the model is left as it was; nothing is printed.
"""

import itertools
import warnings
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_batch, tiny_model
from torch import Tensor, nn

from blip2_train.models.captioner import stack, unstack
from blip2_train.models.qformer import ImageKV
from blip2_train.models.stage1 import Blip2Stage1

B = 3
PAD, SEP, DEC = 0, 3, VOCAB - 1
MODES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_captions": 2, "length_penalty": 2.0},
    {"top_p": 0.9, "num_captions": 4, "temperature": 0.7},
    {"top_p": 0.9, "num_captions": 2, "repetition_penalty": 1.5, "min_length": 4},
]


@pytest.fixture
def model() -> Blip2Stage1:
    return tiny_model().double().eval()


@pytest.fixture
def image(model: Blip2Stage1) -> ImageKV:
    return model.qformer.project_image(tiny_batch(B)["image_embeds"])


def rows(image: ImageKV, row: int) -> ImageKV:
    return [(key[row : row + 1], value[row : row + 1]) for key, value in image]


@torch.no_grad()
def log_probs(model: Blip2Stage1, image: ImageKV, ids: Tensor) -> Tensor:
    """[R, T] ids of one image -> [R, T - 1, V] of what follows each but the last."""
    kv = model.encode_image(image).query_kv
    kv = [tuple(t.expand(len(ids), -1, -1, -1) for t in pair) for pair in kv]
    return model.lm_logits(model.caption(ids, kv)).log_softmax(dim=-1)[:, :-1]


def best_of_all(
    model: Blip2Stage1, image: ImageKV, words: list[int], length: int, least: int, power: float
) -> list[list[int]]:
    """Every caption of some words, best first; [DEC] and padding left out of the score."""
    captions = set()
    for tail in itertools.product([SEP, *words], repeat=length - 1):
        end = tail.index(SEP) + 1 if SEP in tail else len(tail)
        if SEP not in tail or end >= least:
            captions.add((DEC, *tail[:end], *[PAD] * (len(tail) - end)))
    ids = torch.tensor(sorted(captions))
    word = log_probs(model, image, ids).gather(2, ids[:, 1:, None]).squeeze(2)
    counts = ids[:, 1:] != PAD
    score = (word * counts).sum(dim=1) / counts.sum(dim=1) ** power
    return ids[score.argsort(descending=True)].tolist()


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("least", [1, 3])
def test_a_wide_beam_finds_the_best_captions(
    model: Blip2Stage1, image: ImageKV, power: float, least: int
) -> None:
    words = [5, 6, 7, 8]
    others = [i for i in range(VOCAB) if i not in (SEP, *words)]
    model.qformer.lm_head.bias.data[others] = -1e4
    model.qformer.lm_head.bias.data[SEP] = 2.0
    settings = {"max_length": 5, "min_length": least, "length_penalty": power}
    ids = model.generate(image, num_beams=100, num_captions=3, **settings)
    for row, found in enumerate(ids.view(B, 3, -1).tolist()):
        wanted = best_of_all(model, rows(image, row), words, 5, least, power)[:3]
        assert found == [caption[: ids.shape[1]] for caption in wanted]


@pytest.mark.parametrize("num_captions", [1, 2, 3])
def test_a_batch_gives_the_captions_of_its_images(
    model: Blip2Stage1, image: ImageKV, num_captions: int
) -> None:
    model.qformer.lm_head.bias.data[SEP] = 2.0
    settings = {"max_length": 8, "num_beams": 3, "num_captions": num_captions}
    together = model.generate(image, **settings).view(B, num_captions, -1).tolist()
    assert len({str(captions) for captions in together}) == B  # each image its own
    for row, captions in enumerate(together):
        alone = model.generate(rows(image, row), **settings).tolist()
        assert [c[: len(alone[0])] for c in captions] == alone
        assert all(not any(c[len(alone[0]) :]) for c in captions)
        assert len({str(c) for c in captions}) == num_captions


def test_draws_of_an_image_stand_together(model: Blip2Stage1, image: ImageKV) -> None:
    greedy = model.generate(image, max_length=8)
    for certain in ({"top_p": 1e-6}, {"top_p": 1.0, "temperature": 1e-4}):
        drawn = model.generate(image, max_length=8, num_captions=2, **certain)
        assert drawn.equal(greedy.repeat_interleave(2, dim=0))


def test_draws_come_from_the_nucleus(model: Blip2Stage1, image: ImageKV) -> None:
    top_p, draws = 0.5, 200
    one = rows(image, 0)
    ids = model.generate(one, max_length=4, top_p=top_p, num_captions=draws)
    probs = log_probs(model, one, ids).exp()
    ranked, order = probs.sort(dim=-1, descending=True)
    before = (ranked.cumsum(dim=-1) - ranked).gather(-1, order.argsort(dim=-1))
    taken = before.gather(2, ids[:, 1:, None]).squeeze(2)  # probability of all likelier tokens
    ended = (ids == SEP).cumsum(dim=1)[:, :-1] > 0
    assert (taken[~ended] < top_p + 1e-6).all()
    nucleus = int((before[0, 0] < top_p).sum())
    assert nucleus > 1 and len(ids[:, 1].unique()) == nucleus


def test_draws_come_from_the_whole_vocabulary(model: Blip2Stage1, image: ImageKV) -> None:
    words = 90  # more than the 50 that the library would draw from unasked
    model.qformer.word_embeddings = nn.Embedding(words, 16).double()
    model.qformer.lm_head.bias = nn.Parameter(torch.zeros(words).double())
    settings = {"top_p": 1.0, "temperature": 100.0, "num_captions": 1000}
    torch.manual_seed(0)
    ids = model.generate(rows(image, 0), max_length=2, **settings)
    assert len(ids[:, 1].unique()) > 80


def test_draws_follow_the_global_generator(model: Blip2Stage1, image: ImageKV) -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(image, max_length=8, top_p=0.95, num_captions=4)

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_lengths_count_dec(model: Blip2Stage1, image: ImageKV, num_beams: int) -> None:
    model.qformer.lm_head.bias.data[SEP] = 50.0
    for least in (1, 2, 5):
        ids = model.generate(image, max_length=7, min_length=least, num_beams=num_beams)
        assert (ids[:, least] == SEP).all() and not (ids[:, :least] == SEP).any()
    model.qformer.lm_head.bias.data[SEP] = -50.0
    assert model.generate(image, max_length=7, num_beams=num_beams).shape == (B, 7)


def test_padding_follows_the_end(model: Blip2Stage1, image: ImageKV) -> None:
    torch.manual_seed(0)
    model.qformer.lm_head.bias.data[SEP] = 3.0
    for settings in MODES:
        ids = model.generate(image, max_length=9, **settings)
        assert ids.dtype == torch.int64 and len(ids) == B * settings.get("num_captions", 1)
        assert (ids[:, 0] == DEC).all()
        assert ((ids == SEP).sum(dim=1) <= 1).all()
        ended = (ids == SEP).cumsum(dim=1)[:, :-1] > 0
        assert (ids[:, 1:][ended] == PAD).all() and ended.any() and not ended.all()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_repetition_penalty(model: Blip2Stage1, image: ImageKV, num_beams: int) -> None:
    model.qformer.lm_head.bias.data[SEP] = -50.0
    settings = {"max_length": 8, "num_beams": num_beams}

    def most_frequent(ids: Tensor) -> int:
        return max(int(row.bincount().max()) for row in ids)

    assert most_frequent(model.generate(image, **settings)) > 1
    assert most_frequent(model.generate(image, repetition_penalty=1e4, **settings)) == 1


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(
    model: Blip2Stage1, image: ImageKV, training: bool, capfd: pytest.CaptureFixture
) -> None:
    model.train(training)
    model.text_proj.requires_grad_(False)
    modules, names = list(model.modules()), list(model.state_dict())
    before = {name: (p, p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    model.generate(image, max_length=4)  # imports the library, which may print on its first time
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in MODES:
            assert not model.generate(image, max_length=8, **settings).requires_grad
    assert capfd.readouterr() == ("", "")
    assert list(model.modules()) == modules and list(model.state_dict()) == names
    assert all(module.training == training for module in model.modules())
    for name, parameter in model.named_parameters():
        same, requires_grad, values = before[name]
        assert parameter is same and parameter.requires_grad == requires_grad
        assert parameter.equal(values) and parameter.grad is None


def test_precisions() -> None:
    model = tiny_model().eval()
    embeds = tiny_batch(B)["image_embeds"].float()
    ids = {}
    for num_beams in (1, 3):
        narrow = model.generate(model.qformer.project_image(embeds), num_beams=num_beams, **LONG)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.qformer.project_image(embeds)
            half = model.generate(image, num_beams=num_beams, **LONG)
        assert image[0][0].dtype == torch.bfloat16
        assert half.dtype == torch.int64 and half.shape == (B, LONG["max_length"])
        ids[num_beams] = narrow
    model.double()
    for num_beams, narrow in ids.items():
        image = model.qformer.project_image(embeds.double())
        assert model.generate(image, num_beams=num_beams, **LONG).equal(narrow)


LONG = {"max_length": 8, "min_length": 8}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 11}, "between 2 and 10"),  # the position table has 9 rows
        ({"max_length": 4, "min_length": 5}, "min_length=5"),
        ({"max_length": 4, "num_captions": 2}, "num_captions=2"),
        ({"max_length": 4, "num_captions": 3, "num_beams": 2}, "num_beams=2"),
        ({"max_length": 4, "num_captions": 3, "num_beams": 2, "top_p": 0.9}, "num_captions=3"),
    ],
)
def test_what_cannot_be_searched(
    model: Blip2Stage1, image: ImageKV, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        model.generate(image, **settings)


def test_the_longest_caption(model: Blip2Stage1, image: ImageKV) -> None:
    model.qformer.lm_head.bias.data[SEP] = -50.0
    assert model.generate(image, max_length=10).shape == (B, 10)


def test_stacking() -> None:
    kv = [(torch.randn(B, 2, 4, 5), torch.randn(B, 2, 4, 5)) for _ in range(3)]
    assert stack(kv).shape == (B, 3, 2, 2, 4, 5)
    for pair, back in zip(kv, unstack(stack(kv)), strict=True):
        assert pair[0].equal(back[0]) and pair[1].equal(back[1])
