"""The training loop: forward and backward, optimizer step, logging, validation, saving. Its parts are passed in."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, TypeAlias

import torch
from torch import nn

from rm_gallery.data.batching.loader import StepBatches
from rm_gallery.distributed.collectives import HostGroup, sum_numbers
from rm_gallery.errors import StoppedBySignal, TrainingStopped
from rm_gallery.modeling.language_loss import RewardsAndLosses
from rm_gallery.modeling.parallel.ema import AveragedWeights
from rm_gallery.modeling.parallel.master_weights import TrainedWeights
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.router_loss import RouterLoss
from rm_gallery.objectives import Objective
from rm_gallery.objectives.metrics import Sums
from rm_gallery.training.checkpoint import Progress, Start, random_state, set_random_state
from rm_gallery.training.metric_names import parse_metric
from rm_gallery.training.optim import Schedule
from rm_gallery.training.signals import StopSignal

log = logging.getLogger(__name__)

STOP_CHECKS_PER_STEP = 4  # all-reduces per step that find out whether any rank has to stop


class MetricSink(Protocol):
    """Receives the metrics; see `trackers.Trackers`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...


Validation: TypeAlias = Callable[[Callable[[], None]], dict[str, float]]
"""Returns metrics. Calls its argument before each micro-batch; the argument may raise to abort."""


class Saver(Protocol):
    """Writes checkpoints; see `checkpoint.Checkpoints`."""

    @property
    def latest(self) -> Path | None: ...

    def save(self, progress: Progress, sums: Mapping[str, float], *, is_last: bool = False) -> None: ...

    def has_failed(self) -> bool: ...

    def wait(self) -> None: ...

    def describe_last_good(self, progress: Progress) -> str: ...


