"""The schema of storages: studies of this version open for ever, others are refused.

``fixtures/schema2.sql`` is the dump of a study that ``make_fixture`` ran with schema 2. A new
schema gets a dump of its own beside it; no dump is ever changed.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import tiny
import yaml

from widthsearch.api import Study
from widthsearch.errors import StudyError
from widthsearch.report.tables import origin_text
from widthsearch.study.storage import SCHEMA, Store
from widthsearch.study.trial import Trial, TrialState

FIXTURES = Path(__file__).parent / "fixtures"


def make_fixture(folder: Path) -> None:
    """Run the fixture's study in a folder, and dump its storage there."""
    settings = tiny.config(
        trials=10,
        objectives=["accuracy", "macs", "latency_ms"],
        early_stopping={"kind": "rungs", "first_epoch": 1, "eta": 2},
        latency={"pairs": 4},
        recipe={"epochs": 4, "batch_size": 32, "precision": "fp32"},
    )

    def accuracy(trial: Trial, epoch: int) -> float:
        return 10.0 if trial.number == 6 else tiny.wide_is_good(trial, epoch)

    study = Study(settings, tiny.space(), tiny.task(), folder=folder)
    with study.search() as search:
        search._measure = lambda trial, base_ms: tiny.latency(trial.cost.macs / 1e4)
        tiny.drive(search, accuracy, trials=9)
        last = tiny.ask(search)
        search.fail(last.number, "RuntimeError: no")
        store = search._store
    for key, value in {
        "#a0": '["two ',
        "#a1": 'parts"]',
        "": {"widthsearch.parts": ["a", 2]},
    }.items():
        store.set_attribute(f"record{key}", value)
    with sqlite3.connect(folder / "study.db") as connection:
        (folder / f"schema{SCHEMA}.sql").write_text("\n".join(connection.iterdump()) + "\n")
    connection.close()


def loaded(folder: Path, schema: int) -> Study:
    """The study of a fixture, in a folder as it was run."""
    folder.mkdir()
    with sqlite3.connect(folder / "study.db") as connection:
        connection.executescript((FIXTURES / f"schema{schema}.sql").read_text())
    connection.close()
    text = (FIXTURES / f"schema{schema}.yaml").read_text()
    (folder / "study.yaml").write_text(text)
    return Study.load(folder)


def test_a_study_of_schema_2_opens(tmp_path: Path) -> None:
    """Its trials in every state, its front and its long values, as they were stored."""
    study = loaded(tmp_path / "tiny", 2)
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(10))
    states = [trial.state for trial in trials]
    assert [states.count(state) for state in TrialState] == [0, 4, 5, 1]
    first, stopped, failed = trials[0], trials[6], trials[9]
    assert (first.origin, first.widths) == ({"base": True}, tiny.widths(8, 8))
    assert (first.value, first.latency_ms, first.cost.macs) == (36.0, 1.04, 10400)
    assert first.values == (33.0, 34.0, 35.0, 36.0)
    assert (stopped.state, stopped.value, len(stopped.curve)) == ("stopped", None, 1)
    assert {origin_text(trial.origin) for trial in trials[3:]} == {"search"}
    assert (failed.state, failed.error) == ("failed", "RuntimeError: no")
    assert [trial.number for trial in study.front()] == [1, 2, 0, 3]
    assert Store.open(study.storage, "tiny").attribute("record") == ["two parts"]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "'tiny' is of widthsearch 0.1.0: give the study another name and train"),
        (SCHEMA + 1, f"'tiny' has schema {SCHEMA + 1}: upgrade widthsearch"),
    ],
)
def test_a_study_of_another_schema_is_refused(
    tmp_path: Path, schema: int | None, message: str
) -> None:
    """An older one and a newer one, to read and to drive, in one line.

    The storage decides, also where the configuration has keys that this version does not know.
    """
    study = Study(tiny.config(trials=1), tiny.space(), tiny.task(), folder=tmp_path)
    with study.search() as search:
        tiny.drive(search)
        search._store.set_attribute("schema", schema)
    for use in (study.trials, lambda: study.search().__enter__()):
        with pytest.raises(StudyError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
    values = {**study.config.to_json(), "constraints": {"least": 0.5}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(StudyError, match=message):
        Study.load(tmp_path)
