"""BaseGrader: the base class of graders, and their results: GraderScore, GraderRank, GraderError."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, Field

from rm_gallery.core.run_sync import run_sync


class GraderMode(StrEnum):
    """Whether a grader judges responses one by one or together."""

    POINTWISE = "pointwise"
    """One response: a score."""
    LISTWISE = "listwise"
    """Several responses to one query, compared with each other: a rank."""


class GraderResult(BaseModel):
    """Fields of all results."""

    name: str = ""
    """Name of the grader."""
    reason: str = ""
    """Explanation of the judge; empty without one."""
    metadata: dict[str, Any] = Field(default_factory=dict)


class GraderScore(GraderResult):
    """The score of one response."""

    score: float = Field(allow_inf_nan=False)
    """On the grader's scale, or the reward (any finite number) of a reward model; higher is better."""


class GraderRank(GraderResult):
    """The ranking of several responses."""

    rank: list[Annotated[int, Field(ge=1)]]
    """The rank of each response, in the order given; 1 is best, ties share the better rank (1, 1, 3)."""


class GraderError(GraderResult):
    """An error in place of a result; it does not stop the batch."""

    error: str
    """What failed, and how to fix it."""


class BaseGrader(ABC):
    """Base class of graders. Subclasses implement `aevaluate`."""

    def __init__(self, name: str = "", mode: GraderMode | str = GraderMode.POINTWISE, description: str = "") -> None:
        """name: name in results; defaults to the class name. Raises ValueError for an unknown mode."""
        self.name = name or type(self).__name__
        self.mode = GraderMode(mode)
        self.description = description

    @abstractmethod
    async def aevaluate(self, **kwargs: Any) -> GraderScore | GraderRank | GraderError:
        """Grade one sample. Failures are returned as GraderError, so that they do not stop a batch."""

    def evaluate(self, **kwargs: Any) -> GraderScore | GraderRank | GraderError:
        """Synchronous `aevaluate`; blocks the event loop if one is running."""
        return run_sync(self.aevaluate(**kwargs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, mode={self.mode.value!r})"