@dataclass(frozen=True)
class Intervals:
    """Steps between events; for `validate` and `save`, 0 or less means only at the end."""

    log: int
    validate: int
    save: int


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step."""

    loss: float
    grad_norm: float
    is_finite: bool
    """False: the optimizer step was skipped."""


class Trainer:
    """Trains one model. Every part is passed in, so that it can be tested alone."""

    def __init__(
        self, *, model: RewardModel, weights: TrainedWeights, objective: Objective, optimizer: torch.optim.Optimizer,
        schedule: Schedule, clip_grad: float, steps: Iterator[StepBatches], total_steps: int, intervals: Intervals,
        max_bad_steps: int, validate: Validation | None, checkpoints: Saver, sink: MetricSink,
        ranks: HostGroup, start: Start | None = None, stop: StopSignal | None = None, save_best: bool = False,
        patience: int | None = None, tick: Callable[[str], None] = lambda text: None,
        router_loss: RouterLoss | None = None, ema: AveragedWeights | None = None, patience_after: int = -1,
        lm_coefficient: float = 0.0,
    ) -> None:  # fmt: skip
        """start: the checkpoint that the run resumes from. steps: those after it.

        patience: `trainer.early_stopping_patience`; validations up to step `patience_after` do not count for it.
        lm_coefficient: of the language-model loss, if the model gives one.
        tick: called before each micro-batch with a text that says which.
        """
        self.model, self.weights, self.objective = model, weights, objective
        self.optimizer, self.schedule, self.clip_grad = optimizer, schedule, clip_grad
        self.steps, self.total_steps, self.intervals = steps, total_steps, intervals
        self.max_bad_steps, self.validate, self.checkpoints, self.sink = max_bad_steps, validate, checkpoints, sink
        self.ranks, self.stop, self.save_best = ranks, stop or StopSignal(), save_best
        self.patience, self.tick, self.router_loss, self.ema = patience, tick, router_loss, ema
        self.patience_after, self.lm_coefficient = patience_after, lm_coefficient
        self.start = start or Start()
        self.progress = self.start.progress
        self.parameters: list[nn.Parameter] = [parameter for _, parameter in weights.named_parameters()]
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        unit = "conversations" if objective.reads == "tokens" else "pairs"
        self.window = _Window(self.start.sums, weights.device, unit)
        self._saved_step = self.progress.step  # of the newest checkpoint

    def train(self, *, val_before_train: bool = False) -> dict[str, float]:
        """Run the remaining steps; returns the metrics of the last validation.

        Raises TrainingStopped after `max_bad_steps` consecutive steps with a non-finite loss or gradient, and
        StoppedBySignal after SIGTERM or Ctrl-C, once the run is saved.
        """
        self.stop.begin()
        if self.start.random is not None:
            set_random_state(self.start.random)
        if not self.progress.step and val_before_train and self.validate:
            self._validate()
        if self.progress.validation_pending:
            self._validate()
        while self.progress.step < self.total_steps and not stops_early(self.progress, self.patience):
            self._next_step()
        if self.progress.bad_steps:
            log.warning("%d of %d steps were skipped: not finite", self.progress.bad_steps, self.total_steps)
        return self.progress.last_val

    def _next_step(self) -> None:
        """One step, and the logging, validation and saving that are due after it."""
        progress = self.progress
        batches = next(self.steps)
        learning_rate = self._set_learning_rate(progress.step)
        before = random_state()
        try:
            result = self.train_step(batches, self.window.sums)
        except _StopRequested:  # this step is discarded; a resumed run repeats it
            self.optimizer.zero_grad(set_to_none=True)
            set_random_state(before)
            self._save_and_stop()
        progress.step += 1
        self._watch(result)
        self.window.add(batches)
        is_last = progress.step == self.total_steps
        if progress.step % self.intervals.log == 0 or is_last or batches.ends_phase:
            self._log(result, learning_rate, batches)
        is_best = False
        if self.validate and (is_last or _is_due(progress.step, self.intervals.validate)):
            is_best = self._validate()
        if stops_early(progress, self.patience):
            metric = parse_metric(progress.best_metric)
            best = math.nan if progress.highest_accuracy is None else progress.highest_accuracy
            log.info(
                "early stopping at step %d: no %s %s %.4f in the last %d validations", progress.step,
                progress.best_metric, "below" if metric and metric.direction < 0 else "above", best,
                progress.validations_since_highest,
            )  # fmt: skip
            is_last = True
        if is_last or is_best or _is_due(progress.step, self.intervals.save):
            self._save(is_last=is_last)

    def train_step(self, batches: StepBatches, sums: Sums) -> StepResult:
        """Forward and backward of every micro-batch, then one optimizer step, unless loss or gradient are not finite.

        The loss of a micro-batch is the sum over its comparisons, divided by the number of comparisons in the whole
        step over all ranks. The result therefore does not depend on micro-batches, accumulation or world size. Example:
        a step of 6 comparisons in micro-batches of 4 and 2 has the loss sum(4) / 6 + sum(2) / 6; the mean of the two
        means would weigh the last 2 twice as much. All ranks get the same loss and gradient norm, so they skip the same
        steps.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        device = self.weights.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        step_sums = Sums()
        count, objective = len(batches.batches), self.objective.phases[batches.phase]
        if self.router_loss is not None:
            self.router_loss.start(batches.batches, device)
        for index, batch in enumerate(batches.batches):
            if _is_stop_check(index, count):
                self._check_stop()
            if index:
                self.tick(f"micro-batch {index + 1}/{count}")
            batch = batch.to(device)
            outputs, language = self.model(batch), None
            if isinstance(outputs, RewardsAndLosses):
                outputs, language = outputs
            loss, metric_sums = objective(outputs, batch)
            share = loss / batches.num_comparisons
            if language is not None:
                share = share + self.lm_coefficient * language.total / max(1, batches.num_targets)
                metric_sums = {**metric_sums, "lm_loss": language.total, "lm_tokens": batch.target_times.sum()}
            if self.router_loss is not None:
                balance = self.router_loss.share(batch)
                share = share + self.router_loss.coefficient * balance
                metric_sums = {**metric_sums, "router_aux_loss": balance * batches.num_comparisons}
            self.weights.backward(share, is_last=index == count - 1)
            total += loss.detach()
            step_sums.add(metric_sums)
        loss_value, grad_norm = self.weights.gather_gradients(total / batches.num_comparisons, self.clip_grad)
        is_finite = math.isfinite(loss_value) and math.isfinite(grad_norm)
        if is_finite:
            self.optimizer.step()
            self.weights.copy_to_model()
            if self.ema is not None:
                self.ema.update(self.progress.step - self.progress.bad_steps)
            sums.merge(step_sums)
        return StepResult(loss_value, grad_norm, is_finite)

    def _check_stop(self) -> None:
        """Raise _StopRequested on all ranks if one has received a signal or an asynchronous save has failed."""
        requested, failed = self.stop.received is not None, self.checkpoints.has_failed()
        if self.ranks.any(requested or failed):
            self.checkpoints.wait()  # raises the error of a failed save
            raise _StopRequested

    def _validate(self) -> bool:
        """Validate and log; returns whether the checkpoint of this step is the best so far."""
        assert self.validate is not None
        progress = self.progress
        progress.validation_pending = True
        number = 0

        def before_pack() -> None:
            nonlocal number
            number += 1
            self.tick(f"validation, micro-batch {number}")
            self._check_stop()

        with self.window.paused():
            try:
                metrics = self.validate(before_pack)
            except _StopRequested:
                self._save_and_stop()
        progress.validation_pending = False
        progress.last_val, progress.last_val_step = metrics, progress.step
        for name, value in metrics.items():
            parsed = parse_metric(name)
            if parsed is not None and name == parsed.loss and not math.isfinite(value):
                log.warning("step %d: %s is %s: some validation text has no finite reward", progress.step, name, value)
        self.sink.log(metrics, progress.step)
        if progress.best_metric not in metrics and (self.save_best or self.patience is not None):
            log.warning(
                "step %d: this validation has no %s, so it is not compared with others: set "
                "trainer.save_best_metric to one of %s", progress.step, progress.best_metric,
                ", ".join(name for name in metrics if (each := parse_metric(name)) and each.direction),
            )  # fmt: skip
        elif progress.step > self.patience_after:
            progress.count_validation(metrics)
        return bool(self.save_best and progress.step and progress.note_best(metrics))

    def _log(self, result: StepResult, learning_rate: float, batches: StepBatches) -> None:
        sums = self.window.sums.read()
        self.sink.log(
            {
                **self.objective.phases[batches.phase].means(sums, "train"),
                **({"train/lm_loss": sums["lm_loss"] / sums["lm_tokens"]} if sums.get("lm_tokens") else {}),
                "train/lr": learning_rate,
                "train/grad_norm": result.grad_norm,
                "train/epoch": batches.epoch,
                "train/bad_steps": float(self.progress.bad_steps),
                **self.window.close(),
            },
            self.progress.step,
        )

    def _save(self, *, is_last: bool = False) -> None:
        with self.window.paused():
            self.checkpoints.save(self.progress, self.window.peek(), is_last=is_last)
        self._saved_step = self.progress.step

    def _save_and_stop(self) -> NoReturn:
        """Save the current step unless it is saved already, and raise StoppedBySignal."""
        number = self.stop.received
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        step = self.progress.step
        log.warning("%s received: saving step %d, then exiting", name, step)
        if step > self._saved_step:
            self._save(is_last=True)
        else:
            self.checkpoints.wait()
        what = f"global_step_{step} is saved; rerun the command to resume" if step else "no step was completed"
        raise StoppedBySignal(f"stopped by {name} after step {step} of {self.total_steps}; {what}",
                              status=128 + (number or signal.SIGTERM))  # fmt: skip

    def _set_learning_rate(self, step: int) -> float:
        factor = self.schedule(step)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        return float(self.base_lrs[0] * factor)

    def _watch(self, result: StepResult) -> None:
        """Count skipped steps; raise TrainingStopped after too many consecutive ones."""
        progress = self.progress
        if result.is_finite:
            progress.bad_in_a_row, progress.last_loss = 0, result.loss
            return
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        what = f"loss {result.loss}, gradient norm {result.grad_norm}"
        log.warning("step %d skipped: not finite (%s); %d consecutive", progress.step, what, progress.bad_in_a_row)
        if progress.bad_steps == self.total_steps:
            reason = f"all {progress.bad_steps} steps were skipped: not finite ({what}); nothing was trained"
        elif progress.bad_in_a_row >= self.max_bad_steps:
            reason = (
                f"{progress.bad_in_a_row} consecutive steps were not finite ({what}; "
                f"trainer.max_bad_steps={self.max_bad_steps})"
            )
        else:
            return
        self.checkpoints.wait()
        kept = self.checkpoints.describe_last_good(progress)
        raise TrainingStopped(
            f"step {progress.step}: {reason}; {kept}. Lower optim.lr, or check the data of these steps"
        )


