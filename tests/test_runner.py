"""Ray Tune: what fails is survived, what is killed goes on, and nothing is trained twice."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import tiny

from widthsearch.api import Study
from widthsearch.errors import StudyError
from widthsearch.runner import ray_tune as runner
from widthsearch.study.progress import Progress
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial
from widthsearch.widths import Widths

pytestmark = pytest.mark.ray

UNLUCKY = '''
import os
from pathlib import Path

import torch
from torch import nn

from widthsearch.space.search_space import SearchSpace

ONCE, TWICE = (Path(__file__).with_name(name) for name in ("once", "twice"))


class Net(nn.Module):
    """Fails by its width, in training."""

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
    return SearchSpace.from_model(Net, (1, 4, 4), least=0.25, most=1.25, step=2)
'''


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray in this process, which a study uses and leaves running.

    Its workers write each step of the tiny network into the file that is returned.
    """
    witness = tmp_path_factory.mktemp("witness") / "steps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WIDTHSEARCH_TEST_WITNESS", str(witness))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield witness
    ray.shutdown()


@pytest.fixture(scope="module")
def unlucky(
    ray_here: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Study, list[Progress]]:
    """A study in which everything goes wrong that can, run to its end.

    Its space is in a file that no worker can import, and its first trial was left with a
    checkpoint that is damaged.
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
    told: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "RETRIES", 1)
        study.run(told.append)
    return study, told


def errors(study: Study) -> dict[int, str | None]:
    """Why each width failed."""
    return {trial.widths["conv"]: trial.error for trial in study.trials()}


def test_an_exception_fails_the_candidate_at_once(unlucky: tuple[Study, list[Progress]]) -> None:
    """Its reason is one line; the whole traceback is in the log."""
    study, told = unlucky
    assert errors(study)[2] == "RuntimeError: no kernel for 2 channels"
    assert any("failed: RuntimeError: no kernel" in progress.message for progress in told)
    log = (study.folder / "logs" / "run.log").read_text()
    assert "Traceback" in log
    assert 'raise RuntimeError("no kernel for 2 channels' in log


def test_a_worker_that_dies_again_and_again_fails_the_candidate(
    unlucky: tuple[Study, list[Progress]],
) -> None:
    """After the retries."""
    study, _ = unlucky
    assert str(errors(study)[4]).startswith("its worker process died 2 times")


def test_nan_fails_the_candidate(unlucky: tuple[Study, list[Progress]]) -> None:
    """The curve keeps the epoch in which it happened."""
    study, _ = unlucky
    assert errors(study)[6] == "training diverged in epoch 1: its loss is nan"


def test_a_worker_that_dies_or_lacks_memory_once_is_replaced(
    unlucky: tuple[Study, list[Progress]],
) -> None:
    """The trial finishes; whoever watches is told."""
    study, told = unlucky
    (trial,) = [o for o in study.trials() if o.widths["conv"] == 10]
    assert trial.state == "finished"
    assert [result.epoch for result in trial.curve] == [1, 2, 3, 4]
    message = f"trial {trial.number}: its worker process died; another one goes on"
    assert any(progress.message.startswith(message) for progress in told)
    message = f"trial {trial.number} ran out of memory; it will be trained again by itself"
    assert any(progress.message == message for progress in told)


def test_a_damaged_checkpoint_restarts_the_trial_and_says_so(
    unlucky: tuple[Study, list[Progress]],
) -> None:
    """With the checkpoint's name."""
    study, told = unlucky
    assert study.trials()[0].state == "finished"
    (said,) = [p.message for p in told if "starts from its first epoch" in p.message]
    assert said.startswith("trial 0 starts from its first epoch: a checkpoint must be")
    assert "training.ckpt is damaged" in said


def test_nothing_is_left_behind(unlucky: tuple[Study, list[Progress]]) -> None:
    """No checkpoint of a trial that is done, no lease, and Ray still there as it was."""
    study, told = unlucky
    assert list((study.folder / "checkpoints").iterdir()) == []
    assert ray.is_initialized()
    assert ray.available_resources()["CPU"] == 2.0
    assert (told[-1].done, told[-1].running, told[-1].total) == (5, 0, 5)
    with study.search() as search:
        assert search.done


