"""Plays one history: runs the study, hits it, and starts it again until it is done.

The driver is ``widthsearch run`` itself. Everything is read from outside: the lines that it prints,
the storage by SQL, the witness log, and ``/proc``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checker, places, processes
from .plans import Fault, Plan

TRIALS, EPOCHS, STEPS = 8, 8, 8
"""Of the study: training steps are those of an epoch."""

TIMEOUT_SECONDS = 2.0
"""The time-out of the driver's lock."""

PATIENCE_SECONDS = 180.0
"""So long a driver may show no progress before it counts as hung."""

LINGER_SECONDS = 90.0
"""So long Ray's processes may live on after their driver: the two agents of a node whose driver was
killed try for a minute to report that to Ray's control service, which has ended too.
"""

POLL_SECONDS = 0.02

ROOT = Path(__file__).parents[2]

_STUDY = Path(__file__).with_name("study.py")


_DATABASE_ERRORS: tuple[type[Exception], ...] = (sqlite3.Error,)
with contextlib.suppress(ImportError):
    import psycopg

    _DATABASE_ERRORS += (psycopg.Error,)


class HungError(Exception):
    """A driver shows no progress."""


@dataclass(eq=False)
class Driver:
    """A driver's process.

    Attributes:
        process: The process.
        output: The file of what it prints.
        expected: The exit codes that it may end with.
    """

    process: subprocess.Popen[bytes]
    output: Path
    expected: set[int] = field(default_factory=lambda: {0})
    _lines: int = 0

    def printed(self) -> int | None:
        """The number of done trials in its new lines; None where there is none."""
        lines = self.output.read_text(encoding="utf-8").split("\n")[:-1]
        new, self._lines = lines[self._lines :], len(lines)
        found = [re.match(r"(\d+)/\d+ trials", line) for line in new]
        return max((int(match[1]) for match in found if match), default=None)


