"""SIGINT and SIGTERM while Ray Tune runs.

Tune must not be interrupted within a step of its loop: it wraps or swallows exceptions of its
callbacks, and may leave actors half started. So signals are deferred to the end of the step, and
raise at once everywhere else.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupts:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, at once or deferred.

    A second signal raises at once anywhere. Outside the main thread no handler may be set, so there
    signals stay as they were.

    Attributes:
        requested: Whether a signal has arrived.

    Example:
        >>> with Interrupts() as interrupts, interrupts.deferred():
        ...     signal.raise_signal(signal.SIGINT)
        ...     interrupts.requested
        True
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in self._SIGNALS}
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Set the handlers; again after ``ray.init``, whose native code takes SIGTERM over."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        again, self.requested = self.requested, True
        if again or not self._deferred:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context a signal only sets ``requested``."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Within ``deferred``: raise at once again, also for a signal that has arrived before."""
        self._deferred = False
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._deferred = True
