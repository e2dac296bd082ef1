"""Memory and arithmetic of a training, without its weights, its data or its devices.

A real step is run on fake tensors, shapes without values, and what is alive is followed operation
by operation. What differs on a GPU is dealt with here: attention is a fused kernel that draws its
dropout as it goes and keeps no weights; the allocator and the CUDA context take their share
(`RESERVE`). What a compiled block keeps may be a little less or more than counted here.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.config import BatchPlan
from blip2_train.distributed import World
from blip2_train.models.counting import LiveBytes, stored_bytes
from blip2_train.models.freezing import freeze_unreached
from blip2_train.models.lm_sizes import quantize_shapes
from blip2_train.training.fit import STAGES
from blip2_train.training.module import StageModule

GB = 1e9
# Assumptions: the CUDA context, cuBLAS's workspace and NCCL's buffers; and the share of what is
# allocated that the caching allocator loses in gaps.
CONTEXT = 1e9
GAPS = 0.05
COUNTED = 4  # samples whose arithmetic is counted

# Groups of the configuration, and parts of the model, with blocks that can be recomputed.
CHECKPOINTED = ("qformer", "language_model", "image_encoder")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for.

    Two phases take turns, and the larger decides: the tower, then forward and backward of the rest.

    Attributes:
        weights: of all parts, as they are stored.
        gradients: of trained weights; DDP's buckets are the gradients themselves.
        optimizer: AdamW's two moments.
        tower: the most while the frozen tower runs: images, features, a block's intermediates.
        activations: at the most of the rest: what the backward pass needs, features, temporaries.
        logits: what is alive of logits over a vocabulary then.
    """

    weights: float
    gradients: float
    optimizer: float
    tower: float
    activations: float
    logits: float

    @property
    def fixed(self) -> float:
        """Taken whatever the batch is."""
        return with_reserve(self.weights + self.gradients + self.optimizer)

    @property
    def total(self) -> float:
        """That a device must have."""
        step = max(self.tower, self.activations + self.logits)
        return with_reserve(self.weights + self.gradients + self.optimizer + step)


def with_reserve(allocated: float) -> float:
    """Memory that a device must have for tensors of so many bytes."""
    return allocated * (1 + GAPS) + CONTEXT


def step_world(plan: BatchPlan) -> World:
    """The ranks of a plan, as far as one process knows their memory."""
    return World(0, plan.world_size, imagined=plan.world_size > 1)


def made_up_step(
    module: StageModule, plan: BatchPlan, longest: int | None, device: str = "cpu"
) -> Tensor:
    """Loss of a made-up batch that is as large as one of a training.

    Args:
        module: of the training; it takes over the plan.
        plan: how the global batch is cut.
        longest: tokens of each text, None: as many as is usual.
        device: "cpu" or "cuda".
    """
    module.batch = plan
    batch = module.rehearsal_batch(plan.per_device, longest)
    # of each text, for a step in parts
    batch["tokens"] = [longest or module.usual_tokens] * plan.per_device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    del batch
    return module.step(moved, 0, 0, step_world(plan))["loss"]


