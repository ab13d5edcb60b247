"""From a configuration to a trained model: builds the parts of a run and passes them to the Trainer.

Order: agree on the configuration, tokenizer, model, data, parallelism, plan, optimizer, checkpoint to resume, loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rm_gallery.data.batching.loader import Phase, StepBatches, load_phases
from rm_gallery.data.batching.plan import Plan
from rm_gallery.data.config import mixture_of
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.template_date import freeze_date
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.distributed.collectives import HostGroup, broadcast
from rm_gallery.distributed.cpu import bf16_slowdown, has_bf16_units, keep_freed_memory
from rm_gallery.distributed.process_group import World, processes, seed_everything, seed_per_rank
from rm_gallery.errors import StoppedBySignal, UserError
from rm_gallery.log import log_copy
from rm_gallery.modeling.config import with_dtype
from rm_gallery.modeling.language_loss import add_language_loss
from rm_gallery.modeling.parallel.apply import apply, offload_optimizer
from rm_gallery.modeling.parallel.ema import AveragedWeights
from rm_gallery.modeling.parallel.master_weights import TrainedWeights
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.router_loss import RouterLoss
from rm_gallery.modeling.weight_files import tokenizer_folder
from rm_gallery.objectives import Objective, bradley_terry, build_objective
from rm_gallery.objectives.heads import Heads
from rm_gallery.training.agreement import agree_on_plan, agree_on_run
from rm_gallery.training.callbacks import AnnouncedSaver, Callbacks, Sinks
from rm_gallery.training.checkpoint import (
    Checkpoints,
    RunTensors,
    Start,
    find_start,
)
from rm_gallery.training.checkpoint.folders import name_best
from rm_gallery.training.checkpoint.state import OBJECTIVE
from rm_gallery.training.checkpoint_setup import build_checkpoints, model_shape, run_identity
from rm_gallery.training.config import TrainConfig
from rm_gallery.training.data_setup import (
    Loaded,
    check_best_metric,
    check_data,
    load_eval_sets,
    load_sides,
    plan_phases,
)
from rm_gallery.training.metric_names import as_average
from rm_gallery.training.model_setup import StartModel, find_adapter, start_model
from rm_gallery.training.optim import build_optimizer, build_schedule
from rm_gallery.training.report.writer import ReportWriter
from rm_gallery.training.run_dir import (
    LOG_NAME,
    draw_curves,
    earlier_template_date,
    lock_run_dir,
    tracked_facts,
    write_run_facts,
)
from rm_gallery.training.signals import StopSignal
from rm_gallery.training.trackers import NoTrackers, RunInfo, Trackers
from rm_gallery.training.trainer import Intervals, MetricSink, Saver, Trainer, stops_early
from rm_gallery.training.validation import packer_for, validate, validate_sets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """The outputs of a run."""

    run_dir: Path
    checkpoint: Path
    val_metrics: dict[str, float]
    is_main: bool = True
    """Whether this is the main process (rank 0), which prints and writes."""


def run_training(config: TrainConfig, *, callbacks: Callbacks | None = None) -> RunResult:
    """Train as configured, from scratch or from the newest checkpoint of the run directory.

    Under torchrun every process calls it. Raises UserError for errors in configuration, data or environment, and
    StoppedBySignal after SIGTERM or Ctrl-C. Earlier checkpoints are kept.
    """
    stop, trainer = StopSignal(), config.trainer
    with (
        log_copy() as copy_log_to,
        stop.listening(),
        processes(trainer.device, timeout_seconds=trainer.timeout_seconds) as world,
    ):
        return _run(agree_on_run(config, world), world, stop, callbacks or Callbacks(), copy_log_to)


def prepare(config: TrainConfig, world: World, stop: StopSignal, *, validates: bool = True) -> RunParts:
    """Everything that a training step needs: model, data, plan and optimizer. Writes no file of a run.

    validates: whether to read the validation data.
    """
    find_adapter(config)
    path = config.model.partial_pretrain
    tokenizer = load_tokenizer(
        tokenizer_folder(path, key="model.partial_pretrain", base=config.model.lora.base),
        trust_remote_code=config.model.trust_remote_code,
        chat_template=config.data.chat_template,
    )
    config = _with_template_date(config, tokenizer, world)
    config = replace(config, model=with_dtype(config.model, has_bf16=broadcast(_has_bf16(world.device))))
    if world.device.type == "cpu":
        keep_freed_memory()
        if world.is_main and config.model.fsdp_config.model_dtype == "bf16" and (slowdown := bf16_slowdown()) > 1.5:
            log.warning(
                "this CPU multiplies matrices %.1f times slower in bf16 than in fp32; "
                "model.fsdp_config.model_dtype=fp32 trains faster here", slowdown,
            )  # fmt: skip
    seed_everything(config.trainer.seed)
    start = start_model(
        config, tokenizer, world
    )  # before the data, which may take long: a bad folder fails immediately
    shape = model_shape(start.model)
    if config.objective.lm_coefficient:
        path = config.model.partial_pretrain if start.adapter is None else start.adapter.base
        add_language_loss(start.model, path, packing=config.model.packing, wrapper=bool(start.renames))
    coefficient = config.model.router_aux_loss_coef
    router_loss = RouterLoss(start.model, coefficient) if coefficient else None
    objective = build_objective(config.objective.name, config.model.attributes, asdict(config.objective))
    if config.model.heads > 1:
        objective = Heads(objective)
    train, val = load_sides(config.data, tokenizer, validates=validates)
    eval_sets = load_eval_sets(config, tokenizer, train.data)
    check_data(config, objective, start.model, train, val, eval_sets)
    check_best_metric(config.trainer.save_best_metric, val, eval_sets)
    model = start.model
    weights = apply(model, config.model, world, strategy=start.strategy, files=start.files)
    seed_per_rank(config.trainer.seed, world)
    plan = Plan(
        train.data.sizes,
        config.data,
        packer_for(model, token_budget=config.data.budget, world_size=world.world_size),
        seed=config.trainer.seed,
        mixture=mixture_of(train.data, train.files, config.data),
        prompts=train.data.prompt_hashes,
    )
    agree_on_plan(plan)
    phases = plan_phases(config, objective, train.data, plan)
    total_steps = sum(phase.num_steps for phase in phases)
    optimizer = _start_optimizer(config, objective, weights, train.data)
    decay = config.trainer.ema_decay
    ema = None if decay is None else AveragedWeights(weights, decay)
    return RunParts(
        config, tokenizer, start, shape, world, HostGroup(world), stop, model, weights, objective, optimizer, phases,
        train, val, eval_sets, total_steps, router_loss, ema,
    )  # fmt: skip


def _run(
    config: TrainConfig, world: World, stop: StopSignal, callbacks: Callbacks, copy_log_to: Callable[[Path], None]
) -> RunResult:
    loop = prepare(config, world, stop)
    config, start, ranks, total_steps = loop.config, loop.start, loop.ranks, loop.total_steps
    train, plan, run_dir = loop.train, loop.phases[0].plan, config.trainer.run_dir
    with ranks.on_main(lock_run_dir(run_dir)):
        if world.is_main:
            copy_log_to(run_dir / LOG_NAME)
        tensors = RunTensors(loop.model, loop.weights, loop.optimizer, has_frozen=start.adapter is None, ema=loop.ema)
        identity = run_identity(config, loop.phases, loop.shape)
        begin = find_start(
            run_dir, config.trainer.resume_mode, identity, tensors, ranks, mirror_url=config.trainer.mirror_url
        )
        if begin.progress.use_metric(config.trainer.save_best_metric):
            log.warning("trainer.save_best_metric=%s is new: earlier values of another are not compared with it",
                        config.trainer.save_best_metric)  # fmt: skip
        if world.is_main and config.trainer.save_best:
            name_best(run_dir, begin.progress)  # a kill may have come between the last checkpoint and best.json
        if begin.folder is not None and _is_complete(config, begin, total_steps):
            return RunResult(run_dir, begin.folder, begin.progress.last_val, world.is_main)
        if world.is_main:
            _write_facts(config, world, start, plan, train, loop.val, loop.eval_sets, total_steps, begin.progress.step)
        checkpoints = build_checkpoints(
            config, loop.objective, start, loop.weights, tensors, loop.tokenizer, train, ranks, identity, begin
        )
        val_metrics = _train(config, loop, begin, checkpoints, callbacks)
        if world.is_main:
            draw_curves(run_dir)
    assert checkpoints.latest is not None
    return RunResult(run_dir, checkpoints.latest, val_metrics, world.is_main)


def _is_complete(config: TrainConfig, begin: Start, total_steps: int) -> bool:
    """Whether nothing is left to train, which is logged. Raises UserError if nothing was trained either."""
    stopped_early = stops_early(begin.progress, config.trainer.early_stopping_patience)
    if begin.progress.step != total_steps and not stopped_early:
        return False
    if begin.progress.bad_steps == total_steps:
        raise UserError(f"{begin.folder}: all {total_steps} steps were skipped: nothing was trained")
    log.warning(
        "the run is complete: %s is its last step, and nothing is left to train; for a new run set "
        "trainer.experiment_name=...", begin.folder,
    )  # fmt: skip
    return True


def _start_optimizer(
    config: TrainConfig, objective: Objective, weights: TrainedWeights, data: TokenData
) -> torch.optim.Optimizer:
    """The optimizer of the weights and of the objective's parameters, which start from the training data."""
    objective.start(data)
    added = {f"{OBJECTIVE}{name}": parameter for name, parameter in objective.parameters().items()}
    weights.add(added)
    optimizer = build_optimizer(
        weights.named_parameters(), config.optim, seed=config.trainer.seed, added=added,
        added_lr=config.objective.threshold_lr,
    )  # fmt: skip
    offload_optimizer(optimizer, config.model.fsdp_config, weights.device)
    return optimizer


