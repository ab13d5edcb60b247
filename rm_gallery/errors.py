"""What a person can mend: errors that entry points print as one sentence, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known word that looks most like `word`, or '' when none does."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
