"""Proven here, over real tars and with real loader workers:

- the sequence of global batches (keys, texts, pixels, what was skipped) does not depend on ranks
  and workers, with bad samples, two sources, and others from some batch on
- it continues after any number of micro-batches, with other ranks and workers, from the counts
- it is the order of `order.py`: each epoch every sample once, sources by weight, a tiny one
  exactly beside a large one
- a caption is drawn uniformly, by the sample's own weights, or is the first
- each sample carries all its captions and a random number of its own
- without transforms no image is decoded
- unusable samples are replaced by the next usable one in stored order, everywhere alike, and named
- I/O errors are retried, then stop the run; they never replace a sample
- with `on_bad_shard="skip"` samples of the next shard stand in for those of a bad one
- with `locality` all of this holds too, and each part has samples of its own
- evaluation gives every image with all its captions in stored order, and fields of its json; of
  images without captions, too, where that is asked for
"""

import io
import itertools
import logging
import pickle
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import LAYOUTS
from torch.utils.data import DataLoader

from blip2_train.data import retries
from blip2_train.data.batch import EvalSample, collate, collate_eval, sample_id
from blip2_train.data.images import load_rgb
from blip2_train.data.index import write_index
from blip2_train.data.pool import Reading, ShardPool
from blip2_train.data.shards import ShardError, ShardReader, write_shard
from blip2_train.data.source import open_source
from blip2_train.data.stream import EvalStream, TrainStream
from blip2_train.data.text import load_text_tokenizer
from blip2_train.data.transforms import EvalTransform, TrainTransform, flip_images
from blip2_train.errors import UserError
from blip2_train.seeding import stable_hash

C = 12  # contrastive batch: divides by 1, 2 and 3 ranks
T = 8


