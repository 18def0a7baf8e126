"""How much of a table's true front each sampler finds per trained network.

    python -m benchmarks.search --table PATH [--trials 25 50 100 200] [--runs 10]
        [--samplers width botorch uniform balanced gp tpe nsga2 random] [--rows FILE] [--json]

A table has columns ``width_*``, ``macs``, ``params`` and ``accuracy_*`` (one a seed, more is
better). A trial reveals the accuracy of one seed, drawn at random, and the exact costs. A sampler
is scored by its front: the trials that no other dominates by posterior mean, for Optuna's samplers
by the accuracy seen; only trained networks are on it. There are two scores of a front, each with
its members' mean accuracies over all seeds:

- the hypervolume over log MACs scaled to 0 .. 1, with the table's lowest mean accuracy and highest
  MACs as reference, as a fraction of the whole table's hypervolume;
- points over uniform: by how much the members are more accurate than uniform widths of equal MACs,
  the mean over members. Uniform widths are the rows nearest to multiples of the widest network,
  and linear in log MACs between them.

Optuna's samplers get the costs as they are scored, log MACs, and search the levels of each axis by
their index; WidthSampler gets MACs and searches the widths. Where a table lacks some product of
levels, a suggestion is taken as its nearest row (in log widths). `botorch` needs an extra package:
benchmarks/botorch_search.py. `uniform` and `balanced` search nothing: see `Filling`.

With ``--rows FILE`` each result is appended to a file as a line of JSON, and what is there already
is not computed again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import IntDistribution

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.kernel import Coordinates
from widthsearch.bayesopt.optuna_sampler import WidthSampler
from widthsearch.bayesopt.search import BayesianSearch
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.errors import DataError, WidthsearchError, one_line
from widthsearch.widths import Axis

TITLES = {
    "width": "WidthSampler",
    "botorch": "BoTorch qLogNEHVI",
    "uniform": "uniform widths, no search",
    "balanced": "balanced widths, no search",
    "gp": "Optuna GP",
    "tpe": "Optuna TPE (multivariate)",
    "nsga2": "Optuna NSGA-II",
    "random": "random",
}
FILLINGS = ("uniform", "balanced")
_FAR = 2000
"""Networks that the search did not train, at most, on which intervals are checked."""


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
    def read(cls, path: Path, accuracy: str = "accuracy_") -> Table:
        """The table in a CSV file with a header, with accuracies in columns of this prefix.

        Raises:
            DataError: The file cannot be read, lacks a column, or has a cell that is no number.
        """
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.reader(file)
                lines = [(reader.line_num, row) for row in reader if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            why = error.strerror if isinstance(error, OSError) else one_line(error)
            raise DataError(
                f"a table must be a CSV file, but {str(path)!r} is not: {why}"
            ) from None
        header = [name.strip() for name in lines.pop(0)[1]] if lines else []

        def starting(prefix: str) -> list[int]:
            found = [i for i, name in enumerate(header) if name.startswith(prefix)]
            if not found:
                raise DataError(f"a table must have columns {prefix}*, but {path} has {header}")
            return found

        axes, seeds = starting("width_"), starting(accuracy)
        whole = [*axes, starting("macs")[0], starting("params")[0]]

        def wrong(number: int, rule: str, cell: object) -> DataError:
            return DataError(f"{rule}, but line {number} of {path} has {cell}")

        cells = np.full((len(lines), len(header)), np.nan)
        for i, (number, line) in enumerate(lines):
            if len(line) != len(header):
                raise wrong(number, f"each line must have {len(header)} cells", len(line))
            for j in (*whole, *seeds):
                if j in seeds and not line[j].strip():
                    continue
                try:
                    cells[i, j] = float(line[j])
                except ValueError:
                    cells[i, j] = np.nan
                if j in whole and not 0.5 <= cells[i, j] < 2**62:
                    raise wrong(number, f"{header[j]!r} must be a number from 1 on", repr(line[j]))
                if not np.isfinite(cells[i, j]):
                    rule = f"{header[j]!r} must be a number, or empty without a training"
                    raise wrong(number, rule, repr(line[j]))
        trained = np.isfinite(cells[:, seeds]).any(axis=1)
        if not trained.any():
            raise DataError(f"a table must have a trained network, but {path} has none")
        cells = cells[trained]
        return cls(
            names=tuple(header[i] for i in axes),
            widths=cells[:, axes].round().astype(np.int64),
            macs=cells[:, whole[-2]].round().astype(np.int64),
            params=cells[:, whole[-1]].round().astype(np.int64),
            accuracy=cells[:, seeds],
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
        return len(self.widths) == math.prod(len(axis.grid) for axis in self.axes)

    @cached_property
    def log_cost(self) -> NDArray[np.float64]:
        """Log MACs scaled to 0 .. 1, (N,)."""
        logs = np.log(self.macs)
        return (logs - logs.min()) / np.ptp(logs)

    @cached_property
    def logs(self) -> NDArray[np.float64]:
        """Log widths below those of the widest network, (N, A)."""
        return np.log(self.widths / self.widths.max(axis=0))

    @cached_property
    def _rows(self) -> NDArray[np.intp]:
        """The row of each product of levels, −1 where the table lacks it."""
        rows = np.full([len(levels) for levels in self.levels], -1, np.intp)
        places = [
            np.searchsorted(levels, column)
            for levels, column in zip(self.levels, self.widths.T, strict=True)
        ]
        rows[tuple(places)] = np.arange(len(self.widths))
        return rows

    def rows(self, widths: NDArray[np.int64]) -> NDArray[np.intp]:
        """The row of each of some widths, (M, A) to (M,), or the nearest."""
        found = np.full(len(widths), -1, np.intp)
        places = [
            np.minimum(np.searchsorted(levels, column), len(levels) - 1)
            for levels, column in zip(self.levels, widths.T, strict=True)
        ]
        exact = widths == np.array([lv[at] for lv, at in zip(self.levels, places, strict=True)]).T
        found = np.where(exact.all(axis=1), self._rows[tuple(places)], -1)
        for i in np.flatnonzero(found < 0):
            found[i] = np.abs(np.log(self.widths) - np.log(widths[i])).sum(axis=1).argmin()
        return found

    def cost(self, column: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        """A column as an exact function of widths, (M, A) to (M,)."""
        return lambda widths: column[self.rows(widths)]

    @cached_property
    def coordinates(self) -> Coordinates:
        """The axes, with MACs and parameters."""
        return Coordinates(
            self.axes, {"macs": self.cost(self.macs), "params": self.cost(self.params)}
        )

    def multiples(self, widths: NDArray[np.int64]) -> NDArray[np.intp]:
        """The rows nearest to multiples of some widths, by ascending MACs."""
        ratios = np.concatenate([lv / w for lv, w in zip(self.levels, widths, strict=True)])
        lists = [
            levels[np.abs(np.log(levels / (w * by))).argmin(axis=1)]
            for by in [np.geomspace(ratios.min(), ratios.max(), 100)[:, None]]
            for levels, w in zip(self.levels, widths, strict=True)
        ]
        rows = np.unique(self.rows(np.array(lists).T))
        return rows[np.argsort(self.macs[rows])]

    @cached_property
    def uniform(self) -> NDArray[np.float64]:
        """The mean accuracy of uniform widths at the MACs of each row, (N,)."""
        rows = self.multiples(self.widths.max(axis=0))
        return np.interp(self.log_cost, self.log_cost[rows], self.mean[rows])

    def volume(self, rows: Sequence[int]) -> float:
        """The hypervolume of some rows by their mean accuracies."""
        points = np.column_stack([self.log_cost, -self.mean])[list(rows)]
        return pareto.hypervolume(points, (1.0, -float(self.mean.min())))

    @cached_property
    def full(self) -> float:
        """The hypervolume of the whole table."""
        return self.volume(range(len(self.mean)))

    def score(self, rows: Sequence[int], accuracy: Sequence[float]) -> dict[str, float]:
        """The two scores of the rows that none dominates by ``accuracy``.

        ``volume`` is their share of the full hypervolume, ``points`` their points over uniform.
        """
        chosen = np.array(rows)[
            pareto.non_dominated(np.column_stack([self.log_cost[list(rows)], -np.array(accuracy)]))
        ]
        over = self.mean[chosen] - self.uniform[chosen]
        return {"volume": self.volume(chosen.tolist()) / self.full, "points": float(over.mean())}


class Search(Protocol):
    """Chooses the rows of a table to train, one after another."""

    def ask(self) -> int | None:
        """The next row; None where no further one is wanted."""

    def tell(self, row: int, accuracy: float) -> None:
        """The accuracy of one training of that row."""

    def estimates(self, rows: Sequence[int], seen: Sequence[float]) -> Sequence[float]:
        """What the front is chosen by: the accuracy of each trained row."""


class OptunaSearch:
    """A sampler of Optuna's, over the levels of each axis by their index."""

    def __init__(self, table: Table, name: str, seed: int) -> None:
        self.table = table
        self.study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=self._sampler(name, seed)
        )
        self.ranges: dict[str, IntDistribution] = {
            n: IntDistribution(0, len(levels) - 1)
            for n, levels in zip(table.names, table.levels, strict=True)
        }
        self.cost = table.log_cost
        self.trial: optuna.Trial | None = None

    def _sampler(self, name: str, seed: int) -> optuna.samplers.BaseSampler:
        if name == "tpe":
            return optuna.samplers.TPESampler(multivariate=True, seed=seed)
        if name == "nsga2":  # with the default of 50 it would see one generation of 50 trials
            return optuna.samplers.NSGAIISampler(population_size=20, seed=seed)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def ask(self) -> int:
        self.trial = self.study.ask(self.ranges)
        widths = self._widths([self.trial.params[n] for n in self.table.names])
        return int(self.table.rows(np.array([widths]))[0])

    def _widths(self, asked: Sequence[int]) -> Sequence[int]:
        return [int(levels[i]) for levels, i in zip(self.table.levels, asked, strict=True)]

    def tell(self, row: int, accuracy: float) -> None:
        assert self.trial is not None
        self.study.tell(self.trial, [accuracy, float(self.cost[row])])

    def estimates(self, rows: Sequence[int], seen: Sequence[float]) -> Sequence[float]:
        return seen


