"""The whole of a stage-1 training: resume or start, build, train."""

import functools
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy

from blip2_train import distributed
from blip2_train.checkpoint import io
from blip2_train.checkpoint.initial import init_from
from blip2_train.config import BatchPlan, Launch, plan_batch
from blip2_train.data.feeder import Feeder
from blip2_train.models.freezing import freeze_unreached
from blip2_train.training.build import (
    FROZEN_PREFIXES,
    build_loss,
    build_model,
    build_tokenizer,
    initialise_qformer,
    log_parameters,
    run_folder,
)
from blip2_train.training.checkpointing import Checkpointing, load_trained
from blip2_train.training.devices import (
    check_devices,
    cluster_environment,
    on_rank_zero,
    use_cuda,
)
from blip2_train.training.feeding import (
    open_sources,
    open_validation,
    train_loader,
    train_stream,
    validation_images,
)
from blip2_train.training.monitor import Monitor
from blip2_train.training.resume import (
    check_configuration,
    check_data,
    check_tower,
    find_checkpoint,
    new_state,
)
from blip2_train.training.run_log import MetricsCsv, SkippedLog, wandb_logger
from blip2_train.training.stage1 import Stage1Module
from blip2_train.training.validation import Validation

log = logging.getLogger(__name__)

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # tips and advertisements
# Lightning counts the frozen tower's modules and warns that they are in eval mode; they must be.
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")


def fit(cfg: Mapping[str, Any], launch: Launch) -> Path:
    """Trains, or continues a training, to its last step.

    Args:
        cfg: resolved and validated configuration.
        launch: how this process was started.

    Returns:
        The run's folder.

    Raises:
        UserError: something given is wrong; raised before any training, on all ranks alike.
    """
    # 1. who we are
    cuda = use_cuda(cfg["trainer"]["accelerator"])
    check_devices(cfg["trainer"]["devices"], launch, cuda)
    environment = cluster_environment(launch)
    world = distributed.start(
        launch.rank,
        launch.local_rank,
        launch.world_size,
        environment.main_address,
        environment.main_port,
        cuda=cuda,
    )
    batch = plan_batch(cfg["batch"]["size"], cfg["batch"]["accumulate"], world.size)

    # 2. where the run stands
    folder = run_folder(cfg)
    path = on_rank_zero(functools.partial(find_checkpoint, cfg, folder), world)
    resume = io.load(path, checked=True) if path else None
    if resume is not None:
        check_configuration(resume, cfg, world.size)
    if resume is not None and resume["step"] >= cfg["trainer"]["max_steps"]:
        log.info("run %s is finished: step %d of %s", folder, resume["step"], path)
        return folder
    sources, held_out = open_sources(cfg["data"]), open_validation(cfg)
    tokenizer = build_tokenizer(cfg["text"])
    state = new_state(cfg, sources, tokenizer, world.size)
    if resume is not None and path is not None:
        check_data(resume, state, path)
        state.go_on_from(resume)

    # 3. model, data, trainer
    module = build_module(cfg, batch, tokenizer, resume, path)
    vision = module.model.vision
    state.frozen["vision"] = check_tower(vision, resume, path)
    stream = train_stream(cfg, batch, sources, tokenizer, world, state.drawn, vision.image_size)
    feeder = Feeder(train_loader(stream, cfg, cuda), cfg["text"]["bucket"], world)
    folder.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = []
    skipped = None
    if world.rank == 0:
        (folder / "config.yaml").write_text(state.config)
        skipped = SkippedLog(folder / "skipped.jsonl", state.step)
        loggers.append(MetricsCsv(folder / "metrics.csv", state.step))
        if wandb := wandb_logger(folder, cfg["wandb"], cfg, state.wandb_id):
            loggers.append(wandb)
            state.wandb_id = wandb.experiment.id
    monitor = Monitor(
        feeder,
        skipped,
        start_step=state.step,
        log_every=cfg["trainer"]["log_every"],
        max_consecutive_skips=cfg["trainer"]["max_consecutive_skips"],
        max_skip_fraction=cfg["data"]["max_skip_fraction"],
    )
    checkpointing = Checkpointing(
        folder / "checkpoints",
        state,
        stream.drawn_after,
        FROZEN_PREFIXES,
        monitor.paused,
        resume=resume,
        **cfg["checkpoint"],
    )
    callbacks: list[pl.Callback] = [monitor]  # in this order at the end of each step
    if held_out is not None:
        images, collate = validation_images(cfg, held_out, tokenizer, vision.image_size)
        callbacks.append(
            Validation(
                images,
                collate,
                tokenizer,
                monitor,
                checkpointing,
                skipped,
                folder / "samples",
                cfg["validation"],
                num_workers=cfg["data"]["num_workers"],
                seed=cfg["seed"],
            )
        )
    callbacks.append(checkpointing)
    trainer = build_trainer(cfg, launch, environment, cuda, loggers, callbacks)

    log.info("%s; each optimizer step compares %d samples at a time", batch, batch.contrastive)
    trainer.fit(module, train_dataloaders=feeder)
    log.info("run %s is finished at step %d", folder, trainer.global_step)
    return folder


def build_module(
    cfg: Mapping[str, Any],
    batch: BatchPlan,
    tokenizer: Any,
    resume: Mapping[str, Any] | None,
    path: Path | None,
) -> Stage1Module:
    """The Lightning module, its weights from the checkpoint, `init_from`, a BERT or at random."""
    model = build_model(
        cfg,
        vocab_size=len(tokenizer),
        dec_token_id=tokenizer.bos_token_id,
        end_token_id=tokenizer.sep_token_id,
    )
    if cfg["trainer"]["precision"] == "64-true":  # before weights are loaded, which would round
        model.double()
    if resume is not None:
        assert path is not None
        load_trained(model, resume["model"], FROZEN_PREFIXES, path)
        log.info("continuing %s from step %d", path, resume["step"])
    elif cfg["init_from"] is not None:
        account = init_from(model, Path(cfg["init_from"]), FROZEN_PREFIXES)
        log.info("init_from=%s: %s", cfg["init_from"], account)
    else:
        initialise_qformer(model, cfg["qformer"]["init"])
    module = Stage1Module(
        model,
        loss=build_loss(cfg["loss"]),
        batch=batch,
        seed=cfg["seed"],
        optimizer=cfg["optimizer"],
        schedule={**cfg["schedule"], "max_steps": cfg["trainer"]["max_steps"]},
    )
    if unreached := freeze_unreached(model, module.rehearsal_loss):
        log.info("no loss reaches %d parameters, which are frozen: %s", len(unreached), unreached)
    log_parameters(model)
    return module


def build_trainer(
    cfg: Mapping[str, Any],
    launch: Launch,
    environment: Any,
    cuda: bool,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    """Lightning's trainer without its own checkpoints, samplers, bars and validation loop."""
    settings = cfg["trainer"]
    ddp = DDPStrategy(
        find_unused_parameters=False,
        broadcast_buffers=False,  # the only buffers are the frozen tower's
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
        accumulate_grad_batches=cfg["batch"]["accumulate"],
        limit_val_batches=0,
        logger=loggers or False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(run_folder(cfg)),
    )
    _leave_signals_alone(trainer)
    return trainer


def _leave_signals_alone(trainer: pl.Trainer) -> None:
    """Keeps Lightning (2.6) from handling signals: the default, to end, is the safe answer.

    Its SIGTERM handler broadcasts wherever the rank happens to be, and before each batch every
    rank reads a flag from the device, so that the host would wait for the device in every step.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if hasattr(trainer, "_signal_connector"):
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
