"""Errors caused by user input, rows that cannot be used, and one-line messages.

Entry points print a `UserError` as one line, without a traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rm_gallery.safe_text import redact


class UserError(ValueError):
    """A mistake in the configuration, the data or the environment.

    The message says what is wrong, where (file:row or configuration key) and what to do.
    Entry points print it and exit with status 2; `--debug` adds the traceback. Secrets in it are redacted.
    """

    def __init__(self, *message: object) -> None:
        super().__init__(*map(redact, message))


class TrainingStopped(UserError):
    """Training cannot continue (for example, too many non-finite steps); saved checkpoints are kept."""


class StoppedBySignal(Exception):
    """SIGTERM or Ctrl-C stopped a run after saving; entry points print the message and exit with `status`."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration: the key it is about, and the whole message, which names the key too."""

    key: str
    """E.g. `data.train_files`, or the name of a section."""
    text: str

    def is_about(self, key: str) -> bool:
        """Whether it is about this key, or about a key inside this section."""
        return self.key == key or self.key.startswith(f"{key}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' with the known word closest to `word`, or '' if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


_MAX_REASONS = 200  # chat templates may quote the row in their errors: memory must stay bounded
_OTHER = "dropped for other reasons"


class BadRow(ValueError):
    """A row that cannot be used. The message is the reason, equal for all rows with the same fault."""


@dataclass
class Dropped:
    """Dropped rows: the number by reason, and the first row of each as an example."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Count rows with one reason; `where` is the first of them. Beyond 200 reasons, the rest count as one."""
        if reason not in self.counts and len(self.counts) >= _MAX_REASONS:
            reason = _OTHER
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, where)

    def merge(self, other: Dropped) -> None:
        """Add the rows of another part of the data."""
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def describe(self, limit: int = 20) -> str:
        """`3 null chosen (first: train.parquet:17), 1 ...`, most frequent first, at most `limit` reasons."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count} {reason} (first: {self.examples[reason]})" for reason, count in ordered[:limit]]
        rest = ordered[limit:]
        if rest:
            parts.append(f"{sum(count for _, count in rest)} for {len(rest)} other reasons")
        return ", ".join(parts)

    @property
    def remedy(self) -> str:
        """What to do where no row is left."""
        too_long = any("data.max_length" in reason for reason in self.counts)
        return "raise data.max_length, or fix the data" if too_long else "fix the data"


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """The message of an error in one line of at most `limit` characters, without a final period.

    Only its first paragraph, up to the first blank line, is used. An error without a message is described by its
    cause, or else by its type. Secrets in it are redacted.
    """
    seen: BaseException | str | None = error
    while seen is not None:
        text = " ".join(re.split(r"\n\s*\n", str(seen).strip(), maxsplit=1)[0].split())
        if text:
            text = redact(text.rstrip(".:; "))
            return text if len(text) <= limit else text[: limit - 3] + "..."
        seen = None if isinstance(seen, str) else seen.__cause__ or seen.__context__
    return "" if isinstance(error, str) else type(error).__name__
