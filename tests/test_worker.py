"""A worker in this process: each step returns a report, a restart loses at most one epoch."""

from __future__ import annotations

import errno
import os
import pickle
import platform
import re
import threading
from pathlib import Path
from typing import Any

import own
import pytest
import tiny
import torch
from ray import cloudpickle
from torch import Tensor, nn

from widthsearch.runner import training_thread
from widthsearch.runner.pickling import SharedData
from widthsearch.runner.worker import Worker, WorkerReport, is_out_of_memory
from widthsearch.space.search_space import SearchSpace
from widthsearch.training import job as contract
from widthsearch.training.job import Job, TrainingTrial, own_job
from widthsearch.training.recipe import EpochResult, OwnRecipe, Recipe, recipe_values
from widthsearch.training.trainer import Trainer, train_classifier

RECIPE = Recipe(epochs=4, batch_size=32)
JOB = Job(train_classifier, "the built-in trainer", RECIPE, RECIPE.epochs)


def started(
    folder: Path,
    *vector: int,
    seed: int = 5,
    space: SearchSpace | None = None,
    job: Job = JOB,
    **changes: Any,
) -> Worker:
    """A worker that is to train trial 3, by default in the tiny space."""
    shared: dict[str, Any] = {
        "data": SharedData.of(tiny.task(), "tiny"),
        "spaces": {"tiny": cloudpickle.dumps(space or tiny.space())},
        "job": cloudpickle.dumps(job),
        "device": "cpu",
        "threads": 1,
        "checkpoints": folder,
    }
    made = Worker(**{**shared, **changes})
    made.start_trial(3, "tiny", vector or (4, 6), seed)
    return made


def reason(report: WorkerReport) -> str:
    """Why the trial failed."""
    assert report.failure is not None
    return report.failure.reason


def same(curve: tuple[EpochResult, ...], other: tuple[EpochResult, ...]) -> bool:
    """Whether two curves are equal, apart from the seconds."""
    return [(r.epoch, r.loss, r.value) for r in curve] == [
        (r.epoch, r.loss, r.value) for r in other
    ]


def test_a_restart_reports_the_last_epoch_and_continues(tmp_path: Path) -> None:
    """The curve is that of a worker that was never killed."""
    whole = started(tmp_path / "whole")
    reports = [whole.step() for _ in range(4)]
    assert [len(report.curve) for report in reports] == [1, 2, 3, 4]

    first = started(tmp_path)
    first.step()
    last = first.step()
    again = started(tmp_path)
    assert again.step() == last
    assert same(again.step().curve, reports[2].curve)
    assert same(again.step().curve, reports[3].curve)


def test_one_worker_trains_one_trial_after_the_other(tmp_path: Path) -> None:
    """An earlier trial does not change the next one's curve."""
    reused, fresh = started(tmp_path / "reused", 8, 8, seed=1), started(tmp_path / "fresh")
    reused.step()
    reused.start_trial(2, "tiny", [4, 6], seed=5)
    assert same(reused.step().curve, fresh.step().curve)


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_a_lost_or_damaged_checkpoint_restarts_the_trial(
    tmp_path: Path, content: bytes | None
) -> None:
    """The report has a note with the reason."""
    (tmp_path / "3").mkdir()
    if content is not None:
        (tmp_path / "3" / "training.ckpt").write_bytes(content)
    one = started(tmp_path)
    report = one.step()
    assert len(report.curve) == 1
    assert report.note.startswith("trial 3 restarts from its first epoch: a checkpoint must be")
    assert one.step().note == ""


def test_epochs_that_the_checkpoint_lacks_are_a_note(tmp_path: Path) -> None:
    """This node has no checkpoint, or an earlier one: the nodes do not share the folder.

    The note names the folder and the way out.
    """
    here = started(tmp_path / "here")
    here.step()
    here.step()
    for folder, reported, epochs, found in (
        ("there", 2, 1, "is not there"),
        ("here", 5, 2, "has 2 of its 5 epochs"),
        ("here", 3, 3, None),
        ("fresh", 0, 1, None),
    ):
        one = started(tmp_path / folder)
        one.start_trial(3, "tiny", (4, 6), seed=5, reported=reported)
        report = one.step()
        assert len(report.curve) == epochs
        expected = (
            f"trial 3 trains epochs again: its checkpoint in {str(tmp_path / folder / '3')!r} on "
            f"{platform.node()} {found}; unless its trainer saved no state since, the nodes do not "
            "share this folder: put the study's folder on a file system that all of them share"
        )
        assert report.note == (expected if found else "")
        assert one.step().note == ""


