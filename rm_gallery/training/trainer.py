"""The training loop: it receives built parts, and fetches, computes, steps, logs, validates and saves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Ge, Gt
from torch import nn

from rm_gallery.data.loader import StepBatches
from rm_gallery.distributed import sum_numbers
from rm_gallery.errors import TrainingStopped
from rm_gallery.metrics import Sums, means
from rm_gallery.modeling.parallel import TrainedWeights
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.objectives import Objective
from rm_gallery.training.checkpoint import Checkpoints
from rm_gallery.training.optim import Schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """Part of `trainer`: how long, how often, and when to give up."""

    __pydantic_config__ = {"extra": "forbid"}

    total_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the training data."""
    total_training_steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps; takes the place of `total_epochs`."""
    test_freq: int = -1
    """Steps between validations; one is always made at the end. 0 or less: only that one."""
    val_before_train: bool = False
    """Validate before the first step as well."""
    max_bad_steps: Annotated[int, Ge(1)] = 10
    """Stop after so many steps in a row whose loss or gradient is not finite."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the new reward head, the order of data, and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU when there is one."""
    timeout_seconds: Annotated[float, Gt(0)] = 1800.0
    """Several processes: stop when one has been waited for so long; the message names it."""


class MetricSink(Protocol):
    """What the loop reports to; see `trackers.Trackers`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...


@dataclass(frozen=True)
class Intervals:
    """Steps between events; for `validate` and `save`, 0 or less means only at the end."""

    log: int
    validate: int
    save: int


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    grad_norm: float
    is_finite: bool
    """False: the weights did not change."""


class Trainer:
    """Trains one model; every part is built elsewhere and can be tested alone."""

    def __init__(
        self, *, model: RewardModel, weights: TrainedWeights, objective: Objective, optimizer: torch.optim.Optimizer,
        schedule: Schedule, clip_grad: float, steps: Iterator[StepBatches], total_steps: int, intervals: Intervals,
        max_bad_steps: int, validate: Callable[[], dict[str, float]] | None, checkpoints: Checkpoints, sink: MetricSink,
    ) -> None:  # fmt: skip
        self.model, self.weights, self.objective = model, weights, objective
        self.optimizer, self.schedule, self.clip_grad = optimizer, schedule, clip_grad
        self.steps, self.total_steps, self.intervals = steps, total_steps, intervals
        self.max_bad_steps, self.validate, self.checkpoints, self.sink = max_bad_steps, validate, checkpoints, sink
        self.parameters: list[nn.Parameter] = [parameter for _, parameter in weights.named_parameters()]
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.bad_steps = 0
        self.bad_in_a_row = 0

    def train(self, *, val_before_train: bool = False) -> dict[str, float]:
        """Run all steps; returns the last validation's metrics.

        Raises TrainingStopped after `max_bad_steps` steps in a row that are not finite.
        """
        last_val: dict[str, float] = {}
        if val_before_train and self.validate:
            last_val = self.validate()
            self.sink.log(last_val, 0)
        window = _Window()
        for step in range(1, self.total_steps + 1):
            is_last = step == self.total_steps
            batches = next(self.steps)
            learning_rate = self._set_learning_rate(step - 1)
            result = self.train_step(batches, window.sums)
            self._watch(result, step)
            window.add(batches)
            if step % self.intervals.log == 0 or is_last:
                rates = window.close()
                self.sink.log(
                    {
                        **means(window.sums.read(), "train"),
                        "train/lr": learning_rate,
                        "train/grad_norm": result.grad_norm,
                        "train/epoch": batches.epoch,
                        "train/bad_steps": float(self.bad_steps),
                        **rates,
                    },
                    step,
                )
            if self.validate and (is_last or _is_due(step, self.intervals.validate)):
                with window.paused():
                    last_val = self.validate()
                self.sink.log(last_val, step)
            if is_last or _is_due(step, self.intervals.save):
                with window.paused():
                    self.checkpoints.save(step, is_last=is_last)
        return last_val

    def train_step(self, batches: StepBatches, sums: Sums) -> StepResult:
        """Forward and backward of every micro-batch, then one update, unless something is not finite.

        The loss of each micro-batch is a sum over its comparisons divided by the comparisons of the whole step,
        so the result does not depend on how the step was cut, nor over how many processes. All of them get the same
        loss and gradient norm, and so all skip the same steps.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        device = self.weights.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        step_sums = Sums()
        for number, batch in enumerate(batches.batches, start=1):
            batch = batch.to(device)
            loss, metric_sums = self.objective(self.model(batch), batch)
            self.weights.backward(loss / batches.num_comparisons, is_last=number == len(batches.batches))
            total += loss.detach()
            step_sums.add(metric_sums)
        loss_value, grad_norm = self.weights.gather_gradients(total / batches.num_comparisons, self.clip_grad)
        is_finite = math.isfinite(loss_value) and math.isfinite(grad_norm)
        if is_finite:
            self.optimizer.step()
            self.weights.publish()
            sums.merge(step_sums)
        return StepResult(loss_value, grad_norm, is_finite)

    def _set_learning_rate(self, step: int) -> float:
        factor = self.schedule(step)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        return float(self.base_lrs[0] * factor)

    def _watch(self, result: StepResult, step: int) -> None:
        """Count steps that were skipped; give up when nothing else comes."""
        if result.is_finite:
            self.bad_in_a_row = 0
            return
        self.bad_steps += 1
        self.bad_in_a_row += 1
        what = f"loss {result.loss}, gradient norm {result.grad_norm}"
        log.warning("step %d skipped: not finite (%s); %d in a row", step, what, self.bad_in_a_row)
        if self.bad_in_a_row >= self.max_bad_steps:
            saved = self.checkpoints.saved
            kept = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written"
            raise TrainingStopped(
                f"step {step}: {self.bad_in_a_row} steps in a row were not finite ({what}; trainer.max_bad_steps="
                f"{self.max_bad_steps}); {kept}. Lower optim.lr, or look at the data of these steps"
            )


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


class _Window:
    """Sums and time since the last log line; validation and saving do not count as training time."""

    def __init__(self) -> None:
        self.sums = Sums()
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._comparisons, self._tokens = 0, 0, 0

    def add(self, batches: StepBatches) -> None:
        self._steps += 1
        self._comparisons += batches.num_comparisons
        self._tokens += batches.num_tokens

    def close(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        [tokens] = sum_numbers(self._tokens)
        rates = {
            "perf/pairs_per_second": self._comparisons / seconds,
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
