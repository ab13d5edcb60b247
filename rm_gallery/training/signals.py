"""Signal handling: SIGTERM and Ctrl-C make a run save and exit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_DEBOUNCE_S = 1.0  # seconds: the terminal and the launcher both deliver the same Ctrl-C


class StopSignal:
    """Records a signal after `begin`; before that there is nothing to save, and the signal ends the process.

    SIGTERM may arrive several times (launcher and scheduler both send it). A second Ctrl-C exits without saving.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._when = 0.0
        self._has_begun = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals inside the context and restore the handlers after it. No-op outside the main thread."""
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
        """From now on the training loop checks `received` and exits by itself."""
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
        elif number == signal.SIGINT and now - self._when > _DEBOUNCE_S:
            raise KeyboardInterrupt
