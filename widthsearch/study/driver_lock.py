"""The lease of a study: one driver at a time, or trials would be trained twice."""

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
TIMEOUT_SECONDS = 30.0


class DriverLock:
    """The right to drive a study, held from ``with`` to its end.

    It is a study attribute with the holder and a time, renewed every few seconds by a thread. A
    holder that is dead (same host, no such process) or silent for ``LEASE_SECONDS`` has lost it.
    Two drivers that take it in the same instant both write, and the one that was overwritten finds
    out at its next beat.
    """

    KEY = "driver"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> DriverLock:
        holder = self._store.attribute(self.KEY)
        if holder is not None and not _is_gone(holder):
            silent = time.time() - holder["time"]
            raise StudyError(
                f"a study has one driver at a time, but {self._store.name!r} is being run by "
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
            # Where the storage is what broke, that error is on its way; the lease runs out.
            with contextlib.suppress(StorageError):
                self._store.set_attribute(self.KEY, None)

    def check(self) -> None:
        """Raise StudyError if another driver has taken over."""
        if self._lost:
            raise StudyError(
                f"a study has one driver at a time, but another one took over "
                f"{self._store.name!r}: this one stops"
            )

    def renew(self) -> None:
        """Give a sign of life, unless another driver has taken over."""
        holder = self._store.attribute(self.KEY)
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
        self._store.set_attribute(self.KEY, holder)

    def _beat(self) -> None:
        while not self._lost and not self._ended.wait(HEARTBEAT_SECONDS):
            # A full disk or a network's hiccup: the driver's own next write says so aloud.
            with contextlib.suppress(StorageError):
                self.renew()


def _is_gone(holder: Mapping[str, Any]) -> bool:
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
