"""The lease: one driver at a time, and none is locked out for long."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from widthsearch.errors import StudyError
from widthsearch.study.driver_lock import TIMEOUT_SECONDS, DriverLock
from widthsearch.study.storage import Store

OBJECTIVES = ("accuracy", "macs")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database that does not exist yet."""
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def store(url: str) -> Store:
    """An empty study."""
    return Store.create(url, "tiny", OBJECTIVES)


def holder(**changes: object) -> dict[str, object]:
    """The lease of this very process, with changes."""
    alive = {"token": "t", "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return {**alive, **changes}


def dead_process() -> int:
    """The number of a process that has ended."""
    return int(
        subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"],
            capture_output=True,
            check=True,
        ).stdout
    )


def test_two_drivers_are_refused(store: Store, url: str) -> None:
    """The second is told who the first is; when that one has ended, it may."""
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


def test_a_dead_drivers_lease_is_free_at_once(store: Store) -> None:
    """A SIGKILL leaves the lease; on the same host it is seen that the process is gone."""
    store.set_attribute(DriverLock.KEY, holder(pid=dead_process()))
    with DriverLock(store):
        pass


def test_a_silent_drivers_lease_runs_out(store: Store) -> None:
    """On another host only its silence tells."""
    store.set_attribute(DriverLock.KEY, holder(host="elsewhere"))
    with pytest.raises(StudyError, match="on elsewhere"), DriverLock(store):
        pass
    store.set_attribute(
        DriverLock.KEY, holder(host="elsewhere", time=time.time() - TIMEOUT_SECONDS - 1)
    )
    with DriverLock(store):
        pass


def test_a_lease_that_was_taken_over_is_lost(store: Store) -> None:
    """The driver finds out at its next beat, and leaves the new one's lease alone."""
    other = holder(token="other")
    with DriverLock(store) as driver_lock:
        driver_lock.renew()
        driver_lock.check()
        store.set_attribute(DriverLock.KEY, other)
        driver_lock.renew()
        with pytest.raises(StudyError, match="another one took over 'tiny'"):
            driver_lock.check()
    assert store.attribute(DriverLock.KEY) == other
