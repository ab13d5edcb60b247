"""Packs for tests of attention kernels; the cases and the comparison are those of benchmarks/gpu_check/kernels.py."""

from __future__ import annotations

import pytest

from benchmarks.gpu_check.kernels import (
    EXACT,
    EXACT_ON_GPU,
    FEATURES,
    HEADS,
    LONG_SHAPES,
    ROUNDED,
    SHAPES,
    draw_inputs,
    layout_of,
    supports,
    worst_difference,
)

__all__ = [
    "EXACT", "EXACT_ON_GPU", "FEATURES", "HEADS", "LONG_SHAPES", "ROUNDED", "SHAPES", "SHAPES_AND_HEADS", "draw_inputs",
    "layout_of", "supports", "worst_difference",
]  # fmt: skip

SHAPES_AND_HEADS = [
    pytest.param(shape, heads, id=f"{shape}-{heads}", marks=() if (row + column) % 3 == 0 else pytest.mark.slow)
    for row, shape in enumerate(SHAPES)
    for column, heads in enumerate(HEADS)
]
"""All combinations; `make test` runs every shape and every number of heads at least once."""
