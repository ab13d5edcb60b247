"""What the ranks of a run agree on: yes or no, one value for all. One process agrees with itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rm_gallery.distributed.process_group import World, turn
from rm_gallery.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # rank 0 may write the weights of a large model while the others wait for it


class Ranks:
    """Agreement over a group of its own on the host, so that it never waits for what a GPU still has to do."""

    def __init__(self, world: World, *, in_turn: bool = True) -> None:
        """Every rank makes one at the same place.

        in_turn: a process that is waited for here is named. Only for the thread that trains, whose turns are counted.
        """
        self.world, self.in_turn = world, in_turn
        self.rank, self.world_size = world.rank, world.world_size
        self.group: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def apart(self) -> Ranks:
        """The same ranks over another group, for a thread that agrees while the training goes on."""
        return Ranks(self.world, in_turn=False)

    def any(self, value: bool) -> bool:
        """Whether it is true on some rank."""
        if self.group is None:
            return value
        self._turn()
        found = torch.tensor(float(value))
        dist.all_reduce(found, group=self.group)
        return bool(found)

    def share(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.group is None:
            return value
        self._turn()
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if self.group is None:
            return [value]
        self._turn()
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _turn(self) -> None:
        if self.in_turn:
            turn("an agreement of all ranks")

    @contextmanager
    def first(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Enter the context on rank 0 alone; when it raises UserError there, every rank does."""
        with ExitStack() as stack:
            problem = None
            if self.rank == 0:
                try:
                    stack.enter_context(context)
                except UserError as error:
                    problem = str(error)
            self.settle(problem)
            yield

    def settle(self, problem: str | None) -> None:
        """Raise UserError on every rank if some rank has a problem; it is the lowest rank's that is told."""
        for each in self.gather(problem):
            if each:
                raise UserError(each)