def jpeg(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((25, 20), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def write_source(folder: Path, split: str, sizes: list[int], bad: dict[str, object] | None = None):
    """Shards of tiny pictures; `bad` maps a key to its replaced image bytes or captions."""
    folder.mkdir()
    numbers = itertools.count()
    infos = []
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            n = next(numbers)
            key = f"k{n:03d}"
            broken = (bad or {}).get(key)
            captions = [f"Caption {c} of {folder.name} {n}." for c in range(1 + n % 3)]
            samples.append(
                {
                    "__key__": key,
                    "jpg": broken if isinstance(broken, bytes) else jpeg(n),
                    "json": {
                        "image_id": n // 2,
                        "captions": broken if isinstance(broken, list) else captions,
                    },
                }
            )
        infos.append(write_shard(folder / f"{split}-{shard:06d}.tar", samples))
    write_index(folder, infos)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "caption", "of", "one", "two"]
    words += [str(n) for n in range(70)]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n")
    return load_text_tokenizer(folder / "tokenizer")


BAD = {
    "k003": b"not an image",
    "k004": jpeg(4)[:200],
    "k010": ["!!!", " . "],
    "k018": [],
}


@pytest.fixture(scope="module")
def sources(folder):
    write_source(folder / "one", "train", [7, 5, 7, 0, 6], BAD)
    write_source(folder / "two", "train", [4, 6])
    return [
        open_source("one", folder / "one", "train", 0.7),
        open_source("two", folder / "two", "train", 0.3),
    ]


@pytest.fixture(scope="module")
def make(sources, tokenizer):
    """Build a stream over both sources, with anything changed."""

    def build(transform=None, **changes) -> TrainStream:
        used = [source.name for source in changes.get("sources", sources)]
        arguments = {
            "sources": sources,
            "transforms": dict.fromkeys(used, transform or TrainTransform(8)),
            "collate": partial(collate, tokenizer=tokenizer, max_text_tokens=T),
            "contrastive_batch": C,
            "seed": 5,
            "shuffle_window": 2,
            "reading": Reading(max_open_shards=2),
        }
        return TrainStream(**(arguments | changes))

    return build


def batches(stream: TrainStream, count: int, workers: int = 0) -> list[dict]:
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    return list(itertools.islice(loader, count))


def of_all_ranks(make, count: int, world: int, workers: int, **changes) -> list[tuple[dict, ...]]:
    """What the ranks train on together, step by step."""
    ranks = [
        batches(make(rank=rank, world=world, **changes), count, workers) for rank in range(world)
    ]
    return list(zip(*ranks, strict=True))


def global_batches(make, count: int, world: int, workers: int, **changes) -> list[list[tuple]]:
    """Contrastive batches put together from all ranks: (key, text, ids, id, pixels) per sample."""
    steps = of_all_ranks(make, count, world, workers, **changes)
    return [[row for batch in parts for row in rows(batch)] for parts in steps]


def with_skips(steps: list[tuple[dict, ...]]) -> list[tuple[list[tuple], list[dict]]]:
    """Each global batch, and what was skipped for it."""
    return [
        (
            [row for batch in parts for row in rows(batch)],
            [skip for batch in parts for skip in batch["skipped"]],
        )
        for parts in steps
    ]


def rows(batch: dict) -> list[tuple]:
    return list(
        zip(
            batch["keys"],
            batch["text"],
            map(tuple, batch["input_ids"].tolist()),
            batch["image_id"].tolist(),
            [image.numpy().tobytes() for image in flip_images(batch["image"], batch["flip"])],
            strict=True,
        )
    )


@pytest.fixture(scope="module")
def expected(make):
    return global_batches(make, 9, world=1, workers=0)


@pytest.fixture(scope="module")
def long_run(make):
    """Fifty batches of 24: both sources some 35 times over."""
    return with_skips(of_all_ranks(make, 50, 1, 0, contrastive_batch=24))


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_ranks_and_workers_do_not_change_what_is_seen(make, long_run, layout):
    assert len({key for batch, _ in long_run for key, *_ in batch}) == 31
    assert sum(len(skipped) for _, skipped in long_run) > 100
    assert with_skips(of_all_ranks(make, 50, *layout, contrastive_batch=24)) == long_run


@pytest.mark.parametrize(
    ("start", "layout"), zip((1, 4, 5, 7, 8, 24, 25, 45), LAYOUTS, strict=True), ids=str
)
def test_it_continues_anywhere_with_other_ranks_and_workers(make, long_run, start, layout):
    """The run before had one rank and no worker; the counts alone say where it was."""
    drawn = make(contrastive_batch=24).drawn_after(start)
    resumed = of_all_ranks(make, 5, *layout, contrastive_batch=24, drawn=drawn)
    assert with_skips(resumed) == long_run[start : start + 5]


def test_it_continues_with_another_batch_size(make, expected):
    flat = [row for batch in expected for row in batch]
    resumed = global_batches(make, 10, 2, 0, drawn=make().drawn_after(3), contrastive_batch=6)
    assert [row for batch in resumed for row in batch] == flat[3 * C : 3 * C + 60]


def test_iterating_again_starts_again(make):
    stream = make()
    first, again = (rows(next(iter(stream))) for _ in range(2))
    assert first == again


def test_counts_are_those_of_the_samples_drawn(make):
    stream = make()
    after = Counter()
    for step, batch in enumerate(batches(stream, 5), start=1):
        after.update(key.partition("/")[0] for key in batch["keys"])
        assert stream.drawn_after(step) == dict(after)
        assert stream.epochs_after(step) == {"one": after["one"] / 25, "two": after["two"] / 10}
    assert abs(after["one"] / (5 * C) - 0.7) < 0.02


def test_each_epoch_holds_each_good_sample_once(sources, make):
    stream = make(sources=sources[1:])  # 10 samples
    keys = [key for batch in batches(stream, 5) for key in batch["keys"]]
    epochs = [keys[i : i + 10] for i in range(0, 60, 10)]
    assert {len(set(epoch)) for epoch in epochs} == {10}
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_tiny_source_beside_a_large_one_is_gone_through_exactly(folder, sources, make):
    write_source(folder / "tiny", "train", [2, 0, 1])
    tiny = open_source("tiny", folder / "tiny", "train", 0.9)
    large = open_source("one", folder / "one", "train", 0.1)
    stream = make(sources=[tiny, large])
    keys = [key for batch in batches(stream, 30) for key in batch["keys"]]
    drawn = [key for key in keys if key.startswith("tiny/")]
    assert len(drawn) == stream.drawn_after(30)["tiny"] == 0.9 * 30 * C
    epochs = [drawn[i : i + 3] for i in range(0, len(drawn), 3)]
    assert len(epochs) == stream.epochs_after(30)["tiny"] == 108
    assert {len(set(epoch)) for epoch in epochs} == {3}
    assert stream.epochs_after(30)["one"] == 36 / 25


def test_a_sample_is_seen_differently_in_each_epoch_and_with_each_seed(sources, make):
    def views(seed: int) -> dict[str, set[bytes]]:
        seen: dict[str, set[bytes]] = {}
        for batch in batches(make(sources=sources[1:], seed=seed), 5):
            for row in rows(batch):
                seen.setdefault(row[0], set()).add(row[-1])
        return seen

    first, other = views(1), views(2)
    assert all(len(pictures) >= 4 for pictures in first.values())  # five epochs or six
    assert all(not (first[key] & other[key]) for key in first)


def test_each_sample_of_each_epoch_has_its_own_randomness(make):
    """Two sources here share names of shards and keys; an epoch of `two` is 10 samples."""
    seeds: dict[tuple[str, int], set[int]] = {}
    stream = make(transform=seed_as_image)
    place = Counter()
    for batch in batches(stream, 10):
        for key, image in zip(batch["keys"], batch["image"], strict=True):
            source = key.partition("/")[0]
            epoch = place[source] // {"one": 25, "two": 10}[source]
            place[source] += 1
            seeds.setdefault((key, epoch), set()).add(image.item())
    assert all(len(values) == 1 for values in seeds.values())
    assert len(set().union(*seeds.values())) == len(seeds) > 60


def test_samples_of_one_key_in_two_shards_have_their_own_randomness(folder, make):
    infos = []
    (folder / "echo").mkdir()
    for name in ("train-000000.tar", "train-000001.tar"):
        sample = {"__key__": "same", "jpg": jpeg(0), "json": {"captions": ["Caption one."]}}
        infos.append(write_shard(folder / "echo" / name, [sample]))
    write_index(folder / "echo", infos)
    source = open_source("echo", folder / "echo", "train")
    stream = make(sources=[source], transform=seed_as_image, contrastive_batch=2)
    batch = batches(stream, 1)[0]
    assert len(set(batch["keys"])) == len(set(batch["image"].tolist())) == 2
    assert len(set(batch["image_id"].tolist())) == 2  # no image_id: two images


def seed_as_image(data: bytes, generator: torch.Generator) -> tuple[torch.Tensor, bool]:
    seed = generator.initial_seed()
    load_rgb(data)
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed), False


