"""Rows of an export, what they are made of, and the units in which they are split."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from rm_gallery.core.generator.cases import Answer
from rm_gallery.core.generator.texts import Text


class Contest(NamedTuple):
    """Responses that may be compared with each other."""

    key: bytes
    """The same for the same responses with the same scores."""
    prompt: Text
    answers: list[Answer]
    is_rank: bool


class Pair(NamedTuple):
    """One row of layout `pairs`."""

    prompt: Text
    chosen: Answer
    rejected: Answer
    margin: float | None
    """Difference of the scores; None where these are places."""
    contest: bytes

    @property
    def source(self) -> str | None:
        return self.chosen.source if self.chosen.source == self.rejected.source else None

    @property
    def answers(self) -> list[Answer]:
        return [self.chosen, self.rejected]

    @property
    def key(self) -> bytes:
        return self.chosen.key + self.rejected.key


class Group(NamedTuple):
    """One row of layout `groups`."""

    key: bytes
    prompt: Text
    answers: list[Answer]
    is_rank: bool

    @property
    def contest(self) -> bytes:
        return self.key

    @property
    def source(self) -> str | None:
        return self.answers[0].source if len({answer.source for answer in self.answers}) == 1 else None


Row: TypeAlias = Pair | Group


class Unit(NamedTuple):
    """Rows that belong on one side of a split: those of one prompt, or without a prompt those that share responses."""

    key: bytes
    rows: list[Row]
