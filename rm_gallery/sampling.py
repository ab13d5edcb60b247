"""Reservoir sampling: a uniform, seeded sample of a stream of unknown length (Vitter 1985, algorithm R)."""

from __future__ import annotations

import random
from typing import Generic, TypeVar

T = TypeVar("T")


class Reservoir(Generic[T]):
    """At most `capacity` items; each of the n offered so far is kept with the same probability, capacity / n.

    To offer an item: `place = reservoir.wants()`, then `put(place, item)` unless it is None.
    """

    def __init__(self, capacity: int, *, seed: int) -> None:
        self.items: list[tuple[int, T]] = []
        """(index of the item in the stream, item)."""
        self.num_offered = 0
        self._capacity = capacity
        self._draw = random.Random(seed)

    def wants(self) -> int | None:
        """Count one offered item; the place to `put` it, or None to skip it, so that a skipped item is never built."""
        number = self.num_offered
        self.num_offered += 1
        if number < self._capacity:
            return number
        place = int(self._draw.random() * (number + 1))
        return place if place < self._capacity else None

    def put(self, place: int, item: T) -> None:
        """Store the item that was counted last."""
        entry = (self.num_offered - 1, item)
        if place == len(self.items):
            self.items.append(entry)
        else:
            self.items[place] = entry

    def in_order(self) -> list[T]:
        """The items in stream order."""
        return [item for _, item in sorted(self.items, key=lambda entry: entry[0])]
