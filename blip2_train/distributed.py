"""Everything that talks to other ranks; works unchanged without a process group.

Functions take the `World` they act in: `World()` is this process alone, `current_world()` is what
the launcher started. Row r of rank k is global row k * B + r.
"""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blip2_train.errors import UserError


@dataclass(frozen=True)
class World:
    """Ranks that work on one batch.

    Attributes:
        rank: of this process.
        size: number of processes.
        imagined: there are no other processes: each is taken to have what this one has, so that
            the memory of a step among many can be had of one.
    """

    rank: int = 0
    size: int = 1
    imagined: bool = False


@dataclass
class Traffic:
    """Bytes that this rank has exchanged with others since the start, {kind: bytes}.

    Kinds are "gathered" (features, texts and row numbers), "summed" (counts and gradients of
    gathered features) and "rows" (images that were drawn as negatives, and their gradients).
    Gathering and summing count as on a ring, the least that is possible: a gather of n times b
    bytes brings (n - 1) b, a sum of b bytes 2 (n - 1) / n b.
    """

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, sent: float, received: float) -> None:
        """Adds one collective."""
        self.sent[kind] += round(sent)
        self.received[kind] += round(received)


traffic = Traffic()


def ring_sum_bytes(size: float, ranks: int) -> float:
    """Bytes that each of `ranks` sends, and receives, to sum `size` bytes over all of them."""
    return 2 * (ranks - 1) / ranks * size


def current_world() -> World:
    """All processes of the default group, or this one alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def all_gather(tensor: Tensor, world: World) -> Tensor:
    """[B, ...] of every rank -> [size * B, ...] in rank order, without gradient.

    All ranks must pass the same shape and dtype.
    """
    if world.size == 1:
        return tensor.detach()
    if world.imagined:
        return tensor.detach().repeat(world.size, *[1] * (tensor.ndim - 1))
    tensor = tensor.detach().contiguous()
    gathered = tensor.new_empty((world.size * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor)
    others = gathered.nbytes - tensor.nbytes
    traffic.count("gathered", others, others)
    return gathered


def all_gather_with_grad(tensor: Tensor, world: World) -> Tensor:
    """As `all_gather`; the backward sums what every rank's loss sends to this rank's rows."""
    if world.size == 1:
        return tensor
    return _AllGather.apply(tensor, world)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        return all_gather(tensor, world)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # gloo has no reduce-scatter for every dtype; the features are small (B x Q x E)
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may share it
        _sum(grad, ctx.world)
        return grad.chunk(ctx.world.size)[ctx.world.rank], None


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Sum over ranks, without gradient; the input is left alone."""
    if world.size == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    _sum(total, world)
    return total


def _sum(tensor: Tensor, world: World) -> None:
    if world.imagined:
        return
    dist.all_reduce(tensor)
    moved = ring_sum_bytes(tensor.nbytes, world.size)
    traffic.count("summed", moved, moved)


def broadcast_tensors(tensors: list[Tensor], world: World) -> None:
    """Overwrites every rank's tensors with rank 0's."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def agree_on_maximum(value: int, world: World) -> "PendingMaximum":
    """Starts finding the largest `value` of all ranks; ask for the result later."""
    tensor = torch.tensor([value])
    if world.size == 1:
        return PendingMaximum(tensor, None)
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_host_group(), async_op=True)
    return PendingMaximum(tensor, work)


@dataclass
class PendingMaximum:
    """A maximum over ranks that is on its way, between hosts, beside the device's work."""

    tensor: Tensor
    work: Any

    def result(self) -> int:
        """Waits for it."""
        if self.work is not None:
            self.work.wait()
        return int(self.tensor)


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's plain Python value, on every rank."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_host_group())
    return values[0]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's plain Python value, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=_host_group())
    return values


def barrier(world: World) -> None:
    """Waits for all ranks."""
    if world.size > 1:
        dist.barrier(group=_host_group())


def on_rank_zero(action: Callable[[], Any] | None, world: World) -> Any:
    """Runs on rank 0 and gives every rank its result, or its `UserError`; others may give None.

    What a folder holds is decided once: views of a network file system differ.
    """
    outcome: tuple[Any, str | None] = (None, None)
    if world.rank == 0:
        assert action is not None
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, str(error))
    result, problem = broadcast_object(outcome, world)
    if problem is not None:
        raise UserError(problem)
    return result


