"""The storage: trials come back as they were stored."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import tiny
from torch import nn

from widthsearch.errors import StorageError, StudyError
from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.storage import SpaceRecord, Store
from widthsearch.study.trial import Trial, TrialState
from widthsearch.widths import Widths

SPACES = {"tiny": tiny.space()}
OBJECTIVES = ("accuracy", "macs", "latency_ms")


@pytest.fixture
def store(url: str) -> Store:
    """An empty study."""
    return Store.create(url, "tiny", OBJECTIVES)


def begin(store: Store, first: int = 4, second: int = 8) -> Trial:
    """A trial that has just begun."""
    candidate = Candidate("tiny", tiny.widths(first, second), {"sampler": "tpe"})
    return store.begin(SPACES, candidate, seed=7)


def test_trials_come_back_as_they_were_stored(store: Store, url: str) -> None:
    """Finished, stopped and failed: every field, from a storage that was opened anew."""
    trials = [begin(store, first) for first in (4, 6, 8)]
    for i, trial in enumerate(trials):
        trials[i] = replace(trial, latency=tiny.latency(0.5 + i), curve=tiny.curve(50, 60 + i))
        store.record_latency(trial.number, tiny.latency(0.5 + i))
        store.record_curve(trial.number, tiny.curve(50, 60 + i))
    store.finish(0, (60.0, 100.0, 0.5))
    store.stop(1)
    store.fail(2, "RuntimeError: no")

    assert Store.open(url, "tiny").trials(SPACES) == [
        replace(trials[0], state=TrialState.FINISHED),
        replace(trials[1], state=TrialState.STOPPED),
        replace(trials[2], state=TrialState.FAILED, error="RuntimeError: no"),
    ]


def test_a_running_trial_is_read_back(store: Store, url: str) -> None:
    """Under its own number, with its latency and curve."""
    begin(store)
    trial = begin(store, 6)
    store.record_latency(trial.number, tiny.latency(0.5))
    store.record_curve(trial.number, tiny.curve(50))

    anew = Store.open(url, "tiny")

    taken = anew.trials(SPACES)
    assert [(t.number, t.state) for t in taken] == [(0, "running"), (1, "running")]
    assert taken[1] == replace(trial, latency=tiny.latency(0.5), curve=tiny.curve(50))


def test_a_half_written_trial_fails_and_does_not_count(store: Store, url: str) -> None:
    """Made by another program, which was killed between two parameters."""
    study = optuna.load_study(study_name="tiny", storage=url)
    study.ask({"first": optuna.distributions.IntDistribution(2, 16, step=2)})

    assert store.trials(SPACES) == []
    store.fail_partial(SPACES)
    assert store.trials(SPACES) == []
    (partial,) = optuna.load_study(study_name="tiny", storage=url).trials
    assert partial.state == optuna.trial.TrialState.FAIL


def test_a_trial_is_inserted_whole_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure between two parameters leaves nothing behind."""
    insert = optuna.storages.RDBStorage._set_trial_param_without_commit

    def fail_at_the_second(self: object, *args: object) -> None:
        if "second" in args:
            raise RuntimeError("killed")
        insert(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(
        optuna.storages.RDBStorage, "_set_trial_param_without_commit", fail_at_the_second
    )
    with pytest.raises(RuntimeError, match="killed"):
        begin(store)
    monkeypatch.undo()

    assert store.trials(SPACES) == []
    assert begin(store).number == 0


def test_the_dashboard_can_read_it(store: Store, url: str) -> None:
    """Widths are parameters, objectives have names and directions, curves are no values."""
    trial = begin(store)
    store.record_curve(trial.number, tiny.curve(50, 60))
    store.finish(trial.number, (60.0, 100.0, 0.5))

    study = optuna.load_study(study_name="tiny", storage=url)

    assert study.metric_names == list(OBJECTIVES)
    assert [direction.name for direction in study.directions] == [
        "MAXIMIZE",
        "MINIMIZE",
        "MINIMIZE",
    ]
    (frozen,) = study.trials
    assert frozen.params == {"first": 4, "second": 8}
    assert frozen.values == [60.0, 100.0, 0.5]
    assert frozen.user_attrs["origin"] == {"sampler": "tpe"}
    assert frozen.intermediate_values == {}


def test_sqlite_is_in_wal_mode(store: Store, tmp_path: Path) -> None:
    """Readers do not block the driver."""
    store.set_attribute("key", 1)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_study_without_a_run_is_an_error(url: str, tmp_path: Path) -> None:
    """Opening it makes no empty database."""
    with pytest.raises(StudyError, match="study 'tiny' has no trials yet: run it first"):
        Store.open(url, "tiny")
    assert not (tmp_path / "study.db").exists()
    Store.create(url, "other", OBJECTIVES)
    with pytest.raises(StudyError, match="study 'tiny' has no trials yet"):
        Store.open(url, "tiny")


@pytest.mark.parametrize("lost", ["every", "trials", "version_info"])
def test_a_database_that_lacks_tables_is_a_study_without_a_run(
    store: Store, url: str, tmp_path: Path, lost: str
) -> None:
    """As where a driver was killed while it made them; the next one makes the rest."""
    with sqlite3.connect(tmp_path / "study.db") as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (name,) in tables.fetchall():
            if lost in ("every", name):
                connection.execute(f"DROP TABLE {name}")
    connection.close()
    with pytest.raises(StudyError, match="study 'tiny' has no trials yet: run it first"):
        Store.open(url, "tiny")
    assert not Store.create(url, "tiny", OBJECTIVES).begun


@pytest.mark.parametrize(
    ("address", "reason", "advice"),
    [
        ("sqlite:////nowhere/at/all/study.db", "unable to open database file", "check its address"),
        ("nonsense", "Could not parse SQLAlchemy URL", "check its address"),
        ("mysql://user:secret@localhost/study", "No module named", "install it with pip"),
        ("oracle9://localhost/study", "Can't load plugin", "check its address"),
        ("postgresql://user:secret@localhost:port/study", "invalid literal", "check its address"),
        ("sqlite:///:memory:?timeout=soon", "could not convert string", "check its address"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_an_error(
    address: str, reason: str, advice: str
) -> None:
    """One line with the address, the reason and the way out; never a password."""
    with pytest.raises(StorageError) as caught:
        Store.create(address, "tiny", OBJECTIVES)
    message = str(caught.value)
    if not address.startswith("sqlite"):  # whose file is looked for first
        with pytest.raises(StorageError) as read:
            Store.open(address, "tiny")
        assert str(read.value) == message
    assert "\n" not in message
    assert message.startswith("the storage '")
    assert reason in message
    assert advice in message
    assert "secret" not in message


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    """A text file under the database's name."""
    (tmp_path / "study.db").write_text("hello, " * 100)
    with pytest.raises(StorageError, match="file is not a database"):
        Store.create(f"sqlite:///{tmp_path / 'study.db'}", "tiny", OBJECTIVES)


def test_a_storage_that_breaks_later_is_an_error(store: Store, tmp_path: Path) -> None:
    """The same line where a write fails in the middle of a study."""
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("DROP TABLE study_user_attributes")
        connection.execute("DROP TABLE trials")
    connection.close()
    with pytest.raises(StorageError, match=r"cannot be used: no such table"):
        store.set_attribute("key", 1)
    with pytest.raises(StorageError, match=r"cannot be used: no such table"):
        _ = store.begun


def test_a_storage_that_becomes_read_only_is_an_error(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the tables and the study, where Optuna raises an error of its own."""

    def denied(*_: object, **__: object) -> None:
        raise optuna.exceptions.StorageInternalError("in the commit") from OSError("read-only")

    monkeypatch.setattr(optuna, "create_study", denied)
    with pytest.raises(StorageError, match="cannot be used: read-only; check its address"):
        Store.create(url, "tiny", OBJECTIVES)


def test_several_spaces_share_a_study(store: Store) -> None:
    """Their axes may have the same names: parameters are `space/axis`."""
    both = {"tiny": tiny.space(), "other": tiny.space("other").constrained(pin="first")}
    for name, widths in (("tiny", tiny.widths(4, 8)), ("other", Widths(("second",), (6,)))):
        store.begin(both, Candidate(name, widths, {}), seed=0)
    first, second = store.trials(both)
    assert (first.space, first.widths) == ("tiny", tiny.widths(4, 8))
    assert (second.space, dict(second.widths)) == ("other", {"second": 6})


def sizes(file: Path) -> list[int]:
    """The bytes of each stored attribute."""
    with sqlite3.connect(file) as connection:
        tables = ("study_user_attributes", "trial_user_attributes")
        queries = " UNION ALL ".join(f"SELECT value_json FROM {table}" for table in tables)
        found = [len(text.encode()) for (text,) in connection.execute(queries)]
    connection.close()
    return found


def test_a_space_whose_name_is_no_text_is_an_error(store: Store) -> None:
    """Another program has written it."""
    record = SpaceRecord.of(tiny.space()).to_json()
    store.set_attribute("spaces", [{**record, "name": ["tiny"]}])
    with pytest.raises(StorageError, match="the values of a study must be"):
        store.records()


def test_long_values_are_stored_in_parts(store: Store, url: str, tmp_path: Path) -> None:
    """Of a study and of a trial: no column holds 60,000 bytes, where MySQL's holds 65,535."""
    value = {'é"\\': ['"\n' * 40_000, list(range(20_000))]}
    store.set_attribute("record", value)
    trial = begin(store)
    curve = tiny.curve(*[100 / epoch for epoch in range(1, 2001)])
    store.record_curve(trial.number, curve[:1000])
    store.record_curve(trial.number, curve)
    store.fail(trial.number, "no " * 30_000)

    anew = Store.open(url, "tiny")
    assert anew.attribute("record") == value
    (stored,) = anew.trials(SPACES)
    assert (stored.curve, stored.error) == (curve, "no " * 30_000)
    assert max(sizes(tmp_path / "study.db")) < 60_000
    store.set_attribute("record", "short")
    assert anew.attribute("record") == "short"


def test_a_kill_between_parts_leaves_the_old_value(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a mixture: the head names the new parts once all of them are stored."""
    old, new = ["old"] * 20_000, ["new"] * 20_000
    store.set_attribute("record", ["first"] * 20_000)
    store.set_attribute("record", old)
    set_study_user_attr = optuna.storages.RDBStorage.set_study_user_attr
    left = 0

    def killed(self: object, *args: object) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        set_study_user_attr(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(optuna.storages.RDBStorage, "set_study_user_attr", killed)
    for writes in range(6):  # five parts and the head
        left = writes
        with pytest.raises(KeyboardInterrupt):
            store.set_attribute("record", new)
        assert store.attribute("record") == old
    left = 6
    store.set_attribute("record", new)
    assert Store.open(url, "tiny").attribute("record") == new


def test_a_trial_costs_the_same_in_a_large_study(url: str, tmp_path: Path) -> None:
    """As many SQL statements as in an empty one, and at most 50 kB, with 30 axes and reports."""
    layers = [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(30)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    spaces = {"net": SearchSpace.from_model(net, (3, 4, 4), name="net")}
    store = Store.create(url, "large", ("accuracy", "macs"))
    assert store.fence.take(store.fence.read(), 0, {})
    statements: list[str] = []
    sqlalchemy.event.listen(
        store._storage.engine, "before_cursor_execute", lambda *event: statements.append(event[2])
    )
    counts, sizes = [], []
    for number in range(8):
        store.begin(spaces, Candidate("net", spaces["net"].base, {"sampler": "width"}), seed=number)
        for epoch in range(1, 31):
            store.record_curve(number, tiny.curve(*[90.0 + 1 / 3] * epoch))
        store.finish(number, (90.0, 1e6))
        counts.append(len(statements))
        statements.clear()
        sizes.append(sum(file.stat().st_size for file in tmp_path.glob("study.db")))
    assert len(spaces["net"].axes) == 30
    assert len(set(counts[1:])) == 1, counts
    assert (sizes[-1] - sizes[0]) / 7 < 50_000