def test_resources_that_no_machine_has_are_named(ray_here: Path, tmp_path: Path) -> None:
    """Tune would wait for ever."""
    study = Study(tiny.config(resources={"cpu": 64}), tiny.space(), tiny.task(), folder=tmp_path)
    with pytest.raises(StudyError) as caught:
        study.run()
    assert str(caught.value) == (
        "resources must fit one machine, but a trial takes cpu: 64 and gpu: 0, and the largest has "
        "2 CPUs and 0 GPUs"
    )


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "the Ray cluster at '127.0.0.1:1' cannot be reached: Connection refused"),
        ("ray://127.0.0.1:1", "ray_address must be a cluster's own address such as"),
        ("somewhere", "ray_address must be a cluster's own address such as"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_named(address: str, said: str, tmp_path: Path) -> None:
    """In one line, and at once."""
    study = Study(tiny.config(ray_address=address), tiny.space(), tiny.task(), folder=tmp_path)
    with pytest.raises(StudyError) as caught:
        study.run()
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


DRIVER = """
import sys

import test_runner

try:
    test_runner.long_study(sys.argv[1]).run()
except KeyboardInterrupt:
    sys.exit(130)
"""

EPOCHS = 40


def long_study(folder: str | Path) -> Study:
    """Long enough to be killed in the middle."""
    settings = tiny.config(
        trials=8,
        concurrency=2,
        recipe={"epochs": EPOCHS, "batch_size": 32, "lr": 0.01, "precision": "fp32"},
    )
    return Study(settings, tiny.space(), tiny.task(), folder=Path(folder))


class Driver:
    """A driver in a process of its own, and what its study's storage says meanwhile."""

    def __init__(self, folder: Path, witness: Path) -> None:
        self.study = long_study(folder)
        paths = [Path(__file__).parent, Path(runner.__file__).parents[1]]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
                "WIDTHSEARCH_TEST_WITNESS": str(witness),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def trials(self) -> dict[int, Trial]:
        """What is done."""
        return {trial.number: trial for trial in self.study.trials()}

    def running(self) -> list[Trial]:
        """What is being trained."""
        return Store.open(self.study.storage, "tiny").take_up({"tiny": self.study.space.names})

    def wait_for(self, done: int) -> None:
        """Until so many trials are done and another one is in its middle.

        Looked up by hand: opening the study takes longer than training a few epochs of it.
        """
        query = (
            "SELECT state, value_json FROM trials LEFT JOIN trial_user_attributes AS attribute "
            "ON attribute.trial_id = trials.trial_id AND attribute.key = 'curve'"
        )
        deadline = time.monotonic() + 120
        rows: list[tuple[str, str | None]] = []
        while sum(state == "COMPLETE" for state, _ in rows) < done or not any(
            state == "RUNNING" and len(json.loads(c or "[]")) > 2 for state, c in rows
        ):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
            with contextlib.suppress(sqlite3.OperationalError):  # not there yet
                database = f"file:{self.study.folder / 'study.db'}?mode=ro"
                with contextlib.closing(sqlite3.connect(database, uri=True)) as connection:
                    rows = connection.execute(query).fetchall()

    def end(self) -> tuple[int, str]:
        """Its exit code and all that it said."""
        said, _ = self.process.communicate(timeout=120)
        return self.process.returncode, said


def trained(witness: Path) -> Counter[Widths]:
    """How many epochs each network was trained in all, as it told itself."""
    lines = witness.read_text().split()
    return Counter(tiny.widths(*map(int, line.split(","))) for line in lines)


def test_a_killed_study_goes_on(ray_here: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, SIGINT in the middle, then to the end, then once more."""
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
    epochs = trained(ray_here)
    for number, trial in trials.items():
        assert len(trial.curve) == EPOCHS
        stops = (number not in after_kill) + (number not in after_interrupt)
        assert EPOCHS <= epochs[trial.widths] <= EPOCHS + stops

    long_study(tmp_path).run()
    assert trained(ray_here) == epochs
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("installed", [True, False])
def test_only_the_users_own_code_goes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """What was installed into any folder of the path is imported by the workers, by name."""
    called = f"elsewhere_{installed}"
    (tmp_path / f"{called}.py").write_text('def told():\n    return "by value"\n')
    if installed:
        (tmp_path / f"{called}-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    dumped = runner.pickled(importlib.import_module(called).told, "a function")
    assert (b"by value" in dumped) is not installed
