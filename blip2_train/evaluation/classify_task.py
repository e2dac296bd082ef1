"""`task=classify`: zero-shot classification by the similarity of images to prompts."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from blip2_train.data.batch import EvalSample
from blip2_train.data.stream import EvalStream
from blip2_train.errors import UserError
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.samples import Row
from blip2_train.evaluation.task import Outcome, Task
from blip2_train.evaluation.work import Work

BATCH_OF_CLASSES = 16
SHOWN = 3  # best classes of an image on the page


class ClassifyTask(Task):
    """Accuracy of the best class, and of the best five.

    A class is the normalised mean, over templates, of the normalised features of its prompts; an
    image's score for it is the best of its queries'. Ties count against us.

    Args:
        classes: names, or a JSON or YAML file with a list of them, or a text file with one a line.
        templates: prompts with {} where the name stands, or such a file.
        label: field of the samples' json with the number of the right class or its name.

    Raises:
        UserError: these are no lists of texts, a name is there twice, or a template lacks its {}.
    """

    need_captions = False

    def __init__(
        self,
        classes: Sequence[str] | str,
        templates: Sequence[str] | str = ("a photo of a {}",),
        label: str = "label",
    ) -> None:
        self.classes = texts_of("task.classes", classes)
        self.templates = texts_of("task.templates", templates)
        if not isinstance(label, str) or not label:
            raise UserError(f"task.label={label} must be the name of a field")
        self.extra = (label,)
        self.numbers: dict[str, int] = {}
        for number, name in enumerate(self.classes):
            if name in self.numbers:
                raise UserError(f"task.classes has {name!r} twice; give each class its own name")
            self.numbers[name] = number
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(f"task.templates: {template!r} must have {{}} once, for the name")

    def identity(self) -> dict[str, Any]:
        """Classes and templates, which may stand in files."""
        content = json.dumps([self.classes, self.templates])
        return {"classes and templates": hashlib.sha256(content.encode()).hexdigest()}

    def check(self, blip2: Blip2) -> None:
        """Refuses a model that was not trained by contrast."""
        blip2.needs("stage1", "clip", loss="itc")

    def run(self, blip2: Blip2, images: EvalStream, work: Work) -> Outcome:
        """Evaluates; all ranks call it."""
        class_feat = self.class_features(blip2, work)  # [K, E]

        def classify(items: list[Any]) -> dict[str, Any]:
            skipped, samples, labels = [], [], []
            for item in items:
                if not isinstance(item, EvalSample):
                    skipped.append(dict(item))
                    continue
                found = self.label_of(item)
                if isinstance(found, int):
                    samples.append(item)
                    labels.append(found)
                else:
                    source, shard, key = item.key.split("/", 2)
                    skipped.append({"shard": f"{source}/{shard}", "key": key, "reason": found})
            if not samples:
                return {"items": [], "skipped": skipped}
            feats = blip2.encode_image(torch.stack([sample.image for sample in samples]))
            scores = (feats @ class_feat.T).amax(dim=1)
            rank, margin = ranks_of(scores, torch.tensor(labels))
            best = scores.topk(min(SHOWN, len(self.classes)), dim=1).indices
            return {
                "items": [sample.item for sample in samples],
                "skipped": skipped,
                "label": labels,
                "rank": rank.tolist(),
                "margin": margin.tolist(),
                "best": best.tolist(),
            }

        parts = work.map("images", images, self.batch_size, classify)
        skipped = [line for part in parts for line in part["skipped"]]
        used = [part for part in parts if part["items"]]
        if not used:
            reason = f", the first because of: {skipped[0]['reason']}" if skipped else ""
            raise UserError(f"none of the {len(images)} images can be used{reason}")
        found = {
            key: [value for part in used for value in part[key]]
            for key in ("items", "label", "rank", "margin", "best")
        }
        rank, label = torch.tensor(found["rank"]), torch.tensor(found["label"])
        best, worst = self._rows(found, images, work)
        return Outcome(
            accuracies(rank, label),
            {
                "images": len(rank),
                "classes": len(self.classes),
                "classes with images": len(label.unique()),
                "templates": len(self.templates),
                "skipped": len(skipped),
            },
            best=best,
            worst=worst,
            skipped=skipped,
            text="The best classes of each image, the right one in green. The margin is how far "
            "the right one lies above the best wrong one.",
        )

    def class_features(self, blip2: Blip2, work: Work) -> Tensor:
        """[K, E] of all classes, L2-normalised; all ranks call it."""

        def encode(names: list[str]) -> Tensor:
            prompts = [
                template.replace("{}", name) for name in names for template in self.templates
            ]
            feats = blip2.encode_text(prompts).view(len(names), len(self.templates), -1)
            return F.normalize(feats.mean(dim=1), dim=-1)

        return torch.cat(work.map("classes", self.classes, BATCH_OF_CLASSES, encode))

    def label_of(self, sample: EvalSample) -> int | str:
        """The number of the right class, or why there is none."""
        field = self.extra[0]
        if field not in sample.extra:
            return f"its json has no {field!r}"
        label = sample.extra[field]
        if type(label) is int and 0 <= label < len(self.classes):  # true and false are no numbers
            return label
        if isinstance(label, str) and label in self.numbers:
            return self.numbers[label]
        return f"its {field} {label!r} is none of the {len(self.classes)} classes"[:200]

    def _rows(
        self, found: dict[str, Any], images: EvalStream, work: Work
    ) -> tuple[list[Row], list[Row]]:
        if work.world.rank != 0 or not self.samples:
            return [], []
        margins = torch.tensor(found["margin"]).nan_to_num(nan=-torch.inf)
        order = margins.argsort(descending=True, stable=True).tolist()
        best = order[: self.samples]
        worst = order[len(best) :][::-1][: self.samples]

        def row(n: int) -> Row:
            label = found["label"][n]
            return Row(
                images.picture(found["items"][n]),
                {},
                [self.classes[label]],
                [(self.classes[k], k == label) for k in found["best"][n]],
                notes={"margin": f"{found['margin'][n]:.3f}"},
            )

        return [row(n) for n in best], [row(n) for n in worst]


def texts_of(key: str, given: Any) -> list[str]:
    """A list of texts, also from a file.

    Raises:
        UserError: it is none, or the file cannot be read.
    """
    place = ""
    if isinstance(given, str):
        place, path = f" ({given})", Path(given)
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix.lower() in (".json", ".yaml", ".yml"):
                given = yaml.safe_load(text)  # JSON is YAML
            else:
                given = [line.strip() for line in text.splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{key}={path} cannot be read: {reason}") from error
    good = isinstance(given, list | tuple) and len(given) > 0
    if not good or not all(isinstance(text, str) and text.strip() for text in given):
        raise UserError(f"{key}{place} must be a list of texts, none of them empty")
    return list(given)


def ranks_of(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of the right class, and how far it lies above the best wrong one.

    Args:
        scores: [B, K].
        labels: int64 [B].

    Returns:
        int64 [B], wrong classes that are not below the right one; [B].
    """
    right = scores.gather(1, labels[:, None])
    wrong = torch.ones_like(scores, dtype=torch.bool).scatter_(1, labels[:, None], False)
    # "not below" instead of "at least": a score that is not a number must count against us, too
    rank = (~(scores < right) & wrong).sum(dim=1)
    return rank, right.squeeze(1) - scores.masked_fill(~wrong, -torch.inf).amax(dim=1)


def accuracies(rank: Tensor, label: Tensor) -> dict[str, float]:
    """`top1`, `top5`, and `top1_per_class`, the mean over classes that have images; percent."""
    right = (rank < 1).double()
    images = label.bincount()
    there = images > 0
    per_class = label.bincount(weights=right)[there] / images[there]
    return {
        "top1": 100.0 * right.mean().item(),
        "top5": 100.0 * (rank < 5).double().mean().item(),
        "top1_per_class": 100.0 * per_class.mean().item(),
    }
