"""What a computation keeps in memory, and what it makes the host wait for."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights as they are stored, quantized ones with their scales."""
    total = 0
    for tensor in module.state_dict().values():
        if is_traceable_wrapper_subclass(tensor):
            total += sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])
        else:
            total += tensor.nbytes
    return total


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
