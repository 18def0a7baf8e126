"""How much of a table's true front each sampler finds per trained network.

    python -m benchmarks.search --table PATH [--trials 25 50 100 200] [--runs 10]
        [--samplers width tpe nsga2 random gp] [--json]

A table has columns ``width_*``, ``macs``, ``params`` and ``accuracy_*`` (one a seed, more is
better). A trial reveals the accuracy of one seed, drawn at random, and the exact costs. A sampler
is scored by its front: for WidthSampler the trials that no other dominates by posterior mean, for
Optuna's samplers those that none dominates by the accuracy seen; only trained networks are on it.
The score is the hypervolume of the front with each member's mean accuracy over all seeds, over log
MACs scaled to 0 .. 1, with the table's lowest mean accuracy and highest MACs as reference, as a
fraction of the whole table's hypervolume.

Optuna's samplers get the costs as they are scored, log MACs, and search the levels of each axis by
their index; WidthSampler gets MACs and searches the widths. Where a table lacks some product of
levels, a suggestion is taken as its nearest row (in log widths).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import IntDistribution

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.kernel import Coordinates
from widthsearch.bayesopt.optuna_sampler import WidthSampler
from widthsearch.bayesopt.search import BayesianSearch
from widthsearch.widths import Axis

SAMPLERS = ("width", "tpe", "nsga2", "random", "gp")
TITLES = {
    "width": "WidthSampler",
    "tpe": "Optuna TPE (multivariate)",
    "nsga2": "Optuna NSGA-II",
    "random": "random",
    "gp": "Optuna GP",
}


@dataclass(frozen=True, eq=False)
class Table:
    """Networks that were all trained: N rows, A axes, S seeds.

    Attributes:
        names: The columns ``width_*``.
        widths: (N, A), in channels.
        macs: (N,).
        params: (N,).
        accuracy: (N, S); NaN where a seed is missing.
    """

    names: tuple[str, ...]
    widths: NDArray[np.int64]
    macs: NDArray[np.int64]
    params: NDArray[np.int64]
    accuracy: NDArray[np.float64]

    @classmethod
    def read(cls, path: Path) -> Table:
        """The table in a CSV file with a header."""
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        header = [name.strip() for name in header]
        cells = np.array([[float(cell) if cell.strip() else np.nan for cell in r] for r in rows])

        def starting(prefix: str) -> list[int]:
            found = [i for i, name in enumerate(header) if name.startswith(prefix)]
            if not found:
                raise SystemExit(f"a table must have columns {prefix}*, but {path} has {header}")
            return found

        accuracy = cells[:, starting("accuracy_")]
        trained = np.isfinite(accuracy).any(axis=1)
        axes = starting("width_")
        whole = cells[trained].round()
        return cls(
            names=tuple(header[i] for i in axes),
            widths=whole[:, axes].astype(np.int64),
            macs=whole[:, starting("macs")[0]].astype(np.int64),
            params=whole[:, starting("params")[0]].astype(np.int64),
            accuracy=accuracy[trained],
        )

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """The mean accuracy over seeds, (N,)."""
        return np.nanmean(self.accuracy, axis=1)

    @cached_property
    def levels(self) -> tuple[NDArray[np.int64], ...]:
        """The widths that each axis has, ascending."""
        return tuple(np.unique(column) for column in self.widths.T)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, as a space would have them."""
        return tuple(
            Axis(name, int(levels[-1]), int(levels[0]), int(levels[-1]), math.gcd(*levels.tolist()))
            for name, levels in zip(self.names, self.levels, strict=True)
        )

    @property
    def whole(self) -> bool:
        """Whether it has every width vector of the axes."""
        return len(self._rows) == math.prod(len(axis.grid) for axis in self.axes)

    @cached_property
    def log_cost(self) -> NDArray[np.float64]:
        """Log MACs scaled to 0 .. 1, (N,)."""
        logs = np.log(self.macs)
        return (logs - logs.min()) / np.ptp(logs)

    @cached_property
    def _rows(self) -> dict[tuple[int, ...], int]:
        return {tuple(row): i for i, row in enumerate(self.widths.tolist())}

    def row(self, widths: Sequence[int]) -> int:
        """The row of these widths, or the nearest."""
        found = self._rows.get(tuple(int(w) for w in widths))
        if found is None:
            distance = np.abs(np.log(self.widths) - np.log(widths)).sum(axis=1)
            found = int(distance.argmin())
        return found

    def cost(self, column: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        """A column as an exact function of widths, (M, A) to (M,)."""
        return lambda widths: column[[self.row(vector) for vector in widths.tolist()]]

    def volume(self, rows: Sequence[int]) -> float:
        """The hypervolume of some rows by their mean accuracies."""
        points = np.column_stack([self.log_cost, -self.mean])[list(rows)]
        return pareto.hypervolume(points, (1.0, -float(self.mean.min())))

    def score(self, rows: Sequence[int], accuracy: Sequence[float]) -> float:
        """The share of the full front that the rows have which none dominates by ``accuracy``."""
        chosen = pareto.non_dominated(
            np.column_stack([self.log_cost[list(rows)], -np.array(accuracy)])
        )
        return self.volume(np.array(rows)[chosen].tolist()) / self.volume(range(len(self.mean)))


def optuna_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "tpe":
        return optuna.samplers.TPESampler(multivariate=True, seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(
            population_size=20, seed=seed
        )  # of 50 it would see four generations
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def run(table: Table, name: str, seed: int, marks: Sequence[int]) -> dict[int, float]:
    """One search: the score at each number of trials."""
    noise = np.random.default_rng((seed, 0))
    if name == "width":
        costs = {"macs": table.cost(table.macs), "params": table.cost(table.params)}
        allowed = None if table.whole else table.widths
        space = Coordinates(table.axes, costs)
        sampler = WidthSampler(BayesianSearch(space, seed=seed, allowed=allowed))
        ranges = sampler.distributions
    else:
        sampler = optuna_sampler(name, seed)
        ranges = {
            n: IntDistribution(0, len(levels) - 1)
            for n, levels in zip(table.names, table.levels, strict=True)
        }
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    rows: list[int] = []
    seen: list[float] = []
    scores = {}
    for trial_number in range(1, max(marks) + 1):
        trial = study.ask(ranges)
        widths = [trial.params[n] for n in table.names]
        if name != "width":
            widths = [int(levels[i]) for levels, i in zip(table.levels, widths, strict=True)]
        row = table.row(widths)
        finite = table.accuracy[row][np.isfinite(table.accuracy[row])]
        rows.append(row)
        seen.append(float(noise.choice(finite)))
        study.tell(
            trial, [seen[-1], float((table.macs if name == "width" else table.log_cost)[row])]
        )
        if trial_number in marks:
            estimated = seen
            if name == "width":
                estimated = sampler.surrogate(study).posterior(table.widths[rows]).mean.tolist()
            scores[trial_number] = table.score(rows, estimated)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--trials", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")  # Optuna's own, about experimental samplers
    table = Table.read(options.table)
    marks = sorted(set(options.trials))
    results: dict[str, dict[str, dict[str, float]]] = {}
    if not options.json:
        print("| sampler |", " | ".join(f"{mark} trials" for mark in marks), "| seconds a run |")
        print("| --- |", " | ".join("---:" for _ in marks), "| ---: |", flush=True)
    for name in dict.fromkeys(options.samplers):
        started = time.perf_counter()
        runs = [run(table, name, options.seed + i, marks) for i in range(options.runs)]
        taken = (time.perf_counter() - started) / options.runs
        results[name] = {}
        for mark in marks:
            scores = [scores[mark] for scores in runs]
            std = statistics.stdev(scores) if len(scores) > 1 else 0.0
            results[name][str(mark)] = {"mean": statistics.fmean(scores), "std": std}
        if not options.json:
            shown = [f"{cell['mean']:.3f} ± {cell['std']:.3f}" for cell in results[name].values()]
            print(f"| {TITLES[name]} |", " | ".join(shown), f"| {taken:.1f} |", flush=True)
    full = table.volume(range(len(table.mean)))
    if options.json:
        print(json.dumps({"samplers": results, "full": full}))


if __name__ == "__main__":
    main()
