"""Collectives over the ranks of a run: sums of tensors, and Python values on the host.

With one process each returns its argument. Each call is a heartbeat, so that the watchdog can name a missing rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rm_gallery.distributed.process_group import World, current_world, heartbeat
from rm_gallery.errors import UserError

T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)  # rank 0 may write the weights of a large model while the others wait


def sum_over_ranks(values: Tensor, what: str = "a sum over the processes") -> Tensor:
    """All-reduce a tensor by addition, in place."""
    if current_world():
        heartbeat(what)
        dist.all_reduce(values)
    return values


def sum_numbers(*numbers: float) -> list[float]:
    """All-reduce a few numbers of the host, in float64."""
    world = current_world()
    if world is None:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64, device=world.device)
    return sum_over_ranks(values).tolist()


def broadcast(value: T) -> T:
    """Return the value of rank 0 on every rank. Values are pickled."""
    if current_world() is None:
        return value
    heartbeat("a value of rank 0")
    return _broadcast(value, None)


def all_gather(value: T) -> list[T]:
    """Return the values of all ranks on every rank, in the order of ranks. Values are pickled."""
    world = current_world()
    if world is None:
        return [value]
    heartbeat("values of all ranks")
    return _all_gather(value, None, world.world_size)


class HostGroup:
    """The same over a separate gloo group: it never waits for work queued on a GPU, and a thread can have another."""

    def __init__(self, world: World, *, heartbeats: bool = True) -> None:
        """A collective: every rank calls it.

        heartbeats: whether calls are heartbeats; False in all threads but the one that trains.
        """
        self.world, self.heartbeats = world, heartbeats
        self.rank, self.world_size = world.rank, world.world_size
        self.group: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def for_thread(self) -> HostGroup:
        """Return a second group of the same ranks, for a thread that runs collectives concurrently with training."""
        return HostGroup(self.world, heartbeats=False)

    def any(self, value: bool) -> bool:
        """Return whether the value is true on any rank."""
        if self.group is None:
            return value
        self._heartbeat()
        found = torch.tensor(float(value))
        dist.all_reduce(found, group=self.group)
        return bool(found)

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on every rank."""
        if self.group is None:
            return value
        self._heartbeat()
        return _broadcast(value, self.group)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks on every rank, in the order of ranks."""
        if self.group is None:
            return [value]
        self._heartbeat()
        return _all_gather(value, self.group, self.world_size)

    def raise_problem(self, problem: str | None) -> None:
        """Raise UserError on every rank if some rank has a problem: that of the lowest such rank."""
        for each in self.all_gather(problem):
            if each:
                raise UserError(each)

    @contextmanager
    def on_main(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Enter a context on rank 0 only; a UserError while entering is raised on every rank."""
        with ExitStack() as stack:
            problem = None
            if self.rank == 0:
                try:
                    stack.enter_context(context)
                except UserError as error:
                    problem = str(error)
            self.raise_problem(problem)
            yield

    def _heartbeat(self) -> None:
        if self.heartbeats:
            heartbeat("a collective on the host")


def _broadcast(value: T, group: dist.ProcessGroup | None) -> T:
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
    return values[0]


def _all_gather(value: T, group: dist.ProcessGroup | None, world_size: int) -> list[T]:
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value, group=group)
    return values
