"""What a worker does: trains one trial after the other, an epoch a step, a checkpoint an epoch;
or asks a proposer.

A worker never opens the storage and knows no Ray: it reports, and whoever runs it tells the study.
"""

from __future__ import annotations

import errno
import pickle
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from widthsearch.data.tasks import Task
from widthsearch.errors import CheckpointError, DeviceError, one_line
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.proposals import Failure, ProposalRequest, ProposalResult, told
from widthsearch.training.recipe import EpochResult, Recipe
from widthsearch.training.trainer import Trainer
from widthsearch.widths import Widths


@dataclass(frozen=True)
class Report:
    """What a step came to.

    Attributes:
        curve: The trial's epochs so far.
        note: What whoever watches should know; may be empty.
        failure: Why the candidate cannot be trained, in one line.
        traceback: All of that.
        out_of_memory: Whether it failed because its device's memory did not suffice.
        broken: What is wrong with the machine, where it is not the candidate's fault.
        lost: Whether this process can use its device no more, and must end.
    """

    curve: tuple[EpochResult, ...] = ()
    note: str = ""
    failure: str | None = None
    traceback: str = ""
    out_of_memory: bool = False
    broken: str | None = None
    lost: bool = False


_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""What errors of CUDA, cuBLAS and cuDNN say that are not of torch's allocator."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, of the device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)


def _answers() -> bool:
    """Whether the GPU still answers this process: after an illegal access it never does again."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Worker:
    """Trains trials in this process.

    Args:
        task: The data.
        spaces: The spaces by name, each pickled by the driver. One is unpickled with its first
            trial, so that what goes wrong with that has a trial to be reported for.
        recipe: How candidates are trained.
        device: Where.
        threads: With how many CPU threads.
        checkpoints: The folder in which each trial has its own.
        share: The share of a GPU that is this worker's; of the GPU's memory it gets no more, so
            that no trial takes what its neighbours count on.
    """

    def __init__(
        self,
        *,
        task: Task,
        spaces: Mapping[str, bytes],
        recipe: Recipe,
        device: str,
        threads: int,
        checkpoints: Path,
        share: float = 0.0,
    ) -> None:
        # Ray sets OMP_NUM_THREADS, but torch's pool may be there already.
        torch.set_num_threads(threads)
        self._task = task
        self._pickled = spaces
        self._spaces: dict[str, SearchSpace] = {}
        self._recipe = recipe
        self._device = device
        self._threads = threads
        self._checkpoints = checkpoints
        self._share = share

    def take(
        self, number: int, space: str, vector: Sequence[int], seed: int, alone: bool = False
    ) -> None:
        """Take the next trial; the last one is let go.

        Args:
            number: The trial's.
            space: Its space's name.
            vector: Its widths.
            seed: Its seed.
            alone: Whether no other trial runs meanwhile, so that all memory may be used.
        """
        self._number, self._space, self._vector, self._seed = number, space, tuple(vector), seed
        self._folder = self._checkpoints / str(number)
        self._run: Trainer | None = None
        if self._device.startswith("cuda") and 0 < self._share < 1 and torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0 if alone else self._share)

    def step(self) -> Report:
        """Train an epoch of the trial, or repeat the last one that a checkpoint has.

        Whatever a network raises is its failure: it is reported, for it would come again.
        """
        try:
            return self._step()
        except DeviceError as error:
            return Report(broken=str(error))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return Report(broken=f"{error.strerror} for the checkpoint {str(self._folder)!r}")
            return Report(failure=one_line(error), traceback=traceback.format_exc())
        except Exception as error:  # noqa: BLE001  reported, with its traceback
            self._run = None  # its tensors go
            return Report(
                failure=one_line(error),
                traceback=traceback.format_exc(),
                out_of_memory=is_out_of_memory(error),
                lost=isinstance(error, torch.AcceleratorError) and not _answers(),
            )

    def _step(self) -> Report:
        note = ""
        if self._run is None:
            self._run = self._begin()
            if self._folder.exists():
                try:
                    self._run.load(self._folder)
                    # Whoever was killed, the worker or the driver: it may not be in the storage.
                    return Report(self._run.curve)
                except CheckpointError as error:
                    note = f"trial {self._number} starts from its first epoch: {error}"
        self._run.run_epoch()
        self._run.save(self._folder)
        return Report(self._run.curve, note)

    def _begin(self) -> Trainer:
        if self._space not in self._spaces:
            self._spaces[self._space] = pickle.loads(self._pickled[self._space])
        space = self._spaces[self._space]
        return Trainer(
            space.build(Widths(space.names, self._vector), seed=self._seed),
            self._task,
            self._recipe,
            seed=self._seed,
            device=self._device,
            threads=self._threads,
        )


def answer(pickled: bytes, task: Task) -> Iterator[str | ProposalResult]:
    """Ask a proposer whose question was pickled by the driver; yields its reports, then its answer.

    What goes wrong with unpickling is the proposer's failure as well.
    """
    try:
        request: ProposalRequest = pickle.loads(pickled)
    except BaseException as error:  # noqa: BLE001  SystemExit too; reported, with its traceback
        yield Failure.of(error)
        return
    yield from told(request, task)
