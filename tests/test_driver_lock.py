"""The driver lock: who gets it, and when, by clocks that the tests set."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from widthsearch.errors import StudyError
from widthsearch.study import driver_lock
from widthsearch.study.driver_lock import VARIABLE, DriverLock
from widthsearch.study.storage import Store

OBJECTIVES = ("accuracy", "macs")


class Clock:
    """A monotonic clock that only ``sleep`` advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Advance."""
        self.now += seconds


@pytest.fixture
def store(url: str) -> Store:
    """An empty study."""
    return Store.create(url, "tiny", OBJECTIVES)


@pytest.fixture
def clock() -> Clock:
    """The clock of both drivers."""
    return Clock()


@pytest.fixture
def first(store: Store, clock: Clock) -> DriverLock:
    """The lock of a driver on this machine, which has just taken it."""
    lock = DriverLock(store, clock=clock, sleep=clock.sleep)
    lock.acquire()
    return lock


@pytest.fixture
def second(url: str, clock: Clock) -> DriverLock:
    """The lock of another driver, which has not taken it."""
    return DriverLock(Store.create(url, "tiny", OBJECTIVES), clock=clock, sleep=clock.sleep)


@pytest.fixture
def elsewhere(first: DriverLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first driver be on another machine than the second one."""
    monkeypatch.setattr(driver_lock, "_machine", lambda: "another boot")


def test_a_second_driver_is_refused_at_once(
    first: DriverLock, second: DriverLock, clock: Clock
) -> None:
    """The error names host, process and start of the first, whose writes go on."""
    with pytest.raises(StudyError) as caught, second:
        pass
    assert clock.now == 1000.0
    message = str(caught.value)
    assert f"is being run by process {os.getpid()} on {socket.gethostname()} since 20" in message
    assert "\n" not in message
    first.store.set_attribute("key", 1)


def test_a_released_lock_is_free(first: DriverLock, second: DriverLock) -> None:
    """The first driver has left its block; after that its store writes no more."""
    first._thread.start()
    first.__exit__(None)
    with second:
        second.check()
    with pytest.raises(StudyError, match="another one took over 'tiny'"):
        first.store.set_attribute("key", 1)


def test_an_error_in_the_block_releases_the_lock(store: Store, second: DriverLock) -> None:
    """It is raised on."""
    with pytest.raises(ZeroDivisionError), DriverLock(store):
        raise ZeroDivisionError
    with second:
        pass


HOLDER = """
import sys
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.storage import Store

DriverLock(Store.create(sys.argv[1], "tiny", ("accuracy", "macs"))).acquire()
"""


def test_the_lock_of_a_dead_process_is_free_at_once(url: str) -> None:
    """Its holder ended without a release, and was not even waited for: it is a zombie."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, url])
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with DriverLock(Store.create(url, "tiny", OBJECTIVES)):
        assert holder.wait() == 0


def test_a_recycled_process_number_is_not_the_holder(
    first: DriverLock, second: DriverLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of the holder's number that started at another time."""
    started = driver_lock._started(os.getpid())
    assert started is not None
    monkeypatch.setattr(driver_lock, "_started", lambda pid: started + 1)
    second.acquire()
    with pytest.raises(StudyError, match="took over 'tiny'"):
        first.check()


def test_a_frozen_process_loses_the_lock_after_its_time_out(
    first: DriverLock, second: DriverLock, clock: Clock
) -> None:
    """On this machine, by the age of its last renewal; renewed in time, it keeps the lock."""
    clock.now += 29
    assert first.renew()
    clock.now += 29
    with pytest.raises(StudyError, match="is being run by"):
        second.acquire()
    clock.now += 1
    second.acquire()
    assert clock.now == 1059.0
    assert not first.renew()
    second.check()
    with pytest.raises(StudyError) as caught:
        first.check()
    assert str(caught.value) == (
        f"a study has one driver at a time, but process {os.getpid()} on {socket.gethostname()} "
        "took over 'tiny' while this one was not running: this one stops, and has changed nothing "
        "since"
    )


def test_a_driver_that_was_replaced_ends_with_an_error(
    store: Store, second: DriverLock, clock: Clock
) -> None:
    """Also where it had nothing left to write."""
    # Its thread would renew the lock after 100 s.
    driver = DriverLock(store, timeout=600, clock=clock)
    with pytest.raises(StudyError, match="took over 'tiny'"), driver:
        clock.now += 600
        second.acquire()
    second.check()


def test_an_error_of_a_driver_that_was_replaced_is_raised_on(
    store: Store, second: DriverLock, clock: Clock
) -> None:
    """Such as Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), DriverLock(store, timeout=600, clock=clock):
        clock.now += 600
        second.acquire()
        raise KeyboardInterrupt
    second.check()


@pytest.mark.parametrize("skew", [-1e9, 1e9])
@pytest.mark.usefixtures("elsewhere")
def test_a_silent_driver_elsewhere_is_observed_for_its_time_out(
    first: DriverLock, second: DriverLock, clock: Clock, skew: float
) -> None:
    """Its clock, years behind or ahead, is never compared with ours."""
    first._clock = lambda: clock.now + skew
    assert first.renew()
    second.acquire()
    assert 1030 <= clock.now <= 1031


@pytest.mark.parametrize("renewal", [1005.0, 1030.0])
@pytest.mark.usefixtures("elsewhere")
def test_a_driver_elsewhere_that_renews_keeps_the_lock(
    first: DriverLock, second: DriverLock, clock: Clock, renewal: float
) -> None:
    """The other is refused at the first renewal that it sees, be it at the very end."""

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now >= renewal:
            assert first.renew()

    second._sleep = sleep
    with pytest.raises(StudyError, match="is being run by"):
        second.acquire()
    assert clock.now == renewal


@pytest.mark.usefixtures("elsewhere")
def test_a_renewal_at_the_last_moment_keeps_the_lock(
    first: DriverLock, second: DriverLock, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the decision that the holder is gone and the compare-and-set."""
    fence = second.store.fence
    take = fence.take

    def late(*arguments: object) -> bool:
        clock.now += 1
        assert first.renew()
        return take(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fence, "take", late)
    with pytest.raises(StudyError, match="is being run by"):
        second.acquire()
    first.check()


def test_the_holders_time_out_counts(url: str, second: DriverLock, clock: Clock) -> None:
    """Not that of the driver that waits."""
    patient = DriverLock(
        Store.create(url, "tiny", OBJECTIVES), timeout=300, clock=clock, sleep=clock.sleep
    )
    patient.acquire()
    clock.now += 299
    with pytest.raises(StudyError, match="is being run by"):
        second.acquire()
    clock.now += 1
    second.acquire()


def test_a_thread_renews_the_lock(store: Store) -> None:
    """In the block, six times in a time-out."""
    with DriverLock(store, timeout=0.06) as lock:
        before = store.fence.read().renewed
        while store.fence.read().renewed == before:
            lock.check()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_the_variable_must_be_a_time(
    store: Store, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """One line with its name and value."""
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(StudyError) as caught:
        DriverLock(store)
    assert str(caught.value) == (
        f"WIDTHSEARCH_DRIVER_TIMEOUT must be a number of seconds above 0, but was {text!r}"
    )


def test_the_variable_sets_the_time_out(
    store: Store, second: DriverLock, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the locks that are taken from then on."""
    monkeypatch.setenv(VARIABLE, "2.5")
    DriverLock(store, clock=clock).acquire()
    clock.now += 2.5
    second.acquire()
