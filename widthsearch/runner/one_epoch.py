"""Trains one network for an epoch or two, as the program of a process: ``python -m … FOLDER``.

The folder has the :class:`EpochRequest`, pickled, and gets the result as JSON. A process of its own
has a peak of memory of its own, and whatever the trainer does ends with it.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from widthsearch.runner.pickling import SharedData
from widthsearch.runner.worker import Worker

REQUEST, RESULT = "request.pickle", "result.json"

LONG = 30.0
"""After a first epoch of so many seconds there is no second one."""


@dataclass(frozen=True)
class EpochRequest:
    """A network to train, and all that its worker needs.

    Attributes:
        data: The data.
        spaces: The spaces by name, each pickled.
        job: The trainer and its recipe, pickled.
        device: The device.
        threads: CPU threads.
        space: The name of the network's space.
        vector: Its widths.
        seed: Its seed.
        epochs: The epochs of a whole training.
        paths: Folders to import from.

    Example:
        >>> data = SharedData.of(None, "nothing")
        >>> EpochRequest(data, {}, b"", "cpu", 1, "net", (8, 4), seed=0, epochs=3).vector
        (8, 4)
    """

    data: SharedData
    spaces: Mapping[str, bytes]
    job: bytes
    device: str
    threads: int
    space: str
    vector: tuple[int, ...]
    seed: int
    epochs: int
    paths: Sequence[str] = ()


def train_for_an_epoch(request: EpochRequest, folder: Path) -> dict[str, Any]:
    """Train; a second epoch, if the first is short, has no start-up in its time.

    Args:
        request: The network.
        folder: A folder for checkpoints.

    Returns:
        ``seconds`` of the last epoch with its evaluation and checkpoint, its result in ``last``,
        the peak of the process's memory in ``memory`` and of the GPU's in ``gpu_memory`` (None
        without one), in bytes; or the fault in ``error``.
    """
    worker = Worker(
        request.data,
        request.spaces,
        request.job,
        request.device,
        request.threads,
        folder / "checkpoints",
        paths=request.paths,
    )
    trial = (0, request.space, request.vector, request.seed)
    worker.start_trial(*trial)
    seconds = 0.0
    for epoch in range(min(2, request.epochs)):
        if epoch and seconds > LONG:
            break
        begun = time.perf_counter()
        report = worker.step()
        seconds = time.perf_counter() - begun
        if (error := report.failure and report.failure.reason) or (error := report.machine_error):
            return {"error": error}
        last = report.curve[-1]
        if not math.isfinite(last.value):
            break  # the training has ended
    worker.start_trial(*trial)  # stops the training
    on_gpu = request.device.startswith("cuda")
    gpu_memory = torch.cuda.max_memory_reserved() if on_gpu else None
    measured = {"seconds": seconds, "memory": peak_memory(), "gpu_memory": gpu_memory}
    return {**measured, "last": asdict(last)}


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main(folder: Path) -> None:
    """Read the request in a folder, and write the result there."""
    with (folder / REQUEST).open("rb") as file:
        request: EpochRequest = pickle.load(file)
    result = train_for_an_epoch(request, folder)
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    from widthsearch.runner import one_epoch  # the request's class is of this module

    one_epoch.main(Path(sys.argv[1]))