class Picky(nn.Module):
    """A network that cannot be trained with two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 4) to (N, 4)."""
        if self.training and torch.is_grad_enabled() and self.first.out_channels == 2:
            raise RuntimeError("two are\ntoo few")
        return self.fc(self.first(x).mean((2, 3)))


def test_an_exception_of_the_network_is_reported(tmp_path: Path) -> None:
    """In one line, beside its traceback; the worker can train the next trial."""
    one = started(tmp_path, 2, space=SearchSpace.from_model(Picky, (1, 4, 4), step=2))
    report = one.step()
    assert re.fullmatch(r"RuntimeError: two are \(\S*test_worker.py:\d+\)", reason(report))
    assert report.failure is not None
    assert report.failure.traceback.startswith("Traceback")
    one.start_trial(1, "tiny", [4], seed=0)
    assert one.step().failure is None


def test_a_space_that_cannot_be_unpickled_is_reported(tmp_path: Path) -> None:
    """As the failure of the first trial that needs it."""
    one = started(tmp_path, spaces={"tiny": b"cnowhere\nthing\n."})
    assert reason(one.step()) == "ModuleNotFoundError: No module named 'nowhere'"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_checkpoint_that_cannot_be_written_is_a_fault_of_the_machine(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, the folder is read-only: no candidate has caused it."""

    def write(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    one = started(tmp_path)
    monkeypatch.setattr(contract, "write_checkpoint", write)
    assert one.step().machine_error == (
        f"the folder {str(tmp_path / '3')!r} must be writable, but a file is not: "
        f"{os.strerror(number)}; name another folder, or make this one writable"
    )


def test_a_missing_device_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    """The error names it, and has a way out."""
    error = str(started(tmp_path, device="cuda:77").step().machine_error)
    assert error.startswith("a device must exist, but 'cuda:77' does not; this machine has cpu")
    assert error.endswith(": fix this and run again")


def test_a_disk_that_is_full_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    """Also where the trainer itself writes a file."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert of_own(tmp_path, train).step().machine_error == (
        "OSError: [Errno 28] No space left on device: fix this and run again"
    )


def test_reports_travel_between_processes(tmp_path: Path) -> None:
    """A report is equal to its unpickled copy."""
    report = started(tmp_path).step()
    assert pickle.loads(pickle.dumps(report)) == report


class Greedy(tiny.Net):
    """A network that runs out of memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Fail in training, and only there."""
        if self.training and torch.is_grad_enabled() and len(x) > 2:
            raise torch.OutOfMemoryError("tried to allocate everything")
        return super().forward(x)


def test_a_lack_of_memory_is_marked_in_the_report(tmp_path: Path) -> None:
    """So that the search can train the trial again while no other one runs."""
    report = started(tmp_path, space=SearchSpace.from_model(Greedy, (1, 4, 4), step=2)).step()
    assert report.out_of_memory
    assert reason(report).startswith("OutOfMemoryError: tried to allocate everything (")


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_messages_of_a_lack_of_memory_are_recognised(error: Exception, lack: bool) -> None:
    """torch's allocator has an error type of its own, CUDA's libraries only messages."""
    assert is_out_of_memory(error) is lack


