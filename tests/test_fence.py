"""The fence: a driver that was replaced writes nothing, at whatever moment it was replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
import sqlalchemy
import tiny
from databases import new_database, postgres_server
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from optuna.storages import RDBStorage

from widthsearch.bayesopt.optuna_sampler import directions
from widthsearch.errors import StorageError, StudyError
from widthsearch.proposers.families import Candidate
from widthsearch.study import database, driver_lock
from widthsearch.study.database import open_database
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.storage import Store

SPACES = {"tiny": tiny.space()}
OBJECTIVES = ("accuracy", "macs")
HOLDER = {"host": "elsewhere", "pid": 7}


@pytest.fixture(params=["sqlite", "postgresql"], scope="module")
def database_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database of each kind, with a study for each test."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('database') / 'study.db'}"
    else:
        with postgres_server() as server, new_database(server) as address:
            yield address


@pytest.fixture
def stores(database_url: str, request: pytest.FixtureRequest) -> list[Store]:
    """A study of its own, opened by two processes, as if."""
    return [Store.create(database_url, request.node.name, OBJECTIVES) for _ in range(2)]


def begin(store: Store, first: int = 4) -> int:
    """Begin a trial; returns its number."""
    candidate = Candidate("tiny", tiny.widths(first, 8), {"sampler": "width"})
    return store.begin(SPACES, candidate, seed=7).number


def take(store: Store) -> bool:
    """Become the driver, whichever process is it now."""
    return store.fence.take(store.fence.read(), 0, HOLDER)


def content(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table but the fence's own."""
    engine = store._storage.engine
    with engine.connect() as connection:
        tables = set(sqlalchemy.inspect(connection).get_table_names()) - {"widthsearch_driver"}
        assert "trials" in tables
        return {
            table: sorted(map(tuple, connection.execute(sqlalchemy.text(f"SELECT * FROM {table}"))))
            for table in tables
        }


WRITES: dict[str, Callable[[Store], object]] = {
    "begin": begin,
    "record_latency": lambda store: store.record_latency(0, tiny.latency(1.0)),
    "record_curve": lambda store: store.record_curve(0, tiny.curve(50, 60)),
    "finish": lambda store: store.finish(0, (60.0, 100.0)),
    "stop": lambda store: store.stop(0),
    "fail": lambda store: store.fail(0, "no"),
    "fail_partial": lambda store: store.fail_partial(SPACES),
    "set_attribute": lambda store: store.set_attribute("key", 2),
    "forget": lambda store: store.forget("key"),
}
READS = {"attribute", "begun", "create", "earlier", "open", "records", "running", "trials"}


@pytest.fixture
def store(stores: list[Store]) -> Store:
    """A study with what each write needs, and a driver that holds it."""
    store = stores[0]
    assert take(store)
    begin(store)
    store.set_attribute("key", 1)
    grid = {"first": optuna.distributions.IntDistribution(2, 16, step=2)}
    optuna.load_study(study_name=store.name, storage=store._storage).ask(grid)  # for fail_partial
    return store


def test_every_method_of_the_store_is_tried() -> None:
    """A new one must be among the writes or the reads."""
    public = {name for name in vars(Store) if not name.startswith("_")}
    assert public == WRITES.keys() | READS


@pytest.mark.parametrize("name", WRITES)
def test_a_driver_that_holds_the_study_writes(store: Store, name: str) -> None:
    """Each write changes the database: so the next test could fail."""
    before = content(store)
    WRITES[name](store)
    assert content(store) != before


