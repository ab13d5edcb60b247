"""Dynamic batching: concurrent calls are combined into full packs by one worker thread.

`submit` queues groups and returns a future. The worker collects queued calls, packs them by length, and completes each
call with its last reward. A call that fails or is cancelled does not affect the others.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import forks
from rm_gallery.scoring.base import Rewards, describe, find_bad_reward
from rm_gallery.scoring.engine import Engine

_QUIET_S = 0.002  # calls of one burst arrive within this interval of each other
_MAX_WAIT_S = 0.02
_PACKS_PER_PLAN = 8  # planned together: more fill packs better, fewer have lower latency
_MAX_CALLS = 1024  # taken from the queue at once


@dataclass
class _Call:
    """A call whose rewards are not complete yet."""

    groups: Sequence[PreferenceGroup]
    future: Future[Rewards] = field(default_factory=Future)
    rewards: Rewards = field(default_factory=list)
    num_missing: int = 0
    """Responses without a reward."""

    def fail(self, error: BaseException) -> None:
        """Set the exception, unless the future is done or cancelled."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self) -> None:
        """Set the result, unless the future is done or cancelled."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(self.rewards)


@dataclass
class _Part:
    """One part of a call: responses of one group that are computed together."""

    tokens: TokenGroup
    num_tokens: int
    """That the model computes."""
    call: _Call
    group: int
    """Index of the group in the call."""
    first: int
    """Index of the first response in the group."""
    was_deferred: bool = False


class Batcher(forks.SurvivesFork):
    """Owns the worker thread, which starts with the first call and ends with `close`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._closed = False
        forks.watch(self)

    def fork_locks(self) -> Sequence[Any]:
        return (self._lock,)

    def renew_after_fork(self) -> None:
        """The calls in the queue are those of the other process."""
        self._queue, self._thread = queue.SimpleQueue(), None

    def submit(self, groups: Sequence[PreferenceGroup]) -> Future[Rewards]:
        """Queue groups; the future gives one list of rewards per group.

        Raises RuntimeError after `close`.
        """
        call = _Call(groups)
        with self._lock:
            if self._closed:
                raise RuntimeError("the scorer is closed")
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="rm-gallery-scorer", daemon=True)
                self._thread.start()
            self._queue.put(call)
        return call.future

    def close(self) -> None:
        """Stop the worker after the current pack; unfinished calls get a RuntimeError. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        pending: list[_Part] = []
        error: BaseException = RuntimeError("the scorer was closed before this call was completed")
        try:
            while not self._closed:
                pending += self._receive(pending)
                pending = self._score_some(pending)
        except BaseException as caught:  # complete every future, or callers wait forever
            error = caught
            raise
        finally:
            for part in pending:
                part.call.fail(error)
            with self._lock:  # submit must not queue a call that no worker would take
                self._fail_queued(error)
                self._thread = None

    def _fail_queued(self, error: BaseException) -> None:
        while True:
            try:
                call = self._queue.get_nowait()
            except queue.Empty:
                return
            if call is not None:
                call.fail(error)

    def _receive(self, pending: Sequence[_Part]) -> list[_Part]:
        """Parts of the queued calls; blocks for the first call when nothing is pending.

        Waits up to `_QUIET_S` for the next call of a burst, and `_MAX_WAIT_S` in all, so that a burst is packed
        together.
        """
        budget = self._engine.packer.token_budget
        ready = sum(part.num_tokens for part in pending)
        if ready >= _PACKS_PER_PLAN * budget:
            return []
        timeout = _QUIET_S if ready < budget else 0.0
        calls: list[_Call] = []
        deadline = time.monotonic() + _MAX_WAIT_S
        while len(calls) < _MAX_CALLS:
            try:
                call = self._queue.get(timeout=timeout) if calls or pending else self._queue.get()
            except queue.Empty:
                break
            if call is None:
                break  # closed
            if not calls:
                deadline = time.monotonic() + _MAX_WAIT_S
            calls.append(call)
            if time.monotonic() > deadline and self._queue.empty():
                break
        return self._encode(calls)

    def _encode(self, calls: Sequence[_Call]) -> list[_Part]:
        calls = [call for call in calls if not call.future.cancelled()]
        try:
            encoded = iter(self._engine.encode([group for call in calls for group in call.groups]))
        except BaseException as error:
            for call in calls:
                call.fail(error)
            raise
        parts: list[_Part] = []
        for call in calls:
            found = [next(encoded) for _ in call.groups]
            bad = next((index for index, each in enumerate(found) if isinstance(each, Exception)), None)
            if bad is not None:
                call.fail(describe(found[bad], bad, call.groups[bad]))  # type: ignore[arg-type]
                continue
            call.rewards = [[0.0] * len(group.responses) for group in call.groups]
            call.num_missing = sum(map(len, call.rewards))
            if not call.num_missing:
                call.finish()
            for index, tokens in enumerate(found):
                assert not isinstance(tokens, Exception)
                first = 0
                for each in tokens:
                    parts.append(_Part(each, self._engine.packer.count_tokens(*each.sizes()[:3]), call, index, first))
                    first += len(each.tails)
        return parts

    def _score_some(self, pending: list[_Part]) -> list[_Part]:
        """Score the oldest parts, about `_PACKS_PER_PLAN` packs; returns the parts that remain."""
        pending = [part for part in pending if not part.call.future.done()]
        limit = _PACKS_PER_PLAN * self._engine.packer.token_budget
        count = used = 0
        while count < len(pending) and (not count or used < limit):
            used += pending[count].num_tokens
            count += 1
        chosen, rest = pending[:count], pending[count:]
        packs = [[chosen[index] for index in pack] for pack in self._engine.plan([part.tokens for part in chosen])]
        more_queued = bool(rest) or not self._queue.empty()
        if more_queued and len(packs) > 1 and not any(part.was_deferred for part in packs[-1]):
            # The last pack is not full: defer it once, to be packed with the calls that follow.
            deferred = packs.pop()
            for part in deferred:
                part.was_deferred = True
            rest = deferred + rest
        for number, pack in enumerate(packs):
            if self._closed:
                return [part for each in packs[number:] for part in each] + rest
            self._score_pack([part for part in pack if not part.call.future.done()])
        return rest

    def _score_pack(self, pack: list[_Part]) -> None:
        if not pack:
            return
        try:
            rewards = self._engine.run([part.tokens for part in pack])
        except Exception as error:
            if len(pack) == 1:
                pack[0].call.fail(error)
            else:
                for part in pack:  # one by one, so that only the call at fault fails
                    self._score_pack([part])
            return
        for part, found in zip(pack, rewards, strict=True):
            call = part.call
            bad = find_bad_reward(found)
            if bad is not None:
                call.fail(describe(bad, part.group, call.groups[part.group]))
                continue
            call.rewards[part.group][part.first : part.first + len(found)] = found
            call.num_missing -= len(found)
            if not call.num_missing:
                call.finish()
