"""How fast this processor multiplies matrices; without units for bfloat16 that is slower than in float32."""

from __future__ import annotations

import math
import time

import torch


def matrix_flops(dtype: torch.dtype, *, seconds: float) -> float:
    """Operations a second of matrix products by 1,024 x 1,024, the best of a few; takes about so many seconds at most.

    Of as many rows as that time allows: a processor without bfloat16 takes seconds for 1,024, at the rate of 16.
    """
    size, repeats = 1024, 4
    matrix = torch.ones(size, size, dtype=dtype)
    rows, best = 4, 0.0
    while rows < size and 4 * repeats * best < seconds:
        rows *= 4
        inputs = torch.ones(rows, size, dtype=dtype)
        best = math.inf
        for _ in range(repeats):  # the first sets up its kernel, and others may be disturbed
            start = time.perf_counter()
            torch.nn.functional.linear(inputs, matrix)  # as layers do: the order of weights matters in bfloat16
            best = min(best, time.perf_counter() - start)
    return 2 * rows * size**2 / best


def bf16_slowdown() -> float:
    """Rate in float32 over that in bfloat16, of one thread, measured in a tenth of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other on a busy machine
    try:
        return matrix_flops(torch.float32, seconds=0.05) / matrix_flops(torch.bfloat16, seconds=0.05)
    finally:
        torch.set_num_threads(threads)
