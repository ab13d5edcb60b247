"""Errors: those that a person can mend, rows that cannot be used, and what a library said, in a few words.

Entry points print a `UserError` as one sentence, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field


class UserError(ValueError):
    """A mistake in the configuration, the data or the environment.

    The message says what is wrong, where (file:row or configuration key) and what to do.
    Entry points print it alone and end with status 2; `--debug` adds the traceback.
    """


class TrainingStopped(UserError):
    """Training cannot go on (for example, too many non-finite steps); what was saved before stays."""


class StoppedBySignal(Exception):
    """SIGTERM or Ctrl-C ended a run that was saved first; entry points print the message and end with `status`."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration: the key it is about, and the whole message, which names the key too."""

    key: str
    """As `data.train_files`; a section's name for the section as a whole."""
    text: str

    def is_about(self, key: str) -> bool:
        """Whether it is about this key, or about a key inside this section."""
        return self.key == key or self.key.startswith(f"{key}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known word that looks most like `word`, or '' when none does."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


_MOST_REASONS = 200  # those of chat templates may quote the row, and must not fill the memory
_OTHER = "left out for yet another reason"


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, the same for all rows with the same fault."""


@dataclass
class Dropped:
    """Rows left out, counted by reason, with the first one of each as an example."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Count rows of one reason, the first of them at `where`; past a number of reasons the rest are one."""
        if reason not in self.counts and len(self.counts) >= _MOST_REASONS:
            reason = _OTHER
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, where)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def describe(self, limit: int = 20) -> str:
        """`3 null chosen (first: train.parquet:17), 1 ...`, the most frequent first; at most `limit` reasons."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count} {reason} (first: {self.examples[reason]})" for reason, count in ordered[:limit]]
        rest = ordered[limit:]
        if rest:
            parts.append(f"{sum(count for _, count in rest)} for {len(rest)} other reasons")
        return ", ".join(parts)


_LONGEST = 200


def reason_of(error: BaseException) -> str:
    """First line of the error, or of the error behind it when it says nothing; its type when none says anything."""
    seen: BaseException | None = error
    while seen is not None:
        lines = [line.strip() for line in str(seen).splitlines() if line.strip()]
        if lines:
            text = lines[0].rstrip(".:; ")
            return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__
