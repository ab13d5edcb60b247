"""Logging for entry points: one format, a rank prefix, and nothing at import."""

from __future__ import annotations

import logging
import os
import sys
import time


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log to standard error; ranks above 0 are quiet but for errors, and say who they are.

    Libraries under us stay at WARNING. Called by entry points; calling it again takes today's level and `sys.stderr`.
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
            known.stream = sys.stderr  # not setStream: it would flush a stream that may be closed
    logger.setLevel(level if rank == 0 else logging.ERROR)


def speak_in_turn(seconds: float = 2.0) -> str:
    """Before a process says why it ends: what to put in front, `[rank N] ` or nothing.

    The first process of a machine speaks at once. The others wait: mostly they end for the same reason, and torchrun
    ends them before they repeat it.
    """
    if _number("LOCAL_RANK"):
        time.sleep(seconds)
    rank = _number("RANK")
    return f"[rank {rank}] " if rank else ""


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