def test_captions_are_drawn_evenly_and_cleaned(sources, make):
    texts = Counter(
        row[1]
        for batch in batches(make(sources=sources[1:]), 150)
        for row in rows(batch)
        if row[0].endswith("k005")
    )
    assert set(texts) == {f"caption {c} of two 5" for c in range(3)}
    assert min(texts.values()) > 180 / 3 - 5 * (180 * 2 / 9) ** 0.5


def test_the_first_caption_and_a_prompt(sources, make):
    stream = make(sources=sources[1:], caption="first", prompt="one ", max_words=3)
    for row in rows(batches(stream, 1)[0]):
        assert row[1] == "one caption 0 of"


def test_captions_are_drawn_by_their_weights(tmp_path, make):
    """As CapFilt ranks many, of which the best two count; a blank one takes its weight along."""
    folder = tmp_path / "ranked"
    folder.mkdir()
    captions = ["one", " ", "two", "one of two", "!"]
    weights = {"a": [1, 9, 3, 0, 9], "b": [0, 1, 0, 0, 1], "c": None}
    samples = [
        {
            "__key__": key,
            "jpg": jpeg(0),
            "json": {"captions": captions}
            | ({"caption_weights": given} if given is not None else {}),
        }
        for key, given in weights.items()
    ]
    write_index(folder, [write_shard(folder / "train-000000.tar", samples)])
    source = open_source("ranked", folder, "train")
    drawn = {key: Counter() for key in weights}
    for batch in batches(make(sources=[source], collate=as_list, caption="weighted"), 200):
        for sample in batch["samples"]:
            drawn[sample.key[-1]][sample.captions[0]] += 1
    share = {
        key: {c: n / counts.total() for c, n in counts.items()} for key, counts in drawn.items()
    }
    assert share["a"].keys() == {"one", "two"} and share["a"]["two"] == pytest.approx(
        0.75, abs=0.05
    )
    for key in "bc":  # no weight is left, or there never was one: each of the three alike
        assert list(share[key].values()) == pytest.approx([1 / 3] * 3, abs=0.06)


