"""What an aggregator is: a name, and a call on the results of one sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any


class BaseAggregator(ABC):
    """Makes one result of the results that all graders gave for one sample."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def __call__(self, results: Mapping[str, Any]) -> Any:
        """results: grader name -> GraderScore, GraderRank or GraderError of one sample."""

    def check(self, grader_names: Collection[str]) -> None:
        """Raise UserError when this aggregator cannot work with these graders; called before anything is graded."""
        del grader_names