def stops_early(progress: Progress, patience: int | None) -> bool:
    """Whether `patience` validations in a row had no better `trainer.save_best_metric` than one before them."""
    return patience is not None and progress.validations_since_highest >= patience


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _is_stop_check(index: int, count: int) -> bool:
    """Whether to check for a stop request before this micro-batch: several times per step.

    Launchers kill the process soon after the signal.
    Example: with 10 micro-batches before the numbers 0, 3, 6 and 9.
    """
    return index % -(-count // STOP_CHECKS_PER_STEP) == 0


class _StopRequested(Exception):
    """A stop was requested on some rank."""


class _Window:
    """Metric sums and time since the last log line, without the time of validation and saving."""

    def __init__(self, sums: Mapping[str, float], device: torch.device, unit: str) -> None:
        """sums: of the steps between the last log line and the checkpoint that the run resumes from."""
        self.sums, self._device, self._unit = Sums(), device, unit
        self._put(sums)
        self._restart()

    def peek(self) -> dict[str, float]:
        """The sums of this process, without resetting them."""
        return self.sums.peek()

    def _put(self, values: Mapping[str, float]) -> None:
        self.sums.add({name: torch.tensor(value, dtype=torch.float64, device=self._device)
                       for name, value in values.items()})  # fmt: skip

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._comparisons, self._tokens = 0, 0, 0

    def add(self, batches: StepBatches) -> None:
        self._steps += 1
        self._comparisons += batches.num_comparisons if batches.num_pairs is None else batches.num_pairs
        self._tokens += batches.num_tokens

    def close(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        [tokens] = sum_numbers(self._tokens)
        rates = {
            f"perf/{self._unit}_per_second": self._comparisons / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/step_seconds": seconds / self._steps,
        }
        self._restart()
        return rates

    def paused(self) -> _Pause:
        return _Pause(self)


class _Pause:
    def __init__(self, window: _Window) -> None:
        self._window = window

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._window._start += time.perf_counter() - self._began