def test_pixels_and_ids_are_those_of_the_key(folder, sources, make):
    """Against the shard itself: nothing is attached to the wrong key."""
    batch = batches(make(sources=sources[1:], transform=plain_resize), 1)[0]
    for key, _, _, image_id, pixels in rows(batch):
        source, shard, name = key.split("/")
        n = int(name[1:])
        image = Image.open(io.BytesIO(jpeg(n))).convert("RGB")
        assert pixels == EvalTransform(8)(image).numpy().tobytes()
        assert image_id == sample_id(source, shard, name, n // 2)


def test_each_source_has_its_own_transform(make):
    batch = batches(make(transforms={"one": black, "two": white}), 1)[0]
    expected = [int(key.startswith("two/")) for key in batch["keys"]]
    assert batch["image"].tolist() == batch["flip"].int().tolist() == expected
    assert set(expected) == {0, 1}


def black(data: bytes, generator: torch.Generator) -> tuple[torch.Tensor, bool]:
    return torch.tensor(0), False


def white(data: bytes, generator: torch.Generator) -> tuple[torch.Tensor, bool]:
    return torch.tensor(1), True


def plain_resize(data: bytes, generator: torch.Generator) -> tuple[torch.Tensor, bool]:
    return EvalTransform(8)(load_rgb(data)), False


# What a sample carries.


def as_list(samples, skipped):
    return {"samples": samples, "keys": [sample.key for sample in samples], "skipped": skipped}


def test_a_sample_has_all_captions_beginning_with_the_chosen_one(sources, make):
    firsts = set()
    for batch in batches(make(sources=sources[1:], collate=as_list, prompt="one "), 5):
        for sample in batch["samples"]:
            n = int(sample.key[-3:])
            stored = [f"caption {c} of two {n}" for c in range(1 + n % 3)]
            choice = stored.index(sample.captions[0])
            assert sample.captions == stored[choice:] + stored[:choice]
            assert sample.text == "one " + sample.captions[0]
            firsts.add((n, choice))
    assert len(firsts) > 14  # of 19


def test_its_number_is_drawn_after_caption_and_crop(sources, make):
    """So that runs from before there was this number see the same captions and crops."""
    found = []
    for sample in batches(make(sources=sources[1:], collate=as_list), 1)[0]["samples"][:10]:
        source, shard, key = sample.key.split("/")
        generator = torch.Generator()
        generator.manual_seed(stable_hash(5, 0, source, shard, key))
        choice = int(torch.randint(1 + int(key[1:]) % 3, (1,), generator=generator))
        assert sample.captions[0].startswith(f"caption {choice} ")
        pixels, flip = TrainTransform(8)(jpeg(int(key[1:])), generator)
        assert torch.equal(sample.image, pixels) and sample.flip == flip
        assert sample.uniform == torch.rand(1, generator=generator).item()
        found.append(sample.uniform)
    assert len(set(found)) == len(found) == 10 and 0 <= min(found) < max(found) < 1


def test_without_transforms_no_image_is_decoded(sources, make, monkeypatch):
    def opened(*arguments, **options):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", opened)
    stream = make(sources=sources[:1], transforms={"one": None}, collate=as_list)
    found = batches(stream, 5)
    images = [sample.image for batch in found for sample in batch["samples"]]
    assert {(image.shape, image.dtype) for image in images} == {((0,), torch.uint8)}
    keys = {key[-4:] for batch in found for key in batch["keys"]}
    assert {"k003", "k004"} <= keys  # whose images are broken
    skipped = {skip["key"] for batch in found for skip in batch["skipped"]}
    assert skipped == {"k010", "k018"}  # whose captions are


def test_one_source_may_be_text_alone(make):
    transforms = {"one": None, "two": TrainTransform(8)}
    for sample in batches(make(transforms=transforms, collate=as_list), 1)[0]["samples"]:
        assert sample.image.shape == ((0,) if sample.key.startswith("one/") else (3, 8, 8))


# Samples that cannot be used.


def test_a_bad_sample_is_replaced_by_the_next_good_one_in_stored_order(sources, make):
    stream = make(sources=sources[:1])
    order = stream._orders["one"]
    sizes = [info.samples for info in sources[0].shards]
    first = [sum(sizes[:shard]) for shard in range(len(sizes))]
    keys = [key for batch in batches(stream, 7) for key in batch["keys"]]
    replaced = 0
    for n, key in enumerate(keys):
        _, shard, index = order.locate(0, n)
        wanted = first[shard] + index
        while f"k{wanted:03d}" in BAD:
            wanted = first[shard] + (wanted - first[shard] + 1) % sizes[shard]
            replaced += 1
        assert key == f"one/{sources[0].shards[shard].name}/k{wanted:03d}"
    assert replaced >= 4
    # k018 is the last of its shard: its stand-in is the first one, k012.
    assert Counter(key[-4:] for key in keys)["k012"] > 84 / 25


def test_every_skip_is_reported_once_per_draw(sources, make):
    reports = [
        skip for batch in batches(make(sources=sources[:1]), 25) for skip in batch["skipped"]
    ]
    assert {report["key"] for report in reports} == set(BAD)
    reasons = {report["key"]: report["reason"] for report in reports}
    assert "not a readable image" in reasons["k003"]
    assert "undecodable" in reasons["k004"]
    assert reasons["k010"] == "no caption is left after cleaning"
    assert "no captions" in reasons["k018"]
    assert {report["shard"] for report in reports if report["key"] == "k003"} == {
        "one/train-000000.tar"
    }
    # Twelve epochs: k004 is met when it is drawn and when it follows k003.
    counts = Counter(report["key"] for report in reports)
    assert counts == {"k003": 12, "k004": 24, "k010": 12, "k018": 12}


def test_a_shard_without_a_good_sample_is_an_error(folder, make):
    bad = {f"k{n:03d}": b"x" for n in range(3)}
    write_source(folder / "rotten", "train", [3], bad)
    stream = make(sources=[open_source("rotten", folder / "rotten", "train")])
    with pytest.raises(ShardError, match=r"none of its 3 samples .*not a readable image"):
        next(iter(stream))


def test_a_cut_shard_is_an_error_not_a_replacement(folder, make):
    write_source(folder / "cut", "train", [4])
    source = open_source("cut", folder / "cut", "train")
    path = folder / "cut" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(ShardError, match="bytes"):
        next(iter(make(sources=[source])))


def test_errors_of_a_worker_reach_the_main_process(folder, make):
    bad = {f"k{n:03d}": b"x" for n in range(3)}
    write_source(folder / "rotten2", "train", [3], bad)
    stream = make(sources=[open_source("rotten2", folder / "rotten2", "train")])
    loader = iter(DataLoader(stream, batch_size=None, num_workers=1))
    with pytest.raises(ShardError, match="none of its 3 samples"):
        next(loader)
    loader._shutdown_workers()  # the caught exception keeps it alive, and later it takes 5 s


class Flaky:
    """Makes `ShardReader.read` fail with an I/O error a number of times."""

    def __init__(self, monkeypatch, failures: int) -> None:
        self.left, self.pauses, self.closed = failures, [], 0
        read, close = ShardReader.read, ShardReader.close

        def flaky_read(reader, i):
            if self.left:
                self.left -= 1
                raise OSError(116, "Stale file handle")
            return read(reader, i)

        def counted_close(reader):
            self.closed += 1
            close(reader)

        monkeypatch.setattr(ShardReader, "read", flaky_read)
        monkeypatch.setattr(ShardReader, "close", counted_close)
        monkeypatch.setattr(retries.time, "sleep", self.pauses.append)


def test_an_io_error_is_retried_with_a_fresh_file(make, expected, monkeypatch, caplog):
    flaky = Flaky(monkeypatch, failures=3)
    with caplog.at_level(logging.WARNING):
        batch = next(iter(make(reading=Reading(max_open_shards=99))))
    assert rows(batch) == expected[0]
    assert len(flaky.pauses) == 3
    assert flaky.closed == 3
    assert "Stale file handle" in caplog.text


def test_an_io_error_that_stays_stops_the_run(make, monkeypatch):
    flaky = Flaky(monkeypatch, failures=10_000)
    with pytest.raises(OSError, match="Stale file handle"):
        next(iter(make(reading=Reading(retry_seconds=60))))
    assert 30 <= sum(flaky.pauses) <= 90  # half as many or more, by chance


def test_pauses_double_up_to_a_bound_and_last_as_long_as_asked():
    assert list(retries.pauses(100)) == [1, 2, 4, 8, 16, 30, 30, 9]
    assert list(retries.pauses(0)) == []


def test_few_shards_are_open_at_a_time(sources, monkeypatch):
    pool, open_now, closed = ShardPool(Reading(max_open_shards=2)), [], []
    close = ShardReader.close
    monkeypatch.setattr(
        ShardReader, "close", lambda reader: (closed.append(reader.info.name), close(reader))
    )
    for shard in (0, 1, 0, 2, 0, 1):
        pool.read(sources[0].shards[shard], 0)
        open_now.append(len(pool._readers))
    assert max(open_now) == 2
    # The one used longest ago goes: 1 for 2, then 2 for 1.
    assert closed == ["train-000001.tar", "train-000002.tar"]


def test_a_stream_opens_nothing_before_it_is_iterated_and_pickles(make, expected):
    stream = make()
    assert not stream._pool._readers
    copy = pickle.loads(pickle.dumps(stream))
    assert rows(next(iter(copy))) == expected[0]


# Shards that cannot be read, and parts of the order.


def test_a_bad_shard_may_be_skipped(folder, make):
    sizes = [5, 4, 6]
    write_source(folder / "holes", "train", sizes)
    source = open_source("holes", folder / "holes", "train")
    whole = [row for batch in batches(make(sources=[source]), 5) for row in rows(batch)]
    (folder / "holes" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"'train-000001\.tar' is missing"):
        open_source("holes", folder / "holes", "train")
    source = open_source("holes", folder / "holes", "train", bad_shards=True)
    with pytest.raises(ShardError, match=r"train-000001\.tar does not exist"):
        batches(make(sources=[source]), 5)

    reading = Reading(on_bad_shard="skip")
    found = batches(make(sources=[source], reading=reading), 5)
    rest = [row for batch in found for row in rows(batch)]
    skips = [skip for batch in found for skip in batch["skipped"]]
    lost = [n for n, row in enumerate(whole) if "/train-000001.tar/" in row[0]]
    assert lost and len(skips) == len(lost)
    assert {skip["shard"] for skip in skips} == {"holes/train-000001.tar"}
    assert all("does not exist" in skip["reason"] for skip in skips)
    for n, (before, after) in enumerate(zip(whole, rest, strict=True)):
        if n not in lost:
            assert before == after, "the order of the others changed"
            continue
        # the sample of the same number, of the next shard
        number = int(before[0][-3:]) - sizes[0]
        assert after[0].endswith(f"train-000002.tar/k{sum(sizes[:2]) + number:03d}")


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("locality", [2, 3, 6])
def test_with_parts_too_ranks_and_workers_do_not_change_what_is_seen(make, locality, world):
    expected = global_batches(make, 6, world=1, workers=0, locality=locality)
    assert global_batches(make, 6, world, world % 3, locality=locality) == expected
    drawn = make(locality=locality).drawn_after(2)
    assert sum(drawn.values()) == 2 * C
    again = global_batches(make, 4, world, 0, locality=locality, drawn=drawn)
    assert again == expected[2:]
    longer = make(locality=locality, drawn=drawn, contrastive_batch=2 * C)
    counts = longer.drawn_after(2)
    assert counts == make(locality=locality).drawn_after(6)


def test_a_part_goes_through_its_own_samples_alone(folder, make):
    write_source(folder / "parted", "train", [5, 4, 3, 4, 6, 2])
    source = open_source("parted", folder / "parted", "train")
    found = global_batches(make, 12, 1, 0, sources=[source], locality=3)
    seen = []
    for part in range(3):
        keys = [row[0] for batch in found for row in batch[4 * part : 4 * part + 4]]
        assert len(keys) == 48 and len(set(keys)) == 8
        for epoch in range(6):
            assert len(set(keys[8 * epoch : 8 * epoch + 8])) == 8
        seen += sorted(set(keys))
    assert len(set(seen)) == 24, "the parts overlap"


# What the user can get wrong.


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"contrastive_batch": 10, "world": 3}, r"10 samples .* multiple of 3"),
        ({"contrastive_batch": 0}, "0 samples"),
        ({"caption": "best"}, "data.caption='best'"),
        ({"locality": 5}, r"12 samples is not divisible by data.locality=5"),
        ({"locality": 12, "contrastive_batch": 24}, r"10 samples .* data.locality=12"),
        ({"drawn": {"one": 3, "gone": 4}}, "drawn from gone"),
    ],
)
def test_a_wrong_setting_is_named(make, changes, named):
    with pytest.raises(UserError, match=named):
        make(**changes)


