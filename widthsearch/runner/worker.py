"""A worker process: it trains trials, one epoch and one checkpoint per step, or runs a proposer.

A worker does not open the storage. It returns reports; the driver passes them to the study.
"""

from __future__ import annotations

import errno
import pickle
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from widthsearch.errors import CheckpointError, DeviceError, ImageError, StorageError, one_line
from widthsearch.runner.pickling import SharedData
from widthsearch.runner.training_thread import TrainingThread
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.proposals import Failure, ProposalRequest, ProposalResult, stream_proposal
from widthsearch.study.starts import Extraction
from widthsearch.training.job import TrainingTrial
from widthsearch.training.recipe import EpochResult
from widthsearch.utils.devices import check_device
from widthsearch.widths import Widths


@dataclass(frozen=True)
class WorkerReport:
    """The result of one step of a worker.

    Attributes:
        curve: The trial's epochs so far; empty if the trial has not begun.
        note: A message for the progress display; may be empty.
        failure: Why the candidate cannot be trained.
        out_of_memory: Whether the device's memory did not suffice.
        machine_error: A fault of the machine or of its files, such as a full disk or a damaged
            image, that no candidate has caused, with its way out.
        process_unusable: Whether this process can use its device no more, and must end.

    Example:
        >>> report = WorkerReport(curve=(EpochResult(1, 0.5, 91.0, 2.0),))
        >>> report.curve[-1].value, report.failure
        (91.0, None)
    """

    curve: tuple[EpochResult, ...] = ()
    note: str = ""
    failure: Failure | None = None
    out_of_memory: bool = False
    machine_error: str | None = None
    process_unusable: bool = False


_FIX = "fix this and run again"

_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""Parts of the messages of CUDA, cuBLAS and cuDNN, which raise RuntimeError; torch's own allocator
raises OutOfMemoryError."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the device or of the host did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


