"""Runners: grade many samples with many graders, with bounded concurrency.

Names are looked up when they are asked for, so that importing this package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.core.runner.aggregator import BaseAggregator, WeightedSumAggregator
    from rm_gallery.core.runner.base_runner import BaseRunner, RunnerResult
    from rm_gallery.core.runner.grader_config import GraderConfig
    from rm_gallery.core.runner.grading_runner import GradingRunner

__all__ = [
    "BaseAggregator",
    "BaseRunner",
    "GraderConfig",
    "GradingRunner",
    "RunnerResult",
    "WeightedSumAggregator",
]


def __getattr__(name: str) -> Any:
    if name in ("BaseAggregator", "WeightedSumAggregator"):
        from rm_gallery.core.runner import aggregator

        return getattr(aggregator, name)
    if name in ("BaseRunner", "RunnerResult"):
        from rm_gallery.core.runner import base_runner

        return getattr(base_runner, name)
    if name in ("GraderConfig", "GradingRunner"):
        from rm_gallery.core.runner import grading_runner

        return getattr(grading_runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
