"""The CPU of a run: memory that the allocator keeps, and how fast matrices are multiplied here.

Without keeping, a step fetches every tensor's pages from the system anew. A processor without units for bfloat16 is
slower in it than in float32.
"""

from __future__ import annotations

import ctypes
import math
import os
import time

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_UP_TO = 1 << 30  # bytes of one tensor


def keep_freed_memory() -> bool:
    """Let the C library reuse what this process has freed; whether it does (glibc only).

    It gives tensors above 32 MiB at most back to the system otherwise, and gets them back zeroed, page by page.
    Whoever sets glibc's MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ has decided, and nothing is changed.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _UP_TO)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


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
