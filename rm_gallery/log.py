"""Logging of entry points: one format with a rank prefix. Importing the package configures nothing."""

from __future__ import annotations

import logging
import os
import sys
import time


def setup_logging(level: int = logging.INFO) -> None:
    """Log to standard error. Ranks above 0 log errors only, with the prefix `[rank N]`.

    The levels of other libraries stay unchanged. Calling it again applies the new level and the current `sys.stderr`.
    """
    rank = _number("RANK")
    logger = logging.getLogger("rm_gallery")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = f"[rank {rank}] " if rank else ""
        handler.setFormatter(logging.Formatter(f"{prefix}%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    for known in logger.handlers:
        if type(known) is logging.StreamHandler:
            known.stream = sys.stderr  # setStream would flush the old stream, which may be closed
    logger.setLevel(level if rank == 0 else logging.ERROR)


def wait_for_local_main(seconds: float = 2.0) -> str:
    """Call before printing the error that ends a process. Return the prefix of its rank: `[rank N] `, "" on rank 0.

    Local rank 0 returns immediately. The others wait: they usually fail for the same reason, and torchrun stops them
    before they repeat it.
    """
    if _number("LOCAL_RANK"):
        time.sleep(seconds)
    rank = _number("RANK")
    return f"[rank {rank}] " if rank else ""


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
