"""Memory and arithmetic of a training, without its weights, its data or its devices.

A real step is run on fake tensors, shapes without values, and what is alive is followed operation
by operation. What differs on a GPU is dealt with here: attention is a fused kernel that draws its
dropout as it goes and keeps no weights; the context and the allocator take their share (`CONTEXT`,
`GAPS`). What a compiled block keeps may be a little less or more than what is counted here.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.config import BatchPlan
from blip2_train.distributed import World
from blip2_train.models import float8
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

# Parts of models with blocks that can be recomputed, named as their group of the configuration;
# a frozen tower keeps nothing that could be.
CHECKPOINTED = ("qformer", "language_model", "image_encoder", "vision")

ALONE = BatchPlan(1, 1, 1, 1, 1)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for.

    Two phases take turns, and the larger decides: the tower, then forward and backward of the rest.
    With `trainer.overlap` they run at the same time, and both count.

    Attributes:
        weights: of all parts, as they are stored.
        gradients: of trained weights; DDP's buckets are the gradients themselves.
        optimizer: AdamW's two moments.
        tower: the most while the frozen tower runs: images, features, a block's intermediates; 0
            of a tower that is trained, which is part of the rest.
        activations: at the most of the rest: what the backward pass needs, features, temporaries.
        logits: what is alive of logits over a vocabulary then.
        overlap: both phases count.
    """

    weights: float
    gradients: float
    optimizer: float
    tower: float
    activations: float
    logits: float
    overlap: bool = False

    @property
    def total(self) -> float:
        """That a device must have, with what is not tensors (`CONTEXT`, `GAPS`)."""
        rest = self.activations + self.logits
        step = self.tower + rest if self.overlap else max(self.tower, rest)
        return (self.weights + self.gradients + self.optimizer + step) * (1 + GAPS) + CONTEXT


def step_world(plan: BatchPlan) -> World:
    """The ranks of a plan, as far as one process knows their memory."""
    return World(0, plan.world_size, imagined=plan.world_size > 1)


def made_up_loss(
    module: StageModule,
    plan: BatchPlan,
    precision: str,
    longest: int | None,
    device: str = "cpu",
    stream: torch.cuda.Stream | None = None,
) -> Tensor:
    """Loss of a made-up batch that is as large as one of a training.

    Args:
        module: of the training; it takes over the plan.
        plan: how the global batch is cut.
        precision: `trainer.precision`.
        longest: tokens of each text, None: as many as is usual.
        device: "cpu" or "cuda".
        stream: that the tower runs on; its memory is then not the rest's to reuse.
    """
    module.batch = plan
    batch = module.rehearsal_batch(plan.per_device, longest)
    # of each text, for a step in parts
    batch["tokens"] = [longest or module.usual_tokens] * plan.per_device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    del batch
    # it ends before the backward pass, and with it what it has cast of the weights
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
        with torch.cuda.stream(stream):
            seen = module.see(moved)
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        return module.step(seen, 0, 0, step_world(plan))["loss"]


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
        with self.fakes:
            fake_on_cpu(model)
            quantization = cfg.get("language_model", {}).get("quantization")
            if quantization is not None:
                self.packed = quantize_shapes(model.language_model.lm, quantization)
            if cfg.get("vision", {}).get("precision") == "float8":  # a byte less of each weight
                linears = float8.suitable_linears(model.vision)
                self.packed += sum(layer.weight.numel() for layer in linears)
            self.module = stage.build_module(model, ALONE).train()
            freeze_unreached(model, self.module.rehearsal_loss)

    def empty(self) -> Memory:
        """What is there without any batch."""
        size = stored_bytes(self._trained())
        weights = stored_bytes([*self.model.parameters(), *self.model.buffers()]) - self.packed
        return Memory(weights, size, 2 * size, tower=0, activations=0, logits=0)

    def memory(self, plan: BatchPlan) -> Memory:
        """Of the largest step that a plan's batches can ask for: texts of `text.max_tokens`."""
        trained = self._trained()
        with self._tracing(), LiveBytes(self._kind) as live:
            for parameter in trained:  # DDP keeps them from step to step
                parameter.grad = torch.empty_like(parameter)
            gradients = live.now.total()
            with _phase(self.model, live) as tower:
                self._loss(plan, self.cfg["text"]["max_tokens"]).backward()
            peak = live.peak
        self.module.zero_grad(set_to_none=True)
        return replace(
            self.empty(),
            tower=max(0, tower[0] - gradients),
            activations=peak[""] - gradients,
            logits=peak["logits"],
            overlap=self.cfg["trainer"]["overlap"],
        )

    def flops(self) -> tuple[float, float]:
        """Operations of one usual sample: of the frozen tower; of the rest, there and back.

        A tower that is trained is part of the rest.
        """
        plan = BatchPlan(COUNTED, 1, COUNTED, COUNTED, 1)
        with self._tracing(), FlopCounterMode(display=False) as counter:
            self._loss(plan, None).backward()
        self.module.zero_grad(set_to_none=True)
        tower = self._tower_flops
        return tower, counter.get_total_flops() / COUNTED - tower

    @functools.cached_property
    def _tower_flops(self) -> float:
        tower = frozen_tower(self.model)
        if tower is None:
            return 0.0
        with self._tracing(), FlopCounterMode(display=False) as counter:
            tower(tower.made_up(COUNTED))
        return counter.get_total_flops() / COUNTED

    def _loss(self, plan: BatchPlan, longest: int | None) -> Tensor:
        return made_up_loss(self.module, plan, self.cfg["trainer"]["precision"], longest)

    def _trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        with self.fakes, fused_attention():
            yield

    def _kind(self, tensor: Tensor) -> str:
        # no layer is as wide as a vocabulary
        return "logits" if tensor.ndim > 1 and tensor.shape[-1] == self.module.vocabulary else ""


def recompute(model: Any, parts: tuple[str, ...]) -> None:
    """Has the blocks of these parts recomputed in the backward pass, and of no other.

    Args:
        model: of a stage; changed in place.
        parts: of `CHECKPOINTED`.
    """
    for name in recomputable(model):
        getattr(model, name).gradient_checkpointing = name in parts


def recomputable(model: Any) -> list[str]:
    """Those of `CHECKPOINTED` that a model has, and that keep anything for the backward pass."""
    return [
        name
        for name in CHECKPOINTED
        if hasattr(model, name) and (name != "vision" or model.vision.trainable)
    ]


def frozen_tower(model: Any) -> Any:
    """The image tower where it is frozen, else None."""
    tower = getattr(model, "vision", None)
    return None if tower is None or tower.trainable else tower


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

    tower = frozen_tower(model)
    handle = None if tower is None else tower.register_forward_hook(ended)
    yield found
    if handle is not None:
        handle.remove()


def fake_on_cpu(module: nn.Module) -> None:
    """Makes a meta model's tensors fake CPU ones, inside a `FakeTensorMode`.

    The meta device knows no autocast, so what a mixed-precision step keeps cannot be seen there.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is None:
                continue
            if parameter not in made:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[parameter] = nn.Parameter(fake, parameter.requires_grad)
            child._parameters[name] = made[parameter]
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