@dataclass(eq=False)
class History:
    """The study of one plan.

    Attributes:
        plan: The plan.
        folder: A folder of its own.
        place: Where the study lies.
        product: The folder with the package.
        record: What was seen.
        injected: The faults that hit.
    """

    plan: Plan
    folder: Path
    place: places.Place
    product: Path
    record: checker.Record = field(default_factory=checker.Record)
    injected: list[Fault] = field(default_factory=list)
    _counted: set[int] = field(default_factory=set)
    _sessions: set[int] = field(default_factory=set)

    def play(self) -> None:
        """Run the study with its faults to the end.

        Raises:
            HungError: A driver shows no progress.
        """
        before = processes.shared_memory()
        try:
            self._play()
            self._await_end(before)
        finally:
            for process in processes.processes(self._sessions):
                process.send(signal.SIGKILL)

    @property
    def study(self) -> Path:
        """The study's folder."""
        return self.place.runs / "faults"

    @property
    def url(self) -> str:
        """The storage."""
        postgres = self.place.postgres
        return f"sqlite:///{self.study / 'study.db'}" if postgres is None else postgres.url

    @property
    def witness(self) -> Path:
        """The witness log."""
        return self.folder / "witness"

    def outcomes(self) -> dict[int, checker.Outcome] | None:
        """The trials in the storage, running ones too; None where it cannot be read now."""
        try:
            with checker.connected(self.url) as connection:
                found = checker.trials(connection)
        except _DATABASE_ERRORS:
            return None
        self.record.seen.append((time.monotonic(), found))
        return found

    # -- drivers -----------------------------------------------------------------------------

    def _start(self) -> Driver:
        output = self.folder / f"output{len(self.record.ends)}-{time.monotonic_ns()}"
        settings = self.folder / "faults.yaml"
        if not settings.exists():
            settings.write_text(json.dumps(self._settings()), encoding="utf-8")
        command = [*places.prefix(), sys.executable, "-m", "widthsearch", "run", settings]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--runs", self.place.runs],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(self.product),
                    "OMP_NUM_THREADS": "1",
                    "RAY_TMPDIR": str(self.folder / "ray"),
                    "WIDTHSEARCH_CACHE": "",
                    "WIDTHSEARCH_DRIVER_TIMEOUT": str(TIMEOUT_SECONDS),
                    "WIDTHSEARCH_FAULTS_WITNESS": str(self.witness),
                },
            )
        self._sessions.add(process.pid)
        return Driver(process, output)

    def _settings(self) -> dict[str, Any]:
        return {
            "name": "faults",
            "space": f"{_STUDY}:space",
            "task": {"name": f"{_STUDY}:data", "validation": 0.2},
            "recipe": {"epochs": EPOCHS, "batch_size": 8, "lr": 0.1, "precision": "fp32"},
            "proposers": ["uniform"],
            "budgets": [0.25, 0.5],
            "families": ["linear"],
            "baselines": 0.3,
            "objectives": ["accuracy", "macs"],
            "early_stopping": {"kind": "rungs", "first_epoch": 1, "eta": 2},
            "trials": TRIALS,
            "concurrency": self.plan.concurrency,
            **({} if self.place.postgres is None else {"storage": self.url}),
        }

    def _until(self, driver: Driver, reached: Callable[[], bool]) -> bool:
        """Wait for something; returns False if the driver has ended before."""
        begun, seen = time.monotonic(), -1
        while driver.process.poll() is None:
            self._acknowledge(driver)
            if reached():
                return True
            progress = self._steps() + driver.output.stat().st_size
            if progress != seen:
                begun, seen = time.monotonic(), progress
            elif time.monotonic() - begun > PATIENCE_SECONDS:
                raise HungError(f"no progress: {driver.output.read_text()[-2000:]}")
            time.sleep(POLL_SECONDS)
        return False

    def _acknowledge(self, driver: Driver) -> bool:
        """Compare what a driver has printed with the storage; returns whether it printed."""
        printed = driver.printed()
        if printed is not None and (found := self.outcomes()) is not None:
            self.record.printed.append((printed, len(checker.done(found))))
        return printed is not None

    def _ended(self, driver: Driver) -> int:
        """Wait for a driver's end, and record it; returns the exit code."""
        self._until(driver, lambda: False)
        self._acknowledge(driver)
        code = driver.process.wait()
        output = driver.output.read_text(encoding="utf-8")
        self.record.ends.append((tuple(sorted(driver.expected)), code, output))
        self.outcomes()
        return code

    def _await_end(self, before: set[str]) -> None:
        """Wait until nothing is left, and record what is left after that."""
        deadline = time.monotonic() + LINGER_SECONDS
        while (left := processes.processes(self._sessions)) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.record.left += [f"process {process.pid}: {process.command}" for process in left]
        segments = processes.unused(processes.shared_memory() - before)
        self.record.left += [f"shared memory {name}" for name in segments]

    # -- faults ------------------------------------------------------------------------------

    def _play(self) -> None:
        driver = self._start()
        for fault in self.plan.faults:
            while not self._hit(driver, fault):
                if self._ended(driver) == 0:
                    return
                driver = self._start()
            driver = self._injure(driver, fault)
        for _ in range(3):
            if self._ended(driver) == 0:
                return
            driver = self._start()
        self._ended(driver)

    def _hit(self, driver: Driver, fault: Fault) -> bool:
        """Wait for the moment of a fault; returns False if the driver has ended before."""
        target = fault.kind.split()[0]
        steps, stored, lines = self._steps() + fault.steps, self._stored(), driver.output.stat()

        def exists(role: str) -> bool:
            found = processes.processes({driver.process.pid})
            return role in {process.role for process in found}

        def reached() -> bool:
            if fault.moment == "step":
                now = self._steps() >= steps
            elif fault.moment == "checkpoint":
                now = self._steps() >= steps and self._saves()
            elif fault.moment == "printed":
                now = driver.output.stat().st_size > lines.st_size
            elif fault.moment == "stored":
                now = self._stored() != stored
            else:
                now = exists(fault.moment)
            return now and (target not in ("worker", "raylet") or exists(target))

        if not self._until(driver, reached):
            return False
        self.injected.append(fault)
        self._counted = set()
        self._count_hits()
        return True

    def _injure(self, driver: Driver, fault: Fault) -> Driver:
        """Inject a fault; returns the driver that goes on."""
        target, name = fault.kind.split(" ", 1)
        if name == "SIGSTOP":
            return self._freeze(driver, target, fault)
        if name.startswith("SIG"):
            return self._signal(driver, target, getattr(signal, name))
        with self._broken(fault.kind):
            driver.expected |= {2}
            code, last = self._ended(driver), driver
            self._count_hits()  # one may have begun before the fault
            if code != 0 and fault.again:
                self._counted = set()
                self._count_hits()
                last = self._start()
                last.expected |= {2}
                code = self._ended(last)
            if code == 0:
                self.record.unwritable.add(last.process.pid)
        self._count_hits()
        return driver if code == 0 else self._start()

    @contextmanager
    def _broken(self, kind: str) -> Iterator[None]:
        """The time of a fault that lasts."""
        place = self.place
        if kind == "full disk":
            place.fill()
        elif kind == "read-only folder":
            place.protect()
        else:
            assert place.postgres is not None
            place.postgres.stop(signal.SIGINT if kind.endswith("stopped") else signal.SIGQUIT)
        try:
            yield
        finally:
            if kind == "full disk":
                place.empty()
            elif kind == "read-only folder":
                place.unprotect()
            else:
                place.postgres.start()

    def _targets(self, driver: Driver, target: str) -> list[processes.Process]:
        """The processes of a target; of several workers the first."""
        session = processes.processes({driver.process.pid})
        if target == "everything":
            return session
        return [process for process in session if process.role == target][:1]

    def _signal(self, driver: Driver, target: str, number: signal.Signals) -> Driver:
        for process in self._targets(driver, target):
            process.send(number)
        self._count_hits()
        if target == "raylet":
            # Ray ends the process of a driver that has lost its node.
            driver.expected |= {1, 2, -signal.SIGTERM, -signal.SIGABRT}
        if target not in ("driver", "everything"):
            return driver
        # Signals are the driver's own from the moment that it has the lock.
        driver.expected |= {-signal.SIGKILL} if number == signal.SIGKILL else {130, -number}
        return driver if self._ended(driver) == 0 else self._start()

    def _freeze(self, driver: Driver, target: str, fault: Fault) -> Driver:
        """Freeze processes for longer than the time-out; a frozen driver is replaced meanwhile."""
        frozen = self._targets(driver, target)
        for process in frozen:
            process.send(signal.SIGSTOP)
        self._count_hits()
        time.sleep(1.5 * TIMEOUT_SECONDS)
        if target in ("worker", "raylet"):
            for process in frozen:
                process.send(signal.SIGCONT)
            return driver
        # A driver that holds no lock is not replaced, whatever the others do meanwhile.
        drives = self._holder() == driver.process.pid
        successor = self._start()
        # A driver that is frozen within a transaction keeps SQLite locked: it is not replaced.
        successor.expected = {0, 2}
        replaced = self._until(successor, lambda: self._has_trained(successor))
        if replaced or self._ended(successor) == 0:
            self.record.replaced[driver.process.pid] = time.monotonic()
        for process in frozen:
            process.send(signal.SIGCONT)
        if driver.process.pid not in self.record.replaced:
            return driver
        successor.expected = {0}
        driver.expected = {2} if drives else {0, 2}
        self._ended(driver)
        return successor

    def _count_hits(self) -> None:
        """Note which networks are being trained, each once a fault."""
        for number, outcome in (self.outcomes() or {}).items():
            if outcome[0] not in checker.FINAL and number not in self._counted:
                self.record.hits[checker.architecture(outcome)] += 1
                self._counted.add(number)

    def _steps(self) -> int:
        """The number of training steps so far."""
        with contextlib.suppress(FileNotFoundError):
            return self.witness.read_bytes().count(b"\n")
        return 0

    def _has_trained(self, driver: Driver) -> bool:
        """Whether a worker of a driver has trained a step: then the study is the driver's."""
        with contextlib.suppress(FileNotFoundError):
            lines = self.witness.read_text(encoding="ascii").splitlines()
            return any(int(line.split()[2]) == driver.process.pid for line in lines)
        return False

    def _holder(self) -> int | None:
        """The process that holds the lock of the study; None where there is none."""
        with contextlib.suppress(*_DATABASE_ERRORS), checker.connected(self.url) as connection:
            return next((holder["pid"] for holder in checker.holders(connection)), None)
        return None

    def _saves(self) -> bool:
        """Whether a checkpoint was touched after the last training step."""
        with contextlib.suppress(OSError):
            files = [path.stat() for path in (self.study / "checkpoints").glob("*/*")]
            step = self.witness.stat().st_mtime_ns
            return any(file.st_mtime_ns > step for file in files)
        return False

    def _stored(self) -> dict[int, checker.Outcome] | None:
        """The trials in the storage; None while there is none."""
        try:
            with checker.connected(self.url) as connection:
                return checker.trials(connection) or None
        except _DATABASE_ERRORS:
            return None


