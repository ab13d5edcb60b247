"""BaseGrader: the base class of all graders; their results: a score, a rank, or an error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, Field

from rm_gallery.core.run_sync import run_sync


class GraderMode(StrEnum):
    """What a grader is given at once."""

    POINTWISE = "pointwise"
    """One response, judged by itself: a score."""
    LISTWISE = "listwise"
    """Several responses to one query, judged against each other: a rank."""


class GraderResult(BaseModel):
    """What every result has."""

    name: str = ""
    """The grader's name."""
    reason: str = ""
    """Why, in words; empty where a model gives none."""
    metadata: dict[str, Any] = Field(default_factory=dict)


class GraderScore(GraderResult):
    """How good one response is."""

    score: float = Field(allow_inf_nan=False)
    """On the grader's scale, or the reward (any finite number) where a reward model scores; higher is better."""


class GraderRank(GraderResult):
    """Which of several responses is better."""

    rank: list[Annotated[int, Field(ge=1)]]
    """The place of each response, in the order given; 1 is the best, equal rewards share the better place."""


class GraderError(GraderResult):
    """Why a sample has no grade; takes the place of a result, so that a batch goes on."""

    error: str
    """One sentence: what failed, and what to do where there is something to do."""


class BaseGrader(ABC):
    """Judges one sample at a time. A subclass writes `aevaluate`; everything else follows from it."""

    def __init__(self, name: str = "", mode: GraderMode | str = GraderMode.POINTWISE, description: str = "") -> None:
        """name: what results carry, by default the class's name. Raises ValueError for an unknown mode."""
        self.name = name or type(self).__name__
        self.mode = GraderMode(mode)
        self.description = description

    @abstractmethod
    async def aevaluate(self, **kwargs: Any) -> GraderScore | GraderRank | GraderError:
        """Judge one sample. A judgement that fails is a GraderError, so that a batch goes on without it."""

    def evaluate(self, **kwargs: Any) -> GraderScore | GraderRank | GraderError:
        """`aevaluate` for code that does not await; in a running event loop (a notebook) it blocks that loop."""
        return run_sync(self.aevaluate(**kwargs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, mode={self.mode.value!r})"
