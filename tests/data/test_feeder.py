"""Proven here: what the feeder adds to batches, when it fetches them, what it says of errors."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from blip2_train.data.feeder import Feeder
from blip2_train.data.shards import ShardError
from blip2_train.distributed import World
from blip2_train.errors import RankError


def batch(*lengths: int, width: int = 12) -> dict:
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": mask.clone(), "attention_mask": mask}


def test_batches_get_the_length_of_their_text():
    batches = [batch(3, 5), batch(8), batch(12), batch(9, width=10)]
    fed = list(Feeder(batches, 4, World()))
    assert [one["text_length"] for one in fed] == [8, 8, 12, 10]
    assert all(one["input_ids"] is own["input_ids"] for one, own in zip(fed, batches, strict=True))


def test_without_a_bucket_batches_pass_as_they_are(monkeypatch):
    def collective(*arguments):
        raise AssertionError("ranks have nothing to agree on")

    monkeypatch.setattr("blip2_train.data.feeder.agree_on_maximum", collective)
    batches = [{"any": 1}, {"any": 2}]
    feeder = Feeder(batches, None, World(rank=1, size=4))
    assert all(one is own for one, own in zip(feeder, batches, strict=True))


def test_one_batch_is_fetched_ahead_and_waiting_is_measured(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("blip2_train.data.feeder.time.perf_counter", lambda: clock[0])
    fetched = []

    def slow():
        for number in range(3):
            clock[0] += 2.0
            fetched.append(number)
            yield {"any": number}

    feeder = Feeder(slow(), None, World())
    seen = []
    for one in feeder:
        clock[0] += 100.0  # the step itself is no waiting
        seen.append((one["any"], len(fetched)))
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert feeder.wait_seconds == 6.0


class Broken(IterableDataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self):
        yield {"any": 1}
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ShardError("a.tar is cut"), OSError(5, "a.tar is cut")])
def test_an_error_of_the_data_is_one_sentence(workers, error):
    loader = DataLoader(Broken(error), batch_size=None, num_workers=workers)
    with pytest.raises(RankError) as caught:
        list(Feeder(loader, None, World()))
    message = str(caught.value)
    assert message.startswith("the data cannot be read: ") and message.endswith("a.tar is cut")
    assert "\n" not in message