@dataclass(frozen=True)
class Played:
    """A history that was played.

    Attributes:
        plan: Its plan.
        injected: The faults that hit; the study may end before the last ones.
        complaints: The broken promises.
        outcomes: The outcomes of its trials.
        seconds: Its duration.
    """

    plan: Plan
    injected: tuple[Fault, ...]
    complaints: tuple[checker.Complaint, ...]
    outcomes: dict[int, checker.Outcome]
    seconds: float


def play(
    plan: Plan,
    reference: dict[int, checker.Outcome] | None = None,
    product: Path = ROOT,
    keep: Path | None = None,
) -> Played:
    """Play a plan, and check what it leaves.

    Args:
        plan: The plan.
        reference: The outcomes of an undisturbed run at concurrency 1.
        product: The folder with the package.
        keep: The folder to which the history's files are copied if there are complaints.
    """
    begun = time.monotonic()
    # Sockets of Ray lie in it, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="wf") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with places.place(plan.place, folder) as place:
            history = History(plan, folder, place, product)
            promises = checker.Checker(
                TRIALS, EPOCHS, STEPS, reference if plan.concurrency == 1 else None
            )
            complaints: list[checker.Complaint] = []
            try:
                history.play()
            except HungError as error:
                complaints.append(checker.Complaint("end", str(error)))
            else:
                complaints += promises.check(
                    history.url, history.study, history.witness, history.record
                )
            if complaints and keep is not None:
                ignored = shutil.ignore_patterns("sockets", "session_latest", "pg")
                shutil.copytree(folder, keep / folder.name, ignore=ignored)
            outcomes = history.outcomes() or {}
    seconds = time.monotonic() - begun
    return Played(plan, tuple(history.injected), tuple(complaints), outcomes, seconds)