def _has_bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bf16_units()


def _with_template_date(config: TrainConfig, tokenizer: Any, world: World) -> TrainConfig:
    """The configuration with the date that the chat template writes, frozen in the tokenizer, the same on all ranks.

    A run that is resumed keeps its date. None for a template that writes no date.
    """
    date = None
    if world.is_main:
        date = config.data.template_date or earlier_template_date(config.trainer.run_dir, config.trainer.resume_mode)
        date = freeze_date(tokenizer, date, key="data.template_date")
    date = broadcast(date)
    if date is not None and not world.is_main:
        freeze_date(tokenizer, date, key="data.template_date")
    return replace(config, data=replace(config.data, template_date=date))


@dataclass(frozen=True)
class RunParts:
    """The parts that the training loop is built from."""

    config: TrainConfig
    tokenizer: Any
    start: StartModel
    shape: str
    """See `model_shape`."""
    world: World
    ranks: HostGroup
    stop: StopSignal
    model: RewardModel
    weights: TrainedWeights
    objective: Objective
    optimizer: torch.optim.Optimizer
    phases: Sequence[Phase]
    train: Loaded
    val: Loaded | None
    eval_sets: Mapping[str, Loaded]
    total_steps: int
    router_loss: RouterLoss | None
    ema: AveragedWeights | None


