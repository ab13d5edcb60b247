"""When a failed request is made again, and after how long."""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

RETRIED_STATUS = (408, 409, 429)
"""Beside every 5xx."""


@dataclass(frozen=True)
class RetryPolicy:
    """Waits that double from one try to the next, drawn at random so that many callers do not return together."""

    max_retries: int = 5
    first_delay: float = 0.5
    """Seconds before the first retry, at most; at least half of it."""
    max_delay: float = 30.0
    """Seconds that the doubling stops at."""
    max_retry_after: float = 300.0
    """Seconds; an endpoint that asks for a longer wait is not waited for."""

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds to wait after the failed try number `attempt`, counted from 0.

        retry_after: seconds that the endpoint asked for; never returns before them.
        """
        if retry_after is not None:
            return retry_after * random.uniform(1.0, 1.1)
        return min(self.max_delay, self.first_delay * 2.0**attempt) * random.uniform(0.5, 1.0)


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the headers ask to wait, from a number or a date; None when they ask for nothing."""
    try:
        if text := headers.get("retry-after-ms"):
            seconds = float(text) / 1000
        elif text := headers.get("retry-after"):
            try:
                seconds = float(text)
            except ValueError:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        else:
            return None
    except (TypeError, ValueError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
