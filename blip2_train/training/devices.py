"""What was started where: devices and launchers."""

from typing import Any

import torch
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from blip2_train.config import Launch
from blip2_train.errors import UserError


def use_cuda(accelerator: str, key: str = "trainer.accelerator") -> bool:
    """Whether to work on GPUs.

    Args:
        accelerator: "auto", "cpu" or "gpu".
        key: of the configuration that says so, for messages.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(f"{key}=gpu, but torch sees no GPU; set {key}=cpu")
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
