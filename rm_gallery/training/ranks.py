"""What the ranks of a run agree on: sums, yes or no, one value for all. One process agrees with itself."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rm_gallery.distributed import World
from rm_gallery.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # rank 0 may write the weights of a large model while the others wait for it


class Ranks:
    """Agreement over a group of its own on the host, so that it never waits for what a GPU still has to do."""

    def __init__(self, world: World) -> None:
        """Every rank makes one at the same place."""
        self.world = world
        self.rank, self.world_size = world.rank, world.world_size
        self.group: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def apart(self) -> Ranks:
        """The same ranks over another group, for a thread that agrees while the training goes on."""
        return Ranks(self.world)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a small tensor, on its device; the same bits on every rank."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=None if values.is_cuda else self.group)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true on some rank."""
        return value if self.group is None else bool(self.sum(torch.tensor(float(value))).item())

    def share(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def settle(self, problem: str | None) -> None:
        """Raise UserError on every rank if some rank has a problem; it is the lowest rank's that is told."""
        for each in self.gather(problem):
            if each:
                raise UserError(each)