def test_a_missing_folder_split_or_index_is_named(folder, sources, tmp_path):
    with pytest.raises(UserError, match=r"data\.sources\.coco\.shards=.*nowhere.*\bone\b.*two"):
        open_source("coco", folder / "nowhere", "train")
    with pytest.raises(UserError, match=r"data\.sources\.coco\.shards=.*index\.json"):
        open_source("coco", tmp_path, "train")
    with pytest.raises(UserError, match=r"split 'test'; its splits are train"):
        open_source("coco", folder / "one", "test")


# Evaluation.


def test_evaluation_gives_every_image_with_all_captions_in_stored_order(sources, tokenizer):
    data = EvalStream(sources[0], EvalTransform(8), prompt="one ")
    assert len(data) == 25
    loader = DataLoader(
        data,
        batch_size=4,
        num_workers=2,
        collate_fn=partial(collate_eval, tokenizer=tokenizer, max_text_tokens=T),
    )
    keys, captions, skipped = [], [], []
    for batch in loader:
        keys += batch["keys"]
        skipped += [skip["key"] for skip in batch["skipped"]]
        for text, row in zip(batch["text"], batch["caption_image"].tolist(), strict=True):
            captions.append((batch["keys"][row][-4:], text))
    good = [n for n in range(25) if f"k{n:03d}" not in BAD]
    assert [key.rpartition("/")[2] for key in keys] == [f"k{n:03d}" for n in good]
    assert skipped == list(BAD)
    assert captions == [
        (f"k{n:03d}", f"one caption {c} of one {n}") for n in good for c in range(1 + n % 3)
    ]


