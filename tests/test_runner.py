"""Ray Tune: failures, killed workers and killed drivers, and no epoch that is trained twice."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny

from widthsearch.api import Study
from widthsearch.errors import StorageError, StudyError
from widthsearch.runner import cluster, ray_tune
from widthsearch.runner.pickling import pickle_by_value
from widthsearch.runner.signals import Interrupts
from widthsearch.study.driver_lock import VARIABLE
from widthsearch.study.progress import Progress
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial, TrialState
from widthsearch.widths import Widths

pytestmark = pytest.mark.ray


@dataclass
class Recipe:
    """One field has no default."""

    lr: float
    name: str = ""


UNLUCKY = '''
import os
from pathlib import Path

import torch
from torch import nn

from widthsearch.space.search_space import SearchSpace

ONCE, TWICE = (Path(__file__).with_name(name) for name in ("once", "twice"))


class Net(nn.Module):
    """Its width decides how it fails in training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.fc(self.conv(x).relu().mean((2, 3)))
        if self.training and torch.is_grad_enabled() and len(x) > 2:
            width = self.conv.out_channels
            if width == 2:
                raise RuntimeError("no kernel for 2 channels\\nreally")
            if width == 4:
                os._exit(1)
            if width == 6:
                return x * float("nan")
            if width == 10 and not ONCE.exists():
                ONCE.touch()
                os._exit(1)
            if width == 10 and not TWICE.exists():
                TWICE.touch()
                raise torch.OutOfMemoryError("no memory is left")
        return x


def unlucky():
    return SearchSpace.from_model(Net, (1, 4, 4), min_width=0.25, max_width=1.25, step=2)