class Sketch:
    """A training whose tensors have no values.

    Args:
        cfg: resolved and validated configuration.

    Raises:
        UserError: sizes are not known without a tokenizer or a network.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        self.cfg = cfg
        stage = STAGES[cfg["stage"]](cfg)
        with torch.device("meta"):
            model = stage.build_model(shapes_only=True)
        if cfg["trainer"]["precision"] == "64-true":
            model.double()
        self.model: Any = model
        self.packed = 0.0  # bytes that weights take less than their tensors say
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        nobody = BatchPlan(1, 1, 1, 1, 1)
        with self.fakes:
            give_storage(model, "cpu")
            quantization = cfg.get("language_model", {}).get("quantization")
            if quantization is not None:
                self.packed = quantize_shapes(model.language_model.lm, quantization)
            self.module = stage.build_module(model, nobody)
            freeze_unreached(model, self.module.rehearsal_loss)

    @property
    def checkpointing(self) -> tuple[str, ...]:
        """The parts whose blocks are recomputed, of `CHECKPOINTED`."""
        return tuple(name for name in self._parts() if self._part(name).gradient_checkpointing)

    @checkpointing.setter
    def checkpointing(self, names: tuple[str, ...]) -> None:
        for name in self._parts():
            self._part(name).gradient_checkpointing = name in names

    def _parts(self) -> list[str]:
        return checkpointed_parts(self.cfg)

    def _part(self, name: str) -> Any:
        return getattr(self.model, name)

    def memory(self, plan: BatchPlan) -> Memory:
        """Of the largest step that a plan's batches can ask for: texts of `text.max_tokens`."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        size = stored_bytes(trained)
        with self._tracing(), LiveBytes(self._kind) as live:
            for parameter in trained:  # DDP keeps them from step to step
                parameter.grad = torch.empty_like(parameter)
            gradients = live.now.total()
            with _phase(self.model, live) as tower:
                made_up_step(self.module, plan, self.cfg["text"]["max_tokens"]).backward()
            peak = live.peak
        self.module.zero_grad(set_to_none=True)
        self.module.meter.sums = None
        return Memory(
            weights=stored_bytes([*self.model.parameters(), *self.model.buffers()]) - self.packed,
            gradients=size,
            optimizer=2 * size,
            tower=max(0, tower[0] - gradients),
            activations=peak[""] - gradients,
            logits=peak["logits"],
        )

    def flops(self) -> tuple[float, float]:
        """Operations of one usual sample: of the frozen tower; of the rest, there and back."""
        plan = BatchPlan(COUNTED, 1, COUNTED, COUNTED, 1)
        with self._tracing(), FlopCounterMode(display=False) as counter:
            made_up_step(self.module, plan, None).backward()
        whole = counter.get_total_flops()
        tower = getattr(self.model, "vision", None)
        with self._tracing(), FlopCounterMode(display=False) as counter:
            if tower is not None:
                tower(torch.zeros(COUNTED, 3, tower.image_size, tower.image_size))
        self.module.zero_grad(set_to_none=True)
        own = counter.get_total_flops()
        return own / COUNTED, (whole - own) / COUNTED

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        mixed = self.cfg["trainer"]["precision"] == "bf16-mixed"
        with self.fakes, fused_attention(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            yield

    def _kind(self, tensor: Tensor) -> str:
        # no layer is as wide as a vocabulary
        return "logits" if tensor.ndim > 1 and tensor.shape[-1] == self.module.vocabulary else ""


def checkpointed_parts(cfg: Mapping[str, Any]) -> list[str]:
    """The groups of this configuration that have a `gradient_checkpointing`."""
    return [name for name in CHECKPOINTED if "gradient_checkpointing" in cfg.get(name, {})]


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention keeps what a GPU's fused kernels keep: no weights, and none dropped.

    A processor has such a kernel too, but without dropout; blocks that are recomputed in the
    backward pass must find it as well.
    """
    original = F.scaled_dot_product_attention

    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextlib.contextmanager
def _phase(model: Any, live: LiveBytes) -> Iterator[list[int]]:
    """Counts the frozen tower's peak, into the list's number, apart from what comes after."""
    found = [0]

    def ended(*_: Any) -> None:
        found[0] = max(found[0], live.peak.total())
        live.restart()

    tower = getattr(model, "vision", None)
    handle = None if tower is None else tower.register_forward_hook(ended)
    yield found
    if handle is not None:
        handle.remove()


def give_storage(module: nn.Module, device: str) -> None:
    """Gives a meta model's tensors memory on a device, in place; their values are arbitrary.

    Inside a `FakeTensorMode` that is none. The meta device itself knows no autocast, so what a
    mixed-precision step keeps cannot be seen there.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is None:
                continue
            if parameter not in made:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[parameter] = nn.Parameter(value.normal_(std=0.02), parameter.requires_grad)
            child._parameters[name] = made[parameter]
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
