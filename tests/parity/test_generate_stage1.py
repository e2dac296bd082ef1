"""Captions of stage 1 equal the reference's.

Proven: greedy ids are exact, padding included; a beam search written down plainly gives the
reference's beams in both of its conventions and, in the installed library's, ours.

The search is the same in all three; they differ in how long a caption counts that was cut at
`max_length`, and in when no prefix can win any more. With averages of negative numbers both decide
which caption is best.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.reference import build_stage1, load_case, section
from torch import Tensor

from blip2_train.models.qformer import ImageKV
from blip2_train.models.stage1 import Blip2Stage1


@dataclass(frozen=True)
class Convention:
    cut: int  # added to the length of a caption that was cut
    hope: int  # added to the length by which the best score still within reach is estimated
    ended_hopes: bool  # whether a candidate that has just ended counts in that estimate


REFERENCE = Convention(cut=1, hope=1, ended_hopes=True)
OLDER = Convention(cut=1, hope=0, ended_hopes=True)
INSTALLED = Convention(cut=0, hope=0, ended_hopes=False)


def generate_case(oracle: Path) -> tuple[dict[str, Any], Blip2Stage1, ImageKV]:
    info, tensors = load_case(oracle, "generate_stage1")
    model = build_stage1(info, section(tensors, "weights/")).eval()
    return info, model, model.qformer.project_image(tensors["inputs/image_features"])


def generate(model: Blip2Stage1, image: ImageKV, settings: dict[str, Any], beams: int) -> list:
    ids = model.generate(
        image,
        max_length=settings["max_length"],
        min_length=settings["min_length"],
        num_beams=beams,
        length_penalty=settings["length_penalty"],
        repetition_penalty=settings["repetition_penalty"],
    )
    return ids.tolist()


def padded(captions: list[list[int]], settings: dict[str, Any]) -> list[list[int]]:
    """To `max_length`; searches stop padding at the longest caption."""
    return [c + [settings["pad"]] * (settings["max_length"] - len(c)) for c in captions]


def plain_beams(
    model: Blip2Stage1, image: ImageKV, settings: dict[str, Any], beams: int, convention: Convention
) -> list[int]:
    """The best caption of one image; prefixes and their scores as lists, one pass per prefix."""
    query_kv = model.encode_image(image).query_kv
    eos, longest, power = settings["eos"], settings["max_length"], settings["length_penalty"]

    def log_probs(prefix: list[int]) -> Tensor:
        hidden = model.caption(torch.tensor([prefix]), query_kv)[0, -1]
        scores = model.lm_logits(hidden).log_softmax(dim=-1)
        if len(prefix) < settings["min_length"]:
            scores[eos] = -torch.inf
        return scores

    running, finished = [(0.0, [settings["start"]])], []
    for length in range(1, longest):  # words of a candidate, [DEC] left out
        following = [(total + log_probs(prefix), prefix) for total, prefix in running]
        candidates = [
            (score, [*prefix, word])
            for scores, prefix in following
            for word, score in enumerate(scores.tolist())
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        going_on = [c for c in candidates if c[1][-1] != eos]
        ended = [c for c in candidates[:beams] if c[1][-1] == eos]
        finished += [(score / length**power, caption) for score, caption in ended]
        finished = sorted(finished, reverse=True)[:beams]
        running = going_on[:beams]
        best = (candidates if convention.ended_hopes else running)[0][0]
        within_reach = best / (length + convention.hope) ** power
        if len(finished) == beams and finished[-1][0] >= within_reach:
            break
    else:
        cut = running if convention.ended_hopes else candidates[:beams]
        finished += [(score / (length + convention.cut) ** power, c) for score, c in cut]
    return max(finished)[1]


@torch.no_grad()
def test_greedy_captions(oracle: Path) -> None:
    info, model, image = generate_case(oracle)
    settings = info["settings"]
    ours, wanted = generate(model, image, settings, 1), info["token_ids"]["greedy"]
    assert padded(ours, settings) == padded(wanted, settings)


@pytest.mark.parametrize(
    ("convention", "name"),
    [(REFERENCE, "beam3"), (OLDER, "beam3_older_convention"), (INSTALLED, None)],
    ids=["reference", "older", "installed"],
)
@torch.no_grad()
def test_beams(oracle: Path, convention: Convention, name: str | None) -> None:
    info, model, image = generate_case(oracle)
    settings = info["settings"]
    if settings["early_stopping"] or settings["repetition_penalty"] != 1:
        pytest.skip("the plain search knows neither early stopping nor a repetition penalty")
    wanted = info["token_ids"][name] if name else generate(model, image, settings, 3)
    for row, caption in enumerate(padded(wanted, settings)):
        own = [(key[row : row + 1], value[row : row + 1]) for key, value in image]
        plain = plain_beams(model, own, settings, 3, convention)
        assert padded([plain], settings) == [caption], f"image {row}"