@pytest.mark.parametrize("name", WRITES)
def test_a_driver_that_was_replaced_within_a_write_changes_nothing(
    store: Store, stores: list[Store], name: str
) -> None:
    """The other one takes over in the middle of the method: just before its first write."""
    other = stores[1]
    before, taken = content(store), []

    def freeze(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if not taken and statement.startswith(("INSERT", "UPDATE", "DELETE")):
            taken.append(take(other))

    sqlalchemy.event.listen(store._storage.engine, "before_cursor_execute", freeze, insert=True)
    with pytest.raises(StudyError, match="process 7 on elsewhere took over") as caught:
        WRITES[name](store)
    assert "\n" not in str(caught.value)
    assert taken == [True]
    assert content(store) == before
    with pytest.raises(StudyError, match="took over"):
        store.fence.check()
    WRITES[name](other)
    assert content(store) != before


@pytest.mark.parametrize("name", ["record_latency", "record_curve", "finish", "stop", "fail"])
def test_a_trial_that_another_driver_has_ended_is_its_take_over(
    store: Store, stores: list[Store], name: str
) -> None:
    """Optuna itself refuses the write, before the fence: the line is that of the fence."""
    other = stores[1]
    assert take(other)
    other.finish(0, (60.0, 100.0))
    before = content(store)
    with pytest.raises(StudyError, match="process 7 on elsewhere took over"):
        WRITES[name](store)
    assert content(store) == before


def test_a_trial_that_ends_twice_is_no_take_over(stores: list[Store]) -> None:
    """Without a driver there is none to name: it is the caller's fault, as in Optuna's message."""
    store = stores[0]
    begin(store)
    store.finish(0, (60.0, 100.0))
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        store.stop(0)


def test_nobody_takes_over_between_the_check_and_the_commit(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one waits for the transaction; here in vain, then until it has ended."""
    monkeypatch.setitem(database._SETTINGS, "sqlite", ("PRAGMA busy_timeout=1",))
    monkeypatch.setitem(database._SETTINGS, "postgresql", ("SET lock_timeout = '1ms'",))
    store, other = (Store.create(database_url, "tiny", OBJECTIVES) for _ in range(2))
    assert take(store)
    insert = store._storage._set_trial_param_without_commit
    tried = []

    def interrupted(*arguments: Any) -> None:
        with pytest.raises(StorageError, match=r"database is locked|lock timeout"):
            take(other)
        tried.append(arguments)
        insert(*arguments)

    monkeypatch.setattr(store._storage, "_set_trial_param_without_commit", interrupted)
    begin(store)
    assert len(tried) == 2
    with store.fence.held(), pytest.raises(StorageError, match="cannot be used"):
        take(other)
    assert take(other)
    assert [trial.number for trial in other.trials(SPACES)] == [0]
    with pytest.raises(StudyError, match="took over"), store.fence.held():
        raise AssertionError


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_postgresql_ends_the_transaction_of_a_frozen_driver(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it does not keep the study for ever; the other one waits for that."""
    quick = ("SET idle_in_transaction_session_timeout = '100ms'",)
    monkeypatch.setitem(database._SETTINGS, "postgresql", quick)
    store, other = (Store.create(database_url, "frozen", OBJECTIVES) for _ in range(2))
    assert take(store)
    with pytest.raises(StorageError, match="cannot be used"), store.fence.held():
        assert take(other)
    with pytest.raises(StudyError, match="took over"):
        store.set_attribute("key", 1)


def test_one_of_two_takes_a_free_study(stores: list[Store]) -> None:
    """Both saw the same row: the first one ever, and later ones."""
    for _ in range(2):
        row = stores[0].fence.read()
        assert [store.fence.take(row, 0, HOLDER) for store in stores] == [True, False]
        stores.reverse()


class Drivers(RuleBasedStateMachine):
    """Three drivers on two machines over one SQLite file, in any order of steps.

    The clock advances by sleep and by a rule only. The model knows which driver took the study last
    and when it renewed the lock.
    """

    storages: ClassVar[list[RDBStorage]] = []

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(driver_lock, "_machine", lambda: self.machine)
        self.machine = ""
        self.now = 0.0
        self.renewing = False
        study = self.storages[0].create_new_study(directions(OBJECTIVES))
        name = self.storages[0].get_study_name_from_id(study)
        stores = [Store(str(storage.url), name, storage) for storage in self.storages]
        self.locks = [DriverLock(s, clock=lambda: self.now, sleep=self.sleep) for s in stores]
        self.holder: int | None = None  # the last that took it
        self.released = True
        self.renewed = 0.0
        self.tokens: dict[int, int] = {}  # of the drivers that ever took it
        self.writes = 0
        self.writers: dict[int, set[int]] = {}  # by the token at the time of a write

    def teardown(self) -> None:
        """Leave the storages to the next example."""
        for lock in self.locks:
            fence = lock.store.fence
            sqlalchemy.event.remove(fence._engine, "before_cursor_execute", fence._before_statement)
        self.patch.undo()

    def sleep(self, seconds: float) -> None:
        """While a driver waits, the holder may renew the lock."""
        self.now += seconds
        if self.renewing and self.holder is not None:
            assert self.locks[self.holder].renew()
            self.renewed = self.now

    @rule(i=st.integers(0, 2), renewing=st.booleans())
    def start(self, i: int, renewing: bool) -> None:
        """A driver starts: it gets the lock exactly if it is free."""
        self.machine, self.renewing = ("ours", "ours", "theirs")[i], renewing
        before = self.now
        here = self.holder is not None and (i < 2) == (self.holder < 2)
        timed_out = self.now - self.renewed >= 30
        free = self.released or (timed_out if here else not renewing)
        if free:
            self.locks[i].acquire()
            waited = not self.released and not here
            assert (self.now - before >= 30) == waited
            self.holder, self.released, self.renewed = i, False, self.now
            token = self.locks[i].store.fence.token
            assert token is not None
            assert token > max(self.tokens.values(), default=0)
            self.tokens[i] = token
        else:
            with pytest.raises(StudyError, match="is being run by"):
                self.locks[i].acquire()
            assert self.now == before or not here

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """One that ever held the lock writes: it succeeds exactly if it is the last."""
        i = data.draw(st.sampled_from(sorted(self.tokens)))
        store = self.locks[i].store
        current = store.fence.read().token
        self.writes += 1  # an attribute that keeps its value is not written at all
        try:
            store.set_attribute("writer", [i, self.writes])
        except StudyError:
            assert i != self.holder
        else:
            assert i == self.holder
            assert self.tokens[i] == current
            self.writers.setdefault(current, set()).add(i)
            assert store.attribute("writer") == [i, self.writes]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """One that ever held the lock renews it: the last one only succeeds."""
        i = data.draw(st.sampled_from(sorted(self.tokens)))
        assert self.locks[i].renew() == (i == self.holder)
        if i == self.holder:
            self.renewed = self.now

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """One that ever held the lock ends: the last one frees it, the others raise an error."""
        i = data.draw(st.sampled_from(sorted(self.tokens)))
        try:
            self.locks[i].store.fence.release()
        except StudyError:
            assert i != self.holder
        else:
            assert i == self.holder
            self.released = True

    @rule(seconds=st.sampled_from([0.1, 5.0, 29.0, 30.0, 100.0]))
    def wait(self, seconds: float) -> None:
        """No driver renews the lock for a while: all are frozen."""
        self.now += seconds

    @invariant()
    def one_writer_a_token(self) -> None:
        """At most one driver's writes succeed at any token."""
        assert all(len(writers) == 1 for writers in self.writers.values())


def test_drivers_in_any_order(tmp_path: Path) -> None:
    """At most one driver's writes succeed at any token, and the lock is free exactly when due."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    Drivers.storages[:] = [open_database(url, make_tables=True) for _ in range(3)]
    steps = settings(max_examples=60, stateful_step_count=20, deadline=None)
    run_state_machine_as_test(Drivers, settings=steps)  # type: ignore[no-untyped-call]


def test_a_study_begins_in_an_empty_database(tmp_path: Path) -> None:
    """Of a server, which no file shows to be empty; until then the study was never run."""
    with postgres_server() as server, new_database(server) as address:
        study = tiny.study(tmp_path, storage=address, trials=2)
        with pytest.raises(StudyError, match="study 'tiny' has no trials yet: run it first"):
            study.trials()
        tiny.run(study)
        assert len(study.trials()) == 2
