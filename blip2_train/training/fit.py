"""The whole of a training, whatever its stage: resume or start, build, train."""

import functools
import gc
import logging
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from blip2_train import distributed, signals
from blip2_train.checkpoint import io
from blip2_train.config import BatchPlan, Launch, batch_plan
from blip2_train.data.feeder import Feeder
from blip2_train.distributed import World, on_every_rank, on_rank_zero
from blip2_train.errors import UserError
from blip2_train.models.freezing import freeze_unreached
from blip2_train.signals import Stopped
from blip2_train.training.build import log_parameters, run_folder
from blip2_train.training.checkpointing import Checkpointing, RunState, load_trained
from blip2_train.training.clip import ClipStage
from blip2_train.training.compiling import compile_blocks, wants_compilation
from blip2_train.training.devices import (
    check_devices,
    cluster_environment,
    use_cuda,
)
from blip2_train.training.feeding import (
    cached_features,
    check_locality,
    open_sources,
    open_validation,
    train_loader,
    train_stream,
    validation_images,
)
from blip2_train.training.float8 import check_gpu
from blip2_train.training.lm import LmStage
from blip2_train.training.lock import RunLock
from blip2_train.training.module import StageModule
from blip2_train.training.monitor import Monitor
from blip2_train.training.overlap import Ahead
from blip2_train.training.preemption import Preemption, leave_signals_alone
from blip2_train.training.resume import (
    check_configuration,
    check_data,
    check_frozen,
    find_checkpoint,
    new_state,
)
from blip2_train.training.run_log import (
    MetricsCsv,
    SkippedLog,
    finish_wandb,
    wandb_logger,
    write_whole,
)
from blip2_train.training.run_report import RunReport
from blip2_train.training.stage import Stage
from blip2_train.training.stage1 import Stage1
from blip2_train.training.stage2 import Stage2
from blip2_train.training.validation import Validation
from blip2_train.training.watchdog import Watchdog

log = logging.getLogger(__name__)

STAGES: dict[str, type[Stage]] = {
    "stage1": Stage1,
    "stage2": Stage2,
    "clip": ClipStage,
    "lm": LmStage,
}

FILE_PATIENCE = 90.0  # seconds; network file systems remember for up to 60 what is not there

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # tips and advertisements
# Lightning counts the frozen tower's modules and warns that they are in eval mode; they must be.
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")


def fit(cfg: Mapping[str, Any], launch: Launch, *, patient: bool = False) -> Path:
    """Trains, or continues a training, to its last step.

    Args:
        cfg: resolved and validated configuration.
        launch: how this process was started.
        patient: wait for another process that trains in the run's folder, instead of refusing.

    Returns:
        The run's folder.

    Raises:
        UserError: something given is wrong; raised before any training, on all ranks alike.
        Stopped: a signal ended the run, which was saved.
    """
    cuda = use_cuda(cfg["trainer"]["accelerator"])
    check_devices(cfg["trainer"]["devices"], launch, cuda)
    check_gpu(cfg, launch, cuda)
    environment = cluster_environment(launch)
    world = distributed.start(
        launch.rank,
        launch.local_rank,
        launch.world_size,
        environment.main_address,
        environment.main_port,
        cuda=cuda,
        # the watchdog says more, so it comes first; in start-up, ranks wait for one another longer
        timeout=max(1.5 * cfg["trainer"]["hang_seconds"], 600),
    )
    batch = batch_plan(cfg, world.size)
    check_locality(cfg["data"]["locality"], batch.contrastive, launch)
    folder = run_folder(cfg)
    lock = RunLock(folder) if world.rank == 0 else None
    try:
        take = functools.partial(lock.acquire, 60.0 if patient else None) if lock else None
        while not on_rank_zero(take, world):
            pass
        stopped = _train(cfg, launch, environment, world, batch, lock)
    finally:
        if lock is not None:
            lock.release()
    if stopped:
        raise Stopped(stopped)
    return folder


