"""Names of validation metrics, and which of two values is better.

val/accuracy        of the validation data
val/accuracy/web    of those of one source
val/math/accuracy   of the set `math` of `trainer.eval_sets`; val/math/accuracy/web of one of its sources
val/ema/accuracy    of the validation data with the average of the weights (`trainer.ema_decay`); val/math.ema/accuracy
val/rb/score        of a set that is a benchmark; val/rb/score/Chat of one of its parts
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_METRIC = "val/accuracy"

_LOWER = r"loss|mse(_.+)?|perplexity"
_HIGHER = r"token_accuracy|accuracy(_.+)?|margin|pearson(_.+)?|tie_log_likelihood|score"
_METRIC = re.compile(
    rf"{_LOWER}|{_HIGHER}|reward_.+|margin_std|length_correlation|router_aux_loss|tie_share|threshold|n"
)
_SET = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class MetricName:
    """The parts of a name."""

    set: str
    """"" for the validation data."""
    kind: str
    """E.g. `accuracy`."""
    source: str = ""

    @property
    def loss(self) -> str:
        """Name of the loss of the same data."""
        return f"val/{self.set}/loss" if self.set else "val/loss"

    @property
    def direction(self) -> int:
        """1 if higher is better, -1 if lower is, 0 if neither is, as for a mean reward."""
        if re.fullmatch(_LOWER, self.kind):
            return -1
        return 1 if re.fullmatch(_HIGHER, self.kind) else 0


def parse_metric(name: str) -> MetricName | None:
    """The parts of a `val/` metric's name; None for another name."""
    prefix, _, rest = name.partition("/")
    if prefix != "val" or not rest:
        return None
    first, _, others = rest.partition("/")
    if is_metric(first):
        return MetricName("", first, others)
    kind, _, source = others.partition("/")
    return MetricName(first, kind, source) if is_metric(kind) else None


def as_average(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same values under the names of those of the average of the weights."""
    found = {}
    for name, value in metrics.items():
        parsed = parse_metric(name)
        start, rest = (parsed.set, name.removeprefix(f"val/{parsed.set}/")) if parsed and parsed.set else ("", name[4:])
        found[f"val/{average_of(start)}/{rest}"] = value
    return found


def of_average(metrics: Mapping[str, float]) -> dict[str, float]:
    """Only those of the average of the weights, under the names without it."""
    sets = {name: parsed.set for name in metrics if (parsed := parse_metric(name)) and is_average(parsed.set)}
    return {
        "/".join(("val", *filter(None, [set_of(each)]), name.removeprefix(f"val/{each}/"))): metrics[name]
        for name, each in sets.items()
    }


def average_of(name: str) -> str:
    """The name of the set of metrics with the average of the weights; name: of a set, "" for the validation data."""
    return f"{name}.ema" if name else "ema"


def is_average(name: str) -> bool:
    """Whether a set of metrics is one of those that `average_of` names."""
    return name == "ema" or name.endswith(".ema")


def set_of(name: str) -> str:
    """The set itself, of either name."""
    return name.removesuffix("ema").removesuffix(".") if is_average(name) else name


def is_metric(word: str) -> bool:
    """Whether a word is the kind of a metric, and so no name of a set."""
    return _METRIC.fullmatch(word) is not None


def is_set_name(name: str) -> bool:
    """Whether a set may have this name: letters, digits, `_`, `-` and `.`, and no kind of metric."""
    return _SET.fullmatch(name) is not None and not is_metric(name)


def value_to_compare(metrics: Mapping[str, float], name: str) -> float:
    """The metric, negated where lower is better, so that the highest is the best; NaN where it is missing.

    NaN too where the loss of the same data is not finite: NaN rewards count as wrong and leave an accuracy finite.
    """
    parsed = parse_metric(name)
    if parsed is None or not math.isfinite(metrics.get(parsed.loss, 0.0)):
        return math.nan
    return parsed.direction * metrics.get(name, math.nan)