def on_every_rank(action: Callable[[], Any], world: World) -> Any:
    """Runs on every rank; a `UserError` of one is raised on all of them."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    for rank, found in enumerate(gather_objects(problem, world)):
        if found is not None:
            raise UserError(found if rank == 0 else f"{found} (so says rank {rank})")
    return result


def start(
    rank: int,
    local_rank: int,
    world_size: int,
    address: str,
    port: int,
    *,
    cuda: bool,
    timeout: float,
) -> World:
    """Joins the other ranks: NCCL between GPUs, gloo between CPUs, and gloo between hosts.

    Args:
        rank: of this process.
        local_rank: its GPU.
        world_size: number of processes.
        address: host of rank 0.
        port: of its store.
        cuda: whether tensors live on GPUs.
        timeout: seconds after which a collective that nobody answers is an error.
    """
    if world_size == 1:
        return World()
    if cuda:
        torch.cuda.set_device(local_rank)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    global _timeout
    _timeout = timedelta(seconds=timeout)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        # the runs of a sweep share one store: the keys of the one before would answer the next
        store=dist.PrefixStore(f"run{next(_STARTED)}", _store(rank, world_size)),
        rank=rank,
        world_size=world_size,
        timeout=_timeout,
    )
    _host_group()
    return World(rank, world_size)


_STARTED = itertools.count()
_timeout = timedelta(minutes=30)  # of collectives between hosts


@functools.lru_cache(maxsize=1)
def _store(rank: int, world_size: int) -> dist.Store:
    """The launcher's store, or rank 0's, for the life of this process."""
    return next(iter(dist.rendezvous("env://", rank, world_size)))[0]


def stop() -> None:
    """Leaves the other ranks; a next `start` joins them anew.

    After success only: after a failure they may wait in a collective for ever.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _host_group() -> dist.ProcessGroup:
    """A gloo group of its own: values on the host travel beside the device's collectives."""
    return _beside(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _beside(world_group: Any) -> dist.ProcessGroup:  # a new default group needs a new one beside it
    group = dist.new_group(backend="gloo", timeout=_timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


# -- rows that live on other ranks -----------------------------------------------------------------


@dataclass
class RowRequest:
    """Rows of the global batch that each rank wants, on their way to the host.

    Reading them takes the one host synchronisation of a step with several ranks, so it is split:
    `request_rows` starts the copy, other work is queued, `fetch_rows` waits for it.

    Attributes:
        wanted: int64 [size, R] on the host: row numbers that every rank asked for.
        rows_per_rank: B.
        world: the ranks.
        copied: CUDA event of the copy, None on CPU.
    """

    wanted: Tensor
    rows_per_rank: int
    world: World
    copied: Any = None


def request_rows(index: Tensor, rows_per_rank: int, world: World) -> RowRequest:
    """Tells every rank which global rows this one wants.

    Args:
        index: int64 [R] global row numbers, repetitions allowed; R is the same on all ranks.
        rows_per_rank: B, rows that each rank owns.
        world: the ranks.
    """
    wanted = all_gather(index[None], world)
    if not wanted.is_cuda or world.imagined:
        return RowRequest(wanted, rows_per_rank, world)
    host = torch.empty(wanted.shape, dtype=wanted.dtype, pin_memory=True)
    host.copy_(wanted, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return RowRequest(host, rows_per_rank, world, copied)


def fetch_rows(rows: Tensor, request: RowRequest) -> tuple[Tensor, Tensor]:
    """Gets the requested rows, each only once, by all-to-all.

    Args:
        rows: [B, ...] of this rank; the gradient flows back to them if they require one.
        request: from `request_rows`, made by all ranks.

    Returns:
        fetched [U, ...], the distinct rows that this rank wanted, and position int64 [R] so that
        `fetched[position]` are the rows in the order of the request.
    """
    if request.copied is not None:
        request.copied.synchronize()
    if request.world.imagined:  # the most that can be: all are different, all are sent
        own = request.wanted[0] % request.rows_per_rank
        return rows.index_select(0, own).clone(), torch.arange(len(own), device=rows.device)
    plan = plan_exchange(request.wanted, request.rows_per_rank, request.world)
    return _ExchangeRows.apply(rows, plan), plan.position.to(rows.device, non_blocking=True)


@dataclass(frozen=True)
class ExchangePlan:
    """Who sends what to whom.

    Attributes:
        send_rows: int64, own rows in the order of the ranks that get them.
        send_counts: rows to each rank.
        receive_counts: rows from each rank.
        position: int64 [R], where in the received rows each wanted row stands.
        rank: whose plan it is.
    """

    send_rows: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    position: Tensor = field(repr=False)
    rank: int


def plan_exchange(wanted: Tensor, rows_per_rank: int, world: World) -> ExchangePlan:
    """Plans an all-to-all from what every rank wants, the same way on every rank.

    Args:
        wanted: int64 [size, R] on the host, global row numbers.
        rows_per_rank: rows that each rank owns (B).
        world: the ranks.
    """
    distinct = [row.unique() for row in wanted]  # sorted, so grouped by owner
    first = world.rank * rows_per_rank
    send = [d[(d >= first) & (d < first + rows_per_rank)] - first for d in distinct]
    own = distinct[world.rank]
    return ExchangePlan(
        send_rows=torch.cat(send),
        send_counts=[len(s) for s in send],
        receive_counts=torch.bincount(own // rows_per_rank, minlength=world.size).tolist(),
        position=torch.searchsorted(own, wanted[world.rank]),
        rank=world.rank,
    )


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: ExchangePlan) -> Tensor:
        ctx.plan, ctx.shape = plan, rows.shape
        ctx.send_rows = plan.send_rows.to(rows.device, non_blocking=True)
        return _all_to_all(
            rows.index_select(0, ctx.send_rows), plan.send_counts, plan.receive_counts, plan.rank
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan: ExchangePlan = ctx.plan
        returned = _all_to_all(grad.contiguous(), plan.receive_counts, plan.send_counts, plan.rank)
        return grad.new_zeros(ctx.shape).index_add_(0, ctx.send_rows, returned), None


def _all_to_all(
    rows: Tensor, send_counts: list[int], receive_counts: list[int], rank: int
) -> Tensor:
    if len(send_counts) == 1:
        return rows
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(received, rows, receive_counts, send_counts)
    row = rows[:1].nbytes or received[:1].nbytes
    own = send_counts[rank]  # these do not leave the rank
    traffic.count("rows", (sum(send_counts) - own) * row, (sum(receive_counts) - own) * row)
    return received
