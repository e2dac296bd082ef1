"""From the configuration to the mixture of sources.

Proven: weights of null mix sources by their sizes, given ones by their ratios alone; epochs of each
source are counted from the start of the run, also after it was continued.
"""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from blip2_train.config import plan_batch
from blip2_train.data.stream import TrainStream
from blip2_train.distributed import World
from blip2_train.training.feeding import open_sources, train_stream

SIZES = {"large": 108, "small": 24}


def stream_of(
    shards: Path, large: float | None, small: float | None, drawn: dict[str, int] | None = None
) -> TrainStream:
    """Two sources, text alone: the splits of the rendered scenes."""
    common: dict[str, Any] = {"shards": str(shards), "randaugment": False}
    data = {
        "sources": {
            "large": {"split": "train", "weight": large, **common},
            "small": {"split": "novel", "weight": small, **common},
        },
        "mode": "indexed",
        "locality": 1,
        "on_bad_shard": "error",
        "retry_seconds": 0,
        "cache_dir": None,
        "cache_gb": 1,
        "shuffle_window": 2,
        "caption": "uniform",
        "max_words": 50,
        "prompt": "",
    }
    sources = open_sources(data)
    assert {s.name: sum(info.samples for info in s.shards) for s in sources} == SIZES
    cfg = {"seed": 3, "data": data}
    return train_stream(cfg, plan_batch(12, 1, 1), sources, keys_of, World(), drawn or {}, None)


def keys_of(samples: list[Any], skipped: list[Any]) -> list[str]:
    assert not skipped
    return [sample.key for sample in samples]


@pytest.mark.parametrize(
    ("large", "small", "share"),
    [
        (None, None, 108 / 132),
        (1, 1, 0.5),
        (3, 1, 0.75),
        (0.003, 0.001, 0.75),
        (1, 9, 0.1),
    ],
)
def test_sources_mix_by_size_or_by_ratio(
    shards: Path, large: float | None, small: float | None, share: float
) -> None:
    stream = stream_of(shards, large, small)
    seen = Counter(key.partition("/")[0] for keys in islice(stream, 22) for key in keys)
    assert seen.total() == 264
    assert seen["large"] == pytest.approx(264 * share, abs=1)
    assert stream.drawn_after(22) == dict(seen)
    if large is None:  # by size: an epoch of all is an epoch of each
        assert stream.epochs_after(11) == {"large": 1, "small": 1}


def test_epochs_are_counted_from_the_start_of_the_run(shards: Path) -> None:
    whole = stream_of(shards, 1, 9)
    rest = stream_of(shards, 1, 9, drawn=whole.drawn_after(10))
    for step in (0, 1, 7):
        assert rest.epochs_after(step) == whole.epochs_after(10 + step)
    assert rest.epochs_after(30)["small"] == pytest.approx(0.9 * 40 * 12 / 24, abs=1 / 24)
    following = list(islice(whole, 13))[10:]
    assert list(islice(rest, 3)) == following