class WidthSearch(OptunaSearch):
    """WidthSampler: over widths, with MACs, and a front by posterior mean."""

    def __init__(self, table: Table, name: str, seed: int) -> None:
        super().__init__(table, name, seed)
        self.ranges, self.cost = self.sampler.distributions, table.macs

    def _sampler(self, name: str, seed: int) -> optuna.samplers.BaseSampler:
        allowed = None if self.table.whole else self.table.widths
        search = BayesianSearch(self.table.coordinates, seed=seed, allowed=allowed)
        self.sampler = WidthSampler(search)
        return self.sampler

    def _widths(self, asked: Sequence[int]) -> Sequence[int]:
        return asked

    def estimates(self, rows: Sequence[int], seen: Sequence[float]) -> Sequence[float]:
        means: list[float] = self.surrogate().mean(self.table.widths[list(rows)]).tolist()
        return means

    def surrogate(self) -> Surrogate:
        """Fitted to all trials."""
        return self.sampler.surrogate(self.study)


class Filling:
    """No search: a network in each of equal slices of log MACs, in an order drawn at random.

    ``uniform`` has the one whose widths are nearest to a multiple of the base's, ``balanced`` the
    one of greatest Σ log w, of equals the nearest to such a multiple. Slices without a network
    give none. The front is by the posterior mean, so that only the choice differs from a search.
    """

    def __init__(self, table: Table, name: str, seed: int, count: int) -> None:
        self.table = table
        slices = np.minimum((table.log_cost * count).astype(np.intp), count - 1)
        off = np.round(table.logs.var(axis=1), 9)
        score = off if name == "uniform" else -np.round(table.logs.sum(axis=1), 9)
        order = np.lexsort([off, score, slices])
        _, first = np.unique(slices[order], return_index=True)
        self.rows = np.random.default_rng(seed).permutation(order[first]).tolist()

    def ask(self) -> int | None:
        return self.rows.pop() if self.rows else None

    def tell(self, row: int, accuracy: float) -> None:
        pass

    def estimates(self, rows: Sequence[int], seen: Sequence[float]) -> Sequence[float]:
        widths = self.table.widths[list(rows)]
        means: list[float] = (
            Surrogate.fit(self.table.coordinates, widths, seen).mean(widths).tolist()
        )
        return means


