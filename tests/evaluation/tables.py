"""Tables of made-up rewards, without texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rm_gallery.data.benchmarks.table import Item, Table, TableBuilder
from rm_gallery.schema import Comparison, PreferenceGroup

Row = tuple[str, str, int, Sequence[float]]
"""Subset, label, number of correct responses (which come first) and rewards."""


def make_table(rows: Sequence[Row]) -> tuple[Table, np.ndarray]:
    """Every correct response of a row against every other one."""
    builder = TableBuilder()
    rewards: list[float] = []
    for number, (subset, label, correct, values) in enumerate(rows):
        count = len(values)
        pairs = tuple(Comparison(better, worse) for better in range(correct) for worse in range(correct, count))
        group = PreferenceGroup((), ["x"] * count, pairs, "chat", where=f"made.jsonl:{number}")
        quality = [1.0] * correct + [0.0] * (count - correct)
        builder.add(Item(group, number, subset, quality, label), [1] * count)
        rewards += values
    return builder.finish(), np.array(rewards, float)
