"""The queue in front of one model: texts of all requests that wait are packed together, by one thread.

A pack starts as soon as the model is free, with what waits at that moment. Clients take turns, by tokens. Texts that
begin alike share these tokens, whichever requests they came with. A request whose future is cancelled leaves the queue.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rm_gallery.errors import BadRow
from rm_gallery.scoring.base import find_bad_reward
from rm_gallery.scoring.engine import Engine
from rm_gallery.scoring.prefix_cache import PrefixCache
from rm_gallery.scoring.shared_prefixes import SharedGroup, common_tokens, share_prefixes
from rm_gallery.serving.limits import Refused

log = logging.getLogger(__name__)

_QUANTUM = 512  # tokens of a client's turn
_MAX_FILLS = 3  # times that the tokens saved by sharing are filled with further texts
_MIN_FILL = 0.75  # of the token budget


@dataclass(eq=False)
class Job:
    """The texts of one request."""

    texts: list[np.ndarray]
    client: str
    every_token: bool = False
    """Whether a text gets the rewards read at each of its tokens in place of its reward."""
    future: Future[list[Any]] = field(default_factory=Future)
    rewards: list[Any] = field(default_factory=list)
    num_taken: int = 0
    num_missing: int = 0
    submitted: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.rewards = [math.nan] * len(self.texts)
        self.num_missing = len(self.texts)

    def finish(self, index: int, reward: Any) -> None:
        """Set the reward of a text; the last one completes the future."""
        self.rewards[index] = reward
        self.num_missing -= 1
        if not self.num_missing and self.future.set_running_or_notify_cancel():
            self.future.set_result(self.rewards)

    def fail(self, error: BaseException) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass
class Counts:
    """What a queue did so far."""

    texts: int = 0
    tokens: int = 0
    """Of all texts."""
    computed: int = 0
    """Tokens that the model computed, after sharing and without those of the cache."""
    cached: int = 0
    """Tokens whose keys and values the prefix cache had."""
    packs: int = 0
    wait_seconds: float = 0.0
    """Sum over requests, until their first text was taken."""
    requests: int = 0


class ScoringQueue:
    """Owns the thread of one model."""

    def __init__(self, engine: Engine, max_waiting: int, cache: PrefixCache | None = None) -> None:
        """max_waiting: texts that are accepted and not finished."""
        self._engine, self._cache, self.max_waiting = engine, cache, max_waiting
        self._run = engine.run if cache is None else cache.run
        self.counts = Counts()
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()  # in the order of their turns
        self._turn: str | None = None  # the client whose turn it is, also between packs
        self._credit: dict[str, int] = {}  # tokens that a client may still take in its turn
        self.num_waiting = 0
        """Texts that are accepted and not finished."""
        self._changed = threading.Condition()
        self._closing = False
        self._speed = 0.0  # tokens per second, smoothed
        self._thread = threading.Thread(target=self._work, name="rm-gallery-model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread takes texts."""
        return self._thread.is_alive()

    def reserve(self, count: int) -> None:
        """Take places for this number of texts, for which the caller calls `submit` or `release` later.

        Raises Refused with status 429 if the queue is full, and 503 when it is closed.
        """
        with self._changed:
            self._check_open()
            if self.num_waiting + count > self.max_waiting:
                raise self._full(count)
            self.num_waiting += count

    def release(self, count: int) -> None:
        """Give up places."""
        with self._changed:
            self.num_waiting -= count

    def submit(self, texts: Sequence[np.ndarray], client: str, *, every_token: bool = False) -> Future[list[Any]]:
        """Queue the texts of a request, whose places are reserved; the future gives their rewards.

        every_token: of each text a list in place of its reward: the reward read at every token, of a packed model.
        Cancel it to leave the queue. Raises Refused with status 503 when the queue is closed.
        """
        job = Job(list(texts), client, every_token)
        with self._changed:
            self._check_open()
            self.counts.requests += 1
            if job.texts:
                self._clients.setdefault(client, deque()).append(job)
                self._changed.notify()
        job.future.add_done_callback(lambda _: self._leave(job))
        if not job.texts:
            job.future.set_result([])
        return job.future

    def _check_open(self) -> None:
        if self._closing or not self._thread.is_alive():
            raise Refused(503, "the server is stopping", headers={"Retry-After": "1"})

    def _full(self, count: int) -> Refused:
        waiting = (each for jobs in self._clients.values() for each in jobs)
        ahead = sum(len(text) for each in waiting for text in each.texts[each.num_taken :])
        seconds = math.ceil(min(max(ahead / self._speed if self._speed else 1.0, 1.0), 60.0))
        return Refused(
            429,
            f"the queue is full: {self.num_waiting} texts wait and --max-waiting is {self.max_waiting}, so the "
            f"{count} of this request do not fit; try again in {seconds} s",
            headers={"Retry-After": str(seconds)},
        )

    def _leave(self, job: Job) -> None:
        """Free the places of a request that is finished, has failed, or was cancelled."""
        with self._changed:
            self.num_waiting -= len(job.texts)
            jobs = self._clients.get(job.client)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                self._drop_if_idle(job.client)

    def _drop_if_idle(self, client: str) -> None:
        if not self._clients[client]:
            del self._clients[client]
            self._credit.pop(client, None)

    def close(self, *, finish: bool = True) -> None:
        """Take no more texts; score those that wait, or fail them. Idempotent."""
        with self._changed:
            self._closing = True
            jobs = [] if finish else [job for jobs in self._clients.values() for job in jobs]
            self._changed.notify()
        for job in jobs:
            job.fail(Refused(503, "the server was stopped before this request was finished"))
        self._thread.join()

    # --- The thread of the model

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._clients and not self._closing:
                        self._changed.wait()
                    if not self._clients:
                        return
                self._step()
        except BaseException as error:
            log.error("the thread of a model ended (%s); its requests fail from now on", type(error).__name__)
            raise
        finally:
            with self._changed:
                self._closing = True
                jobs = [job for jobs in self._clients.values() for job in jobs]
            for job in jobs:
                job.fail(Refused(500, "the model's thread ended; restart the server"))

    def _step(self) -> None:
        """Score one pack: about as many tokens of the waiting texts as the token budget."""
        budget = self._engine.packer.token_budget
        chosen: list[tuple[Job, int]] = []
        try:
            groups: list[SharedGroup] = []
            room = budget
            for _ in range(_MAX_FILLS):
                more = self._take(room, is_first=not chosen)
                if not more:
                    break
                chosen += more
                groups = share_prefixes([job.texts[index] for job, index in chosen], self._engine.packer)
                room = budget - self._computed(groups)
                if room < budget * (1 - _MIN_FILL):
                    break
            kinds = [[each for each in chosen if each[0].every_token is kind] for kind in (False, True)]
            for part in filter(None, kinds):
                if len(part) < len(chosen):
                    groups = share_prefixes([job.texts[index] for job, index in part], self._engine.packer)
                for pack in self._engine.plan([each.tokens for each in groups]):
                    self._score([groups[index] for index in pack], part)
        except BaseException as error:
            for job, _ in chosen:
                job.fail(error)
            raise

    def _computed(self, groups: Sequence[SharedGroup]) -> int:
        """Tokens that the model computes for these groups."""
        return sum(self._engine.packer.count_tokens(*each.tokens.sizes()[:3]) for each in groups)

    def _take(self, room: int, *, is_first: bool) -> list[tuple[Job, int]]:
        """Texts of the clients in turn, up to this many tokens; one text if it is the first, however long."""
        taken: list[tuple[Job, int]] = []
        with self._changed:
            while self._clients:
                client, jobs = next(iter(self._clients.items()))
                is_alone = len(self._clients) == 1
                if client != self._turn:
                    self._turn = client
                    self._credit[client] = self._credit.get(client, 0) + _QUANTUM
                while jobs:
                    job = jobs[0]
                    cost = self._cost(taken[-1] if taken else None, job)
                    if cost > room and (taken or not is_first):
                        return taken
                    if cost > self._credit[client] and not is_alone:
                        break  # the next one's turn; the credit grows until the text fits
                    if not job.num_taken:
                        self.counts.wait_seconds += time.monotonic() - job.submitted
                    taken.append((job, job.num_taken))
                    job.num_taken += 1
                    room -= cost
                    self._credit[client] -= 0 if is_alone else cost
                    if job.num_taken == len(job.texts):
                        jobs.popleft()
                self._turn = None
                if jobs:
                    self._clients.move_to_end(client)
                else:
                    self._drop_if_idle(client)
        return taken

    def _cost(self, before: tuple[Job, int] | None, job: Job) -> int:
        """Tokens that the next text of a request adds to a pack whose last text is `before`."""
        text = job.texts[job.num_taken]
        if before is None or self._engine.packer.padded:
            return len(text)
        return max(len(text) - common_tokens(before[0].texts[before[1]], text), 1)

    def _score(self, groups: list[SharedGroup], chosen: list[tuple[Job, int]]) -> None:
        places = [chosen[member] for group in groups for members in group.members for member in members]
        if all(job.future.done() for job, _ in places):
            return
        started = time.monotonic()
        reused = 0 if self._cache is None else self._cache.num_reused
        try:
            run = self._engine.run_tokens if places[0][0].every_token else self._run
            found = run([each.tokens for each in groups])
        except Exception as error:
            if len(groups) > 1:
                for group in groups:  # one by one, so that only the request at fault fails
                    self._score([group], chosen)
                return
            log.error("a pack failed: %s", type(error).__name__)
            for job, _ in places:
                job.fail(error)
            return
        reused = 0 if self._cache is None else self._cache.num_reused - reused
        self.counts.cached += reused
        self._count(self._computed(groups) - reused, places, time.monotonic() - started)
        for group, rewards in zip(groups, found, strict=True):
            for members, reward in zip(group.members, rewards, strict=True):
                for job, index in (chosen[member] for member in members):
                    bad = find_bad_reward([reward])
                    if bad is not None:
                        job.fail(BadRow(f"text {index} has a reward that is not finite"))
                    elif not job.future.done():
                        job.finish(index, reward)

    def _count(self, computed: int, places: list[tuple[Job, int]], seconds: float) -> None:
        counts = self.counts
        counts.packs += 1
        counts.computed += computed
        counts.texts += len(places)
        counts.tokens += sum(len(job.texts[index]) for job, index in places)
        speed = computed / max(seconds, 1e-6)
        self._speed = speed if not self._speed else 0.8 * self._speed + 0.2 * speed