def _train(
    config: TrainConfig, loop: RunParts, begin: Start, checkpoints: Checkpoints, callbacks: Callbacks
) -> dict[str, float]:
    """Train from the checkpoint `begin` to the last step; returns the metrics of the last validation."""
    run = RunInfo(
        config.trainer.project_name,
        config.trainer.experiment_name,
        config.trainer.run_dir,
        config.to_save(),
        loop.total_steps,
        start_step=begin.progress.step,
        repeats_validation=begin.progress.validation_pending,
        best_metric=config.trainer.save_best_metric,
        facts=tracked_facts(config.trainer.run_dir) if loop.world.is_main else {},
    )
    trackers = Trackers(config.trainer.logger, run) if loop.world.is_main else NoTrackers()
    report = ReportWriter(config.trainer.run_dir) if loop.world.is_main else None
    failed, stopped = True, False
    try:
        on_save = callbacks.on_save if loop.world.is_main else None
        sink = Sinks(trackers, report, callbacks) if report else trackers
        trainer = _build_trainer(config, loop, begin, AnnouncedSaver(checkpoints, on_save), sink, trackers.tick)
        val_metrics = trainer.train(val_before_train=config.trainer.val_before_train)
        failed = False
        return val_metrics
    except StoppedBySignal:
        stopped = True
        raise
    finally:
        checkpoints.close(wait_for_uploads=not stopped)
        if report:
            trackers.attach(report.finish())
        trackers.close(failed=failed)


def _write_facts(
    config: TrainConfig,
    world: World,
    start: StartModel,
    plan: Plan,
    train: Loaded,
    val: Loaded | None,
    eval_sets: Mapping[str, Loaded],
    total_steps: int,
    start_step: int,
) -> None:
    facts = {
        "device": str(world.device),
        "world_size": world.world_size,
        "strategy": start.strategy,
        "total_steps": total_steps,
        "model": {
            "type": start.model.network.config.model_type,
            "parameters": start.num_parameters,
            "trained_parameters": start.num_trained,
        },
        "data": {
            "train": train.facts(),
            "val": val and val.facts(),
            "plan_fingerprint": plan.fingerprint(),
            "eval_sets": {name: each.facts() for name, each in eval_sets.items()},
        },
    }
    write_run_facts(config.trainer.run_dir, config.to_yaml(), facts, start_step=start_step)
    _log_overview(config, world, start, plan, train, val, total_steps)


