"""CIDEr, BLEU, ROUGE-L and METEOR of captions, computed by `pycocoevalcap`.

All are between 0 and 1, but for CIDEr's 0 to 10; papers print them times 100. CIDEr is the variant
that the benchmarks use (CIDEr-D). It and BLEU are numbers of a whole set, not means over images
that were scored alone: CIDEr weighs words by how few images of the set have them in a reference,
so that of a single image is 0.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blip2_train.errors import UserError
from blip2_train.evaluation import java, ptb

log = logging.getLogger(__name__)

PACKAGE = "pycocoevalcap"
JAVA_TOKENIZER = "Stanford PTBTokenizer 3.4.1 (Java)"
OWN_TOKENIZER = "blip2_train.evaluation.ptb (its rules, without Java)"


@dataclass(frozen=True)
class CaptionScores:
    """What captions are worth.

    Attributes:
        metrics: `cider bleu1 bleu2 bleu3 bleu4 rougeL meteor` of all images, then of each group
            under `cider_GROUP` and so on; `meteor` is None where it could not be computed.
        cider: of each image, within the whole set.
        notes: which `tokenizer` was used, why `meteor` is None.
    """

    metrics: dict[str, float | None]
    cider: list[float]
    notes: dict[str, str] = field(default_factory=dict)


def check_installed() -> None:
    """Refuses where what computes the metrics is not installed.

    Raises:
        UserError: says what to install.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"caption metrics need the package {PACKAGE}, which is not installed: "
            "pip install 'blip2-train[captions]'"
        )


def score_captions(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[str | None] | None = None,
) -> CaptionScores:
    """Scores one caption per image.

    Args:
        captions: of N images; may be empty.
        references: what people said of each, at least one.
        groups: of each image, such as the domain of NoCaps; each group is scored as a set of its
            own, too.

    Raises:
        UserError: `pycocoevalcap` is not installed.
    """
    check_installed()
    assert len(captions) == len(references) > 0, "one caption for each of some images"
    assert all(references), "every image has a reference"
    notes: dict[str, str] = {}
    said, truth = _tokenized(captions, references, notes)
    names = sorted({group for group in groups or () if group is not None})
    sets: dict[str | None, list[int]] = {None: list(range(len(captions)))}
    sets |= {name: [n for n, g in enumerate(groups or ()) if g == name] for name in names}
    metrics: dict[str, float | None] = {}
    cider: list[float] = []
    with contextlib.ExitStack() as stack:
        scorer = _meteor(stack, notes)
        for name, images in sets.items():
            gts = {n: truth[n] for n in images}
            res = {n: [said[n]] for n in images}
            found, per_image = _scores(gts, res)
            found["meteor"] = None
            if scorer is not None:
                try:
                    found["meteor"] = java.meteor_score(scorer, gts, res)
                except java.JavaError as error:
                    scorer = None
                    notes["meteor"] = str(error)
                    log.warning("no METEOR: %s", error)
            suffix = "" if name is None else "_" + name.replace("-", "_")
            metrics |= {key + suffix: value for key, value in found.items()}
            cider = cider or per_image
    if "meteor" in notes:  # of all sets, or of none
        metrics |= {key: None for key in metrics if key.startswith("meteor")}
    return CaptionScores(metrics, cider, notes)


def _tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]], notes: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Captions and references as words with single spaces between them."""
    # Captions and references apart, as the library tokenises them: the Java program looks beyond
    # a line's end.
    flat = [text for texts in references for text in texts]
    absent = java.problem()
    if absent is None:
        try:
            said, truth = java.tokenize(captions), java.tokenize(flat)
            notes["tokenizer"] = JAVA_TOKENIZER
        except java.JavaError as error:
            absent = str(error)
    if absent is not None:
        log.warning("captions are tokenised without Java: %s", absent)
        said, truth = [ptb.tokenize(text) for text in captions], [ptb.tokenize(t) for t in flat]
        notes["tokenizer"] = f"{OWN_TOKENIZER}: {absent}"
    words = iter(truth)
    return said, [[next(words) for _ in texts] for texts in references]


def _meteor(stack: contextlib.ExitStack, notes: dict[str, str]) -> Any:
    absent = java.problem()
    if absent is None:
        try:
            return stack.enter_context(java.meteor())
        except java.JavaError as error:
            absent = str(error)
    notes["meteor"] = absent
    log.warning("no METEOR: %s", absent)
    return None


def _scores(
    references: dict[int, list[str]], captions: dict[int, list[str]]
) -> tuple[dict[str, float | None], list[float]]:
    """Metrics of one set of tokenised captions, and CIDEr of each."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    cider, per_image = Cider().compute_score(references, captions)
    bleu, _ = Bleu(4).compute_score(references, captions, verbose=0)
    rouge, _ = Rouge().compute_score(references, captions)
    metrics: dict[str, float | None] = {"cider": float(cider)}
    metrics |= {f"bleu{n}": float(value) for n, value in enumerate(bleu, start=1)}
    metrics["rougeL"] = float(rouge)
    return metrics, [float(value) for value in per_image]
