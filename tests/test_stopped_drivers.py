"""Killed, interrupted and frozen drivers: no result is lost, no epoch is trained twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny

from widthsearch.api import Study
from widthsearch.errors import StudyError
from widthsearch.runner import ray_tune
from widthsearch.study.driver_lock import VARIABLE
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial, TrialState
from widthsearch.widths import Widths

pytestmark = pytest.mark.ray

DRIVER = """
import sys

import test_stopped_drivers

from widthsearch.errors import WidthsearchError

try:
    test_stopped_drivers.long_study(sys.argv[1]).run(quiet=True)
except KeyboardInterrupt:
    sys.exit(130)
except WidthsearchError as error:
    print(f"error: {error}")
    sys.exit(2)
"""

EPOCHS = 40


def long_study(folder: str | Path) -> Study:
    """A study that is long enough to be killed while it trains."""
    recipe = {"epochs": EPOCHS, "batch_size": 32, "lr": 0.01, "precision": "fp32"}
    return tiny.study(Path(folder), trials=8, concurrency=2, recipe=recipe)


class Driver:
    """A driver in a process of its own, and a view of its study's storage."""

    def __init__(self, folder: Path, steps: Path) -> None:
        self.study = long_study(folder)
        paths = [Path(__file__).parent, Path(ray_tune.__file__).parents[2]]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
                "WIDTHSEARCH_TEST_WITNESS": str(steps),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def trials(self) -> dict[int, Trial]:
        """The done trials, by number."""
        return {trial.number: trial for trial in self.study.trials()}

    def running(self) -> list[Trial]:
        """The trials that have begun and are not done."""
        trials = Store.open(self.study.storage, "tiny").trials(self.study.spaces)
        return [trial for trial in trials if trial.state == TrialState.RUNNING]

    def wait_for(self, done: int) -> None:
        """Wait until so many trials are done and another one has trained a few epochs.

        The query is a plain one: opening the study takes longer than training a few epochs.
        """
        query = (
            "SELECT state, value_json FROM trials LEFT JOIN trial_user_attributes AS attribute "
            "ON attribute.trial_id = trials.trial_id AND attribute.key = 'curve'"
        )
        deadline, rows = time.monotonic() + 120, list[tuple[str, str | None]]()
        while sum(state == "COMPLETE" for state, _ in rows) < done or not any(
            state == "RUNNING" and len(json.loads(c or "[]")) > 2 for state, c in rows
        ):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
            with contextlib.suppress(sqlite3.OperationalError):  # no tables yet
                database = f"file:{self.study.folder / 'study.db'}?mode=ro"
                with contextlib.closing(sqlite3.connect(database, uri=True)) as connection:
                    rows = connection.execute(query).fetchall()

    def freeze(self) -> None:
        """Stop it between two transactions: within one it keeps SQLite locked for all others."""
        file = self.study.folder / "study.db"
        with contextlib.closing(sqlite3.connect(file, timeout=1)) as opened:
            while True:
                os.kill(self.process.pid, signal.SIGSTOP)
                with contextlib.suppress(sqlite3.OperationalError):
                    opened.execute("BEGIN IMMEDIATE").connection.rollback()
                    return
                os.kill(self.process.pid, signal.SIGCONT)

    def end(self) -> tuple[int, str]:
        """Its exit code and its output."""
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


def trained_epochs(steps: Path) -> Counter[Widths]:
    """The number of epochs that each network was trained, by the file of its steps."""
    lines = steps.read_text().split() if steps.exists() else []
    return Counter(tiny.widths(*map(int, line.split(","))) for line in lines)


def test_a_killed_study_continues(shared_ray: None, steps: Path, tmp_path: Path) -> None:
    """A driver gets SIGKILL, the next one SIGINT, the third ends the study, the fourth is idle."""
    earlier = trained_epochs(steps)
    killed = Driver(tmp_path, steps)
    killed.wait_for(2)
    killed.process.kill()
    killed.end()
    after_kill = killed.trials()
    assert 2 <= len(after_kill) < 8
    assert killed.running()

    interrupted = Driver(tmp_path, steps)
    interrupted.wait_for(len(after_kill) + 1)
    before = time.monotonic()
    os.killpg(interrupted.process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes too
    assert interrupted.end() == (130, "")
    assert time.monotonic() - before < 10
    after_interrupt = interrupted.trials()
    assert after_kill.items() <= after_interrupt.items()
    assert len(after_interrupt) < 8

    study = long_study(tmp_path)
    study.run()
    trials = {trial.number: trial for trial in study.trials()}
    assert after_interrupt.items() <= trials.items()
    assert list(trials) == list(range(8))
    assert len({trial.widths for trial in trials.values()}) == 8
    assert {trial.state for trial in trials.values()} == {"finished"}
    assert killed.running() == []

    # Each stop costs a running trial at most the epoch that was not yet in its checkpoint.
    epochs = trained_epochs(steps) - earlier
    for number, trial in trials.items():
        assert len(trial.curve) == EPOCHS
        stops = (number not in after_kill) + (number not in after_interrupt)
        assert EPOCHS <= epochs[trial.widths] <= EPOCHS + stops

    long_study(tmp_path).run()
    assert trained_epochs(steps) - earlier == epochs
    assert list((tmp_path / "checkpoints").iterdir()) == []


def contents(folder: Path) -> dict[str, object]:
    """The files of a study's folder but the logs, which each driver writes, and its storage."""
    files = [path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts]
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as connection:
        rows = list(connection.iterdump())
    return {str(f): f.read_bytes() for f in files if ".db" not in f.name} | {"study.db": rows}


def session_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the session that a process leads, but those that have ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
            if int(session) == process.pid and state not in "ZX":
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_frozen_driver_that_wakes_up_changes_nothing(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped for longer than its time-out, and another one ends its study meanwhile.

    It then ends with one line and code 2. No row and no file has changed, it has trained no further
    step, and no process is left.
    """
    monkeypatch.setenv(VARIABLE, "1")
    frozen = Driver(tmp_path, tmp_path / "steps")
    frozen.wait_for(2)
    frozen.freeze()
    assert len(session_of(frozen.process)) > 1  # Ray and its workers are not stopped
    study = long_study(tmp_path)
    refusals = set()
    while len(study.trials()) < 8:
        try:
            study.run()
        except StudyError as error:
            refusals.add(str(error))
    assert all(f"being run by process {frozen.process.pid} on" in each for each in refusals)

    before = contents(tmp_path)
    os.kill(frozen.process.pid, signal.SIGCONT)
    code, output = frozen.end()
    assert output.startswith("error: a study has one driver at a time, but another one took over")
    assert (code, output.count("\n")) == (2, 1)
    assert contents(tmp_path) == before
    assert session_of(frozen.process) == []
