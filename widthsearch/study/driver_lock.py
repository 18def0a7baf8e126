"""The lock of a study: two drivers at once would train the same trials twice."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from widthsearch.errors import StorageError, StudyError
from widthsearch.study.database import FenceRow
from widthsearch.study.storage import Store

VARIABLE = "WIDTHSEARCH_DRIVER_TIMEOUT"
"""The environment variable with the time-out of the locks that a process takes, in seconds."""

TIMEOUT_SECONDS = 30.0
"""The time without a renewal after which the lock is free, unless the variable names another."""

POLL_SECONDS = 0.5
"""The time between two looks at the lock of a driver on another machine."""


class DriverLock:
    """The right to drive a study, held within its ``with`` block.

    The lock is the study's :class:`~widthsearch.study.database.Fence`: a row that names its holder,
    and that every write of the holder checks. A thread renews it, six times in a time-out. It is
    free if it was released, if its holder's process has ended, or if it was not renewed for its
    time-out. Clocks of two machines are never compared:

    * On the holder's own machine (the same boot and the same process namespace, on Linux) its
      process is looked up by number and start, and the age of the last renewal is read from the
      machine's monotonic clock. So a lock is taken or refused at once.
    * Elsewhere the holder is observed: it is alive if it renews the lock within its time-out, by
      this machine's clock.

    A driver that is frozen for longer loses the lock. Once it runs again, its next write, its next
    :meth:`check` or the end of its ``with`` block raises StudyError.

    Args:
        store: The study's storage.
        timeout: Seconds without a renewal after which the lock is free; None for the default.
        clock: The machine's monotonic clock in seconds.
        sleep: Waits for some seconds.

    Attributes:
        store: The study's storage.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store.create(f"sqlite:///{folder}/study.db", "mine", ("accuracy", "macs"))
        ...     with DriverLock(store) as driver_lock:
        ...         driver_lock.check()  # raises StudyError if another driver has taken over
    """

    def __init__(
        self,
        store: Store,
        *,
        timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store = store
        self._timeout = _default_timeout() if timeout is None else timeout
        self._clock = clock
        self._sleep = sleep
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="driver-lock", daemon=True)

    def __enter__(self) -> DriverLock:
        self.acquire()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self.store.fence.release()
        except StorageError:
            pass  # its error is already being raised, and the lock times out
        except StudyError:
            # A driver with nothing left to write, which has not noticed yet that it was replaced.
            if kind is None:
                raise

    def acquire(self) -> None:
        """Take the lock without renewing it; a holder elsewhere is observed for its time-out.

        Raises:
            StudyError: Another driver holds it.
        """
        fence, begun, first = self.store.fence, self._clock(), None
        while True:
            row = fence.read()
            holder = row.holder
            if (
                holder is None
                or self._is_gone(row)
                or (row == first and self._clock() - begun >= holder["timeout"])
            ):
                if fence.take(row, self._now(), self._holder()):
                    return
                continue  # another driver was faster, or the holder is alive
            first = first or row
            if row != first or holder["machine"] == _machine() is not None:
                raise StudyError(
                    f"a study has one driver at a time, but {self.store.name!r} is being run by "
                    f"process {holder['pid']} on {holder['host']} since {holder['since']}: wait "
                    "for it or stop it"
                )
            self._sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise StudyError if another driver has taken over, or the lock was given back."""
        self.check_kept()
        self.store.fence.check()

    def check_kept(self) -> None:
        """Raise StudyError if the lock was given back; reads no storage."""
        if self._ended.is_set():
            raise StudyError(
                "a study is driven within `with study.search() as search`, but that has ended"
            )

    def renew(self) -> bool:
        """Renew the lock; returns False once another driver has taken over."""
        return self.store.fence.renew(self._now())

    def _beat(self) -> None:
        renewed = True
        while renewed and not self._ended.wait(self._timeout / 6):
            # A full disk or a network fault: the driver's own next write raises the error.
            with contextlib.suppress(StorageError):
                renewed = self.renew()

    def _now(self) -> int:
        return int(self._clock() * 1e9)

    def _holder(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            "machine": _machine(),
            "started": _started(os.getpid()),
            "timeout": self._timeout,
        }

    def _is_gone(self, row: FenceRow) -> bool:
        """Whether a holder on this machine has ended, or did not renew the lock in time."""
        holder = row.holder
        if holder is None or holder["machine"] is None or holder["machine"] != _machine():
            return False
        ended: bool = _started(holder["pid"]) != holder["started"]
        return ended or self._now() - row.renewed >= int(holder["timeout"] * 1e9)


def _default_timeout() -> float:
    text = os.environ.get(VARIABLE, "")
    try:
        timeout = float(text or TIMEOUT_SECONDS)
    except ValueError:
        timeout = math.nan
    if not 0 < timeout < math.inf:
        raise StudyError(f"{VARIABLE} must be a number of seconds above 0, but was {text!r}")
    return timeout


def _machine() -> str | None:
    """Names this boot of this machine, and its process namespace; None where Linux is not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """The start of a process in ticks since the boot, which a later process of its number does not
    share; None where it has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