def test_a_network_too_large_for_two_images_runs_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check of the network's input does not hide the lack of memory."""
    network = tiny.space().build(1.0, seed=0)

    def forward(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate everything")

    monkeypatch.setattr(network, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(network, tiny.task(), RECIPE, seed=0)


def test_a_process_that_lost_its_gpu_is_marked_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access no CUDA call of a process works; after other errors they do."""

    def broken(self: Trainer) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def gone() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Trainer, "run_epoch", broken)
    for synchronize, unusable in ((gone, True), (lambda: None, False)):
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        report = started(tmp_path).step()
        assert report.failure is not None
        assert report.process_unusable is unusable


# --- trainers of the user's own ---


def of_own(folder: Path, trainer: Any) -> Worker:
    """A worker that trains a trial with a user's own trainer."""
    worker = started(
        folder,
        data=SharedData.of(own.data(), "data"),
        spaces={"own": cloudpickle.dumps(own.space())},
        job=own.job(trainer),
    )
    worker.start_trial(3, "own", [8], seed=5)
    return worker


def test_an_own_trainer_makes_one_report_a_step(tmp_path: Path) -> None:
    """It waits in between, and continues from its checkpoint in another worker."""
    whole = of_own(tmp_path / "whole", own.train)
    curves = [whole.step().curve for _ in range(3)]
    assert [len(curve) for curve in curves] == [1, 2, 3]
    of_own(tmp_path, own.train).step()
    again = of_own(tmp_path, own.train)
    assert [len(again.step().curve) for _ in range(2)] == [1, 2]
    assert same(again.step().curve, curves[2])


def test_the_built_in_trainer_has_no_privilege(tmp_path: Path) -> None:
    """Given as a user's own, with its recipe in the study, it gives the same curve."""
    recipe = OwnRecipe(**recipe_values(RECIPE))
    own_one = own_job(train_classifier, "mine", recipe, "accuracy", {})
    built_in, mine = started(tmp_path / "a"), started(tmp_path / "b", job=own_one)
    for _ in range(RECIPE.epochs):
        assert same(built_in.step().curve, mine.step().curve)


def test_a_stopped_trainer_returns(tmp_path: Path) -> None:
    """Its report returns False once the worker gets the next trial; the worker is as before."""
    returned: list[int] = []

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        own.train(network, trial)
        returned.append(trial.epoch)

    train.__annotations__["trial"] = TrainingTrial[own.Steps]
    one = of_own(tmp_path, train)
    one._unpickled[""] = own.job(train), own.data()  # so that it appends to this list
    one.step()
    assert returned == []
    one.start_trial(4, "own", [8], seed=5)
    assert returned == [1]
    assert len(one.step().curve) == 1


def test_a_trainer_that_does_not_return_costs_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next trial's report says so, before the process ends."""
    monkeypatch.setattr(training_thread, "RETURN_SECONDS", 0.01)

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        trial.report({"accuracy": 1.0})
        threading.Event().wait()

    one = of_own(tmp_path, train)
    one.step()
    one.start_trial(4, "own", [8], seed=5)
    assert one.step() == WorkerReport(
        note="a trainer must return once report() has returned False, but 'own:train' did not "
        "within 0.01 s; its worker process is replaced"
    )
    assert one.step().process_unusable


def test_an_error_after_the_stop_is_a_note(tmp_path: Path) -> None:
    """The trial keeps its epochs; the next trial's report has the note."""

    def deaf(network: nn.Module, trial: TrainingTrial) -> None:
        while True:
            trial.report({"accuracy": 1.0})

    one = of_own(tmp_path, deaf)
    one.step()
    one.start_trial(4, "own", [8], seed=5)
    report = one.step()
    assert len(report.curve) == 1
    assert report.note.startswith("trainer 'own:train' failed after it was stopped: StudyError: a ")


@pytest.mark.parametrize("reports", [0, 1, 3])
def test_an_exception_of_a_trainer_fails_its_trial(tmp_path: Path, reports: int) -> None:
    """At the start, in the middle, and after the last report; SystemExit too."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        for _ in range(reports):
            trial.report({"accuracy": 1.0})
        raise SystemExit("no more")

    one = of_own(tmp_path, train)
    for _ in range(min(reports, 2)):
        assert one.step().failure is None
    report = one.step()
    assert reason(report).startswith(
        "StudyError: a trainer must not end its process, but 'own:train' raised SystemExit: no "
        "more ("
    )
    assert report.failure is not None
    assert 'raise SystemExit("no more")' in report.failure.traceback


@pytest.mark.gpu
def test_a_worker_allocates_at_most_its_share_of_a_gpu(tmp_path: Path) -> None:
    """A trial that runs alone may allocate all of it."""
    small = started(tmp_path, device="cuda", gpu_share=0.25)
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(int(0.3 * total), dtype=torch.uint8, device="cuda")
    small.start_trial(1, "tiny", [4, 4], seed=0, alone=True)
    assert torch.empty(int(0.3 * total), dtype=torch.uint8, device="cuda").numel() > 0
