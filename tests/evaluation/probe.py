"""A task for tests of `blip2-evaluate` itself: how long captions are."""

import os
import time
from pathlib import Path

from blip2_train.data.batch import EvalSample
from blip2_train.errors import UserError
from blip2_train.evaluation.samples import Row
from blip2_train.evaluation.task import Outcome, Task


class Probe(Task):
    """Mean number of characters; writes a line of `log` for each batch."""

    extra = ("image_id", "source", "nothing")

    def __init__(self, log: str, fail: str = "") -> None:
        self.log = Path(log)
        self.seconds = float(os.environ.get("PROBE_SECONDS", "0"))
        self.fail = fail

    def check(self, blip2):
        blip2.needs("stage1", "clip")

    def run(self, blip2, images, work):
        def measure(items):
            if self.fail:
                raise UserError(self.fail)
            time.sleep(self.seconds)
            with self.log.open("a") as file:
                file.write(" ".join(item.key for item in items) + "\n")
            lengths = [len(i.captions[0]) for i in items if isinstance(i, EvalSample)]
            assert all("nothing" not in i.extra and "image_id" in i.extra for i in items)
            features = blip2.encode_text([i.captions[0] for i in items])
            return {"lengths": lengths, "features": features}

        parts = work.map("lengths", images, self.batch_size, measure)
        lengths = [length for part in parts for length in part["lengths"]]
        norms = [part["features"].norm(dim=1).mean().item() for part in parts]
        rows = [Row(images.picture(0), {"says": "a <b>"}, [], notes={"länge": "3"})]
        return Outcome(
            {"length": sum(lengths) / len(lengths), "norm": sum(norms) / len(norms)},
            {"images": len(lengths)},
            files={"answers.json": [{"id": 1, "text": "ä"}]},
            best=rows if self.samples else [],
            text="Ünlike",
        )
