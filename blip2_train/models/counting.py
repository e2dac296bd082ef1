"""What a computation keeps in memory, and what it makes the host wait for."""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def saved_bytes(loss: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `loss`.

    Each storage counts once and in full; those of `parameters` do not count.
    """
    known = {p.untyped_storage()._cdata for p in parameters}
    seen: dict[int, int] = {}
    alive = []  # a freed storage would have its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(seen.values())


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that operations inside make, until each is freed.

    Works for tensors without values too. What a kernel takes for itself is not seen. Tensors made
    before do not count, whatever is written into them.

    Args:
        kind: what a new tensor belongs to; bytes are counted apart for each kind.

    Attributes:
        now: bytes that are alive, {kind: bytes}.
        peak: the most that was alive at one time, since the start or `restart`.
    """

    def __init__(self, kind: Callable[[Tensor], str] = lambda tensor: "") -> None:
        super().__init__()
        self.kind = kind
        self.now: Counter[str] = Counter()
        self.alive: dict[int, weakref.ref] = {}
        self.restart()

    def restart(self) -> None:
        """Forgets the peak; what is alive goes on counting."""
        self.peak = Counter(self.now)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs every operation as it is."""
        out = function(*args, **(kwargs or {}))
        if _makes_new(function):
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and not hasattr(tensor, "__tensor_flatten__"):
                    self._count(tensor)
            if self.now.total() > self.peak.total():
                self.peak = Counter(self.now)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.alive:
            return
        kind, size = self.kind(tensor), storage.nbytes()
        freed = functools.partial(self._free, place, kind, size)
        self.alive[place] = weakref.ref(storage, freed)
        self.now[kind] += size

    def _free(self, place: int, kind: str, size: int, _: Any) -> None:
        del self.alive[place]
        self.now[kind] -= size


@functools.cache
def _makes_new(operation: Any) -> bool:
    """Whether its results are neither views nor written in place."""
    return all(result.alias_info is None for result in operation._schema.returns)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take as they are stored, packed ones too."""
    total = 0
    for tensor in tensors:
        value = tensor.data
        if hasattr(value, "__tensor_flatten__"):
            total += stored_bytes(getattr(value, name) for name in value.__tensor_flatten__()[0])
        else:
            total += value.numel() * value.element_size()
    return total


class HostReads(TorchDispatchMode):
    """Notes, on any device, operations for which the host would wait for a GPU.

    Those that read a value (`.item()`) and those whose result's size depends on values
    (`nonzero`); not copies to the host.

    Attributes:
        names: of the operations, in order.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs every operation as it is."""
        if function.__name__.startswith(self.WAITING):
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))
