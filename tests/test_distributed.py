"""What ranks tell each other.

Proven on three processes, and by the same code in one without a group: gathering keeps rank order;
its gradient is that of the whole batch, and touches nobody else's; rows fetched from other ranks
arrive in the wanted order and dtype, each distinct one once, and send their gradient back; maxima,
broadcasts and gathered objects agree; a second group works after the first was left. Simulated on
any number of ranks: the plans of an exchange fit together.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from faulty_server import free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from blip2_train.distributed import (
    World,
    agree_on_maximum,
    all_gather,
    all_gather_with_grad,
    all_reduce_sum,
    barrier,
    broadcast_object,
    current_world,
    fetch_rows,
    gather_objects,
    plan_exchange,
    request_rows,
    start,
)

SIZE, B, E = 3, 4, 5  # ranks, rows of each, width
ROWS = SIZE * B
# Global rows that each rank wants: repeated, its own, all from one other rank.
WANTED = [[5, 5, 0, 11, 5, 2], [4, 5, 6, 7, 4, 4], [3, 3, 3, 3, 3, 3]]
ALL_WANTED = [row for rows in WANTED for row in rows]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathered_loss(own: Tensor, everything: Tensor, weights: Tensor) -> Tensor:
    """A sum over own rows against all rows: as contrast has it."""
    return (torch.tanh(own @ everything.T) * weights).sum()


def everything(port: int) -> dict[str, Any]:
    """This rank's share of every check; alone, it has all the rows."""
    world = current_world()
    size = ROWS // world.size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    features, weights = numbers(ROWS, E), numbers(ROWS, ROWS, seed=1)
    out: dict[str, Any] = {"world": (world.rank, world.size)}

    own = features[mine].clone().requires_grad_()
    gathered = all_gather(own, world)
    assert not gathered.requires_grad
    out["gathered"] = gathered
    out["integers"] = all_gather(torch.arange(ROWS)[mine].reshape(-1, 1), world)
    out["loss"] = gathered_loss(own, all_gather_with_grad(own, world), weights[mine])
    (out["gradient"],) = torch.autograd.grad(out["loss"], own)
    out["loss"] = out["loss"].detach()

    # a gradient that others use, too, must arrive there unchanged
    other = torch.zeros(ROWS, E, dtype=torch.float64, requires_grad=True)
    upstream = torch.full((ROWS, E), 1.0 + world.rank, dtype=torch.float64)
    (all_gather_with_grad(own, world) + other).backward(upstream)
    out["upstream"], out["shared"] = upstream.clone(), other.grad
    out["sum"] = all_reduce_sum(weights[mine].sum(dim=0), world)

    out["fetched"] = []
    for dtype in (torch.float64, torch.bfloat16):
        rows = features[mine].to(dtype).requires_grad_()
        index = torch.tensor(WANTED[world.rank] if world.size > 1 else ALL_WANTED)
        request = request_rows(index, size, world)
        rows_there, position = fetch_rows(rows, request)
        scale = numbers(SIZE * 6, E, seed=2).to(dtype)
        scale = scale if world.size == 1 else scale[world.rank * 6 : world.rank * 6 + 6]
        (gradient,) = torch.autograd.grad((rows_there[position] * scale).sum(), rows)
        plain, _ = fetch_rows(rows.detach(), request)
        assert plain.equal(rows_there) and not plain.requires_grad
        out["fetched"].append(
            {"rows": rows_there[position].detach(), "gradient": gradient, "count": len(rows_there)}
        )
    # images have more dimensions, and every rank may want the same one
    images = features[mine].reshape(-1, 1, E).expand(-1, 2, -1)
    same, position = fetch_rows(images, request_rows(torch.tensor([7, 7]), size, world))
    out["same"], out["same_position"] = same.clone(), position

    pending = agree_on_maximum([3, 9, 4][world.rank] if world.size > 1 else 9, world)
    out["maximum"] = pending.result()
    out["broadcast"] = broadcast_object({"from": world.rank}, world)
    out["objects"] = gather_objects(("rank", world.rank), world)
    barrier(world)

    if world.size > 1:  # a second training in the same processes
        dist.destroy_process_group()
    again = start(world.rank, world.rank, world.size, "127.0.0.1", port, cuda=False, timeout=60)
    assert again == world == current_world()
    out["again"] = agree_on_maximum(world.rank, again).result()
    assert broadcast_object(world.rank, again) == 0
    return out


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return everything(0)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, SIZE, free_port())


def test_every_rank_knows_its_place(ranks: list[dict], alone: dict) -> None:
    assert [rank["world"] for rank in ranks] == [(0, 3), (1, 3), (2, 3)]
    assert alone["world"] == (0, 1)


