"""Memory that the allocator keeps, so that a step on a CPU does not fetch every tensor's pages from the system anew."""

from __future__ import annotations

import ctypes
import os

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
