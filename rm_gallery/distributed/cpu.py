"""CPU training: keep freed memory in the process (glibc malloc), and measure the matrix multiplication rate."""

from __future__ import annotations

import ctypes
import math
import os
import time
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3)
_MAX_TENSOR_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Raise malloc's mmap and trim thresholds, so that freed tensors are reused; return whether that worked (glibc).

    By default, blocks above 32 MiB return to the system when freed. The next step then page-faults on zeroed memory.
    Nothing is changed if MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ is set in the environment.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MAX_TENSOR_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def matrix_flops(dtype: torch.dtype, *, seconds: float) -> float:
    """Measure FLOPs per second of a linear layer of 1,024 x 1,024, the best of four calls, in about `seconds`.

    The number of rows starts at 16 and grows to 1,024 while time allows: without bfloat16 units, 1,024 rows take
    seconds at the same rate.
    """
    size, repeats = 1024, 4
    matrix = torch.ones(size, size, dtype=dtype)
    rows, best = 4, 0.0
    while rows < size and 4 * repeats * best < seconds:
        rows *= 4
        inputs = torch.ones(rows, size, dtype=dtype)
        best = math.inf
        for _ in range(repeats):  # the first call sets up the kernel; others may be preempted
            start = time.perf_counter()
            torch.nn.functional.linear(inputs, matrix)  # weight layout as in layers: it matters in bfloat16
            best = min(best, time.perf_counter() - start)
    return 2 * rows * size**2 / best


def has_bf16_units() -> bool:
    """Whether this CPU has instructions for matrix products in bfloat16 (AMX, AVX-512 BF16, or those of Arm)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    older = [getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(older) or any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16"))


def bf16_slowdown() -> float:
    """Float32 rate divided by bfloat16 rate of one thread, measured in 0.1 s. Above 1, bfloat16 is slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, several threads would wait for each other
    try:
        return matrix_flops(torch.float32, seconds=0.05) / matrix_flops(torch.bfloat16, seconds=0.05)
    finally:
        torch.set_num_threads(threads)
