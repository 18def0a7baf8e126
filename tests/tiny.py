"""A study so small that it trains in milliseconds, and a plain loop to drive it without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.api import Study
from widthsearch.data.config import Augmentation
from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task
from widthsearch.latency.config import Latency
from widthsearch.proposers.families import Candidate
from widthsearch.space.cost import Cost
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.loop import Search
from widthsearch.study.progress import Progress
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial, TrialState
from widthsearch.training.recipe import EpochResult
from widthsearch.widths import Widths


class Net(nn.Module):
    """Two convolutions, two axes; on request it logs each training step to a file."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 4) to (N, 4)."""
        witness = os.environ.get("WIDTHSEARCH_TEST_WITNESS")
        if witness and self.training and torch.is_grad_enabled() and len(x) > 2:
            with Path(witness).open("a") as file:
                file.write(f"{self.first.out_channels},{self.second.out_channels}\n")
        return self.fc(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


@cache
def space(name: str = "tiny", min_width: float = 0.25) -> SearchSpace:
    """A grid of 8 × 8 widths: 2, 4, ... 16 on both axes."""
    return SearchSpace.from_model(
        Net, (1, 4, 4), name=name, min_width=min_width, max_width=2.0, step=2
    )


@cache
def narrower() -> SearchSpace:
    """The same axes with half the base widths."""

    def net() -> nn.Module:
        made = Net()
        made.first, made.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        made.fc = nn.Linear(4, 4)
        return made

    return SearchSpace.from_model(net, (1, 4, 4), name="tiny", min_width=0.5, step=2)


@cache
def task() -> Task:
    """Four classes of 4 × 4 images that a tiny network learns; a batch of 32 is an epoch."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        labels = np.arange(count, dtype=np.int64) % 4
        images = rng.integers(0, 128, (count, 1, 4, 4))
        images += labels[:, None, None, None] * 32
        return Split(images.astype(np.uint8), labels)

    return Task(
        "tiny", split(32), split(40), split(8), 4, (0.5,), (0.25,), Augmentation(0, flip=False)
    )


def config(**changes: Any) -> StudyConfig:
    """A configuration with the defaults of these tests."""
    values: dict[str, Any] = {
        "name": "tiny",
        "recipe": {"epochs": 4, "batch_size": 32},
        "proposers": ["uniform"],
        "budgets": [0.25, 0.5],
        "families": ["linear"],
        "trials": 6,
    }
    return StudyConfig(**{**values, **changes})


def widths(first: int, second: int) -> Widths:
    """Widths of the tiny space."""
    return Widths(("first", "second"), (first, second))


def latency(median_ms: float) -> Latency:
    """A measurement, as if."""
    conditions = ("cpu", "none", "eager", 1, "float32", "contiguous", 1, 4)
    return Latency(median_ms, 0.01, median_ms, 0.01, 1.0, *conditions)


def curve(*accuracies: float) -> tuple[EpochResult, ...]:
    """A curve with these accuracies."""
    return tuple(EpochResult(i, 1.0, a, 0.1) for i, a in enumerate(accuracies, 1))


COST = Cost(macs=100, params=10, activations=5)


def candidate(first: int, second: int, proposer: str, budget: float) -> Candidate:
    """A family's member; the uniform ones are baselines."""
    origin: dict[str, object] = {"proposer": proposer, "family": "linear", "budget": budget}
    if proposer == "uniform":
        origin["baseline"] = True
    return Candidate("tiny", widths(first, second), origin)


CANDIDATES = [
    candidate(4, 4, "uniform", 0.25),
    candidate(2, 8, "sensitivity", 0.25),
    candidate(6, 6, "uniform", 0.5),
    candidate(4, 8, "sensitivity", 0.5),
]


@contextmanager
def searching(folder: Path, settings: StudyConfig, **options: Any) -> Iterator[Search]:
    """A search over the tiny space, with its storage in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    store = Store.create(f"sqlite:///{folder / 'study.db'}", settings.name, settings.objectives)
    with DriverLock(store) as driver_lock:
        spaces = options.pop("spaces", {"tiny": space()})
        base = Candidate("tiny", space().base, {"base": True})
        options["candidates"] = [base, *options.get("candidates", CANDIDATES)]
        yield Search(settings, spaces, driver_lock, **options)


def study(
    folder: Path, spaces: SearchSpace | Sequence[SearchSpace] | None = None, **changes: Any
) -> Study:
    """A study of the tiny task in a folder; of the tiny space unless others are given."""
    return Study(config(**changes), spaces or space(), task(), folder=folder)


def wide_is_good(trial: Trial, epoch: int) -> float:
    """An accuracy that grows with width and with training."""
    return min(99.0, 2.0 * sum(trial.widths.vector) + epoch)


def finished(number: int, widths: Widths, accuracy: float, **changes: Any) -> Trial:
    """A trial of the tiny space that was trained to its end, with one epoch."""
    trial = Trial(number, "tiny", widths, {"sampler": "search"}, number, COST)
    changes = {"curve": curve(accuracy), "state": TrialState.FINISHED, **changes}
    return replace(trial, **changes)


def ask(search: Search) -> Trial:
    """The next trial, which must be there."""
    trial = search.ask()
    assert trial is not None
    return trial


def drive(
    search: Search,
    accuracy: Callable[[Trial, int], float] = wide_is_good,
    trials: int | None = None,
) -> list[Trial]:
    """The plain loop: one trial after the other, up to so many; returns them."""
    asked: list[Trial] = []
    while not search.done and (trials is None or len(asked) < trials):
        trial = ask(search)
        asked.append(trial)
        done = list(trial.curve)
        goes_on = True
        while goes_on:
            epoch = len(done) + 1
            done.append(EpochResult(epoch, 1.0, accuracy(trial, epoch), 0.1))
            goes_on = search.report(trial.number, done)
    return asked


def run(
    of: Study, accuracy: Callable[[Trial, int], float] = wide_is_good, trials: int | None = None
) -> list[Progress]:
    """Run a study by the plain loop; returns its progress."""
    progress: list[Progress] = []
    with of.search(progress.append) as search:
        drive(search, accuracy, trials)
    return progress
