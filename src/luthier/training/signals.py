"""Ctrl-C and SIGTERM end a run after the step in hand; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes the first stop signal, from :meth:`catch` to :meth:`release`; in the main thread alone.

    Args:
        say: tells the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: dict[signal.Signals, Any] = {}
        self.received: int | None = None

    def catch(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOPS}

    def release(self) -> None:
        """The handlers of before are in place again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self._say("stopping after this step, with a checkpoint; once more to stop at once")
