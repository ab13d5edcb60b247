"""A thread beside the training of each process that learns when another process failed, died or hangs, and says which.

A process that ends leaves the others waiting in a collective, for minutes or for ever. So each process keeps a beat
and a count of its turns in the rendezvous store, and the first failure is written there for all to read.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rm_gallery.errors import one_line

log = logging.getLogger(__name__)

_FAILURE = "failure"
_GONE = "gone"


@dataclass(frozen=True)
class Pace:
    """Seconds of the watch; tests take smaller ones."""

    beat: float = 1.0
    """Between two beats, and between two looks at the store."""
    silence: float = 18.0
    """A process without a beat for so long is dead, or its machine is."""
    short_silence: float = 5.0
    """The same, once a collective broke."""
    grace: float = 12.0
    """What the main thread has to end by itself once another process failed: a collective breaks when that one ends."""
    short_grace: float = 3.0
    """The same where no collective breaks: after silence, and when all stand still."""


@dataclass
class _Seen:
    """What was last read of one process, and when it changed."""

    beat: str = ""
    beat_at: float = 0.0
    turns: int = 0


class RankWatch:
    """One of these runs in each process. `turn` before a collective; `report` when this process fails."""

    def __init__(
        self, store: Any, *, rank: int, world_size: int, name: str, timeout_seconds: float,
        speaks: bool, pace: Pace | None = None,
    ) -> None:  # fmt: skip
        """store: a client of its own, since a client that waits keeps its other users waiting.

        name: of this process, for people ("rank 3 on node07"). speaks: whether it tells what it learned of others.
        timeout_seconds: how long all may stand still while some wait for others.
        """
        self.store, self.rank, self.world_size, self.name = store, rank, world_size, name
        self.timeout_seconds, self.speaks, self.pace = timeout_seconds, speaks, pace or Pace()
        self.cause: str | None = None
        """What ended another process, once it is known."""
        self._turns = 0
        self._what = "start"
        self._reported = False
        self._silence = self.pace.silence
        self._grace = self.pace.grace
        self._beats = 0
        self._stopping = threading.Event()
        self._told = threading.Event()
        self._seen = {other: _Seen(beat_at=time.monotonic()) for other in range(world_size)}
        self._moved_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)

    def start(self) -> None:
        self.store.set(f"name/{self.rank}", self.name)
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Leave for good: the others no longer expect beats of this process."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(timeout=5)
        try:
            self.store.set(f"beat/{self.rank}", _GONE)
        except Exception:  # the store may have gone with its host
            log.debug("the store is gone", exc_info=True)

    def turn(self, what: str) -> None:
        """This process comes to the next meeting point; `what` says which, for the message about one that does not."""
        self._turns += 1
        self._what = what

    def report(self, text: str) -> None:
        """Tell the others that this process fails, unless another one was first."""
        self._reported = True
        self._write_failure(f"{self.name} failed: {text}")

    def wait_for_cause(self, seconds: float) -> str | None:
        """A collective broke: the cause of another process's end, if it becomes known in so many seconds."""
        self._silence = self.pace.short_silence
        self._told.wait(seconds)
        return self.cause

    def _run(self) -> None:
        lost_since: float | None = None
        while not self._stopping.wait(self.pace.beat):
            try:
                self._beat()
                self._look_for_failure()
                if self.cause is None and not self._reported:
                    self._look_at_others()
                lost_since = None
            except Exception as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > self.pace.silence / 2:
                    text = f"the store of the run cannot be reached ({one_line(error)}): node 0 ended; see its output"
                    self._learn(text, self.pace.grace)
            if self.cause is not None:
                self._end_soon()
                return

    def _beat(self) -> None:
        self._beats += 1
        self.store.set(f"beat/{self.rank}", f"{self._beats} {self._turns} {self._what}")

    def _look_for_failure(self) -> None:
        if not self._reported and self.store.check([_FAILURE]):
            self._learn(self.store.get(_FAILURE).decode(), self.pace.grace)

    def _look_at_others(self) -> None:
        """Rank 0 looks at all and writes down what it finds; the others look at rank 0 alone."""
        others = range(self.world_size) if self.rank == 0 else [0]
        now = time.monotonic()
        for other, value in zip(others, self._beats_of(others), strict=True):
            seen = self._seen[other]
            beat, _, rest = value.partition(" ")
            if beat != seen.beat:
                turns = int(rest.partition(" ")[0]) if rest else seen.turns
                if turns != seen.turns:
                    self._moved_at = now
                seen.beat, seen.beat_at, seen.turns = beat, now, turns
            elif beat != _GONE and other != self.rank and now - seen.beat_at > self._silence:
                self._accuse(other, f"stopped answering {now - seen.beat_at:.0f} s ago: killed, or its machine is gone")
                return
        if self.rank == 0 and now - self._moved_at > self.timeout_seconds:
            self._accuse_the_last()

    def _beats_of(self, others: Sequence[int]) -> list[str]:
        keys = [f"beat/{other}" for other in others]
        there = [
            key for key, other in zip(keys, others, strict=True) if self._seen[other].beat or self.store.check([key])
        ]
        values = dict(zip(there, (value.decode() for value in self.store.multi_get(there)), strict=True))
        return [values.get(key, "") for key in keys]

    def _accuse_the_last(self) -> None:
        """All stand still, and some wait for others: those with the fewest turns are waited for."""
        present = {other: seen.turns for other, seen in self._seen.items() if seen.beat != _GONE}
        last = [other for other, turns in present.items() if turns == min(present.values())]
        if len(last) < len(present):
            text = f"has not moved for {self.timeout_seconds:g} s, while the others wait for it ({self._what})"
            more = f" (and {len(last) - 1} more)" if len(last) > 1 else ""
            self._accuse(last[0], text, more)

    def _accuse(self, other: int, text: str, more: str = "") -> None:
        name = self.store.get(f"name/{other}").decode() if self.store.check([f"name/{other}"]) else f"rank {other}"
        text = f"{name}{more} {text}"
        self._write_failure(text)
        self._learn(text, self.pace.short_grace)

    def _write_failure(self, text: str) -> None:
        try:
            self.store.compare_set(_FAILURE, "", text)
        except Exception:  # the store may have gone with its host: there is nobody to tell
            log.debug("the store is gone", exc_info=True)

    def _learn(self, text: str, grace: float) -> None:
        if self.cause is None:
            self.cause, self._grace = text, grace
            self._told.set()
            if self.speaks:
                log.error("%s; ending", text)

    def _end_soon(self) -> None:
        """End this process, should its main thread not: it may wait in a collective that cannot be interrupted."""
        if not self._stopping.wait(self._grace):
            for handler in logging.getLogger("rm_gallery").handlers:
                handler.flush()
            sys.stderr.flush()
            os._exit(1)
