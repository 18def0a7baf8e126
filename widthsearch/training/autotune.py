"""Short probes of a machine: the faster precision on a CPU, and the best number of trials at once.

Measured times differ from run to run, so a study probes once and stores the result: all its trials
then have the same precision, and the same seed gives the same numbers.
"""

from __future__ import annotations

import copy
import os
import pickle
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task
from widthsearch.errors import DeviceError, StudyError, first_line, one_line
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import Trainer, evaluate, evaluation_batch
from widthsearch.utils.devices import check_device

MIN_SPEEDUP = 1.2
"""bf16 is chosen where it is faster than fp32 by at least this factor."""

_PROBE_PIXELS = 2**14  # per batch of the precision probe: 16 images of 32×32
_EPOCH_STEPS = 8  # per epoch of the concurrency probe
_ENDLESS = 10**6  # epochs: the warm-up of the learning rate outlasts any probe


@dataclass(frozen=True)
class PrecisionProbe:
    """The result of :func:`probe_precision`.

    Attributes:
        precision: The precision to train in.
        speedup: The time of an fp32 step over that of a bf16 step, the median over pairs.
        pairs: The number of pairs of steps; 0 if the first step in bf16 was clearly slower.
        device: The device.
        threads: CPU threads; None for torch's number.

    Example:
        >>> PrecisionProbe("bf16", speedup=1.3, pairs=20, device="cpu", threads=1).precision
        'bf16'
    """

    precision: Literal["fp32", "bf16"]
    speedup: float
    pairs: int
    device: str
    threads: int | None


def probe_precision(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    seconds: float = 0.5,
) -> PrecisionProbe:
    """Time training steps in fp32 and bf16 in turns, on small batches.

    On a CPU with bf16 units, ResNet-20 trains 1.3 times as fast in bf16 in batches of 8, and 1.9
    times in batches of 128; on a CPU without them, up to ten times slower. Very small networks gain
    nothing in either case.

    Args:
        model: The study's base network; it is copied, not changed.
        task: Its first images are used.
        recipe: Batch size, optimizer and loss.
        device: The device.
        threads: CPU threads.
        seconds: No pair of steps begins after this time, but there are at least five pairs, unless
            the first step in bf16 takes three times as long as in fp32.
    """
    small = _few(task, recipe.batch_size)
    trainers = [
        Trainer(
            copy.deepcopy(model),
            small,
            _endless(replace(recipe, precision=precision), len(small.train)),
            seed=0,
            device=device,
            threads=threads,
        )
        for precision in ("fp32", "bf16")
    ]
    # The first steps create the kernels and are not counted. fp32 creates the common ones.
    try:
        fp32, bf16 = (trainer.run_epoch().seconds for trainer in trainers)
    except StudyError:  # the loss is not finite at the start: trials will report that
        return PrecisionProbe("fp32", 1.0, 0, device, threads)
    # The same if the network diverges at once.
    if bf16 > 3 * fp32 or any(trainer.finished for trainer in trainers):
        return PrecisionProbe("fp32", fp32 / bf16, 0, device, threads)
    started = time.perf_counter()
    ratios: list[float] = []
    while len(ratios) < 5 or time.perf_counter() - started < seconds:
        fp32, bf16 = (trainer.run_epoch().seconds for trainer in trainers)
        ratios.append(fp32 / bf16)
    speedup = statistics.median(ratios)
    precision: Literal["fp32", "bf16"] = "bf16" if speedup >= MIN_SPEEDUP else "fp32"
    return PrecisionProbe(precision, speedup, len(ratios), device, threads)


@dataclass(frozen=True)
class ConcurrencyProbe:
    """The result of :func:`probe_concurrency`.

    Attributes:
        candidates_per_hour: Base networks trained per hour, without evaluation, by the number of
            them at once, ascending.
        device: The device.
        threads: CPU threads of each process.
        limit: Why no more were tried, in one line; None if all numbers were tried.

    Example:
        >>> probe = ConcurrencyProbe({1: 50.0, 2: 90.0, 4: 92.0}, "cpu", threads=1, limit=None)
        >>> probe.best
        2
    """

    candidates_per_hour: dict[int, float]
    device: str
    threads: int
    limit: str | None

    @property
    def best(self) -> int:
        """The smallest number within 3% of the most candidates per hour."""
        most = max(self.candidates_per_hour.values())
        return min(n for n, rate in self.candidates_per_hour.items() if rate >= 0.97 * most)

    def to_json(self) -> dict[str, Any]:
        """Every field by its name, and the best number."""
        rates = {str(n): rate for n, rate in self.candidates_per_hour.items()}
        return {**asdict(self), "candidates_per_hour": rates, "best": self.best}


