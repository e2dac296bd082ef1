"""Work that survives being killed.

Proven: results come in order, the same on 1, 2 and 3 processes; what is on the disk is not computed
again, whatever the number of processes was; parts that are cut, flipped, of other work or of
another split are; a user's mistake on one rank is raised on all; leftovers go, and nothing else.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from whole_runs import children_of

from blip2_train.distributed import current_world
from blip2_train.errors import RankError, UserError
from blip2_train.evaluation.work import Work

ITEMS = [f"{n} ä" for n in range(11)]


class Counted:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, items: list[str]) -> dict[str, Any]:
        self.calls.append(items)
        assert not torch.is_grad_enabled()
        return {"texts": items, "sum": torch.tensor(sum(int(t.split()[0]) for t in items))}


def done(folder: Path, identity: Any = None, size: int = 3, items: Any = ITEMS) -> Counted:
    counted = Counted()
    work = Work(folder, {"checkpoint": "a"} if identity is None else identity)
    results = work.map("step", items, size, counted)
    assert [text for part in results for text in part["texts"]] == list(items)
    return counted


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    assert len(done(tmp_path).calls) == 4
    assert done(tmp_path).calls == []
    (tmp_path / "step-000002.pt").unlink()
    assert done(tmp_path).calls == [ITEMS[6:9]]


@pytest.mark.parametrize(
    "other",
    [
        {"identity": {"checkpoint": "b"}},
        {"identity": {"checkpoint": "a", "task.k": 1}},
        {"size": 4},
        {"items": ITEMS[:10]},
    ],
)
def test_parts_of_other_work_are_not_taken(tmp_path: Path, other: dict[str, Any]) -> None:
    done(tmp_path)
    counted = done(tmp_path, **other)
    assert sum(map(len, counted.calls)) == len(other.get("items", ITEMS))


def test_damaged_parts_are_computed_again(tmp_path: Path) -> None:
    done(tmp_path)
    cut, flipped, foreign = (tmp_path / f"step-{n:06d}.pt" for n in (0, 1, 3))
    cut.write_bytes(cut.read_bytes()[:100])
    data = bytearray(flipped.read_bytes())
    place = data.index("4 ä".encode())
    data[place] ^= 1
    flipped.write_bytes(bytes(data))
    foreign.write_bytes(b"")
    assert done(tmp_path).calls == [ITEMS[0:3], ITEMS[3:6], ITEMS[9:11]]


def test_a_pickle_in_place_of_a_part_is_not_run(tmp_path: Path) -> None:
    done(tmp_path)

    class Bad:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/harm",)

    torch.save({"mark": "x", "result": Bad()}, tmp_path / "step-000001.pt")
    assert done(tmp_path).calls == [ITEMS[3:6]]
    assert not (tmp_path / "harm").exists()


def test_nothing_to_do(tmp_path: Path) -> None:
    assert done(tmp_path, items=[]).calls == []


def test_loader_processes_read_the_items(tmp_path: Path) -> None:
    class Items:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, n: int) -> int:
            return os.getpid()

    work = Work(tmp_path, {}, num_workers=2)
    pids = [pid for part in work.map("pids", Items(), 2, list) for pid in part]
    assert len(pids) == 5 and os.getpid() not in pids
    assert not set(children_of(os.getpid())) & set(pids)


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / ".step-000000.pt.123.tmp").write_bytes(b"half")
    work = Work(parts, {})
    work.map("step", [1], 1, list)
    assert [p.name for p in parts.iterdir()] == ["step-000000.pt"]
    (parts / "mine.txt").write_text("notes")
    work.close()
    assert [p.name for p in parts.iterdir()] == ["mine.txt"]
    (parts / "mine.txt").unlink()
    work.map("again", [1], 1, list)
    work.close()
    assert not parts.exists()


def shared(folder: str) -> dict[str, Any]:
    counted = Counted()
    work = Work(Path(folder), {"checkpoint": "a"}, current_world())
    results = work.map("step", ITEMS, 2, counted)
    return {"results": results, "calls": counted.calls}


def test_ranks_share_the_missing_parts_evenly(tmp_path: Path) -> None:
    alone = Work(tmp_path / "alone", {"checkpoint": "a"}).map("step", ITEMS, 2, Counted())
    for size, calls in ((2, [3, 3]), (3, [2, 2, 2])):
        found = run_ranks(shared, size, str(tmp_path / str(size)))
        assert [len(rank["calls"]) for rank in found] == calls
        for rank in found:
            assert rank["results"] == alone
    # three of the six are gone: two processes take two and one of them
    for number in (0, 1, 4):
        (tmp_path / "3" / f"step-{number:06d}.pt").unlink()
    found = run_ranks(shared, 2, str(tmp_path / "3"))
    assert [rank["calls"] for rank in found] == [[ITEMS[0:2], ITEMS[8:10]], [ITEMS[2:4]]]
    assert found[1]["results"] == alone


def failing(folder: str) -> str:
    world = current_world()

    def fail(items: list[str]) -> list[str]:
        if world.rank == 1:
            raise UserError("the second one cannot")
        return items

    try:
        Work(Path(folder), {}, world).map("step", ITEMS, 2, fail)
    except UserError as error:
        return str(error)
    return ""


def test_a_mistake_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    assert run_ranks(failing, 2, str(tmp_path)) == ["the second one cannot (so says rank 1)"] * 2


class Unreadable:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, n: int) -> int:
        if n == 3:
            raise OSError(5, "Input/output error")
        return n


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_that_cannot_be_read(tmp_path: Path, num_workers: int) -> None:
    work = Work(tmp_path, {}, num_workers=num_workers)
    with pytest.raises(RankError, match=r"^the data cannot be read: .*Input/output error$"):
        work.map("step", Unreadable(), 1, list)
    assert len(list(tmp_path.iterdir())) >= 3  # the others are kept


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made.*another out="):
        Work(tmp_path / "file" / "parts", {}).map("step", [1], 1, list)