def test_evaluation_ids_join_samples_of_one_image(sources):
    data = EvalStream(sources[1], EvalTransform(8))
    items = [data[i] for i in range(len(data))]
    assert all(isinstance(item, EvalSample) for item in items)
    assert [item.image_id for item in items] == [
        sample_id("two", "any", "any", n // 2) for n in range(10)
    ]


def test_evaluation_brings_fields_of_the_json_along(sources):
    data = EvalStream(sources[0], None, extra=("image_id", "captions", "label"))
    item = data[10 + 1]
    assert item.extra == {"image_id": 5, "captions": [f"Caption {c} of one 11." for c in range(3)]}
    assert EvalStream(sources[0], None)[11].extra == {}


def test_evaluation_of_images_without_captions(sources):
    data = EvalStream(sources[0], None, reading=Reading(need_captions=False), extra=("captions",))
    # its captions are marks that cleaning takes away; it has none at all
    assert [(data[n].captions, data[n].extra) for n in (10, 18)] == [
        ([], {"captions": ["!!!", " . "]}), ([], {"captions": []}),
    ]  # fmt: skip
    assert len(data[11].captions) == 3
    moved = pickle.loads(pickle.dumps(ShardReader("x.tar", sources[0].shards[0], None, False)))
    assert moved._need_captions is False


def test_evaluation_without_a_transform_decodes_no_image(sources):
    data = EvalStream(sources[0], None)
    items = [data[i] for i in range(len(data))]
    usable = [item for item in items if isinstance(item, EvalSample)]
    assert len(usable) == 23
    assert {(item.image.shape, item.image.dtype) for item in usable} == {((0,), torch.uint8)}


@pytest.mark.parametrize(
    ("limit", "numbers"), [(4, [0, 2, 5, 7]), (10, range(10)), (99, range(10))]
)
def test_an_evaluation_subset_is_evenly_spaced(sources, limit, numbers):
    data = EvalStream(sources[1], EvalTransform(8), max_images=limit)
    assert [data[i].item for i in range(len(data))] == list(range(len(data)))
    assert [data[i].key[-4:] for i in range(len(data))] == [f"k{n:03d}" for n in numbers]
    with pytest.raises(IndexError):
        data[len(data)]


def test_an_empty_evaluation_subset_is_refused(sources):
    with pytest.raises(UserError, match="max_images=0"):
        EvalStream(sources[1], EvalTransform(8), max_images=0)