def make_search(table: Table, name: str, seed: int, count: int) -> Search:
    """The search of this name, of which ``count`` trials are wanted."""
    if name == "width":
        return WidthSearch(table, name, seed)
    if name in FILLINGS:
        return Filling(table, name, seed, count)
    if name == "botorch":
        try:
            from benchmarks.botorch_search import BotorchSearch
        except ImportError as error:
            raise SystemExit(
                f"the sampler 'botorch' needs BoTorch, but {error}: "
                "python -m pip install 'widthsearch[benchmark]'"
            ) from None
        return BotorchSearch(table, seed)
    return OptunaSearch(table, name, seed)


def run(
    table: Table, name: str, seed: int, marks: Sequence[int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """One search: each number of trials with its scores, WidthSampler's with its intervals'."""
    noise = np.random.default_rng((seed, 0))
    search = make_search(table, name, seed, max(marks))
    rows: list[int] = []
    seen: list[float] = []
    for number in range(1, max(marks) + 1):
        row = search.ask()
        if row is not None:
            finite = table.accuracy[row][np.isfinite(table.accuracy[row])]
            rows.append(row)
            seen.append(float(noise.choice(finite)))
            search.tell(row, seen[-1])
        if number in marks:
            scores = table.score(rows, search.estimates(rows, seen))
            if isinstance(search, WidthSearch):
                scores |= intervals(table, search.surrogate(), rows, seed)
            yield number, scores


def intervals(
    table: Table, surrogate: Surrogate, trained: Sequence[int], seed: int
) -> dict[str, float]:
    """How good 90% intervals are for the mean accuracies of networks without a training.

    ``coverage`` is the share of the accuracies in their intervals, ``interval`` the mean length of
    these, and ``interval_score`` that length plus 20 times the mean distance of the accuracies
    from them, less being better (Gneiting and Raftery, Journal of the American Statistical
    Association 102, 2007); both in standard deviations of the table's accuracies. The mean over
    the table's seeds is noisy too, so the noise of a training over the square root of their number
    joins the interval. The networks are drawn from all rows.
    """
    others = np.setdiff1d(np.arange(len(table.mean)), trained)
    if not len(others):
        return {"coverage": 1.0, "interval": 0.0, "interval_score": 0.0}
    others = np.random.default_rng((seed, 1)).permutation(others)[:_FAR]
    posterior = surrogate.posterior(table.widths[others])
    seeds = np.isfinite(table.accuracy[others]).sum(axis=1)
    half = 1.645 * np.sqrt(posterior.sd**2 + surrogate.noise**2 / seeds)
    off = np.maximum(np.abs(table.mean[others] - posterior.mean) - half, 0)
    spread = float(table.mean.std())
    return {
        "coverage": float((off == 0).mean()),
        "interval": float(2 * half.mean()) / spread,
        "interval_score": float((2 * half + 20 * off).mean()) / spread,
    }


def runs(
    table: Table, path: Path, name: str, seeds: Sequence[int], marks: Sequence[int], rows: Path
) -> Iterator[dict[int, dict[str, float]]]:
    """Each run's scores, and ``seconds`` of one core, by number of trials; known ones are read."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    known = [json.loads(line) for line in lines]
    for seed in seeds:
        key = {"table": path.stem, "sampler": name, "seed": seed}
        found = {row["trials"]: row["scores"] for row in known if key.items() <= row.items()}
        left = [mark for mark in marks if mark not in found]
        started = time.process_time()
        # Without a search, each number of trials has slices of its own.
        for own in [[mark] for mark in left] if name in FILLINGS else [left] * bool(left):
            for mark, scores in run(table, name, seed, own):
                found[mark] = scores | {"seconds": time.process_time() - started}
                with rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(key | {"trials": mark, "scores": found[mark]}) + "\n")
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--trials", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--samplers", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--rows", type=Path, default=Path(os.devnull), help="results so far")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")  # Optuna's own, about experimental samplers
    try:
        table = Table.read(options.table)
    except WidthsearchError as error:
        parser.error(str(error))
    marks, seeds = sorted(set(options.trials)), range(options.seed, options.seed + options.runs)
    results: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    if not options.json:
        print("| sampler | score |", " | ".join(f"{mark} trials" for mark in marks), "|")
        print("| --- | --- |", " | ".join("---:" for _ in marks), "|", flush=True)
    for name in dict.fromkeys(options.samplers):
        found = list(runs(table, options.table, name, seeds, marks, options.rows))
        results[name] = {mark: summary([each[mark] for each in found]) for mark in marks}
        for score in {} if options.json else results[name][marks[0]]:
            cells = [results[name][mark][score] for mark in marks]
            shown = [f"{cell['mean']:.3f} ± {cell['std']:.3f}" for cell in cells]
            print(f"| {TITLES[name]} | {score} |", " | ".join(shown), "|", flush=True)
    if options.json:
        print(json.dumps({"samplers": results, "full": table.full}))


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over runs of each score."""
    out = {}
    for score in runs[0]:
        values = [each[score] for each in runs]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        out[score] = {"mean": statistics.fmean(values), "std": std}
    return out


if __name__ == "__main__":
    main()
