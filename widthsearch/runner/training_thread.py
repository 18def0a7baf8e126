"""A trainer in a thread, which is stopped at each report until the study has decided."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
from torch import nn

from widthsearch.errors import StudyError, located
from widthsearch.training.job import Job, TrainingTrial
from widthsearch.training.recipe import EpochResult

RETURN_SECONDS = 30.0
"""The time that a trainer has to return after its trial has ended."""


class TrainingThread:
    """Turns a trainer, which calls ``report``, into steps of one epoch, which are called.

    Between two steps the trainer waits in ``report``. After the last epoch, and after a stop, it
    has ``RETURN_SECONDS`` to return.

    Args:
        job: The trainer and its recipe.
        network: The network, on the trial's device.
        trial: The trial.

    Example:
        >>> from pathlib import Path
        >>> from widthsearch.widths import Widths
        >>> def train(network, trial):
        ...     while trial.report({"accuracy": 50.0 + trial.epoch}):
        ...         pass
        >>> job, network = Job(train, "mine", recipe={}, epochs=3), nn.Linear(2, 2)
        >>> widths = Widths(("fc",), (2,))
        >>> trial = TrainingTrial(job, network, None, widths, seed=0, folder=Path("unused"))
        >>> training = TrainingThread(job, network, trial)
        >>> [result.value for result in training.step()]
        [50.0]
        >>> [result.value for result in training.step()]
        [50.0, 51.0]
        >>> training.stop(), training.is_running
        ('', False)
    """

    def __init__(self, job: Job, network: nn.Module, trial: TrainingTrial[Any]) -> None:
        self.trial = trial
        trial.on_report = self._on_report
        self._name = job.name
        self._reported: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._continues: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(job, network), daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether the trainer has begun and has not returned."""
        return self._thread.is_alive()

    def step(self) -> tuple[EpochResult, ...]:
        """Let the trainer go on to its next report; returns the curve.

        Raises:
            StudyError: The trainer breaks its contract.
            Exception: The trainer raised it.
        """
        if self.is_running:
            self._continues.put(True)
        else:
            self._thread.start()
        self._reported.get()
        if self.trial.complete:
            self._thread.join(RETURN_SECONDS)
        if (error := self._error) is not None:
            self._error = None
            try:
                if isinstance(error, Exception):
                    raise error
                raise StudyError(
                    f"a trainer must not end its process, but {self._name!r} raised "
                    f"{located(error)}"
                ) from error
            finally:
                del error  # else it would keep this frame, and with its own frames the network
        return tuple(self.trial.curve)

    def stop(self) -> str:
        """Let ``report`` return False, and wait for the trainer's end.

        Returns:
            The fault, in one line; empty if it returned.
        """
        if self.is_running:
            self._continues.put(False)
            self._thread.join(RETURN_SECONDS)
        if self.is_running:
            return (
                f"a trainer must return once report() has returned False, but {self._name!r} did "
                f"not within {RETURN_SECONDS:g} s; its worker process is replaced"
            )
        error, self._error = self._error, None  # its frames hold the network
        if error is not None:
            return f"trainer {self._name!r} failed after it was stopped: {located(error)}"
        return ""

    def _run(self, job: Job, network: nn.Module) -> None:
        torch.set_num_threads(self.trial.threads)
        try:
            job.run(network, self.trial)
        except BaseException as error:  # noqa: BLE001  raised again by step
            self._error = error
        finally:
            self._reported.put(None)

    def _on_report(self, result: EpochResult) -> bool:
        self._reported.put(None)
        return self.trial.complete or self._continues.get()
