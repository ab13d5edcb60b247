"""Whether this processor has units for bfloat16: without them it is several times slower than in float32."""

from __future__ import annotations

import time

import torch

_ROWS, _INNER, _COLUMNS = 512, 256, 256


def bf16_slowdown() -> float:
    """Time of a linear layer in bfloat16 over that in float32, measured on this processor in a few milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other on a busy machine
    try:
        return _seconds(torch.bfloat16) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    states, weight = torch.ones(_ROWS, _INNER, dtype=dtype), torch.ones(_COLUMNS, _INNER, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the fastest: the first sets up its kernel, and others may be disturbed
        start = time.thread_time()
        torch.nn.functional.linear(states, weight)
        best = min(best, time.thread_time() - start)
    return best
