"""Watchdog: a thread in each process that detects when another process failed, died or hangs, and names it.

When a process ends, the others would wait in a collective for minutes or forever. So each process publishes its status
in the rendezvous store every second: a liveness counter, the number of its heartbeats (one before each collective) and
the next collective. The first failure is written to the store too, where every process reads it.
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
_LEFT = "left"


@dataclass(frozen=True)
class Timing:
    """Intervals of the watchdog, in seconds."""

    interval: float = 1.0
    """Between two updates of this process's status, and between two reads of the others'."""
    dead_after: float = 18.0
    """A process whose status has not changed for this long is dead, or its machine is."""
    dead_after_error: float = 5.0
    """The same, after a collective has failed."""
    grace: float = 12.0
    """Time for the main thread to end by itself after another process failed: its collective fails then."""
    short_grace: float = 3.0
    """The same where no collective fails: after a death, and when all processes wait."""


@dataclass
class _Status:
    """The last status read of one process, and when it changed."""

    alive: str = ""
    changed_at: float = 0.0
    heartbeats: int = 0


class Watchdog:
    """Call `heartbeat` before a collective, and `report` when this process fails."""

    def __init__(
        self, store: Any, *, rank: int, world_size: int, name: str, timeout_seconds: float,
        reports_others: bool, timing: Timing | None = None,
    ) -> None:  # fmt: skip
        """store: a client for this thread alone, since a waiting client blocks its other users.

        name: of this process in messages ("rank 3 on node07"). reports_others: whether it logs failures of others.
        timeout_seconds: how long some processes may wait for the others without any heartbeat.
        """
        self.store, self.rank, self.world_size, self.name = store, rank, world_size, name
        self.timeout_seconds, self.reports_others, self.timing = timeout_seconds, reports_others, timing or Timing()
        self.cause: str | None = None
        """Why another process ended, once it is known."""
        self._heartbeats = 0
        self._what = "start"
        self._reported = False
        self._dead_after = self.timing.dead_after
        self._grace = self.timing.grace
        self._updates = 0
        self._stopping = threading.Event()
        self._cause_known = threading.Event()
        self._status = {other: _Status(changed_at=time.monotonic()) for other in range(world_size)}
        self._last_heartbeat_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self.store.set(f"name/{self.rank}", self.name)
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        """Leave the run: the others expect no further status of this process."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(timeout=5)
        try:
            self.store.set(f"status/{self.rank}", _LEFT)
        except Exception:  # the store may have ended with its host
            log.debug("the store cannot be reached", exc_info=True)

    def heartbeat(self, what: str) -> None:
        """This process reaches a collective; `what` describes it in messages about a missing process."""
        self._heartbeats += 1
        self._what = what

    def report(self, text: str) -> None:
        """Report to the others that this process fails, unless another one failed first."""
        self._reported = True
        self._write_failure(f"{self.name} failed: {text}")

    def wait_for_cause(self, seconds: float) -> str | None:
        """After a failed collective: return why another process ended, or None if that is not known in time."""
        self._dead_after = self.timing.dead_after_error
        self._cause_known.wait(seconds)
        return self.cause

    def _run(self) -> None:
        lost_since: float | None = None
        while not self._stopping.wait(self.timing.interval):
            try:
                self._publish()
                self._read_failure()
                if self.cause is None and not self._reported:
                    self._check_others()
                lost_since = None
            except Exception as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > self.timing.dead_after / 2:
                    text = f"the store of the run cannot be reached ({one_line(error)}): node 0 ended; see its output"
                    self._set_cause(text, self.timing.grace)
            if self.cause is not None:
                self._exit_after_grace()
                return

    def _publish(self) -> None:
        self._updates += 1
        self.store.set(f"status/{self.rank}", f"{self._updates} {self._heartbeats} {self._what}")

    def _read_failure(self) -> None:
        if not self._reported and self.store.check([_FAILURE]):
            self._set_cause(self.store.get(_FAILURE).decode(), self.timing.grace)

    def _check_others(self) -> None:
        """Rank 0 checks all processes and writes what it finds; the others check rank 0 only."""
        others = range(self.world_size) if self.rank == 0 else [0]
        now = time.monotonic()
        for other, value in zip(others, self._read_status(others), strict=True):
            status = self._status[other]
            alive, _, rest = value.partition(" ")
            if alive != status.alive:
                heartbeats = int(rest.partition(" ")[0]) if rest else status.heartbeats
                if heartbeats != status.heartbeats:
                    self._last_heartbeat_at = now
                status.alive, status.changed_at, status.heartbeats = alive, now, heartbeats
            elif alive != _LEFT and other != self.rank and now - status.changed_at > self._dead_after:
                silent = now - status.changed_at
                self._blame(other, f"stopped answering {silent:.0f} s ago: killed, or its machine is down")
                return
        if self.rank == 0 and now - self._last_heartbeat_at > self.timeout_seconds:
            self._blame_slowest()

    def _read_status(self, others: Sequence[int]) -> list[str]:
        keys = [f"status/{other}" for other in others]
        known = [
            key for key, other in zip(keys, others, strict=True) if self._status[other].alive or self.store.check([key])
        ]
        values = dict(zip(known, (value.decode() for value in self.store.multi_get(known)), strict=True))
        return [values.get(key, "") for key in keys]

    def _blame_slowest(self) -> None:
        """Blame the ranks with the fewest heartbeats, for which the others wait. All equal is no deadlock: all work."""
        present = {other: status.heartbeats for other, status in self._status.items() if status.alive != _LEFT}
        slowest = [other for other, heartbeats in present.items() if heartbeats == min(present.values())]
        if len(slowest) < len(present):
            text = f"has not moved for {self.timeout_seconds:g} s, while the others wait for it ({self._what})"
            more = f" (and {len(slowest) - 1} more)" if len(slowest) > 1 else ""
            self._blame(slowest[0], text, more)

    def _blame(self, other: int, text: str, more: str = "") -> None:
        name = self.store.get(f"name/{other}").decode() if self.store.check([f"name/{other}"]) else f"rank {other}"
        text = f"{name}{more} {text}"
        self._write_failure(text)
        self._set_cause(text, self.timing.short_grace)

    def _write_failure(self, text: str) -> None:
        try:
            self.store.compare_set(_FAILURE, "", text)
        except Exception:  # the store may have ended with its host
            log.debug("the store cannot be reached", exc_info=True)

    def _set_cause(self, text: str, grace: float) -> None:
        if self.cause is None:
            self.cause, self._grace = text, grace
            self._cause_known.set()
            if self.reports_others:
                log.error("%s; ending", text)

    def _exit_after_grace(self) -> None:
        """End this process if its main thread does not; it may wait in a collective that cannot be interrupted."""
        if not self._stopping.wait(self._grace):
            for handler in logging.getLogger("rm_gallery").handlers:
                handler.flush()
            sys.stderr.flush()
            os._exit(1)
