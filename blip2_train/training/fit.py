"""The whole of a stage-1 training: resume or start, build, train."""

import dataclasses
import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader

from blip2_train import distributed
from blip2_train.checkpoint import io
from blip2_train.checkpoint.initial import init_from
from blip2_train.config import BatchPlan, Launch, compare_for_resume, plan_batch
from blip2_train.data.batch import collate, collate_eval
from blip2_train.data.feeder import Feeder
from blip2_train.data.stream import EvalStream, Source, TrainStream, open_source
from blip2_train.data.transforms import EvalTransform, TrainTransform
from blip2_train.distributed import World, broadcast_object
from blip2_train.errors import UserError
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
from blip2_train.training.checkpointing import Checkpointing, RunState, load_trained
from blip2_train.training.monitor import Monitor
from blip2_train.training.run_log import MetricsCsv, SkippedLog, wandb_logger
from blip2_train.training.stage1 import Stage1Module
from blip2_train.training.validation import Validation

log = logging.getLogger(__name__)

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
    folder = run_folder(cfg)
    path = on_rank_zero(functools.partial(find_checkpoint, cfg, folder), world)
    resume = io.load(path) if path else None
    if resume is not None and resume["step"] >= cfg["trainer"]["max_steps"]:
        log.info("run %s is finished: step %d of %s", folder, resume["step"], path)
        return folder

    tokenizer = build_tokenizer(cfg["text"])
    sources = open_sources(cfg["data"])
    validation_source = open_validation(cfg)
    state = new_state(cfg, sources, tokenizer)
    if resume is not None:
        on_rank_zero(lambda: check_resume(resume, cfg, state, path), world)
        for key in ("step", "drawn", "wandb_id", "scores"):
            setattr(state, key, resume[key])

    module = build_module(cfg, batch, tokenizer, resume, path)
    vision = module.model.vision
    state.frozen["vision"] = {
        "name": vision.name, "weights": vision.weights, "digest": vision.digest()
    }  # fmt: skip
    if resume is not None and resume["frozen"]["vision"]["digest"] != vision.digest():
        raise UserError(
            f"the image tower {vision.name} has other weights than the one that {path} was trained "
            f"with ({resume['frozen']['vision']['name']}); set vision.* as it was"
        )
    stream = build_stream(cfg, batch, sources, tokenizer, world, state.drawn, vision.image_size)
    trainer, feeder = build_trainer(
        cfg, launch, environment, cuda, module, stream, validation_source, tokenizer, state, resume
    )
    if world.rank == 0:
        (folder / "config.yaml").write_text(state.config)
    log.info("%s; each optimizer step compares %d samples at a time", batch, batch.contrastive)
    trainer.fit(module, train_dataloaders=feeder)
    log.info("run %s is finished at step %d", folder, trainer.global_step)
    return folder


# -- before anything is built ----------------------------------------------------------------------


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


def on_rank_zero(action: Callable[[], Any], world: World) -> Any:
    """Runs on rank 0 and gives every rank its result, or its `UserError`.

    What a folder holds is decided once: views of a network file system differ.
    """
    outcome: tuple[Any, str | None] = (None, None)
    if world.rank == 0:
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, str(error))
    result, problem = broadcast_object(outcome, world)
    if problem is not None:
        raise UserError(problem)
    return result


def find_checkpoint(cfg: Mapping[str, Any], folder: Path) -> Path | None:
    """The checkpoint to go on from, by `resume.from`; None: a new run.

    Raises:
        UserError: a given file is missing or damaged, or a new run would overwrite another.
    """
    wanted = cfg["resume"]["from"]
    checkpoints = folder / "checkpoints"
    if wanted == "auto":
        return io.newest_valid(checkpoints)
    if wanted == "never":
        if io.steps(checkpoints):
            raise UserError(
                f"resume.from=never, but {folder} holds a run; give another run.name or delete it"
            )
        return None
    path = Path(wanted)
    if not path.is_file():
        raise UserError(f"resume.from={wanted}: there is no such file (or auto, or never)")
    return path


def check_resume(
    resume: Mapping[str, Any], cfg: Mapping[str, Any], state: RunState, path: Path
) -> None:
    """Compares configuration and data with the checkpoint's; logs what changed.

    Raises:
        UserError: something changed that may not.
    """
    saved = yaml.safe_load(resume["config"])
    for change in compare_for_resume(saved, cfg, cfg["resume"]["allow"]):
        log.info("changed since the checkpoint: %s", change)
    if resume["data"] != state.data:
        raise UserError(
            f"the shards are not those that {path} was trained on ({resume['data']} then, "
            f"{state.data} now); their order would differ: give the run a new run.name"
        )
    if resume["frozen"]["tokenizer"] != state.frozen["tokenizer"]:
        raise UserError(f"text.tokenizer is not the one that {path} was trained with")


