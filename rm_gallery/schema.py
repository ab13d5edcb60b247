"""Records shared by all stages: messages, a prompt with its responses, and comparisons between responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Message: TypeAlias = dict[str, Any]
"""One chat turn: {"role": str, "content": str, ...}; further keys (tool calls, names) reach the chat template."""

InputStyle: TypeAlias = Literal["text", "chat"]
"""Input of a model: `text` is tokenized as it is, `chat` is rendered by the chat template first."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Response `better` of a group is preferred to response `worse` (0-based indices)."""

    better: int
    worse: int
    weight: float = 1.0
    """Factor of this comparison's loss."""
    margin: float | None = None
    """Strength of the preference, in the unit of the data (score difference, steps of a scale); None if unknown."""
    p_better: float | None = None
    """Soft label: fraction of annotators who prefer `better`, 0 to 1; None if unknown."""
    tied: bool = False
    """Neither is better: a tie, which only objectives with ties read (`data.ties`)."""


@dataclass(frozen=True, slots=True)
class Rating:
    """What the data say about response `response` of a group (0-based index) by itself."""

    response: int
    score: float | None = None
    """Higher is better, in the unit of the data; None if unknown."""
    rank: float | None = None
    """Lower is better; None if unknown."""
    attributes: tuple[float, ...] = ()
    """One number per name of `model.attributes`; NaN where unknown."""
    weight: float = 1.0
    """Factor of this response's loss."""
    group: int = 0
    """Which of several merged groups it belongs to."""


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """One prompt, K responses, and the comparisons between them: the unit of the whole pipeline.

    A chosen/rejected pair is K = 2 with one comparison; scoring one response is K = 1 with none.
    """

    prompt: str | Sequence[Message]
    """Text or messages before each response; may be empty."""
    responses: Sequence[str | Sequence[Message]]
    """Text (style `text`) or messages (style `chat`) after the prompt."""
    comparisons: Sequence[Comparison] = ()
    style: InputStyle = "text"
    where: str = ""
    """Origin of the row for error messages: `file:row`; rows count from 0."""
    source: str = ""
    """Name of the row's dataset, for metrics by source."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    ratings: Sequence[Rating] = ()
    """At most one per response."""
