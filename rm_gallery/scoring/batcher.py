"""Batching: calls from many tasks and threads become whole packs in one worker thread.

A caller hands over groups and gets a future. The worker takes what waits, cuts it into packs of like length and
answers each call when its last response has a reward. A call that fails or is cancelled touches no other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.engine import Engine, Unit

Rewards: TypeAlias = list[list[float]]

_QUIET_SECONDS = 0.002  # calls of one burst follow each other faster than this
_MOST_WAIT_SECONDS = 0.02
_PACKS_AT_ONCE = 8  # sorted together by length: more fill better, fewer answer sooner
_CALLS_AT_ONCE = 1024


@dataclass
class _Call:
    """One call that waits for its rewards."""

    groups: Sequence[PreferenceGroup]
    future: Future[Rewards] = field(default_factory=Future)
    rewards: Rewards = field(default_factory=list)
    num_left: int = 0
    """Responses without a reward."""

    def fail(self, error: BaseException) -> None:
        """Give the caller the error, unless it has its answer or has gone."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self) -> None:
        """Give the caller its rewards."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(self.rewards)


@dataclass
class _Job:
    """One unit of a call."""

    unit: Unit
    call: _Call
    group: int
    was_held_back: bool = False


class Batcher:
    """Owns the worker thread; it starts with the first call and ends with `close`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, groups: Sequence[PreferenceGroup]) -> Future[Rewards]:
        """Hand groups over; the future gives one list of rewards per group.

        Raises RuntimeError after `close`.
        """
        call = _Call(groups)
        with self._lock:
            if self._closed:
                raise RuntimeError("the scorer is closed")
            if self._thread is None or not self._thread.is_alive():  # the latter in a forked process
                self._thread = threading.Thread(target=self._work, name="rm-gallery-scorer", daemon=True)
                self._thread.start()
            self._queue.put(call)
        return call.future

    def close(self) -> None:
        """End the thread after the pack that runs; calls that still wait get a RuntimeError. May be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        pool: list[_Job] = []
        error: BaseException = RuntimeError("the scorer was closed before this call was answered")
        try:
            while not self._closed:
                pool += self._receive(pool)
                pool = self._score_some(pool)
        except BaseException as caught:  # nobody may wait for ever
            error = caught
            raise
        finally:
            for job in pool:
                job.call.fail(error)
            with self._lock:  # no call may come in between: none would answer it
                self._fail_waiting(error)
                self._thread = None

    def _fail_waiting(self, error: BaseException) -> None:
        while True:
            try:
                call = self._queue.get_nowait()
            except queue.Empty:
                return
            if call is not None:
                call.fail(error)

    def _receive(self, pool: Sequence[_Job]) -> list[_Job]:
        """Jobs of the calls that have come; waits for the first when there is nothing to do.

        Waits on while more come one right after the other, so that a burst is scored together.
        """
        budget = self._engine.token_budget
        ready = sum(job.unit.cost(self._engine.model.padded) for job in pool)
        if ready >= _PACKS_AT_ONCE * budget:
            return []
        patience = _QUIET_SECONDS if ready < budget else 0.0
        calls: list[_Call] = []
        deadline = time.monotonic() + _MOST_WAIT_SECONDS
        while len(calls) < _CALLS_AT_ONCE:
            try:
                call = self._queue.get(timeout=patience) if calls or pool else self._queue.get()
            except queue.Empty:
                break
            if call is None:
                break  # closed
            if not calls:
                deadline = time.monotonic() + _MOST_WAIT_SECONDS
            calls.append(call)
            if time.monotonic() > deadline and self._queue.empty():
                break
        return self._encode(calls)

    def _encode(self, calls: Sequence[_Call]) -> list[_Job]:
        calls = [call for call in calls if not call.future.cancelled()]
        try:
            encoded = iter(self._engine.encode([group for call in calls for group in call.groups]))
        except BaseException as error:
            for call in calls:
                call.fail(error)
            raise
        jobs: list[_Job] = []
        for call in calls:
            found = [next(encoded) for _ in call.groups]
            bad = next((index for index, each in enumerate(found) if isinstance(each, Exception)), None)
            if bad is not None:
                call.fail(describe(found[bad], bad, call.groups[bad]))  # type: ignore[arg-type]
                continue
            call.rewards = [[0.0] * len(group.responses) for group in call.groups]
            call.num_left = sum(map(len, call.rewards))
            if not call.num_left:
                call.finish()
            for index, units in enumerate(found):
                assert not isinstance(units, Exception)
                jobs += [_Job(unit, call, index) for unit in units]
        return jobs

    def _score_some(self, pool: list[_Job]) -> list[_Job]:
        """Score the oldest jobs, several packs of them; returns those that are left."""
        pool = [job for job in pool if not job.call.future.done()]
        room = _PACKS_AT_ONCE * self._engine.token_budget
        count = used = 0
        while count < len(pool) and (not count or used < room):
            used += pool[count].unit.cost(self._engine.model.padded)
            count += 1
        chosen, rest = pool[:count], pool[count:]
        packs = [[chosen[index] for index in pack] for pack in self._engine.plan([job.unit for job in chosen])]
        more_waits = bool(rest) or not self._queue.empty()
        if more_waits and len(packs) > 1 and not any(job.was_held_back for job in packs[-1]):
            # The last pack is not full: it goes with what comes next, but only once.
            held = packs.pop()
            for job in held:
                job.was_held_back = True
            rest = held + rest
        for number, pack in enumerate(packs):
            if self._closed:
                return [job for each in packs[number:] for job in each] + rest
            self._score_pack([job for job in pack if not job.call.future.done()])
        return rest

    def _score_pack(self, pack: list[_Job]) -> None:
        if not pack:
            return
        try:
            rewards = self._engine.run([job.unit for job in pack])
        except Exception as error:
            if len(pack) == 1:
                pack[0].call.fail(error)
            else:
                for job in pack:  # find out whose fault it was
                    self._score_pack([job])
            return
        for job, found in zip(pack, rewards, strict=True):
            call = job.call
            call.rewards[job.group][job.unit.first : job.unit.first + len(found)] = found
            call.num_left -= len(found)
            if not call.num_left:
                call.finish()


def describe(error: Exception, index: int, group: PreferenceGroup) -> Exception:
    """The error of one group of a call, saying which group it was; errors that are not the user's stay as they are."""
    if not isinstance(error, ValueError):
        return error
    place = group.where or f"group {index}"
    described = UserError(f"{place}: the text cannot be scored: {error}")
    described.__cause__ = error
    return described
