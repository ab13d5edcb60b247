"""Reservoir: a fair sample, drawn with a seed, of a stream whose length is not known before."""

from __future__ import annotations

import random
from typing import Generic, TypeVar

T = TypeVar("T")


class Reservoir(Generic[T]):
    """At most `capacity` items; after n were offered, each of them is kept with the same chance."""

    def __init__(self, capacity: int, *, seed: int) -> None:
        self.items: list[tuple[int, T]] = []
        """(number of the offer, item)."""
        self.num_offered = 0
        self._capacity = capacity
        self._draw = random.Random(seed)

    def wants(self) -> int | None:
        """Count one offer; the place it goes to, or None when it is not kept. Cheap: items are made after it."""
        number = self.num_offered
        self.num_offered += 1
        if number < self._capacity:
            return number
        place = int(self._draw.random() * (number + 1))
        return place if place < self._capacity else None

    def put(self, place: int, item: T) -> None:
        """Keep the item that was counted last."""
        entry = (self.num_offered - 1, item)
        if place == len(self.items):
            self.items.append(entry)
        else:
            self.items[place] = entry

    def in_order(self) -> list[T]:
        """The items in the order they were offered."""
        return [item for _, item in sorted(self.items, key=lambda entry: entry[0])]