def test_gathering_keeps_rank_order(ranks: list[dict], alone: dict) -> None:
    for rank in [*ranks, alone]:
        assert rank["gathered"].equal(numbers(ROWS, E))
        assert rank["integers"].flatten().tolist() == list(range(ROWS))
        torch.testing.assert_close(rank["sum"], numbers(ROWS, ROWS, seed=1).sum(dim=0))


def test_gathered_gradients_are_those_of_the_whole_batch(ranks: list[dict], alone: dict) -> None:
    whole = sum(rank["loss"] for rank in ranks)
    torch.testing.assert_close(whole, alone["loss"], atol=1e-12, rtol=0)
    gradient = torch.cat([rank["gradient"] for rank in ranks])
    torch.testing.assert_close(gradient, alone["gradient"], atol=1e-12, rtol=0)
    # the gathered side matters: without it the gradient would be another
    own = numbers(ROWS, E).requires_grad_()
    loss = gathered_loss(own, own.detach(), numbers(ROWS, ROWS, seed=1))
    (half,) = torch.autograd.grad(loss, own)
    assert (half - gradient).abs().max() > 0.1


def test_gathered_gradients_leave_others_alone(ranks: list[dict], alone: dict) -> None:
    for number, rank in enumerate([*ranks, alone]):
        wanted = 1.0 + number % SIZE
        assert rank["upstream"].unique().tolist() == [wanted]
        assert rank["shared"].unique().tolist() == [wanted]


def test_fetched_rows_and_their_gradients(ranks: list[dict], alone: dict) -> None:
    features, everyone = numbers(ROWS, E), torch.tensor(WANTED)
    for number, dtype in enumerate((torch.float64, torch.bfloat16)):
        rows = torch.cat([rank["fetched"][number]["rows"] for rank in ranks])
        assert rows.dtype == dtype and rows.equal(features[everyone.flatten()].to(dtype))
        assert alone["fetched"][number]["rows"].equal(rows)
        counts = [rank["fetched"][number]["count"] for rank in ranks]
        assert counts == [4, 4, 1]  # each distinct row once
        gradient = torch.cat([rank["fetched"][number]["gradient"] for rank in ranks])
        scale = numbers(SIZE * 6, E, seed=2).to(dtype).double()
        naive = torch.zeros(ROWS, E, dtype=torch.float64)
        for row, s in zip(everyone.flatten().tolist(), scale, strict=True):
            naive[row] += s
        tolerance = 1e-12 if dtype == torch.float64 else 0.1  # bfloat16 has three digits
        torch.testing.assert_close(gradient.double(), naive, atol=tolerance, rtol=0)
        unwanted = [r for r in range(ROWS) if r not in ALL_WANTED]
        assert unwanted and (gradient[unwanted] == 0).all()


def test_one_row_for_all(ranks: list[dict], alone: dict) -> None:
    for rank in [*ranks, alone]:
        assert rank["same"].shape == (1, 2, E)
        assert rank["same"][0].equal(numbers(ROWS, E)[7].expand(2, -1))
        assert rank["same_position"].tolist() == [0, 0]


def test_hosts_agree(ranks: list[dict], alone: dict) -> None:
    assert [rank["maximum"] for rank in ranks] == [9, 9, 9]
    assert [rank["broadcast"] for rank in ranks] == [{"from": 0}] * 3
    assert [rank["objects"] for rank in ranks] == [[("rank", 0), ("rank", 1), ("rank", 2)]] * 3
    assert (alone["maximum"], alone["broadcast"]) == (9, {"from": 0})
    assert alone["objects"] == [("rank", 0)]


def test_a_second_group_works(ranks: list[dict], alone: dict) -> None:
    assert [rank["again"] for rank in ranks] == [2, 2, 2]
    assert alone["again"] == 0


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_plans_fit_together(data: st.DataObject) -> None:
    size, rows = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, 9))
    row = st.integers(0, size * rows - 1)
    wanted = torch.tensor(
        [data.draw(st.lists(row, min_size=count, max_size=count)) for _ in range(size)]
    )
    plans = [plan_exchange(wanted, rows, World(rank, size)) for rank in range(size)]
    everything = torch.arange(size * rows) * 10
    for me, plan in enumerate(plans):
        assert len(plan.send_counts) == len(plan.receive_counts) == size
        assert sum(plan.send_counts) == len(plan.send_rows)
        assert ((plan.send_rows >= 0) & (plan.send_rows < rows)).all()
        received = []
        for other, theirs in enumerate(plans):
            assert theirs.send_counts[me] == plan.receive_counts[other]
            part = theirs.send_rows.split(theirs.send_counts)[me]
            received.append(everything[other * rows : (other + 1) * rows][part])
        fetched = torch.cat(received)
        assert fetched[plan.position].equal(everything[wanted[me]])
        assert len(fetched) == len(wanted[me].unique())  # nothing travels twice
