"""From a configuration to a trained model: builds every part and hands them to the Trainer."""

from __future__ import annotations

import hashlib
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rm_gallery.data.loader import load_steps
from rm_gallery.data.packing import PackingConfig, Plan
from rm_gallery.data.token_data import TokenData
from rm_gallery.data.tokenize import load_tokenizer
from rm_gallery.distributed import World, seed_everything, start
from rm_gallery.errors import StoppedBySignal, UserError
from rm_gallery.modeling.export import InputRecord
from rm_gallery.modeling.parallel import DTYPES, MasterWeights, apply
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.training.checkpoint import (
    PLAN,
    Checkpoints,
    Copies,
    RunIdentity,
    RunTensors,
    Start,
    WeightsFolder,
    find_start,
)
from rm_gallery.training.config import DataConfig, TrainConfig
from rm_gallery.training.inputs import Loaded, build_model, check_data, load_data
from rm_gallery.training.optim import build_optimizer, build_schedule
from rm_gallery.training.ranks import Ranks
from rm_gallery.training.run_folder import claimed, draw_curves, write_run_facts
from rm_gallery.training.stopping import StopSignal
from rm_gallery.training.trackers import RunInfo, Trackers
from rm_gallery.training.trainer import Intervals, Trainer
from rm_gallery.training.validate import validate

log = logging.getLogger(__name__)

_NUM_PROBES = 4  # shortest training groups, rescored from a checkpoint


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    run_dir: Path
    checkpoint: Path
    val_metrics: dict[str, float]


def run_training(config: TrainConfig) -> RunResult:
    """Train as configured, from nothing or the newest checkpoint of the run folder to the last one.

    Raises UserError for anything a person can mend, and StoppedBySignal when SIGTERM or Ctrl-C came; checkpoints
    that were written before stay.
    """
    world = start(config.trainer.device)
    tokenizer = load_tokenizer(
        config.model.partial_pretrain,
        trust_remote_code=config.model.trust_remote_code,
        chat_template=config.data.chat_template,
    )
    seed_everything(config.trainer.seed)
    model = build_model(config, tokenizer)  # before the data, which may take long: a bad folder is said at once
    shape = _shape(model)
    data = config.data
    train = load_data(data, data.train_files, "data.train_files", tokenizer)
    val = load_data(data, data.val_files, "data.val_files", tokenizer) if data.val_files else None
    check_data(config, model, train, val)
    weights = apply(model, config.model, world)
    plan = Plan(
        train.data.sizes,
        _packing(config.data),
        token_budget=config.data.budget,
        seed=config.trainer.seed,
        world_size=world.world_size,
        padded=model.padded,
    )
    total_steps = _count_steps(plan, config, train.data)
    parts = _Parts(world, Ranks(world), model, weights, build_optimizer(weights.named_parameters(), config.optim),
                   plan, train, val, total_steps)  # fmt: skip
    run_dir = config.trainer.run_dir
    with claimed(run_dir) if world.rank == 0 else nullcontext():
        tensors = RunTensors(model, weights, parts.optimizer)
        identity = _identity(config, parts, shape)
        begin = find_start(
            run_dir, config.trainer.resume_mode, identity, tensors, parts.ranks, copies_url=config.trainer.copies_url
        )
        if begin.folder is not None and begin.progress.step == total_steps:
            log.info("the run is complete: %s is its last step", begin.folder)
            return RunResult(run_dir, begin.folder, begin.progress.last_val)
        _write_facts(config, parts, begin.progress.step)
        checkpoints = Checkpoints(
            run_dir, config.trainer, tensors, _weights_folder(config, model, tokenizer, train.data), parts.ranks,
            facts=identity.facts(begin.origin), copies=_copies(config, parts.ranks), latest=begin.folder,
        )  # fmt: skip
        val_metrics = _train(config, parts, begin, checkpoints)
        draw_curves(run_dir)
    assert checkpoints.latest is not None
    return RunResult(run_dir, checkpoints.latest, val_metrics)


@dataclass(frozen=True)
class _Parts:
    """What is built once and needed in several places."""

    world: World
    ranks: Ranks
    model: RewardModel
    weights: MasterWeights
    optimizer: torch.optim.Optimizer
    plan: Plan
    train: Loaded
    val: Loaded | None
    total_steps: int


def _train(config: TrainConfig, parts: _Parts, begin: Start, checkpoints: Checkpoints) -> dict[str, float]:
    """Train from where `begin` says to the end; returns the last validation's metrics."""
    run = RunInfo(
        config.trainer.project_name,
        config.trainer.experiment_name,
        config.trainer.run_dir,
        config.as_dict(),
        parts.total_steps,
        begin.progress.step,
        begin.progress.validation_pending,
    )
    trackers = Trackers(config.trainer.logger, run)
    failed, hurry = True, False
    try:
        trainer = _build_trainer(config, parts, begin, checkpoints, trackers)
        val_metrics = trainer.train(val_before_train=config.trainer.val_before_train)
        failed = False
        return val_metrics
    except StoppedBySignal:
        hurry = True
        raise
    finally:
        checkpoints.close(hurry=hurry)
        trackers.close(failed=failed)


