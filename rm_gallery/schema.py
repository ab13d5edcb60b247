"""The records every stage shares: messages, a prompt with its responses, and comparisons between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

Message: TypeAlias = dict[str, Any]
"""One chat turn: {"role": str, "content": str, ...}; further keys (tool calls, names) reach the chat template."""

InputStyle: TypeAlias = Literal["text", "chat"]
"""How a model reads its input: `text` as the tokenizer gives it, `chat` through the chat template."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Response `better` of a group is preferred to response `worse`; both count from 0."""

    better: int
    worse: int
    weight: float = 1.0
    """Factor on this comparison's loss."""
    margin: float | None = None
    """How much better, in whatever unit the data have (a score difference, steps of a scale); None for unknown."""
    p_better: float | None = None
    """Soft label: share of people who prefer `better`, 0 to 1; None for unknown."""


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """One prompt, K responses, and the comparisons between them: the unit that the whole pipeline moves.

    A chosen/rejected pair is K = 2 with one comparison; scoring one answer is K = 1 with none.
    """

    prompt: str | Sequence[Message]
    """Text that stands before each response, or the messages before it; may be empty."""
    responses: Sequence[str | Sequence[Message]]
    """In style `text` the text after the prompt; in style `chat` the messages after the prompt."""
    comparisons: Sequence[Comparison] = ()
    style: InputStyle = "text"
    where: str = ""
    """Origin for messages to people, as `file:row`; rows count from 0."""
    source: str = ""
    """Name of the data set that the row belongs to, for metrics by source."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """Anything that gives rewards: in process, remote, or a judge."""

    def score(self, groups: Sequence[PreferenceGroup]) -> list[list[float]]:
        """One list of K rewards per group, in the order of its responses."""
        ...
