"""`rm-gallery find-lr`: a learning-rate range test on the configuration of a run.

Smith 2017 (WACV, arXiv 1506.01186), "Cyclical Learning Rates for Training Neural Networks", section 3.3: the learning
rate grows from step to step, and the loss shows which rates train and which diverge. Loads no torch until it runs.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rm_gallery.errors import TrainingStopped, UserError
from rm_gallery.safe_text import safe

if TYPE_CHECKING:
    from rm_gallery.training.checkpoint import Progress
    from rm_gallery.training.config import TrainConfig
    from rm_gallery.training.setup import RunParts

log = logging.getLogger(__name__)

_WIDTH, _HEIGHT = 80, 16  # of the plot in the terminal, with its labels
_MIN_STEPS = 20
RULE = "a tenth of the learning rate at the lowest smoothed loss"


@dataclass(frozen=True)
class RangeTest:
    """The losses of a range test."""

    rates: Sequence[float]
    losses: Sequence[float]
    diverged: bool
    """Whether the loss ended the test before its last learning rate."""
    is_main: bool = True

    @property
    def smoothed(self) -> list[float]:
        """The losses, averaged over neighbours on both sides, so that no learning rate is late or early."""
        return smooth(self.losses)

    def suggestion(self) -> tuple[float | None, str]:
        """The learning rate to begin with, and the reason for it; None if the test does not show one."""
        curve = self.smoothed
        low = min(range(len(curve)), key=curve.__getitem__)
        begin = curve[: max(1, len(curve) // 5)]
        noise = math.sqrt(sum((a - b) ** 2 for a, b in zip(self.losses, curve, strict=True)) / len(curve))
        start = sum(begin) / len(begin)
        if len(curve) < _MIN_STEPS:
            return None, f"only {len(curve)} steps until the loss diverged: lower --from"
        if start - curve[low] < noise:
            return None, (
                f"the loss falls by {start - curve[low]:.3g}, less than it varies from step to step ({noise:.3g}): "
                "raise data.train_batch_size or --steps"
            )
        if low == len(curve) - 1 and not self.diverged:
            return None, "the loss still falls at the highest learning rate: raise --to"
        return self.rates[low] / 10, f"{RULE}, {self.rates[low]:.2g} (loss {start:.4f} -> {curve[low]:.4f})"


def smooth(values: Sequence[float]) -> list[float]:
    """Averages over neighbours, with Gaussian weights of a thirtieth of the curve."""
    width = max(1.0, len(values) / 30)
    reach = math.ceil(3 * width)
    found = []
    for place in range(len(values)):
        near = range(max(0, place - reach), min(len(values), place + reach + 1))
        weights = [math.exp(-(((each - place) / width) ** 2) / 2) for each in near]
        found.append(sum(w * values[each] for w, each in zip(weights, near, strict=True)) / sum(weights))
    return found


class _Diverged(Exception):
    """The loss has risen too far, or is not finite."""


class _Recorder:
    """Takes the loss of each step, in the place of the trackers, and ends the test when it diverges."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._on_step = on_step

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Raise _Diverged where the mean of the last losses is above the lowest such mean by that of the first ones."""
        loss, rate = metrics.get("train/loss", math.nan), metrics["train/lr"]
        if not math.isfinite(loss):
            raise _Diverged
        self.rates.append(rate)
        self.losses.append(loss)
        self._on_step()
        span = 5
        means = [sum(self.losses[end - span : end]) / span for end in range(span, len(self.losses) + 1)]
        if means and means[-1] > min(means) + abs(means[0]):
            raise _Diverged


class _NoCheckpoints:
    """Saves nothing."""

    latest: Path | None = None

    def save(self, progress: Progress, sums: Mapping[str, float], *, is_last: bool = False) -> None:
        pass

    def has_failed(self) -> bool:
        return False

    def wait(self) -> None:
        pass

    def describe_last_good(self, progress: Progress) -> str:
        return "find-lr saves no checkpoint"


def find_lr(config: TrainConfig, *, low: float, high: float, steps: int) -> RangeTest:
    """Train `steps` steps of a run with learning rates from `low` to `high`, each a constant factor above the last.

    Data, batches, model, objective and optimizer are those of training; there is no validation, no checkpoint and no
    run directory, and the model folder stays as it is. Other learning rates of the optimizer, such as that of an
    objective's threshold, grow by the same factor. Raises UserError as training does.
    """
    from rm_gallery.distributed.process_group import processes
    from rm_gallery.training.agreement import agree_on_run
    from rm_gallery.training.setup import prepare
    from rm_gallery.training.signals import StopSignal

    if not (0 < low < high < math.inf and steps >= _MIN_STEPS):
        raise UserError(f"--from {low:g} --to {high:g} --steps {steps}: needs 0 < from < to, and {_MIN_STEPS} steps")
    trainer = replace(
        config.trainer, eval_sets={}, ema_decay=None, total_training_steps=steps, save_best=False,
        early_stopping_patience=None,
    )  # fmt: skip
    config = replace(config, trainer=trainer)
    if config.objective.name == "regression_then_bt":  # whose loss jumps where its second phase begins
        log.warning("objective.name=regression_then_bt: the learning rate is tested on its first phase, regression")
        config = replace(config, objective=replace(config.objective, name="regression"))
    stop = StopSignal()
    with processes(trainer.device, timeout_seconds=trainer.timeout_seconds) as world:
        parts = prepare(agree_on_run(config, world), world, stop, validates=False)
        return _test(parts, low=low, high=high, steps=steps)


def _test(parts: RunParts, *, low: float, high: float, steps: int) -> RangeTest:
    from rm_gallery.progress_bar import ProgressBar
    from rm_gallery.training.setup import load_parts
    from rm_gallery.training.trainer import Intervals, Trainer

    config = parts.config
    with ProgressBar("find-lr", steps, show=parts.world.is_main, log_unit="steps") as bar:
        recorder = _Recorder(bar.advance)
        trainer = Trainer(
            model=parts.model, weights=parts.weights, objective=parts.objective, optimizer=parts.optimizer,
            schedule=lambda step: low / config.optim.lr * (high / low) ** (step / (steps - 1)),
            clip_grad=config.optim.clip_grad or math.inf, steps=load_parts(parts), total_steps=steps,
            intervals=Intervals(1, 0, 0), max_bad_steps=1, validate=None, checkpoints=_NoCheckpoints(), sink=recorder,
            ranks=parts.ranks, stop=parts.stop, router_loss=parts.router_loss,
        )  # fmt: skip
        diverged = True
        try:
            trainer.train()
            diverged = False
        except (_Diverged, TrainingStopped) as stopped:
            log.info("stopped after %d of %d steps: %s", len(recorder.losses), steps,
                     "the loss rises" if isinstance(stopped, _Diverged) else "it is not finite")  # fmt: skip
    if not recorder.losses:
        raise UserError(
            f"the loss of the first step, at the learning rate {low:g}, is not finite; check model and data"
        )
    return RangeTest(recorder.rates, recorder.losses, diverged, parts.world.is_main)


def as_text(test: RangeTest) -> str:
    """The plot and the suggestion, at most 80 columns wide."""
    rate, reason = test.suggestion()
    found = f"optim.lr={rate:.1e}: {reason}" if rate is not None else f"no suggestion: {reason}"
    return f"{_plot(test, rate)}\n\n{_wrapped(found)}"


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def _plot(test: RangeTest, rate: float | None) -> str:
    """Losses as `.`, smoothed ones as `#`, the suggestion as a column of `|`, over the logarithm of the rate."""
    low, high = math.log10(test.rates[0]), math.log10(test.rates[-1])
    curve = test.smoothed
    top = max(curve[: max(1, len(curve) // 5)])
    bottom = min(curve)
    top, bottom = top + (top - bottom) / 2 + 1e-12, bottom - (top - bottom) / 4 - 1e-12  # the rise is cut off
    left, right, upper = 9, _WIDTH - 10, _HEIGHT - 1
    grid = [[" "] * (right + 1) for _ in range(_HEIGHT)]

    def column(value: float) -> int:
        return round((math.log10(value) - low) / ((high - low) or 1.0) * right)

    def draw(losses: Sequence[float], mark: str) -> None:
        for each, loss in zip(test.rates, losses, strict=True):
            row = round((top - loss) / (top - bottom) * upper)
            if 0 <= row <= upper:
                grid[row][column(each)] = mark

    if rate is not None and rate >= test.rates[0]:
        for line in grid:
            line[column(rate)] = "|"
    draw(test.losses, ".")
    draw(curve, "#")
    labels = {0: f"{top:.4f}", upper // 2: f"{(top + bottom) / 2:.4f}", upper: f"{bottom:.4f}"}
    lines = [f"{labels.get(row, ''):>{left - 1}} {''.join(line)}".rstrip() for row, line in enumerate(grid)]
    axis = [" "] * (right + 1)
    for power in range(math.ceil(low), math.floor(high) + 1):
        text, place = f"1e{power}", round((power - low) / ((high - low) or 1.0) * right)
        place = min(place, right + 1 - len(text))
        axis[place : place + len(text)] = text
    title = "loss (. each step, # smoothed, | suggestion) over the learning rate"
    return "\n".join([title, *lines, " " * left + "".join(axis).rstrip()])


def draw(test: RangeTest, path: Path) -> None:
    """Write the picture, a PNG file."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    curve = test.smoothed
    axis.plot(test.rates, test.losses, color="tab:blue", alpha=0.25, linewidth=1, label="each step")
    axis.plot(test.rates, curve, color="tab:blue", label="smoothed")
    rate, _ = test.suggestion()
    if rate is not None:
        axis.axvline(rate, color="tab:orange", linestyle="--", label=f"suggestion {rate:.1e}")
    start = max(curve[: max(1, len(curve) // 5)])
    margin = max(start - min(curve), 1e-12)
    axis.set(xlabel="learning rate", ylabel="loss", xscale="log", ylim=(min(curve) - margin / 2, start + margin))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); give another --png") from error


def add_find_lr(commands: Any, add_config: Callable[[argparse.ArgumentParser], None]) -> None:
    command = commands.add_parser(
        "find-lr",
        help="find a learning rate for a run: raise it until the loss diverges",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Learning-rate range test (Smith 2017): train a few steps of a run with a rate\n"
            "that grows from step to step, plot the loss, and suggest a rate. Takes the\n"
            "configuration of train; writes no run directory and no checkpoint.\n"
            "  rm-gallery find-lr --png lr.png model.partial_pretrain=MODEL \\\n"
            "      data.train_files=train.parquet data.train_batch_size=64"
        ),
    )
    add_config(command)
    command.add_argument("--from", dest="low", type=float, default=1e-7, metavar="LR", help="first rate (1e-7)")
    command.add_argument("--to", dest="high", type=float, default=1.0, metavar="LR", help="last rate (1)")
    command.add_argument("--steps", type=int, default=100, metavar="N", help="steps between them (100)")
    command.add_argument("--png", metavar="FILE", help="write the plot as a picture (extra plot)")
    command.set_defaults(run=_run, words="overrides", when_stopped="nothing was written")


def _run(arguments: argparse.Namespace) -> None:
    from rm_gallery.training.config import load_config

    if arguments.png is not None and find_spec("matplotlib") is None:
        raise UserError("--png needs matplotlib: pip install 'rm-gallery[plot]'")
    if arguments.png is not None and not Path(arguments.png).expanduser().parent.is_dir():
        raise UserError(f"--png {arguments.png}: no such folder; give another --png")
    config = load_config(arguments.config, arguments.overrides)
    test = find_lr(config, low=arguments.low, high=arguments.high, steps=arguments.steps)
    if not test.is_main:
        return
    print(safe(as_text(test)))
    if arguments.png is not None:
        draw(test, Path(arguments.png).expanduser())
        print(safe(f"picture: {arguments.png}"))