def _shape(model: RewardModel) -> str:
    """The model's architecture, for a comparison of runs."""
    shapes = repr([(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()])
    count = sum(parameter.numel() for parameter in model.parameters())
    digest = hashlib.sha256(shapes.encode()).hexdigest()[:8]
    return f"{model.network.config.model_type} with {count} parameters ({digest})"


def _identity(config: TrainConfig, parts: _Parts, shape: str) -> RunIdentity:
    """What makes a run this run: under anything else a checkpoint is refused."""
    return RunIdentity(
        fixed={
            "data.train_files": f"fingerprint {parts.train.data.fingerprint()}",
            "trainer.seed": config.trainer.seed,
            "model.partial_pretrain": shape,
            PLAN: f"fingerprint {parts.plan.fingerprint()}",
        },
        config=config.as_dict(),
        total_steps=parts.total_steps,
        rate_at=lambda total_steps, step: build_schedule(config.optim, total_steps)(step),
    )


def _packing(data: DataConfig) -> PackingConfig:
    """What decides the plan, without where the data lie."""
    return PackingConfig(**{each.name: getattr(data, each.name) for each in fields(PackingConfig)})


def _copies(config: TrainConfig, ranks: Ranks) -> Copies | None:
    url = config.trainer.copies_url
    return Copies(url) if url is not None and ranks.rank == 0 else None


def _count_steps(plan: Plan, config: TrainConfig, data: TokenData) -> int:
    if not plan.epoch_steps(0):
        raise UserError(
            f"data.train_batch_size={config.data.train_batch_size} with data.drop_last=true leaves no step: there are "
            f"{int(data.sizes.num_comparisons.sum())} pairs; lower it, or set data.drop_last=false"
        )
    return config.trainer.total_training_steps or plan.num_steps(config.trainer.total_epochs)


def _write_facts(config: TrainConfig, parts: _Parts, start_step: int) -> None:
    train, val = parts.train, parts.val
    facts = {
        "device": str(parts.world.device),
        "world_size": parts.world.world_size,
        "total_steps": parts.total_steps,
        "model": {
            "type": parts.model.network.config.model_type,
            "parameters": sum(parameter.numel() for parameter in parts.model.parameters()),
        },
        "data": {"train": train.facts(), "val": val and val.facts(), "plan_fingerprint": parts.plan.fingerprint()},
    }
    write_run_facts(config.trainer.run_dir, config.to_yaml(), facts, start_step=start_step)
    steps_per_epoch = len(parts.plan.epoch_steps(0))
    epochs = f"{parts.total_steps / steps_per_epoch:g}"
    log.info("%d steps (%s epochs of %d)", parts.total_steps, epochs, steps_per_epoch)


def _weights_folder(config: TrainConfig, model: RewardModel, tokenizer: Any, data: TokenData) -> WeightsFolder:
    computes, wanted = config.model.fsdp_config.model_dtype, config.trainer.export_dtype
    written = computes if wanted == "auto" else wanted
    shortest = np.argsort(data.sizes.longest_text, kind="stable")[:_NUM_PROBES]
    return WeightsFolder(
        model,
        tokenizer,
        InputRecord(
            data.style,
            config.data.append_eos,
            config.data.max_length,
            separator="" if data.has_text_prompts else "\n\n",
        ),
        DTYPES[written],
        exact=computes == written == "fp32",
        probes=[data[int(index)] for index in shortest],
    )


def _build_trainer(
    config: TrainConfig, parts: _Parts, begin: Start, checkpoints: Checkpoints, trackers: Trackers
) -> Trainer:
    objective = OBJECTIVES["bradley_terry"]
    stop = StopSignal()
    model, val = parts.model, parts.val

    def run_validation() -> dict[str, float]:
        assert val is not None
        return validate(model, val.data, objective, token_budget=config.data.budget)

    if val is not None:
        padded = " padded" if model.padded else ""
        log.info("micro-batches of at most %d%s tokens", config.data.budget, padded)
    return Trainer(
        model=model,
        weights=parts.weights,
        objective=objective,
        optimizer=parts.optimizer,
        schedule=build_schedule(config.optim, parts.total_steps),
        clip_grad=config.optim.clip_grad or math.inf,
        steps=load_steps(parts.train.data, parts.plan, rank=parts.world.rank, start_step=begin.progress.step),
        total_steps=parts.total_steps,
        intervals=Intervals(config.trainer.log_freq, config.trainer.test_freq, config.trainer.save_freq),
        max_bad_steps=config.trainer.max_bad_steps,
        validate=run_validation if val is not None else None,
        checkpoints=checkpoints,
        sink=trackers,
        ranks=parts.ranks,
        start=begin,
        stop=stop,
        save_best=config.trainer.save_best,
    )
