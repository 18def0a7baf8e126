"""Ray Tune: failures, killed workers, lost checkpoints, and what is refused."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import own
import pytest
import ray
import tiny
from torch import nn

from widthsearch.api import Study
from widthsearch.errors import StorageError, StudyError
from widthsearch.runner import cluster, ray_tune
from widthsearch.runner.pickling import pickle_by_value
from widthsearch.runner.signals import Interrupts
from widthsearch.study.progress import Progress
from widthsearch.training.job import TrainingTrial

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
def unlucky(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Unlucky:
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
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_folder_that_nodes_do_not_share_is_said(shared_ray: None, tmp_path: Path) -> None:
    """A trial that restarts without its checkpoint, as on another node, is a warning."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        while trial.report({"accuracy": 50.0}, state=network.state_dict):
            if trial.epoch == 3 and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                shutil.rmtree(trial.folder)
                os._exit(1)

    warnings: list[str] = []
    study = own.study(tmp_path / "study", trainer=train, trials=2)
    study.run(lambda now: warnings.append(now.message) if now.level == "warning" else None)
    assert [len(trial.curve) for trial in study.trials()] == [4, 4]
    place = tmp_path / "study" / "checkpoints" / "0"
    died, lost = warnings
    assert "its worker process died" in died
    assert lost.startswith(f"trial 0 trains epochs again: its checkpoint in {str(place)!r} on ")
    assert "the nodes do not share this folder: put the study's folder on" in lost


def test_resources_that_no_machine_has_are_refused(shared_ray: None, tmp_path: Path) -> None:
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
    shared_ray: None, monkeypatch: pytest.MonkeyPatch
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
