"""What was started where: devices, launchers, and decisions that all ranks must share."""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from blip2_train.config import Launch
from blip2_train.distributed import World, broadcast_object, gather_objects
from blip2_train.errors import UserError


def use_cuda(accelerator: str) -> bool:
    """Whether to train on GPUs.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator=gpu, but torch sees no GPU; set trainer.accelerator=cpu"
        )
    return accelerator != "cpu" and torch.cuda.is_available()


def check_devices(devices: int | None, launch: Launch, cuda: bool) -> None:
    """Compares `trainer.devices` with what was started and with what there is.

    Raises:
        UserError: they differ; says how to start that many processes.
    """
    if devices is not None and devices != launch.local_world_size:
        raise UserError(
            f"trainer.devices={devices}, but {launch.local_world_size} process(es) were started on "
            f"this machine; start one per device: torchrun --nproc-per-node {devices} "
            "--module blip2_train.train experiment=... (or srun, see launch/)"
        )
    if cuda and launch.local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{launch.local_world_size} processes were started on this machine, which has "
            f"{torch.cuda.device_count()} GPU(s); start as many as there are"
        )


def cluster_environment(launch: Launch) -> Any:
    """Lightning's view of the launcher, always given explicitly: its own guess may requeue jobs."""
    if launch.launcher == "torchrun":
        return TorchElasticEnvironment()
    if launch.launcher == "slurm":
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


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
