"""Aggregators: combine the results of several graders for one sample."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from rm_gallery.core.graders.base_grader import GraderError, GraderRank, GraderScore
from rm_gallery.errors import UserError, nearest

__all__ = ["BaseAggregator", "WeightedSumAggregator"]


class BaseAggregator(ABC):
    """Base class of aggregators: a callable from the results of all graders for one sample to one result."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def __call__(self, results: Mapping[str, Any]) -> Any:
        """results: grader name -> GraderScore, GraderRank or GraderError of one sample."""

    def check(self, grader_names: Collection[str]) -> None:
        """Raise UserError if this aggregator does not fit these graders; called before grading starts."""
        del grader_names


class WeightedSumAggregator(BaseAggregator):
    """`sum(weight * score)` over the graders with a weight; weights that sum to 1 give the weighted mean.

    weights: grader name -> weight, may be negative; graders without a weight are ignored. None gives the mean of all
    graders.
    If one of the weighted graders has no score for a sample, the result is a GraderError: a sum over the others would
    not be comparable between samples.
    """

    def __init__(self, name: str = "weighted_sum", weights: Mapping[str, float] | None = None) -> None:
        super().__init__(name)
        for grader, weight in (weights or {}).items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise UserError(f"aggregator {name!r}: the weight of {grader!r} is {weight!r}: it must be a number")
        self.weights = dict(weights) if weights else None

    def check(self, grader_names: Collection[str]) -> None:
        for grader in self.weights or ():
            if grader not in grader_names:
                raise UserError(
                    f"aggregator {self.name!r} has a weight for {grader!r}, but the graders are "
                    f"{', '.join(map(repr, grader_names))}.{nearest(grader, grader_names)}"
                )

    def __call__(self, results: Mapping[str, GraderScore | GraderRank | GraderError]) -> GraderScore | GraderError:
        weights = self.weights or {grader: 1 / len(results) for grader in results}
        scores: dict[str, float] = {}
        for grader in weights:
            result = results.get(grader)
            if isinstance(result, GraderScore):
                scores[grader] = result.score
                continue
            why = result.error if isinstance(result, GraderError) else f"its result is {type(result).__name__}"
            return GraderError(name=self.name, error=f"no score of {grader!r}: {why}")
        terms = [f"{weights[grader]:g} * {score:.4g} ({grader})" for grader, score in scores.items()]
        return GraderScore(
            name=self.name,
            score=math.fsum(weights[grader] * score for grader, score in scores.items()),
            reason=" + ".join(terms),
            metadata={"weights": dict(weights), "scores": scores},
        )
