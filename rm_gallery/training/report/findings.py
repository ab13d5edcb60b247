"""What is wrong with a run, from its metrics: each check is a function of the history, with what to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rm_gallery.training.report.history import History, Points, Run, smooth

CHANCE = math.log(2)
"""The Bradley-Terry loss of a model that gives all responses the same reward."""
_MIN_POINTS, _MIN_STEPS = 20, 50


@dataclass(frozen=True)
class Finding:
    """A warning about a run."""

    key: str
    """Which check, and for which data."""
    text: str
    advice: str


def findings(run: Run) -> list[Finding]:
    """All warnings about a run as far as it is."""
    return [found for check in CHECKS for found in check(run)]


def loss_at_chance(run: Run) -> Iterator[Finding]:
    """The training loss stays at ln 2 over the second half of what was trained."""
    losses, accuracies = run.history.points("train/loss"), run.history.points("train/accuracy")
    is_pairwise = bool(run.history.points("train/margin"))
    if not is_pairwise or len(losses) < _MIN_POINTS or run.history.last_step < _MIN_STEPS:
        return
    loss, accuracy = (_mean(points[len(points) // 2 :]) for points in (losses, accuracies))
    if abs(loss - CHANCE) < 0.02 and accuracy < 0.58:
        rate = run.setting("optim.lr")
        yield Finding(
            "loss at chance",
            f"the training loss is still that of chance (mean {loss:.3f} since step {losses[len(losses) // 2][0]}, "
            f"0.693 is chance; accuracy {accuracy:.2f})",
            f"raise optim.lr{f' (now {rate:g})' if isinstance(rate, float) else ''} by 3 to 10 times; check with "
            "rm-gallery show-data that chosen and rejected are not exchanged or equal in what the model can read",
        )


def accuracy_too_early(run: Run) -> Iterator[Finding]:
    """Nothing is wrong any more within the first quarter of the run: something gives the answer away."""
    early = run.total_steps // 4
    train = [each for each in smooth(run.history.points("train/accuracy"), 5) if each[0] <= early]
    found = next((step for step, value in train[10:] if value >= 0.9995), None)
    if found is not None:
        yield Finding("accuracy 1.0 in training", f"training accuracy is 1.0 at step {found} already", _GIVEN_AWAY)
    for name in run.history.sets():
        points = run.history.points(_metric(name, "accuracy"))
        step = next((step for step, value in points if value >= 0.9995 and 0 < step <= early), None)
        if step is not None:
            yield Finding(
                f"accuracy 1.0 {_of(name)}", f"{_metric(name, 'accuracy')} is 1.0 at step {step} already", _GIVEN_AWAY
            )


_GIVEN_AWAY = (
    "look for what gives the chosen response away: rm-gallery show-data reports length, format and leakage; evaluate "
    "on other data (trainer.eval_sets)"
)


def overfitting(run: Run) -> Iterator[Finding]:
    """A validation loss rises while the training loss falls."""
    train = smooth(run.history.points("train/loss"))
    for name in run.history.sets():
        metric = _metric(name, "loss")
        points = run.history.points(metric)
        if len(points) < 3 or len(train) < 3:
            continue
        lowest_step, lowest = min(points, key=lambda each: each[1])
        last_step, last = points[-1]
        since = [value for step, value in points if step > lowest_step]
        if len(since) < 2 or last < lowest + max(0.02, 0.05 * lowest) or since[-1] < since[0]:
            continue
        if _at(train, last_step) < _at(train, lowest_step):
            yield Finding(
                f"overfitting {_of(name)}",
                f"{metric} rises, from {lowest:.4f} at step {lowest_step} to {last:.4f} at step {last_step}, while the "
                f"training loss falls",
                "train for fewer epochs or with a lower optim.lr; keep the best checkpoint (trainer.save_best=true "
                f"trainer.save_best_metric={metric}), or stop there (trainer.early_stopping_patience=3)",
            )


def drifting_rewards(run: Run) -> Iterator[Finding]:
    """The mean of chosen and rejected rewards moves by more than twice their difference."""
    for start, place in (*((_metric(name, ""), _of(name)) for name in run.history.sets()), ("train/", "in training")):
        levels = _levels(run.history, start)
        margins = run.history.points(f"{start}margin")
        if len(levels) < 3 or not margins:
            continue
        if start == "train/":
            levels, margins = smooth(levels), smooth(margins)
        move, margin = levels[-1][1] - levels[0][1], abs(margins[-1][1])
        if abs(move) > max(2.0, 2 * margin):
            yield Finding(
                "drifting rewards",
                f"rewards drift: their mean {place} moved by {move:+.2f}, from {levels[0][1]:.2f} at step "
                f"{levels[0][0]} to {levels[-1][1]:.2f}, with a margin of {margin:.2f}",
                "the loss sees only differences; where rewards are used by themselves, normalize them (rm-gallery "
                "score --normalize, trainer.reward_statistics=normalize), and lower optim.lr",
            )
            return


def growing_length_bias(run: Run) -> Iterator[Finding]:
    """The correlation of reward and length rises."""
    for name in run.history.sets():
        metric = _metric(name, "length_correlation")
        points = run.history.points(metric)
        if len(points) < 2:
            continue
        (first_step, first), (last_step, last) = points[0], points[-1]
        if last >= 0.4 and last - first >= 0.15:
            yield Finding(
                f"length bias {_of(name)}",
                f"length correlation rises: {metric} from {first:+.2f} at step {first_step} to {last:+.2f} at step "
                f"{last_step}, so longer responses get higher rewards",
                "compare it with the data (rm-gallery show-data), balance the lengths of chosen and rejected, and read "
                "the length-controlled accuracy of rm-gallery evaluate",
            )


def skipped_steps(run: Run) -> Iterator[Finding]:
    """Steps whose loss or gradient was not finite."""
    points = run.history.points("train/bad_steps")
    if points and points[-1][1] > 0:
        yield Finding(
            "skipped steps",
            f"{points[-1][1]:.0f} steps were skipped: loss or gradient was not finite",
            "lower optim.lr, and check the data of these steps (train.log names them)",
        )


CHECKS: Sequence[Callable[[Run], Iterator[Finding]]] = (
    loss_at_chance, accuracy_too_early, overfitting, drifting_rewards, growing_length_bias, skipped_steps,
)  # fmt: skip


def _metric(name: str, kind: str) -> str:
    return f"val/{name}/{kind}" if name else f"val/{kind}"


def _of(name: str) -> str:
    return f"of {name}" if name else "of the validation data"


def _levels(history: History, start: str) -> Points:
    """Mean of the chosen and the rejected reward."""
    pairs = zip(history.points(f"{start}reward_chosen"), history.points(f"{start}reward_rejected"), strict=False)
    return [(step, (chosen + rejected) / 2) for (step, chosen), (_, rejected) in pairs]


def _at(points: Points, step: int) -> float:
    """The value at a step, or at the last one before it."""
    before = [value for at, value in points if at <= step]
    return before[-1] if before else points[0][1]


def _mean(points: Points) -> float:
    return sum(value for _, value in points) / len(points) if points else math.nan
