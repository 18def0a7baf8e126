"""The driver lock: one driver at a time, and no lock of a dead driver stays for long."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from widthsearch.errors import StudyError
from widthsearch.study.driver_lock import TIMEOUT_SECONDS, DriverLock
from widthsearch.study.storage import Store

OBJECTIVES = ("accuracy", "macs")


@pytest.fixture
def store(url: str) -> Store:
    """An empty study."""
    return Store.create(url, "tiny", OBJECTIVES)


def holder(**changes: object) -> dict[str, object]:
    """The value of a lock that this process holds, with changes."""
    alive = {"token": "t", "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return {**alive, **changes}


def dead_process() -> int:
    """The number of a process that has ended."""
    return int(
        subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
        ).stdout
    )


def test_two_drivers_are_refused(store: Store, url: str) -> None:
    """The second driver's error names the first; after the first has ended, it gets the lock."""
    second = Store.create(url, "tiny", OBJECTIVES)
    with DriverLock(store):
        with pytest.raises(StudyError) as caught, DriverLock(second):
            pass
        assert f"is being run by process {os.getpid()} on {socket.gethostname()}" in str(
            caught.value
        )
        assert "\n" not in str(caught.value)
    with DriverLock(second):
        pass


def test_the_lock_of_a_dead_process_is_free_at_once(store: Store) -> None:
    """A SIGKILL leaves the lock; on the same host the process is looked up."""
    store.set_attribute(DriverLock.KEY, holder(pid=dead_process()))
    with DriverLock(store):
        pass


def test_a_lock_without_renewal_times_out(store: Store) -> None:
    """The process of another host cannot be looked up, so its time decides."""
    store.set_attribute(DriverLock.KEY, holder(host="elsewhere"))
    with pytest.raises(StudyError, match="on elsewhere"), DriverLock(store):
        pass
    store.set_attribute(
        DriverLock.KEY, holder(host="elsewhere", time=time.time() - TIMEOUT_SECONDS - 1)
    )
    with DriverLock(store):
        pass


def test_a_driver_notices_that_another_took_over(store: Store) -> None:
    """At its next renewal; it leaves the new driver's lock as it is."""
    other = holder(token="other")
    with DriverLock(store) as driver_lock:
        driver_lock.renew()
        driver_lock.check()
        store.set_attribute(DriverLock.KEY, other)
        driver_lock.renew()
        with pytest.raises(StudyError, match="another one took over 'tiny'"):
            driver_lock.check()
    assert store.attribute(DriverLock.KEY) == other