def new_state(cfg: Mapping[str, Any], sources: list[Source], tokenizer: Any) -> RunState:
    """A run's state at step 0."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return RunState(
        drawn={source.name: 0 for source in sources},
        config=yaml.safe_dump(dict(cfg), sort_keys=False),
        frozen={
            "tokenizer": {"digest": hashlib.sha256(repr(vocabulary).encode()).hexdigest()},
        },
        data={
            source.name: {
                "samples": sum(info.samples for info in source.shards),
                "digest": hashlib.sha256(
                    "".join(f"{info.name}{info.sha256}" for info in source.shards).encode()
                ).hexdigest(),
            }
            for source in sources
        },
    )


# -- data ------------------------------------------------------------------------------------------


def open_sources(settings: Mapping[str, Any]) -> list[Source]:
    """The training sources; a weight of null is the source's number of samples.

    Raises:
        UserError: one of them is not there.
    """
    sources = []
    for name, source in settings["sources"].items():
        weight = source["weight"]
        opened = open_source(name, source["shards"], source["split"], 1.0)
        if weight is None:
            weight = sum(info.samples for info in opened.shards)
        sources.append(dataclasses.replace(opened, weight=weight))
    return sources


def open_validation(cfg: Mapping[str, Any]) -> Source | None:
    """The validation split, or None where validation is off."""
    if cfg["validation"]["every"] is None:
        return None
    settings = cfg["data"]["validation"]
    return open_source("validation", settings["shards"], settings["split"])


def build_stream(
    cfg: Mapping[str, Any],
    batch: BatchPlan,
    sources: list[Source],
    tokenizer: Any,
    world: World,
    drawn: dict[str, int],
    image_size: int,
) -> TrainStream:
    """This rank's micro-batches, from where `drawn` says."""
    data = cfg["data"]
    transforms = {
        name: TrainTransform(
            image_size,
            scale=tuple(data["crop_scale"]),
            flip=data["flip"],
            randaugment=source["randaugment"],
        )
        for name, source in data["sources"].items()
    }
    return TrainStream(
        sources,
        transforms,
        functools.partial(collate, tokenizer=tokenizer, max_text_tokens=cfg["text"]["max_tokens"]),
        contrastive_batch=batch.contrastive,
        seed=cfg["seed"],
        shuffle_window=data["shuffle_window"],
        rank=world.rank,
        world=world.size,
        drawn=drawn,
        caption=data["caption"],
        max_words=data["max_words"],
        prompt=data["prompt"],
    )


# -- model and trainer -----------------------------------------------------------------------------


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
    module: Stage1Module,
    stream: TrainStream,
    validation_source: Source | None,
    tokenizer: Any,
    state: RunState,
    resume: dict[str, Any] | None,
) -> tuple[pl.Trainer, Feeder]:
    """Lightning's trainer with our callbacks and loggers, and what feeds it."""
    folder = run_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    world = World(launch.rank, launch.world_size)
    settings, data = cfg["trainer"], cfg["data"]
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=data["num_workers"],
        pin_memory=cuda,
        persistent_workers=data["num_workers"] > 0,
    )
    feeder = Feeder(loader, cfg["text"]["bucket"], world)
    loggers: list[Logger] = []
    skipped = None
    if world.rank == 0:
        skipped = SkippedLog(folder / "skipped.jsonl", state.step)
        loggers = [MetricsCsv(folder / "metrics.csv", state.step)]
        if wandb := wandb_logger(folder, cfg["wandb"], cfg, state.wandb_id):
            loggers.append(wandb)
            state.wandb_id = wandb.experiment.id
    monitor = Monitor(
        feeder,
        skipped,
        log_every=settings["log_every"],
        max_consecutive_skips=settings["max_consecutive_skips"],
        max_skip_fraction=data["max_skip_fraction"],
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
    callbacks: list[pl.Callback] = [monitor]
    if validation_source is not None:
        images = EvalStream(
            validation_source,
            EvalTransform(module.model.vision.image_size),
            max_images=cfg["validation"]["max_images"],
            max_words=data["max_words"],
        )
        make = functools.partial(
            collate_eval, tokenizer=tokenizer, max_text_tokens=cfg["text"]["max_tokens"]
        )
        callbacks.append(
            Validation(
                images,
                make,
                tokenizer,
                monitor,
                checkpointing,
                skipped,
                folder / "samples",
                cfg["validation"],
                num_workers=data["num_workers"],
                seed=cfg["seed"],
            )
        )
    callbacks.append(checkpointing)
    trainer = pl.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=launch.local_world_size,
        num_nodes=launch.world_size // launch.local_world_size,
        strategy=DDPStrategy(
            find_unused_parameters=False,
            gradient_as_bucket_view=True,
            process_group_backend="nccl" if cuda else "gloo",
        )
        if launch.world_size > 1
        else "auto",
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
        default_root_dir=str(folder),
    )
    return trainer, feeder