def _log_overview(
    config: TrainConfig,
    world: World,
    start: StartModel,
    plan: Plan,
    train: Loaded,
    val: Loaded | None,
    total_steps: int,
) -> None:
    """What trains on what, and where, in a line each."""
    count, epoch = start.num_parameters, len(plan.epoch_steps(0))
    dtype = config.model.fsdp_config.model_dtype
    ranks = f", {world.world_size} processes" if world.world_size > 1 else ""
    held_out = f"; {val.data.num_comparisons:,} for validation" if val else "; no validation"
    padded = " padded" if start.model.padded else ""
    trained = f"{start.num_trained:,} of {count:,} parameters trained"
    trained = trained if start.num_trained < count else f"{count:,} parameters, all trained"
    log.info("model   %s, %s", start.model.network.config.model_type, trained)
    log.info("device  %s%s, %s, strategy %s", world.device, ranks, dtype, start.strategy)
    items = train.data.unit
    count_and_tokens = f"{train.data.num_comparisons:,} {items}, {train.data.num_tokens:,} tokens"
    log.info("data    %s%s", count_and_tokens, held_out)
    if config.objective.name == "regression_then_bt":  # phases with other epochs
        log.info("steps   %s, %d %s or pairs each", f"{total_steps:,}", config.data.train_batch_size, items)
    else:
        epochs = f"{total_steps / epoch:.3g} epochs of {epoch}"
        log.info("steps   %s (%s), %d %s each", f"{total_steps:,}", epochs, config.data.train_batch_size, items)
    log.info("budget  micro-batches of at most %s%s tokens", f"{config.data.budget:,}", padded)
    log.info("run     %s", config.trainer.run_dir)


def load_parts(parts: RunParts, start_step: int = 0) -> Iterator[StepBatches]:
    """The batches of this rank from a step on."""
    return load_phases(parts.phases, rank=parts.world.rank, start_step=start_step)


def _build_trainer(config: TrainConfig, loop: RunParts, begin: Start, checkpoints: Saver, sink: MetricSink,
    tick: Callable[[str], None],
) -> Trainer:  # fmt: skip
    weights = config.model.output_weights
    val = loop.val.data if loop.val else None
    sets = {name: (each.data, each.benchmark) for name, each in loop.eval_sets.items()}

    def validate_weights(before_pack: Callable[[], None]) -> dict[str, float]:
        return validate_sets(val, sets, lambda data, benchmark: validate(
            loop.model, data, loop.objective if benchmark is None else bradley_terry, token_budget=config.data.budget,
            share_prompts=config.data.share_prompts, device=loop.world.device, before_pack=before_pack,
            attribute_weights=weights, benchmark=benchmark,
        ))  # fmt: skip

    def run_validation(before_pack: Callable[[], None]) -> dict[str, float]:
        metrics = validate_weights(before_pack)
        if loop.ema is None:
            return metrics
        with loop.ema.applied():
            return {**metrics, **as_average(validate_weights(before_pack))}

    return Trainer(
        model=loop.model,
        weights=loop.weights,
        objective=loop.objective,
        optimizer=loop.optimizer,
        schedule=build_schedule(config.optim, loop.total_steps),
        clip_grad=config.optim.clip_grad or math.inf,
        steps=load_parts(loop, begin.progress.step),
        total_steps=loop.total_steps,
        intervals=Intervals(config.trainer.log_freq, config.trainer.test_freq, config.trainer.save_freq),
        max_bad_steps=config.trainer.max_bad_steps,
        validate=run_validation if val is not None or sets else None,
        checkpoints=checkpoints,
        sink=sink,
        ranks=loop.ranks,
        start=begin,
        stop=loop.stop,
        save_best=config.trainer.save_best,
        patience=config.trainer.early_stopping_patience,
        patience_after=sum(phase.num_steps for phase in loop.phases[:-1]) or -1,
        tick=tick,
        router_loss=loop.router_loss,
        lm_coefficient=config.objective.lm_coefficient,
        ema=loop.ema,
    )
