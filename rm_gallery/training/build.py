"""From a configuration to a trained model: builds every part and hands them to the Trainer."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rm_gallery.data.loader import load_steps
from rm_gallery.data.packing import Plan
from rm_gallery.data.token_data import TokenData
from rm_gallery.data.tokenize import load_tokenizer
from rm_gallery.distributed import World, processes, seed_apart, seed_everything
from rm_gallery.errors import UserError
from rm_gallery.modeling.export import InputRecord
from rm_gallery.modeling.parallel import DTYPES, TrainedWeights, apply, offload_optimizer
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.training.agreement import agree_on_plan, agree_on_run
from rm_gallery.training.checkpoint import Checkpoints, refuse_earlier_run
from rm_gallery.training.config import TrainConfig
from rm_gallery.training.inputs import Loaded, check_data, load_data
from rm_gallery.training.optim import build_optimizer, build_schedule
from rm_gallery.training.run_folder import draw_curves, write_run_facts
from rm_gallery.training.start_model import StartModel, start_model
from rm_gallery.training.trackers import NoTrackers, RunInfo, Trackers
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
    is_main: bool = True
    """Whether this process is the one that talks to people."""


def run_training(config: TrainConfig) -> RunResult:
    """Train as configured, from nothing to the last checkpoint.

    Under torchrun every process calls it, and rank 0 writes. Raises UserError for anything a person can mend;
    checkpoints that were written before stay.
    """
    with processes(config.trainer.device, timeout_seconds=config.trainer.timeout_seconds) as world:
        return _run(agree_on_run(config, world), world)


def _run(config: TrainConfig, world: World) -> RunResult:
    if world.is_main:
        refuse_earlier_run(config.trainer.run_dir)
    tokenizer = load_tokenizer(
        config.model.partial_pretrain,
        trust_remote_code=config.model.trust_remote_code,
        chat_template=config.data.chat_template,
    )
    seed_everything(config.trainer.seed)
    start = start_model(config, tokenizer, world)  # before the data, which may take long: a bad folder is said at once
    data = config.data
    train = load_data(data, data.train_files, "data.train_files", tokenizer)
    val = load_data(data, data.val_files, "data.val_files", tokenizer) if data.val_files else None
    check_data(config, start.model, train, val)
    model, weights = apply(start.model, config.model, world, strategy=start.strategy, files=start.files)
    seed_apart(config.trainer.seed, world)
    plan = Plan(
        train.data.sizes,
        config.data,
        token_budget=config.data.budget,
        seed=config.trainer.seed,
        world_size=world.world_size,
        padded=model.padded,
    )
    agree_on_plan(plan)
    total_steps = _count_steps(plan, config, train.data)
    if world.is_main:
        _write_facts(config, world, start, plan, train, val, total_steps)
    checkpoints = _build_checkpoints(config, model, weights, tokenizer, train.data)
    run = RunInfo(
        config.trainer.project_name,
        config.trainer.experiment_name,
        config.trainer.run_dir,
        config.as_dict(),
        total_steps,
    )
    trackers = Trackers(config.trainer.logger, run) if world.is_main else NoTrackers()
    failed = True
    try:
        trainer = _build_trainer(config, world, model, weights, plan, train, val, total_steps, checkpoints, trackers)
        val_metrics = trainer.train(val_before_train=config.trainer.val_before_train)
        failed = False
    finally:
        trackers.close(failed=failed)
    if world.is_main:
        draw_curves(run.run_dir)
    return RunResult(run.run_dir, checkpoints.saved[-1], val_metrics, world.is_main)


def _count_steps(plan: Plan, config: TrainConfig, data: TokenData) -> int:
    if not plan.epoch_steps(0):
        raise UserError(
            f"data.train_batch_size={config.data.train_batch_size} with data.drop_last=true leaves no step: there are "
            f"{int(data.sizes.num_comparisons.sum())} pairs; lower it, or set data.drop_last=false"
        )
    return config.trainer.total_training_steps or plan.num_steps(config.trainer.total_epochs)


def _write_facts(
    config: TrainConfig,
    world: World,
    start: StartModel,
    plan: Plan,
    train: Loaded,
    val: Loaded | None,
    total_steps: int,
) -> None:
    facts = {
        "device": str(world.device),
        "world_size": world.world_size,
        "strategy": start.strategy,
        "total_steps": total_steps,
        "model": {
            "type": start.model.network.config.model_type,
            "parameters": start.num_parameters,
        },
        "data": {"train": train.facts(), "val": val and val.facts(), "plan_fingerprint": plan.fingerprint()},
    }
    write_run_facts(config.trainer.run_dir, config.to_yaml(), facts)
    steps_per_epoch = len(plan.epoch_steps(0))
    log.info("%d steps (%s epochs of %d)", total_steps, f"{total_steps / steps_per_epoch:g}", steps_per_epoch)


def _build_checkpoints(
    config: TrainConfig, model: RewardModel, weights: TrainedWeights, tokenizer: Any, data: TokenData
) -> Checkpoints:
    wanted = config.trainer.export_dtype
    shortest = np.argsort(data.sizes.longest_text, kind="stable")[:_NUM_PROBES]
    return Checkpoints(
        config.trainer.run_dir,
        model,
        weights,
        tokenizer,
        InputRecord(
            data.style,
            config.data.append_eos,
            config.data.max_length,
            separator="" if data.has_text_prompts else "\n\n",
        ),
        dtype=DTYPES[config.model.fsdp_config.model_dtype if wanted == "auto" else wanted],
        probes=[data[int(index)] for index in shortest],
    )


def _build_trainer(
    config: TrainConfig, world: World, model: RewardModel, weights: TrainedWeights, plan: Plan, train: Loaded,
    val: Loaded | None, total_steps: int, checkpoints: Checkpoints, trackers: Trackers | NoTrackers,
) -> Trainer:  # fmt: skip
    objective = OBJECTIVES["bradley_terry"]
    optimizer = build_optimizer(weights.named_parameters(), config.optim, is_matrix=weights.is_matrix)
    offload_optimizer(optimizer, config.model.fsdp_config, world.device)

    def run_validation() -> dict[str, float]:
        assert val is not None
        return validate(model, val.data, objective, token_budget=config.data.budget, device=world.device)

    if val is not None:
        padded = " padded" if model.padded else ""
        log.info("micro-batches of at most %d%s tokens", config.data.budget, padded)
    return Trainer(
        model=model,
        weights=weights,
        objective=objective,
        optimizer=optimizer,
        schedule=build_schedule(config.optim, total_steps),
        clip_grad=config.optim.clip_grad or math.inf,
        steps=load_steps(train.data, plan, rank=world.rank),
        total_steps=total_steps,
        intervals=Intervals(config.trainer.log_freq, config.trainer.test_freq, config.trainer.save_freq),
        max_bad_steps=config.trainer.max_bad_steps,
        validate=run_validation if val is not None else None,
        checkpoints=checkpoints,
        sink=trackers,
    )
