"""Short probes of a machine: in which precision a CPU trains faster, how many trials at once.

Times decide here, and they are never quite the same twice. So whoever drives a study probes once
and keeps the answer: every trial of it gets the same precision, and the same seed gives the same
numbers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import nn

from widthsearch.data.tasks import Task
from widthsearch.errors import DeviceError, one_line
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import Trainer, evaluate, evaluation_batch
from widthsearch.utils.devices import check_device

CLEARLY = 1.2
"""bf16 is taken where it is faster than fp32 by this factor at least."""

_PIXELS = 2**14  # of a probe's batch: 16 images of 32×32
_ENDLESS = 10**6  # epochs, so that the learning rate hardly rises while the probe lasts


@dataclass(frozen=True)
class PrecisionProbe:
    """How training in bf16 compares with fp32 on a device.

    Attributes:
        precision: What to train in.
        speedup: Time of an fp32 step over that of a bf16 step, the median over pairs.
        pairs: How often the two took turns; 0 where the first step in bf16 left no doubt.
        device: Where.
        threads: CPU threads; None for torch's number.
    """

    precision: Literal["fp32", "bf16"]
    speedup: float
    pairs: int
    device: str
    threads: int | None

    def to_json(self) -> dict[str, Any]:
        """Every field by its name."""
        return asdict(self)


def probe_precision(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    seconds: float = 0.5,
) -> PrecisionProbe:
    """Train a network in turns in fp32 and bf16, and say which is faster.

    Both are in the memory format that the network takes, on small batches. On a CPU that computes
    in bf16, ResNet-20 trains 1.3 times as fast in bf16 in batches of 8, and 1.9 times in batches of
    128; on one that does not, up to ten times as slow. Very small networks gain nothing either way.

    Args:
        model: The study's base network; it is left as it is.
        task: What it learns; a batch of it is used.
        recipe: Whose batch size, optimizer and loss are used.
        device: Where.
        threads: CPU threads.
        seconds: No pair of steps begins later, after the first step of each; but there are five at
            least, unless bf16's first step takes three times as long as fp32's.
    """
    small = _few(task, recipe.batch_size)
    runs = [
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
    # These make the kernels, and do not count; what is common to both is made by fp32.
    fp32, bf16 = (run.run_epoch().seconds for run in runs)
    # A network that diverges at once is its trials' to report.
    if bf16 > 3 * fp32 or any(run.finished for run in runs):
        return PrecisionProbe("fp32", fp32 / bf16, 0, device, threads)
    started = time.perf_counter()
    ratios: list[float] = []
    while len(ratios) < 5 or time.perf_counter() - started < seconds:
        fp32, bf16 = (run.run_epoch().seconds for run in runs)
        ratios.append(fp32 / bf16)
    speedup = statistics.median(ratios)
    precision: Literal["fp32", "bf16"] = "bf16" if speedup >= CLEARLY else "fp32"
    return PrecisionProbe(precision, speedup, len(ratios), device, threads)


@dataclass(frozen=True)
class ConcurrencyProbe:
    """How many candidates an hour a device trains, by how many train at once.

    Attributes:
        candidates_per_hour: By their number at once, ascending. Base networks, without evaluation.
        device: Where.
        threads: CPU threads of each.
        limit: Why no more were tried, in one line; None if as many were as was asked for.
    """

    candidates_per_hour: dict[int, float]
    device: str
    threads: int
    limit: str | None

    @property
    def best(self) -> int:
        """The least number that comes within 3% of the most candidates an hour."""
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
    """Train the base network in ever more processes at once, and count steps.

    Args:
        space: The space, pickled, as workers get it.
        task: What is learnt; a few batches of it are used.
        recipe: How, its precision decided.
        device: Where all of them train.
        threads: CPU threads of each.
        numbers: How many at once, ascending. The next is not tried where this one trains fewer
            candidates an hour than the last, or where a process fails (out of memory).
        seconds: How long each number is tried.

    Raises:
        DeviceError: Not even one can train.
    """
    check_device(device)
    small = _few(task, recipe.batch_size, batches=8, pixels=2**62)
    steps_of_one = recipe.epochs * (len(task.train) // min(recipe.batch_size, len(task.train)))
    whole = evaluation_batch(task, torch.device(device).type)
    validated = task.validation.subset(np.arange(min(whole, len(task.validation))))
    asked = pickle.dumps((space, small, validated, recipe, device, threads))
    processes: list[_Trainer] = []
    rates: dict[int, float] = {}
    limit: str | None = None
    try:
        for number in numbers:
            new = [_Trainer() for _ in range(number - len(processes))]
            processes += new
            for process in new:  # all of them import torch meanwhile
                process.ask(asked)
            failures = [told["failed"] for told in (p.read() for p in new) if "failed" in told]
            if not failures:
                for process in processes:
                    process.write(seconds)
                counts = [process.read() for process in processes]
                failures = [count["failed"] for count in counts if "failed" in count]
            if failures:
                limit = f"{number} at once: {failures[0]}"
                break
            steps = sum(count["steps"] / count["seconds"] for count in counts)
            rates[number] = 3600 * steps / steps_of_one
            if rates[number] < max(rates.values()):
                limit = f"{number} at once train fewer candidates an hour than less did"
                break
    finally:
        for process in processes:
            process.end()
    if not rates:
        raise DeviceError(f"a candidate must train on {device!r}, but cannot: {limit}")
    return ConcurrencyProbe(rates, device, threads, limit)


class _Trainer:
    """A process that trains the base network for as long as it is told to, again and again.

    Not of multiprocessing, which would run the user's own script again.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "widthsearch.training.autotune"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, asked: bytes) -> None:
        self._send(len(asked).to_bytes(8, "big") + asked)

    def write(self, seconds: float) -> None:
        self._send(f"{seconds}\n".encode())

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"failed": "its process died"}
        return told

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # it ends at the end of its input
        self._process.wait()
        self._process.stdout.close()

    def _send(self, content: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, and reading will say so
            self._process.stdin.write(content)
            self._process.stdin.flush()


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    """What a :class:`_Trainer`'s process does."""

    def tell(**told: Any) -> None:
        sink.write(json.dumps(told).encode() + b"\n")
        sink.flush()

    try:
        size = int.from_bytes(source.read(8), "big")
        pickled, task, validated, recipe, device, threads = pickle.loads(source.read(size))
        torch.set_num_threads(threads)
        space: SearchSpace = pickle.loads(pickled)
        model = space.build(space.base, seed=0)
        # Once, for its memory; the steps alone are timed.
        evaluate(model, replace(task, validation=validated), "validation", device, recipe.precision)
        run = Trainer(
            model,
            task,
            _endless(recipe, len(task.train) // 8),
            seed=0,
            device=device,
            threads=threads,
        )
        first = run.run_epoch()  # eight steps: kernels are made, a graph is captured
        if run.finished:
            raise FloatingPointError(f"training diverged at once: its loss is {first.loss}")
        tell(ready=True)
        for line in source:
            end = time.perf_counter() + float(line)
            before = len(run.curve)
            while time.perf_counter() < end:
                run.run_epoch()
            results = run.curve[before:]
            tell(steps=8 * len(results), seconds=sum(result.seconds for result in results))
    except Exception as error:  # noqa: BLE001  told to whoever asked
        tell(failed=one_line(error))


def _endless(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with practically endless epochs, and a learning rate at which nothing diverges."""
    lr = min(recipe.lr, 1e-3)
    return replace(recipe, epochs=_ENDLESS, batch_size=batch_size, warmup_epochs=None, lr=lr)


def _few(task: Task, batch_size: int, batches: int = 1, pixels: int = _PIXELS) -> Task:
    """So many batches of a task, of so many pixels at most, and two images to validate on."""
    _, height, width = task.input_shape
    size = min(batch_size, max(2, pixels // (height * width)), len(task.train))
    return replace(
        task,
        train=task.train.subset(np.arange(size * batches) % len(task.train)),
        validation=task.validation.subset(np.arange(min(2, len(task.validation)))),
        test=None,
    )


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
