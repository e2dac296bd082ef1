"""`task=caption`: what the model says of images, by the metrics of COCO captions and NoCaps."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from blip2_train import signals
from blip2_train.data.batch import EvalSample
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import gather_objects, on_rank_zero
from blip2_train.errors import UserError
from blip2_train.evaluation.caption_metrics import CaptionScores, check_installed, score_captions
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.samples import Row, spread
from blip2_train.evaluation.task import Outcome, Task
from blip2_train.evaluation.work import Work

MAX_REFERENCE = 10_000  # characters; a longer one is no caption, and takes tokenizers for ever
NO_REFERENCES = "no image of this split has captions to compare with"


@dataclass
class Captioned:
    """One image and what was said of it.

    Attributes:
        item: its number within the split.
        image_id: as the annotations have it; the sample's key where they have none.
        caption: of the model.
        references: of people, as annotated.
        domain: of NoCaps, None elsewhere.
    """

    item: int
    image_id: Any
    caption: str
    references: list[str] = field(default_factory=list)
    domain: str | None = None


class CaptionTask(Task):
    """CIDEr, BLEU, ROUGE-L and METEOR; of each domain, too, where images have one.

    Args:
        prompt: of stage 2; None: the one of the training.
        num_beams: see `Blip2.caption`, as the next three.
        max_new_tokens: at most in a caption.
        min_new_tokens: at least.
        length_penalty: of beams.
        metrics: False: only captions are made.
        results: name of the file for a benchmark's server; None: made of split and data.

    Raises:
        UserError: a value that cannot be.
    """

    extra = ("image_id", "captions", "domain")
    need_captions = False

    def __init__(
        self,
        prompt: str | None = "a photo of",
        num_beams: int = 5,
        max_new_tokens: int = 30,
        min_new_tokens: int = 8,
        length_penalty: float = 1.0,
        metrics: bool = True,
        results: str | None = None,
    ) -> None:
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"task.prompt={prompt} must be text, or null")
        counts = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
        for name, value in (counts | {"min_new_tokens": min_new_tokens}).items():
            least = 0 if name == "min_new_tokens" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"task.{name}={value} must be a whole number of at least {least}")
        if min_new_tokens > max_new_tokens:
            raise UserError(
                f"task.min_new_tokens={min_new_tokens} is more than "
                f"task.max_new_tokens={max_new_tokens}"
            )
        if isinstance(length_penalty, bool) or not isinstance(length_penalty, int | float):
            raise UserError(f"task.length_penalty={length_penalty} must be a number")
        if not isinstance(metrics, bool):
            raise UserError(f"task.metrics={metrics} must be true or false")
        if results is not None and not re.fullmatch(
            r"(?!(?:metrics|lock)\.)\w[\w.\-]*\.json", str(results)
        ):
            raise UserError(
                f"task.results={results} must be the name of a file that ends with .json, and not "
                "metrics.json or lock.json"
            )
        self.prompt = prompt
        self.search: dict[str, Any] = {
            "num_beams": num_beams,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "length_penalty": float(length_penalty),
        }
        self.metrics = metrics
        self.results = results

    def check(self, blip2: Blip2) -> None:
        """Refuses a model that writes no captions, and where what scores them is missing."""
        blip2.needs("stage1", "stage2", loss="lm")
        if self.metrics:
            check_installed()

    def run(self, blip2: Blip2, images: EvalStream, work: Work) -> Outcome:
        """Evaluates; all ranks call it."""
        prompt = self.prompt if blip2.kind == "stage2" else None

        def caption(items: list[Any]) -> dict[str, Any]:
            samples = [item for item in items if isinstance(item, EvalSample)]
            said: list[str] = []
            if samples:
                pixels = torch.stack([sample.image for sample in samples])
                said = blip2.caption(pixels, prompt=prompt, **self.search)
            return {
                "captions": said,
                "items": [sample.item for sample in samples],
                "ids": [sample.image_id for sample in samples],
                "keys": [sample.key for sample in samples],
                "extras": [sample.extra for sample in samples],
                "skipped": [dict(item) for item in items if not isinstance(item, EvalSample)],
            }

        parts = work.map("captions", images, self.batch_size, caption)
        skipped = [line for part in parts for line in part["skipped"]]
        found, repeated, oversized = _by_image(parts)
        if not found:
            reason = f", the first because of: {skipped[0]['reason']}" if skipped else ""
            raise UserError(f"none of the {len(images)} images can be used{reason}")
        judged = [n for n, image in enumerate(found) if image.references]
        scores = CaptionScores({}, [])
        if self.metrics and judged:
            scores = on_rank_zero(
                (lambda: _score([found[n] for n in judged])) if work.world.rank == 0 else None,
                work.world,
            )
            # Slurm signals the programs of Java, too: a metric may be missing for no other reason
            stopped = [
                number for number in gather_objects(signals.received(), work.world) if number
            ]
            if stopped:
                raise signals.Stopped(stopped[0])
        elif not judged:
            scores.notes["metrics"] = NO_REFERENCES
        else:
            scores.notes["metrics"] = "task.metrics=false: only captions were made"
        counts = {
            "images": len(found),
            "references": sum(len(image.references) for image in found),
            "skipped": len(skipped),
            "repeated images": repeated,
            "images without references": len(found) - len(judged),
            "oversized references": oversized,
        }
        best: list[Row] = []
        worst: list[Row] = []
        text = "By CIDEr of the image. Green: words that one of its captions by people has, too."
        if not scores.cider:
            text = "Some images from all over the split: without scores, none is better."
            if work.world.rank == 0:
                best = [_row(images, image) for image in spread(found, self.samples)]
        elif work.world.rank == 0:
            order = sorted(range(len(judged)), key=lambda n: -scores.cider[n])
            first, rest = order[: self.samples], order[self.samples :][::-1][: self.samples]
            best, worst = (
                [_row(images, found[judged[n]], scores.cider[n]) for n in shown]
                for shown in (first, rest)
            )
        source = re.sub(r"[^\w.\-]", "_", images.name)
        name = self.results or f"captions_{images.split}_{source}_results.json"
        return Outcome(
            scores.metrics,
            counts,
            files={name: [_result(image) for image in found]},
            best=best,
            worst=worst,
            skipped=skipped,
            text=text,
            notes=scores.notes,
            digits=4,
        )


def official_id(image_id: Any) -> Any:
    """The number that COCO's server knows an image by, where lists have its path instead.

    Args:
        image_id: any JSON value; all but paths and names of COCO's files stay as they are.
    """
    if isinstance(image_id, str):
        named = re.fullmatch(r"(?:.*/)?COCO_[a-z]+\d{4}_(\d{12})(?:\.\w+)?|coco_(\d+)", image_id)
        if named:
            return int(named[1] or named[2])
    return image_id


def _by_image(parts: list[dict[str, Any]]) -> tuple[list[Captioned], int, int]:
    """The images in order, how many samples repeat one, and references that were left out.

    Of samples of one image the first counts, with what people said of any of them.
    """
    found: dict[int, Captioned] = {}
    samples = oversized = 0
    for part in parts:
        columns = zip(
            part["items"], part["ids"], part["keys"], part["extras"], part["captions"], strict=True
        )
        for item, known_by, key, extra, caption in columns:
            samples += 1
            references = [text for text in extra["captions"] if len(text) <= MAX_REFERENCE]
            oversized += len(extra["captions"]) - len(references)
            image = found.get(known_by)
            if image is None:
                image_id, domain = extra.get("image_id"), extra.get("domain")
                found[known_by] = Captioned(
                    item,
                    key if image_id is None else official_id(image_id),
                    caption,
                    references,
                    domain if isinstance(domain, str) and domain else None,
                )
            else:
                image.references += [t for t in references if t not in image.references]
    return list(found.values()), samples - len(found), oversized


def _score(images: list[Captioned]) -> CaptionScores:
    return score_captions(
        [image.caption for image in images],
        [image.references for image in images],
        [image.domain for image in images],
    )


def _result(image: Captioned) -> dict[str, Any]:
    return {"image_id": image.image_id, "caption": image.caption}


def _row(images: EvalStream, image: Captioned, cider: float | None = None) -> Row:
    """A row of the page."""
    notes = {} if cider is None else {"CIDEr": f"{cider:.3f}"}
    notes["image"] = str(image.image_id)
    if image.domain is not None:
        notes["domain"] = image.domain
    return Row(images.picture(image.item), {"model": image.caption}, image.references, notes=notes)
