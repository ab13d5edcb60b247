"""What graders give back: a score, a ranking, or one sentence on why there is neither."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, Field


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
