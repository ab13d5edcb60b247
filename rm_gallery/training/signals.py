"""Stopping: SIGTERM and Ctrl-C ask a run to save and to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME_KEY_PRESS = 1.0  # seconds: a launcher passes on what the terminal has sent already


class StopSignal:
    """Remembers that a signal came, once `begin` was called; before, there is nothing to save and it ends the process.

    SIGTERM may come many times (launcher and scheduler each send it); the second Ctrl-C ends the run without saving.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._when = 0.0
        self._has_begun = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take both signals inside; outside they do what they did before. Other threads than the main one cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def begin(self) -> None:
        """From now on the run looks at `received`, and ends by itself."""
        self._has_begun = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._has_begun:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.received is None:
            self.received, self._when = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._when > _SAME_KEY_PRESS:
            raise KeyboardInterrupt