def _train(
    cfg: Mapping[str, Any],
    launch: Launch,
    environment: Any,
    world: World,
    batch: BatchPlan,
    lock: RunLock | None,
) -> int:
    """Returns the number of the signal that ended the training, 0 where it is finished."""
    # 1. where the run stands
    cuda = use_cuda(cfg["trainer"]["accelerator"])
    stage = STAGES[cfg["stage"]](cfg)
    folder = run_folder(cfg)
    path = on_rank_zero(functools.partial(find_checkpoint, cfg, folder), world)
    resume = load_checkpoint(path, world) if path else None
    if resume is not None:
        check_configuration(resume, cfg, world.size)
    if resume is not None and resume["step"] >= cfg["trainer"]["max_steps"]:
        log.info("run %s is finished: step %d of %s", folder, resume["step"], path)
        on_rank_zero(functools.partial(export_again, stage, folder, resume["model"], path), world)
        return 0
    sources = on_every_rank(functools.partial(open_sources, cfg["data"]), world)
    held_out = on_every_rank(functools.partial(open_validation, cfg), world)
    stage.features = on_every_rank(
        functools.partial(cached_features, cfg, sources, held_out), world
    )
    fetch_once_per_machine(stage, launch, world)
    state = new_state(cfg, sources, stage.tokenizers(), world.size)
    if resume is not None and path is not None:
        check_data(resume, state, path)
        state.go_on_from(resume)

    # 2. model, data, trainer
    device = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    model = stage.build_model(device=device if cuda else None)
    frozen = on_rank_zero(functools.partial(stage.frozen_parts, model), world)
    check_frozen(frozen, resume, path)
    state.frozen |= frozen
    on_every_rank(functools.partial(stage.start_frozen, model, device), world)
    module = build_module(cfg, stage, model, batch, resume, path)
    if wants_compilation(cfg["trainer"], cuda=cuda):
        compile_blocks(model)
    image_size = stage.image_size(model)
    stream = train_stream(
        cfg, batch, sources, stage.collate(), world, state.drawn, image_size, stage.features
    )
    feeder = Feeder(train_loader(stream, cfg, cuda), stage.text_bucket, world)
    batches = Ahead(feeder, module) if cfg["trainer"]["overlap"] else feeder
    logs: list[Any] = []
    on_rank_zero(lambda: logs.extend(open_logs(folder, state)), world)
    loggers: list[Logger] = []
    skipped = None
    if world.rank == 0:
        skipped, metrics = logs
        loggers.append(metrics)
        if wandb := wandb_logger(folder, cfg["wandb"], cfg, state.wandb_id):
            loggers.append(wandb)
            state.wandb_id = wandb.experiment.id
    monitor = Monitor(
        feeder,
        skipped,
        stream.epochs_after,
        state.counted,
        start_step=state.step,
        log_every=cfg["trainer"]["log_every"],
        max_consecutive_skips=cfg["trainer"]["max_consecutive_skips"],
        max_skip_fraction=cfg["data"]["max_skip_fraction"],
    )
    checkpointing = Checkpointing(
        folder / "checkpoints",
        state,
        stream.drawn_after,
        stage.frozen_prefixes,
        monitor.paused,
        monitor.counted,
        resume=resume,
        **cfg["checkpoint"],
    )
    report = RunReport(folder, monitor)
    watchdog = Watchdog(cfg["trainer"]["hang_seconds"])
    callbacks: list[pl.Callback] = [watchdog, monitor]  # in this order at the end of each step
    if held_out is not None:
        images = validation_images(cfg, held_out, image_size, stage.features)
        callbacks.append(
            Validation(
                stage.build_evaluator(module, images),
                images,
                stage.collate_eval(),
                monitor,
                checkpointing,
                report,
                skipped,
                watchdog,
                folder / "samples",
                cfg["validation"],
                num_workers=cfg["data"]["num_workers"],
            )
        )
    preemption = Preemption(checkpointing.save_now, lock)
    callbacks += [report, checkpointing, preemption]
    trainer = build_trainer(cfg, launch, batch, environment, cuda, loggers, callbacks)

    # 3. train
    log.info("%s", batch)
    try:
        with signals.noted():
            trainer.fit(module, train_dataloaders=batches)
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error
    if preemption.stopped:
        if preemption.saved:
            log.info("run %s is saved at step %d", folder, trainer.global_step)
        finish_wandb(patience=60)  # Slurm is about to end this process
        return preemption.stopped
    on_rank_zero(functools.partial(export, stage, folder, model), world)
    log.info("run %s is finished at step %d", folder, trainer.global_step)
    return 0


