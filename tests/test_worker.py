"""A worker, in this process: every step is a report, and a restart loses at most an epoch."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ray import cloudpickle
from torch import Tensor, nn

from widthsearch.runner.worker import Worker, is_out_of_memory
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import EpochResult, Recipe
from widthsearch.training.trainer import Trainer

RECIPE = Recipe(epochs=4, batch_size=32)


def worker(folder: Path, space: SearchSpace | None = None, **changes: Any) -> Worker:
    """A worker for the tiny space."""
    shared: dict[str, Any] = {
        "task": tiny.task(),
        "spaces": {"tiny": cloudpickle.dumps(space or tiny.space())},
        "recipe": RECIPE,
        "device": "cpu",
        "threads": 1,
        "checkpoints": folder,
    }
    return Worker(**{**shared, **changes})


def same(curve: tuple[EpochResult, ...], other: tuple[EpochResult, ...]) -> bool:
    """Equal but for the time that it took."""
    return [(r.epoch, r.loss, r.accuracy) for r in curve] == [
        (r.epoch, r.loss, r.accuracy) for r in other
    ]


def test_a_restart_repeats_the_last_epoch_and_goes_on(tmp_path: Path) -> None:
    """Whoever was killed, the numbers are those of a worker that never was."""
    whole = worker(tmp_path / "whole")
    whole.take(3, "tiny", [4, 6], seed=5)
    reports = [whole.step() for _ in range(4)]
    assert [len(report.curve) for report in reports] == [1, 2, 3, 4]

    first = worker(tmp_path)
    first.take(3, "tiny", [4, 6], seed=5)
    first.step()
    told = first.step()
    again = worker(tmp_path)
    again.take(3, "tiny", [4, 6], seed=5)
    assert again.step() == told
    assert same(again.step().curve, reports[2].curve)
    assert same(again.step().curve, reports[3].curve)


def test_one_worker_trains_one_trial_after_the_other(tmp_path: Path) -> None:
    """What it trained before makes no difference."""
    reused, fresh = worker(tmp_path / "reused"), worker(tmp_path / "fresh")
    reused.take(1, "tiny", [8, 8], seed=1)
    reused.step()
    for each in (reused, fresh):
        each.take(2, "tiny", [4, 6], seed=5)
    assert same(reused.step().curve, fresh.step().curve)


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_a_lost_or_damaged_checkpoint_restarts_the_trial(
    tmp_path: Path, content: bytes | None
) -> None:
    """And says so."""
    (tmp_path / "3").mkdir()
    if content is not None:
        (tmp_path / "3" / "training.ckpt").write_bytes(content)
    one = worker(tmp_path)
    one.take(3, "tiny", [4, 6], seed=5)
    report = one.step()
    assert len(report.curve) == 1
    assert report.note.startswith("trial 3 starts from its first epoch: a checkpoint must be")
    assert one.step().note == ""


class Picky(nn.Module):
    """Trains with more than two channels only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 4) to (N, 4)."""
        if self.training and torch.is_grad_enabled() and self.first.out_channels == 2:
            raise RuntimeError("two are\ntoo few")
        return self.fc(self.first(x).mean((2, 3)))


def test_what_a_network_raises_is_reported(tmp_path: Path) -> None:
    """In one line, with all of it beside; the worker goes on to the next trial."""
    one = worker(tmp_path, SearchSpace.from_model(Picky, (1, 4, 4), step=2))
    one.take(0, "tiny", [2], seed=0)
    report = one.step()
    assert report.failure == "RuntimeError: two are"
    assert report.traceback.startswith("Traceback")
    one.take(1, "tiny", [4], seed=0)
    assert one.step().failure is None


def test_a_space_that_cannot_be_unpickled_is_reported(tmp_path: Path) -> None:
    """As the trial's failure, with the reason."""
    one = worker(tmp_path, space=None)
    one._pickled = {"tiny": b"cnowhere\nthing\n."}
    one.take(0, "tiny", [4, 4], seed=0)
    assert one.step().failure == "ModuleNotFoundError: No module named 'nowhere'"


def test_a_full_disk_is_not_the_candidates_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a device that is not there; other errors of the system may be."""

    def full(self: Trainer, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def denied(self: Trainer, folder: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    one = worker(tmp_path)
    one.take(0, "tiny", [4, 4], seed=0)
    monkeypatch.setattr(Trainer, "save", full)
    assert str(one.step().broken).startswith("No space left on device for the checkpoint '")
    monkeypatch.setattr(Trainer, "save", denied)
    assert one.step().failure == "PermissionError: [Errno 13] Permission denied"
    nowhere = worker(tmp_path, device="cuda:77")
    nowhere.take(0, "tiny", [4, 4], seed=0)
    assert "cuda:77" in str(nowhere.step().broken)


def test_reports_travel_between_processes(tmp_path: Path) -> None:
    """They are plain values."""
    one = worker(tmp_path)
    one.take(0, "tiny", [4, 4], seed=0)
    report = one.step()
    assert pickle.loads(pickle.dumps(report)) == report


class Greedy(tiny.Net):
    """Wants more memory than there is."""

    def forward(self, x: Tensor) -> Tensor:
        """Fails in training."""
        if self.training and torch.is_grad_enabled() and len(x) > 2:
            raise torch.OutOfMemoryError("tried to allocate everything")
        return super().forward(x)


def test_a_lack_of_memory_is_told_from_other_failures(tmp_path: Path) -> None:
    """So that the trial can be given the machine to itself."""
    greedy = worker(
        tmp_path, SearchSpace.from_model(Greedy, (1, 4, 4), name="tiny", min_width=0.25, step=2)
    )
    greedy.take(1, "tiny", [4, 4], seed=0)
    report = greedy.step()
    assert report.out_of_memory
    assert report.failure == "OutOfMemoryError: tried to allocate everything"


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
def test_libraries_say_otherwise_that_memory_is_short(error: Exception, lack: bool) -> None:
    """torch's allocator has an error of its own, and others have messages."""
    assert is_out_of_memory(error) is lack


def test_a_network_too_large_for_two_images_lacks_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not said that it does not take the task's images."""
    network = tiny.space().build(1.0, seed=0)

    def forward(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate everything")

    monkeypatch.setattr(network, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(network, tiny.task(), RECIPE, seed=0)


def test_a_process_whose_gpu_is_gone_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An illegal access is the end of all CUDA in a process, other errors are not."""

    def broken(self: Trainer) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def gone() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Trainer, "run_epoch", broken)
    for synchronize, lost in ((gone, True), (lambda: None, False)):
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        one = worker(tmp_path)
        one.take(0, "tiny", [4, 4], seed=0)
        report = one.step()
        assert report.failure is not None
        assert report.lost is lost


@pytest.mark.gpu
def test_a_worker_takes_no_more_than_its_share_of_a_gpu(tmp_path: Path) -> None:
    """What it may allocate is its share; alone it may take all."""
    small = worker(tmp_path, device="cuda", share=0.25)
    total = torch.cuda.get_device_properties(0).total_memory
    small.take(1, "tiny", [4, 4], seed=0)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(int(0.3 * total), dtype=torch.uint8, device="cuda")
    small.take(1, "tiny", [4, 4], seed=0, alone=True)
    assert torch.empty(int(0.3 * total), dtype=torch.uint8, device="cuda").numel() > 0
