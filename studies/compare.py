"""Compare networks: train each from scratch by one recipe with several seeds; print one table.

For example::

    base = Entry.of("base", space, space.base)
    entries = [base, Entry.of("uniform 0.5", space, widths), Entry("branched", build, macs, params)]
    results = compare(entries, task, Recipe(epochs=16), seeds=5, base=base)
    print(table(results, base))

An entry builds a network from a seed, so that entries of different spaces can be compared (a
smaller depth, a branched network). ``schedule="compute"`` trains a narrower network for more epochs
in proportion to its MACs. Accuracies are of the validation split unless ``split="test"``, which is
for networks that were not chosen by their test accuracy. ``ratios`` adds inference latency and
training time relative to the base network, measured in alternation, since absolute times of a
machine drift. Run scripts from the repository's root: ``python -m studies.sensitivity.run``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from widthsearch import LatencyConfig, Recipe, SearchSpace, Widths
from widthsearch.data.tasks import Task
from widthsearch.latency.meter import LatencyMeter
from widthsearch.training.trainer import Trainer, evaluate

Schedule = Literal["epochs", "compute"]
"""``epochs``: those of the recipe; ``compute``: times the ratio of base MACs to network MACs."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A network to compare.

    Attributes:
        name: The name in the table.
        build: Builds a newly initialised network from a seed.
        macs: The MACs of the network.
        params: The parameters of the network.
    """

    name: str
    build: Callable[[int], nn.Module]
    macs: int
    params: int

    @classmethod
    def of(cls, name: str, space: SearchSpace, widths: Widths) -> Entry:
        """The network of a space at these widths."""
        cost = space.cost(widths)
        return cls(name, lambda seed: space.build(widths, seed=seed), cost.macs, cost.params)


@dataclass(frozen=True, eq=False)
class Result:
    """The accuracies of an entry.

    Attributes:
        entry: The network.
        epochs: The epochs of each training.
        accuracies: Top-1 in percent after the last epoch, one per seed.
    """

    entry: Entry
    epochs: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Standard deviation of the accuracy over seeds (n - 1); NaN for a single seed."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else float("nan")


@dataclass(frozen=True)
class Ratios:
    """Times of a network as multiples of the base network's.

    Attributes:
        latency: The ratio of inference latencies.
        latency_spread: Half the interquartile range of that ratio over pairs.
        training: The ratio of the training times of an epoch.
    """

    latency: float
    latency_spread: float
    training: float


def compare(
    entries: Sequence[Entry],
    task: Task,
    recipe: Recipe,
    *,
    seeds: int | Sequence[int],
    base: Entry,
    schedule: Schedule = "epochs",
    split: Literal["validation", "test"] = "validation",
    device: str = "cpu",
    report: Callable[[str], None] = print,
) -> list[Result]:
    """Train every entry from scratch, seed by seed.

    Args:
        entries: The networks.
        task: The data.
        recipe: The recipe of every training.
        seeds: The number of seeds, or the seeds, of initialisation and training.
        base: The network whose MACs ``schedule="compute"`` refers to.
        schedule: The number of epochs.
        split: The split of the accuracies.
        device: The device.
        report: Called with one line per entry.
    """
    chosen = range(seeds) if isinstance(seeds, int) else seeds
    results = []
    for entry in entries:
        factor = base.macs / entry.macs if schedule == "compute" else 1.0
        epochs = max(1, round(recipe.epochs * factor))
        accuracies = tuple(
            train(entry.build(s), task, recipe, s, epochs=epochs, split=split, device=device)
            for s in chosen
        )
        results.append(Result(entry, epochs, accuracies))
        report(f"{entry.name}, {epochs} epochs: {results[-1].mean:.2f} ± {results[-1].std:.2f}")
    return results


def train(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    seed: int,
    *,
    epochs: int | None = None,
    split: Literal["validation", "test"] = "validation",
    device: str = "cpu",
) -> float:
    """Train a network by a recipe, for other epochs if given; returns its accuracy in percent."""
    stretched = _stretched(recipe, epochs or recipe.epochs)
    run = Trainer(model, task, stretched, seed=seed, device=device)
    while not run.finished:
        result = run.run_epoch()
    return (
        result.value
        if split == "validation"
        else evaluate(model, task, "test", device, recipe.precision)
    )


def _stretched(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with another number of epochs; a warm-up keeps its share of them."""
    warmup = recipe.warmup_epochs
    if warmup is not None:
        warmup *= epochs / recipe.epochs
    return Recipe(**{**vars(recipe), "epochs": epochs, "warmup_epochs": warmup})


def ratios(
    entries: Sequence[Entry],
    base: Entry,
    task: Task,
    recipe: Recipe,
    *,
    latency: LatencyConfig,
    epochs: int = 5,
    device: str = "cpu",
) -> dict[str, Ratios]:
    """Inference latency and training time of each entry relative to the base, by name.

    Args:
        entries: The networks.
        base: The base network.
        task: The data.
        recipe: The recipe of the timed epochs.
        latency: The settings of the latency measurement.
        epochs: Timed epochs of both networks in alternation; the median of their ratios counts.
        device: The device of the training.
    """
    meter = LatencyMeter(base.build(0), task.input_shape, latency)
    timed = _stretched(recipe, epochs + 1)
    out = {}
    for entry in entries:
        measured = meter.measure(entry.build(0))
        runs = [
            Trainer(which.build(0), task, timed, seed=0, device=device) for which in (base, entry)
        ]
        seconds = np.array([[run.run_epoch().seconds for run in runs] for _ in range(epochs + 1)])
        training = np.median(seconds[1:, 1] / seconds[1:, 0])  # the first epoch warms caches
        out[entry.name] = Ratios(measured.ratio, measured.ratio_spread, float(training))
    return out


def table(results: Sequence[Result], base: Entry, times: dict[str, Ratios] | None = None) -> str:
    """A Markdown table with a line per result, and with times where they were measured."""
    head = ["network", "epochs", "n", "accuracy", "MACs", "× base", "parameters"]
    head += ["latency × base", "epoch's time × base"] if times else []
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for result in results:
        entry = result.entry
        line = [entry.name, f"{result.epochs}", f"{len(result.accuracies)}"]
        line += [f"{result.mean:.2f} ± {result.std:.2f}", f"{entry.macs:,}"]
        line += [f"{entry.macs / base.macs:.3f}", f"{entry.params:,}"]
        if times:
            t = times.get(entry.name)
            line += [f"{t.latency:.2f} ± {t.latency_spread:.2f}" if t else ""]
            line += [f"{t.training:.2f}" if t else ""]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