'''


Unlucky = tuple[Study, list[Progress]]


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray, started in this process: a study uses it and leaves it running.

    Returns the file into which its workers write each training step of the tiny network.
    """
    steps = tmp_path_factory.mktemp("steps") / "steps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WIDTHSEARCH_TEST_WITNESS", str(steps))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield steps
    ray.shutdown()


@pytest.fixture(scope="module")
def unlucky(ray_here: Path, tmp_path_factory: pytest.TempPathFactory) -> Unlucky:
    """A finished study with failures of every kind, and its progress.

    Its space is in a file that no worker can import, and its first trial begins with a damaged
    checkpoint.
    """
    folder = tmp_path_factory.mktemp("unlucky")
    (folder / "space.py").write_text(UNLUCKY)
    settings = tiny.config(space=f"{folder / 'space.py'}:unlucky", trials=5, concurrency=2)
    study = Study(settings, task=tiny.task(), folder=folder)
    with study.search() as search:
        search.ask()
    (folder / "checkpoints" / "0").mkdir(parents=True)
    (folder / "checkpoints" / "0" / "training.ckpt").write_bytes(b"nonsense")
    (folder / "checkpoints" / "9").mkdir()
    progress: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_tune, "RETRIES", 1)
        study.run(progress.append)
    return study, progress


def errors(study: Study) -> dict[int, str | None]:
    """The error of each width's trial."""
    return {trial.widths["conv"]: trial.error for trial in study.trials()}


def test_an_exception_fails_the_trial_without_a_retry(unlucky: Unlucky) -> None:
    """The reason is one line; the traceback is in the log."""
    study, progress = unlucky
    (reason,) = re.findall(r"(.*) \(\S*space.py:\d+\); the widths", str(errors(study)[2]))
    assert reason == "RuntimeError: no kernel for 2 channels"
    assert any("failed: RuntimeError: no kernel" in each.message for each in progress)
    log = (study.folder / "logs" / "run.log").read_text()
    assert "Traceback" in log
    assert 'raise RuntimeError("no kernel for 2 channels' in log


def test_a_trial_fails_when_its_worker_dies_in_every_retry(unlucky: Unlucky) -> None:
    """The error has the number of deaths."""
    study, _ = unlucky
    assert str(errors(study)[4]).startswith("its worker process died 2 times")


def test_a_loss_of_nan_fails_the_trial(unlucky: Unlucky) -> None:
    """The error says that it is so before any step."""
    error = str(errors(unlucky[0])[6])
    assert "its loss is nan for the first batch, before any step" in error
    assert error.endswith("; the widths are [6]")


def test_a_worker_that_dies_or_lacks_memory_once_is_replaced(unlucky: Unlucky) -> None:
    """The trial finishes, and the progress has a message."""
    study, progress = unlucky
    (trial,) = [o for o in study.trials() if o.widths["conv"] == 10]
    assert trial.state == "finished"
    assert [result.epoch for result in trial.curve] == [1, 2, 3, 4]
    messages = [each.message for each in progress]
    died = f"trial {trial.number}: its worker process died; a new one continues from its last"
    assert any(message.startswith(died) for message in messages)
    assert f"trial {trial.number} ran out of memory; it will be trained again by itself" in messages


def test_a_damaged_checkpoint_restarts_the_trial(unlucky: Unlucky) -> None:
    """The message has the checkpoint's name."""
    study, progress = unlucky
    assert study.trials()[0].state == "finished"
    (message,) = [p.message for p in progress if "restarts from its first epoch" in p.message]
    assert message.startswith("trial 0 restarts from its first epoch: a checkpoint must be")
    assert "training.ckpt is damaged" in message


def test_nothing_is_left_behind(unlucky: Unlucky) -> None:
    """No checkpoint of a done trial and no driver lock; Ray is as it was before."""
    study, progress = unlucky
    assert list((study.folder / "checkpoints").iterdir()) == []
    assert ray.is_initialized()
    assert ray.available_resources()["CPU"] == 2.0
    assert (progress[-1].done, progress[-1].running, progress[-1].total) == (5, 0, 5)
    with study.search() as search:
        assert search.done


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_a_folder_that_becomes_read_only_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the study's start and the first training, too."""
    made = Path.mkdir

    def denied(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        made(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StorageError, match=rf"writable, but .*{name} is not: Permission"):
        tiny.study(tmp_path, proposers=[]).run(quiet=True)


def test_a_checkpoint_that_comes_late_is_removed(
    ray_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker was frozen with its driver, another driver ended the trial, and both woke up."""
    disconnect = ray_tune.Session._disconnect
    study = tiny.study(tmp_path, trials=1, proposers=[])

    def wake(session: ray_tune.Session) -> None:
        late = study.folder / "checkpoints" / "0" / "training.ckpt"
        if session._owns_ray is not None:
            late.parent.mkdir(parents=True, exist_ok=True)
            late.write_text("late")
        disconnect(session)

    monkeypatch.setattr(ray_tune.Session, "_disconnect", wake)
    study.run(quiet=True)
    assert list((study.folder / "checkpoints").iterdir()) == []


def test_resources_that_no_machine_has_are_refused(ray_here: Path, tmp_path: Path) -> None:
    """Tune itself would wait for ever."""
    with pytest.raises(StudyError) as caught:
        tiny.study(tmp_path, resources={"cpu": 64}).run()
    assert str(caught.value) == (
        "resources must fit one machine, but a trial takes cpu: 64 and gpu: 0, and the largest has "
        "2 CPUs and 0 GPUs"
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "the Ray cluster at '127.0.0.1:1' cannot be reached: Connection refused"),
        ("ray://127.0.0.1:1", "ray_address must be a cluster's own address such as"),
        ("somewhere", "ray_address must be a cluster's own address such as"),
    ],
)
def test_an_address_without_a_cluster_is_refused(
    address: str, message: str, tmp_path: Path
) -> None:
    """In one line, with the address."""
    with pytest.raises(StudyError) as caught:
        tiny.study(tmp_path, ray_address=address).run()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


DRIVER = """
import sys

import test_runner

from widthsearch.errors import WidthsearchError

try:
    test_runner.long_study(sys.argv[1]).run(quiet=True)
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


def test_a_killed_study_continues(ray_here: Path, tmp_path: Path) -> None:
    """A driver gets SIGKILL, the next one SIGINT, the third ends the study, the fourth is idle."""
    earlier = trained_epochs(ray_here)
    killed = Driver(tmp_path, ray_here)
    killed.wait_for(2)
    killed.process.kill()
    killed.end()
    after_kill = killed.trials()
    assert 2 <= len(after_kill) < 8
    assert killed.running()

    interrupted = Driver(tmp_path, ray_here)
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
    epochs = trained_epochs(ray_here) - earlier
    for number, trial in trials.items():
        assert len(trial.curve) == EPOCHS
        stops = (number not in after_kill) + (number not in after_interrupt)
        assert EPOCHS <= epochs[trial.widths] <= EPOCHS + stops

    long_study(tmp_path).run()
    assert trained_epochs(ray_here) - earlier == epochs
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
    ray_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("installed", [True, False])
def test_only_the_users_own_code_is_pickled_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """A package that is installed in any folder of the path is pickled by name."""
    name = f"elsewhere_{installed}"
    (tmp_path / f"{name}.py").write_text('def function():\n    return "by value"\n')
    if installed:
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    dumped = pickle_by_value(importlib.import_module(name).function, "a function")
    assert (b"by value" in dumped) is not installed


def test_fields_without_a_default_stay_so_in_another_process() -> None:
    """A recipe's class of the user's own is pickled by value, there and back."""
    code = (
        "import pickle, sys; from dataclasses import MISSING, fields; "
        "made = pickle.load(sys.stdin.buffer); "
        "print([f.default is MISSING and f.default_factory is MISSING for f in fields(made)], "
        "made(lr=2.0, name='x'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle_by_value(Recipe, "a recipe"),
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().split("\n")[0] == "[True, False] Recipe(lr=2.0, name='x')"


def test_a_node_that_is_lost_fails_no_trial(
    ray_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies with the last node has no fault; else its trial would count as failed."""
    cluster.check_alive()
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": False}])
    with pytest.raises(StudyError, match="its last one has died: run again"):
        cluster.check_alive()


def test_a_start_of_ray_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a plain Exception if its processes are slow, or were frozen, at their start."""

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    with Interrupts() as interrupts, pytest.raises(StudyError) as error:
        cluster._init(None, interrupts)
    assert str(error.value) == (
        "Ray must start on this machine: Exception: The current node timed out "
        "during startup; run again"
    )
