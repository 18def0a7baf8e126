"""Networks side by side: the same recipe, several seeds from scratch, one table.

Studies of proposers end here::

    base = Entry.of("base", space, space.base)
    entries = [base, Entry.of("uniform 0.5", space, widths), Entry("branched", build, macs, params)]
    results = compare(entries, task, Recipe(epochs=16), seeds=5, base=base)
    print(table(results, base))

An entry is anything that builds a network from a seed, so spaces may be mixed (a smaller depth, a
branched network). ``schedule="compute"`` gives a narrower network as many more epochs as it has
fewer MACs. Accuracies are on the validation split unless ``split="test"``, which is for networks
that nothing chose by their test accuracy. ``ratios`` adds inference latency and training time
beside the base network, in turns with it, since a machine's absolute times drift. Run scripts from
the repository's root: ``python -m studies.sensitivity.run``.
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
"""``epochs``: the recipe's for all; ``compute``: times base MACs over the network's MACs."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A network to compare.

    Attributes:
        name: What the table calls it.
        build: A newly initialised network, by seed.
        macs: Its MACs.
        params: Its parameters.
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
    """What an entry came to.

    Attributes:
        entry: The network.
        epochs: How long each seed trained.
        accuracies: Top-1 in percent after the last epoch, one a seed.
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
        """Standard deviation of the accuracy over seeds (n - 1); NaN of one seed."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else float("nan")


@dataclass(frozen=True)
class Ratios:
    """Times as multiples of the base network's beside it.

    Attributes:
        latency: Of inference.
        latency_spread: Half the interquartile range of that over the pairs.
        training: Of an epoch's training.
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
    """Train every entry from scratch, a seed at a time.

    Args:
        entries: The networks.
        task: The data.
        recipe: How each is trained.
        seeds: How many seeds, or which. A seed is that of the initialisation and of the training.
        base: Whose MACs ``schedule="compute"`` refers to.
        schedule: How many epochs.
        split: What accuracies are measured on.
        device: Where.
        report: Is told of each entry that is done.
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
    """Train a network by a recipe, perhaps for another number of epochs; its accuracy after."""
    stretched = _stretched(recipe, epochs or recipe.epochs)
    run = Trainer(model, task, stretched, seed=seed, device=device)
    while not run.finished:
        result = run.run_epoch()
    return (
        result.accuracy
        if split == "validation"
        else evaluate(model, task, "test", device, recipe.precision)
    )


def _stretched(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe for another number of epochs; a warm-up keeps its share of them."""
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
    """Inference latency and training time of each entry beside the base network, by its name.

    Args:
        entries: The networks.
        base: What they are compared with.
        task: The data.
        recipe: How an epoch is trained.
        latency: How inference is measured.
        epochs: Epochs of each that are timed, in turns; the median of their ratios counts.
        device: Where they train.
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
        training = np.median(seconds[1:, 1] / seconds[1:, 0])  # the first warms caches
        out[entry.name] = Ratios(measured.ratio, measured.ratio_spread, float(training))
    return out


def table(results: Sequence[Result], base: Entry, times: dict[str, Ratios] | None = None) -> str:
    """A Markdown table, a line a result; with latency and training time where they are known."""
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