def probe_concurrency(
    space: bytes,
    task: Task,
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int = 1,
    numbers: Sequence[int] = (1, 2, 4, 8),
    seconds: float = 2.0,
) -> ConcurrencyProbe:
    """Train the base network in more and more processes at once, and count steps.

    Args:
        space: The pickled space, as workers receive it.
        task: A few batches of it are used.
        recipe: The recipe, with a decided precision.
        device: The device that all processes train on.
        threads: CPU threads of each process.
        numbers: The numbers of processes, ascending. The probe stops after a number that trains
            fewer candidates per hour than a smaller one, or at a process that fails (for example
            out of memory).
        seconds: The duration of each number's measurement.

    Raises:
        DeviceError: Not even one process can train.
    """
    check_device(device)
    small = _few(task, recipe.batch_size, _EPOCH_STEPS, pixels=2**62)
    steps_of_one = recipe.epochs * (len(task.train) // min(recipe.batch_size, len(task.train)))
    batch = min(evaluation_batch(task, torch.device(device).type), len(task.validation))
    evaluated = task.validation.subset(np.arange(batch)).read()
    processes: list[ProcessPoolExecutor] = []
    rates: dict[int, float] = {}
    limit: str | None = None
    try:
        for number in numbers:
            new = [_process() for _ in range(number - len(processes))]
            processes += new
            try:
                _on_each(new, _prepare, space, small, evaluated, recipe, device, threads)
                rates[number] = 3600 / steps_of_one * sum(_on_each(processes, _train, seconds))
            except RuntimeError as error:  # of a process, or it died
                limit = f"{number} at once: {first_line(error)}"
                break
            if rates[number] < max(rates.values()):
                limit = f"{number} at once train fewer candidates per hour than fewer did"
                break
    finally:
        for process in processes:
            process.shutdown(cancel_futures=True)
    if not rates:
        raise DeviceError(f"a candidate must train on {device!r}, but cannot: {limit}")
    return ConcurrencyProbe(rates, device, threads, limit)


def _process() -> ProcessPoolExecutor:
    """One process, so that every task of a probe runs in a process of its own."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_end_with_parent)


def _on_each(
    processes: Sequence[ProcessPoolExecutor], function: Callable[..., Any], *args: Any
) -> list[Any]:
    """Run a function in all processes at once.

    Raises:
        RuntimeError: The function failed in a process, or the process died.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")  # else a new process runs the user's script
    try:
        futures = [process.submit(function, *args) for process in processes]
    finally:
        sys.modules["__main__"] = main
    return [future.result() for future in futures]


# --- in the processes ---

_trainer: Trainer


def _end_with_parent() -> None:
    """End this process with its parent, even if the parent is killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _picklable_errors() -> Iterator[None]:
    """Reduce any exception to a RuntimeError of one line, which the parent can unpickle."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  the parent reports it
        raise RuntimeError(one_line(error)) from None


@_picklable_errors()
def _prepare(
    pickled: bytes, task: Task, evaluated: Split, recipe: Recipe, device: str, threads: int
) -> None:
    """Build the base network, evaluate it once for its memory, and train it for an epoch."""
    global _trainer
    torch.set_num_threads(threads)
    space: SearchSpace = pickle.loads(pickled)
    model = space.build(space.base, seed=0)
    evaluate(model, replace(task, validation=evaluated), "validation", device, recipe.precision)
    endless = _endless(recipe, len(task.train) // _EPOCH_STEPS)
    _trainer = Trainer(model, task, endless, seed=0, device=device, threads=threads)
    first = _trainer.run_epoch()  # creates kernels, captures a graph
    if _trainer.finished:
        raise FloatingPointError(f"training diverged at once: its loss is {first.loss}")


@_picklable_errors()
def _train(seconds: float) -> float:
    """Train for a while; steps per second."""
    end, before = time.perf_counter() + seconds, len(_trainer.curve)
    while time.perf_counter() < end:
        _trainer.run_epoch()
    results = _trainer.curve[before:]
    return _EPOCH_STEPS * len(results) / sum(result.seconds for result in results)


# --- short trainings ---


def _few(task: Task, batch_size: int, batches: int = 1, pixels: int = _PROBE_PIXELS) -> Task:
    """A few batches of a task with at most so many pixels each, and two images for validation.

    They are in memory, also those of a streamed task: a probe measures the network.
    """
    _, height, width = task.input_shape
    size = min(batch_size, max(2, pixels // (height * width)), len(task.train))
    return replace(
        task,
        train=task.train.subset(np.arange(size * batches) % len(task.train)).read(),
        validation=task.validation.subset(np.arange(min(2, len(task.validation)))).read(),
        test=None,
    )


def _endless(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with practically endless epochs, and a learning rate at which nothing diverges."""
    lr = min(recipe.lr, 1e-3)
    return replace(recipe, epochs=_ENDLESS, batch_size=batch_size, warmup_epochs=None, lr=lr)
