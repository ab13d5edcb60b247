"""Runners: grade many samples with many graders, with bounded concurrency.

Names are imported on first access, so that importing this package stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.core.runner.aggregator import BaseAggregator, WeightedSumAggregator
    from rm_gallery.core.runner.grader_config import GraderConfig
    from rm_gallery.core.runner.grading_runner import BaseRunner, GradingRunner, RunnerResult

__all__ = [
    "BaseAggregator", "BaseRunner", "GraderConfig", "GradingRunner", "RunnerResult", "WeightedSumAggregator",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("BaseAggregator", "WeightedSumAggregator"):
        from rm_gallery.core.runner import aggregator

        return getattr(aggregator, name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rm_gallery.core.runner import grading_runner

    return getattr(grading_runner, name)
