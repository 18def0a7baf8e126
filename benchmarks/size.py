"""A large study: the driver's CPU time, the time of `pareto`, and the size of the storage.

    python -m benchmarks.size [--trials 1000] [--axes 30] [--epochs 30] [--searched 40]

Trainings are simulated: a saturating curve in the logarithm of the MACs, with noise. All the rest
is the study's own: the loop, early stopping, the storage with the driver's lock, the surrogate. The
queue has random networks first; the last `--searched` trials are suggestions of the search, with a
progress display as in `widthsearch run`. Times are CPU times of one process on one thread.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from torch import nn

from widthsearch import SearchSpace
from widthsearch.proposers.families import Candidate
from widthsearch.study.checks import claim
from widthsearch.study.config import StudyConfig
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.loop import Search
from widthsearch.study.progress import Progress
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial
from widthsearch.training.recipe import EpochResult
from widthsearch.widths import Widths

AT_ONCE = 4
BARS = {"driver": 0.5, "pareto": 3.0, "storage": 50.0}


def network(axes: int) -> nn.Module:
    """So many convolutions in a row, an axis each."""
    layers: list[nn.Module] = []
    before = 3
    for i in range(axes):
        width = 16 * 2 ** (3 * i // axes)
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def curve(trial: Trial, epochs: int) -> list[float]:
    """The accuracy after each epoch of a training, as if."""
    rng = np.random.default_rng(trial.seed)
    final = 96 - 40 * (trial.cost.macs / 1e6) ** -0.4 + rng.normal(0, 0.3)
    early = np.exp(-np.arange(1, epochs + 1) / (epochs / 5))
    return list(np.clip(final - 40 * early + rng.normal(0, 0.3, epochs) * (early > 0.01), 1, 99.9))


def drive(search: Search, epochs: int, until: int) -> list[float]:
    """Drive until so many trials have begun and ended, a few at once; CPU seconds of each."""
    live: list[tuple[Trial, list[float], list[EpochResult]]] = []
    seconds, before = [], time.process_time()
    while live or len(search.trials) < until:
        while len(live) < AT_ONCE and len(search.trials) < until:
            trial = search.ask()
            assert trial is not None
            live.append((trial, curve(trial, epochs), []))
        for entry in list(live):
            trial, accuracies, done = entry
            epoch = len(done) + 1
            done.append(EpochResult(epoch, 1 / epoch, accuracies[epoch - 1], 1.0, "fp32, eager"))
            if not search.report(trial.number, done):
                live.remove(entry)
                now = time.process_time()
                seconds.append(now - before)
                before = now
    return seconds


def run(folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Simulate the study; CPU seconds of a trial of the queue, and of one of the search."""
    space = SearchSpace.from_model(network(options.axes), (3, 32, 32), name="net", step=4)
    config = StudyConfig(
        name="size",
        trials=options.trials,
        recipe={"epochs": options.epochs},
        objectives=["accuracy", "macs"],
        early_stopping=options.early_stopping,
    )
    folder.mkdir()
    (folder / "study.yaml").write_text(config.to_yaml(), encoding="utf-8")
    store = Store.create(f"sqlite:///{folder / 'study.db'}", "size", config.objectives)
    rng = np.random.default_rng(0)
    rows = np.array([space.base.vector] * options.trials)
    for i, axis in enumerate(space.axes):
        rows[:, i] = rng.choice(range(axis.min_width, axis.max_width + 1, axis.step), len(rows))
    names = tuple(axis.name for axis in space.axes)
    queue = [
        Candidate("net", Widths(names, tuple(row)), {"sampler": "random"}) for row in rows.tolist()
    ]
    queue = queue[: options.trials - options.searched]
    with DriverLock(store) as lock:
        claim(store, config, {"net": space})
        search = Search(config, {"net": space}, lock, candidates=queue)
        queued = drive(search, options.epochs, len(queue))
        shown: list[Progress] = []
        search = Search(config, {"net": space}, lock, on_progress=shown.append)
        return queued, drive(search, options.epochs, options.trials)


def pareto(folder: Path) -> float:
    """CPU seconds of `widthsearch pareto`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "widthsearch", "pareto", "size", "--runs", str(folder.parent)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def show(name: str, value: float, bar: float, unit: str) -> None:
    print(f"{name:<44} {value:8.2f} {unit:<4} {value / bar:6.2f} of the bar of {bar:g} {unit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--axes", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--searched", type=int, default=40)
    parser.add_argument("--early-stopping", choices=["front", "rungs"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs, threadpool_limits(1):
        folder = Path(runs, "size")
        queued, searched = run(folder, options)
        first, last = np.mean(queued[:50]), np.mean(queued[-50:])
        print(f"driver, a trial of the queue: {first:.3f} s at first, {last:.3f} s at last")
        last = float(np.mean(searched[-20:]))
        show("driver, a trial of the search at the end", last, BARS["driver"], "s")
        show("pareto", pareto(folder), BARS["pareto"], "s")
        megabytes = sum(f.stat().st_size for f in folder.glob("study.db*")) / 1e6
        show("storage", megabytes, BARS["storage"], "MB")


if __name__ == "__main__":
    main()
