"""Forked processes: a model can score in a process that was forked while other threads scored.

A fork copies locks in the state that they are in, and none of the threads that would release them. So a fork waits
until the model calls of other threads have ended, which takes milliseconds to seconds.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)


class SurvivesFork(ABC):
    """An object with locks and threads that can be used in a forked process after `watch(self)`."""

    @abstractmethod
    def fork_locks(self) -> Sequence[Any]:
        """Re-entrant locks to hold during a fork. No thread holds one of them while it waits for another."""

    def renew_after_fork(self) -> None:  # noqa: B027 - optional
        """Called in the forked process: replace threads and queues."""


_watched: weakref.WeakSet[SurvivesFork] = weakref.WeakSet()
_lock = threading.RLock()
_during_fork: list[SurvivesFork] = []
_is_forked = False


def watch(each: SurvivesFork) -> None:
    """Keep an object usable in forked processes, for as long as it is referenced."""
    with _lock:
        _watched.add(each)


def compute_in_fork() -> None:
    """Use one thread if this process was forked from one that has a model.

    The threads of OpenMP are not copied, and GNU OpenMP would wait for them forever.
    """
    global _is_forked
    if _is_forked:
        import torch

        _is_forked = False
        torch.set_num_threads(1)
        log.info("process %d was forked from one that has a model: it computes with one thread", os.getpid())


def _before() -> None:
    _lock.acquire()
    _during_fork.extend(_watched)
    for each in _during_fork:
        for lock in each.fork_locks():
            lock.acquire()


def _release() -> list[SurvivesFork]:
    held = list(_during_fork)
    _during_fork.clear()
    for each in held:
        for lock in each.fork_locks():
            lock.release()
    _lock.release()
    return held


def _after_in_child() -> None:
    global _is_forked
    held = _release()
    _is_forked = _is_forked or bool(held)
    for each in held:
        each.renew_after_fork()


os.register_at_fork(before=_before, after_in_parent=_release, after_in_child=_after_in_child)