def _cuda_works() -> bool:
    """Whether this process can use CUDA; after an illegal access every call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@dataclass
class Worker:
    """Trains trials in this process, one after the other.

    Attributes:
        data: The data.
        spaces: The spaces by name, each pickled by the driver. Spaces, job and data are unpickled
            with the first trial, so that an error of unpickling is reported as its failure.
        job: The trainer and its recipe, a pickled :class:`~widthsearch.training.job.Job`.
        device: The device that they are trained on.
        threads: The number of CPU threads.
        checkpoints: The folder with one folder per trial.
        gpu_share: This worker's share of a GPU. It may allocate that share of the GPU's memory, so
            that a large trial fails itself instead of the trials beside it.
        weights: The :class:`~widthsearch.study.starts.BaseWeights` that trials with the start
            ``extract`` are cut from.
        paths: Folders that the driver imports from; modules that a trainer imports while it runs
            are looked for there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from widthsearch.data.tasks import load_task
        >>> from widthsearch.training.job import Job
        >>> from widthsearch.training.recipe import Recipe
        >>> from widthsearch.training.trainer import train_classifier
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> spaces = {"net": pickle.dumps(SearchSpace.from_model(model, (1, 8, 8)))}
        >>> job = pickle.dumps(Job(train_classifier, "built-in", Recipe(batch_size=32), epochs=10))
        >>> data = SharedData.of(load_task("digits"), "digits")
        >>> with TemporaryDirectory() as folder:
        ...     worker = Worker(data, spaces, job, "cpu", 1, Path(folder))
        ...     worker.start_trial(0, "net", [4], seed=0)
        ...     len(worker.step().curve)
        1
    """

    data: SharedData
    spaces: Mapping[str, bytes]
    job: bytes
    device: str
    threads: int
    checkpoints: Path
    gpu_share: float = 0.0
    paths: Sequence[str] = ()
    weights: SharedData | None = None
    _unpickled: dict[str, Any] = field(default_factory=dict, init=False)
    _training: TrainingThread | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # Ray sets OMP_NUM_THREADS, but torch's thread pool may exist before that.
        torch.set_num_threads(self.threads)
        sys.path.extend(path for path in self.paths if path not in sys.path)

    def start_trial(
        self,
        number: int,
        space: str,
        vector: Sequence[int],
        seed: int,
        alone: bool = False,
        reported: int = 0,
        start: str = "scratch",
        epochs: int | None = None,
    ) -> None:
        """Set the trial that the next steps train; the previous one is released.

        Args:
            number: The trial's number.
            space: The name of its space.
            vector: Its widths.
            seed: Its seed.
            alone: Whether no other trial runs meanwhile, so that it may use all memory of the GPU.
            reported: The number of epochs that the trial has reported so far, from any process.
            start: What its weights are: new ones, or with ``extract`` those of the base.
            epochs: The number of its epochs; None for the recipe's.
        """
        self._start, self._epochs = start, epochs
        self._number, self._space, self._vector, self._seed = number, space, tuple(vector), seed
        self._folder, self._reported = self.checkpoints / str(number), reported
        self._note = "" if self._training is None else self._training.stop()
        self._unusable = self._training is not None and self._training.is_running
        self._training = None
        if self.device.startswith("cuda") and 0 < self.gpu_share < 1 and torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0 if alone else self.gpu_share)

    def step(self) -> WorkerReport:
        """Train one epoch of the trial; after a restart, report the checkpoint's epochs instead.

        An exception of the trainer is reported and not raised: a retry would raise it again.
        """
        note, self._note = self._note, ""
        if self._unusable:  # the last trial's trainer runs on
            return WorkerReport(note=note, process_unusable=not note)
        try:
            return self._step(note)
        except (ImageError, StorageError) as error:
            return WorkerReport(machine_error=str(error))
        except DeviceError as error:
            return WorkerReport(machine_error=f"{error}: {_FIX}")
        except Exception as error:  # noqa: BLE001  reported, with its traceback
            self._training = None  # frees its tensors
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                return WorkerReport(machine_error=f"{one_line(error)}: {_FIX}")
            return WorkerReport(
                failure=Failure.of(error),
                out_of_memory=is_out_of_memory(error),
                process_unusable=isinstance(error, torch.AcceleratorError) and not _cuda_works(),
            )

    def _step(self, note: str) -> WorkerReport:
        if self._training is None:
            trial = self._begin()
            try:
                if self._folder.exists():
                    trial.load()
                    # A kill of the worker or of the driver may have kept this curve from the
                    # storage, so it is reported again.
                    curve = tuple(trial.curve)
                    return WorkerReport(curve, self._lost_epochs(len(curve)) or note)
                note = self._lost_epochs(0) or note
            except CheckpointError as error:
                note = f"trial {self._number} restarts from its first epoch: {error}"
        assert self._training is not None
        return WorkerReport(self._training.step(), note)

    def _lost_epochs(self, epochs: int) -> str:
        """A note where the checkpoint has fewer epochs than were reported; else empty."""
        if epochs >= self._reported:
            return ""
        found = f"has {epochs} of its {self._reported} epochs" if epochs else "is not there"
        return (
            f"trial {self._number} trains epochs again: its checkpoint in {str(self._folder)!r} on "
            f"{platform.node()} {found}; unless its trainer saved no state since, the nodes do not "
            "share this folder: put the study's folder on a file system that all of them share"
        )

    def _begin(self) -> TrainingTrial[Any]:
        """Build the trial's network, and prepare its training."""
        if self._space not in self._unpickled:
            self._unpickled[self._space] = pickle.loads(self.spaces[self._space])
        if "" not in self._unpickled:
            self._unpickled[""] = pickle.loads(self.job), self.data.load()
        space: SearchSpace = self._unpickled[self._space]
        job, data = self._unpickled[""]
        device, widths = check_device(self.device), Widths(space.names, self._vector)
        if self._epochs not in (None, job.epochs):
            job = job.lasting(self._epochs)
        digest = None
        if self._start == "extract":
            if (key := f"weights of {self._space}") not in self._unpickled:
                assert self.weights is not None
                weights = self.weights.load()
                self._unpickled[key] = weights.digest, Extraction(space, weights)
            digest, extraction = self._unpickled[key]
            network = extraction.network(widths, self._seed).to(device)
        else:
            network = space.build(widths, seed=self._seed).to(device)
        trial: TrainingTrial[Any] = TrainingTrial(
            job,
            network,
            data,
            widths,
            seed=self._seed,
            folder=self._folder,
            device=device,
            threads=self.threads,
            weights=digest,
        )
        self._training = TrainingThread(job, network, trial)
        return trial


def run_proposer(pickled: bytes, data: SharedData) -> Iterator[str | ProposalResult]:
    """Run a proposer; yield the messages that it reports, then its result.

    Args:
        pickled: The :class:`ProposalRequest`, pickled by the driver.
        data: The task; None for a method that reads none. An error of unpickling either is the
            proposer's failure as well.
    """
    try:
        request: ProposalRequest = pickle.loads(pickled)
        task = data.load()
    except BaseException as error:  # noqa: BLE001  SystemExit too; reported, with its traceback
        yield Failure.of(error)
        return
    yield from stream_proposal(request, task)
