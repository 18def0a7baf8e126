"""The lock of a study: two drivers at once would train the same trials twice."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from widthsearch.errors import StorageError, StudyError
from widthsearch.study.storage import Store

HEARTBEAT_SECONDS = 5.0
"""The time between two renewals of the lock."""

TIMEOUT_SECONDS = 30.0
"""The time without a renewal after which the lock is free."""


class DriverLock:
    """The right to drive a study, held within its ``with`` block.

    The lock is an attribute of the study that names its holder and a time; a thread renews it. It
    is free if the holder's process has ended (which can be seen on the same host only), or if it
    was not renewed for ``TIMEOUT_SECONDS``.

    Two drivers that take it in the same instant both write the attribute. The one whose value was
    overwritten sees this at its next renewal, and its next :meth:`check` raises.

    Args:
        store: The study's storage.

    Attributes:
        store: The study's storage.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store.create(f"sqlite:///{folder}/study.db", "mine", ("accuracy", "macs"))
        ...     with DriverLock(store) as driver_lock:
        ...         driver_lock.check()  # raises StudyError if another driver has taken over
    """

    KEY = "driver"

    def __init__(self, store: Store) -> None:
        self.store = store
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._beat, name="driver-lock", daemon=True)

    def __enter__(self) -> DriverLock:
        holder = self.store.attribute(self.KEY)
        if holder is not None and not _is_gone(holder):
            silent = time.time() - holder["time"]
            raise StudyError(
                f"a study has one driver at a time, but {self.store.name!r} is being run by "
                f"process {holder['pid']} on {holder['host']} (last sign of life {silent:.0f} s "
                f"ago): wait for it or stop it; if it was killed, run again in "
                f"{max(1.0, TIMEOUT_SECONDS - silent):.0f} s"
            )
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self._lost:
            # If the storage has failed, its error is already being raised; the lock times out.
            with contextlib.suppress(StorageError):
                self.store.set_attribute(self.KEY, None)

    def check(self) -> None:
        """Raise StudyError if another driver has taken over."""
        if self._lost:
            raise StudyError(
                f"a study has one driver at a time, but another one took over "
                f"{self.store.name!r}: this one stops"
            )

    def renew(self) -> None:
        """Write the current time, unless another driver has taken over."""
        holder = self.store.attribute(self.KEY)
        if holder is None or holder["token"] != self._token:
            self._lost = True
        else:
            self._write()

    def _write(self) -> None:
        holder = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }
        self.store.set_attribute(self.KEY, holder)

    def _beat(self) -> None:
        while not self._lost and not self._ended.wait(HEARTBEAT_SECONDS):
            # A full disk or a network fault: the driver's own next write raises the error.
            with contextlib.suppress(StorageError):
                self.renew()


def _is_gone(holder: Mapping[str, Any]) -> bool:
    """Whether a holder has lost the lock."""
    if time.time() - holder["time"] > TIMEOUT_SECONDS:
        return True
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, and another user's
        return False
    return False
