"""Logging for entry points: one format, a rank prefix, and nothing at import."""

from __future__ import annotations

import logging
import os
import sys


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log to standard error; ranks above 0 only warn, and say who they are.

    Libraries under us stay at WARNING. Called by entry points; calling it again takes today's level and `sys.stderr`.
    """
    rank = int(os.environ.get("RANK", "0") or 0)
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
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