def open_logs(folder: Path, state: RunState) -> tuple[SkippedLog, MetricsCsv]:
    """Writes config.yaml and opens the logs, from which steps that will come again are dropped.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        write_whole(folder / "config.yaml", state.config)
        return (
            SkippedLog(folder / "skipped.jsonl", state.step),
            MetricsCsv(folder / "metrics.csv", state.step),
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); make room there") from error


def load_checkpoint(path: Path, world: World) -> dict[str, Any]:
    """Reads the checkpoint that rank 0 has found; all ranks call it.

    Raises:
        UserError: on all ranks, where one of them does not see that file.
    """
    wanted = on_rank_zero(functools.partial(io.identity, path), world)

    def load() -> dict[str, Any]:
        io.wait_for(path, wanted, FILE_PATIENCE)
        return io.load(path, checked=True)

    return on_every_rank(load, world)


def leave() -> None:
    """Leaves the other ranks and the W&B run: another training may follow in this process."""
    distributed.stop()
    finish_wandb()
    gc.collect()  # a model, its trainer and its loaders refer to each other


def fetch_once_per_machine(stage: Stage, launch: Launch, world: World) -> None:
    """One process of each machine downloads what the others then read from its cache.

    Raises:
        UserError: on all ranks, where one of them cannot be had.
    """
    on_every_rank(stage.download if launch.local_rank == 0 else lambda: None, world)


def export(stage: Stage, folder: Path, model: Any) -> None:
    """Writes what other runs load, beside the checkpoints.

    Raises:
        UserError: it cannot be written; the same command tries again.
    """
    if stage.product is None:
        return
    try:
        stage.export(model, folder / stage.product)
    except Exception as error:  # of several libraries' writers, which fail in ways of their own
        raise UserError(
            f"{folder / stage.product} could not be written ({error}); make room, and give the "
            "same command again"
        ) from error


def export_again(stage: Stage, folder: Path, weights: dict[str, Tensor], path: Path) -> None:
    """Makes up for a run that was killed between its last checkpoint and its product.

    Args:
        stage: of the run.
        folder: of the run.
        weights: of its last checkpoint.
        path: of that checkpoint.
    """
    if stage.product is None or (folder / stage.product).exists():
        return
    model = stage.build_model()
    load_trained(model, weights, stage.frozen_prefixes, path)
    export(stage, folder, model)


def build_module(
    cfg: Mapping[str, Any],
    stage: Stage,
    model: Any,
    batch: BatchPlan,
    resume: Mapping[str, Any] | None,
    path: Path | None,
) -> StageModule:
    """The Lightning module, its weights from the checkpoint or as the stage begins."""
    if cfg["trainer"]["precision"] == "64-true":  # before weights are loaded, which would round
        model.double()
    if resume is not None:
        assert path is not None
        load_trained(model, resume["model"], stage.frozen_prefixes, path)
        log.info("continuing %s from step %d", path, resume["step"])
    else:
        stage.initialise(model)
    module = stage.build_module(model, batch)
    with module.rehearsing():
        unreached = freeze_unreached(model, module.rehearsal_loss)
    if unreached:
        log.info("no loss reaches %d parameters, which are frozen: %s", len(unreached), unreached)
    log_parameters(model)
    return module


def build_trainer(
    cfg: Mapping[str, Any],
    launch: Launch,
    batch: BatchPlan,
    environment: Any,
    cuda: bool,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    """Lightning's trainer without its own checkpoints, samplers, bars and validation loop."""
    settings = cfg["trainer"]
    ddp = DDPStrategy(
        find_unused_parameters=False,
        broadcast_buffers=False,  # frozen ones are equal; others before validations (clip)
        gradient_as_bucket_view=True,
        process_group_backend="nccl" if cuda else "gloo",
    )
    trainer = pl.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=launch.local_world_size,
        num_nodes=launch.world_size // launch.local_world_size,
        strategy=ddp if launch.world_size > 1 else "auto",
        plugins=[environment],
        precision=settings["precision"],
        deterministic=settings["deterministic"],
        max_steps=settings["max_steps"],
        max_epochs=-1,
        accumulate_grad_batches=batch.accumulate,
        limit_val_batches=0,
        logger=loggers or False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(run_folder(cfg)),
    )
    leave_signals_alone(trainer)
    return trainer
