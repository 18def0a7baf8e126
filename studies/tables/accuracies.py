"""What the networks of a table are worth: expected accuracies, and points over uniform widths.

Notation::

    r         a row: a network with widths w_r, MACs F_r and the mean accuracy ȳ_r of n_r trainings
    σ²        the variance of a training, pooled over all rows of two or more; v_r = σ² / n_r
    μ_r       the expected accuracy of r: t_r + u_r, a trend and what the trend does not explain
    H         the projection onto the trend's columns (least squares), t = H ȳ
    τ²        the variance of u: that of the residuals beyond v, or 0
    U(F)      the expected accuracy of uniform widths at F MACs
    g_r       points over uniform at equal MACs: μ_r - U(F_r)

Estimates: μ̂_r = t_r + λ_r (ȳ_r - t_r) with λ_r = τ² / (τ² + v_r), the posterior mean for
u ~ N(0, τ²). The trend has an effect of each level of each axis, and of each pair of levels of two
axes; or fewer of these where the table has too few rows, whichever predicts left-out rows best.
Where the trend explains all but the noise, λ is 0 and the noise is averaged away; where it does
not, λ is near 1 and μ̂ near ȳ. The best of many rows by ȳ would be one of lucky trainings; by μ̂ it
is not.

U is the monotone cubic (PCHIP) through μ̂ of the rows nearest to multiples of the base, over log F.

For example, a table has two trainings of each of four networks, 2 points apart, and their means are
90, 92, 94 and 96. Then σ² = 2 and v = 1. Four rows are too few for more than their mean as the
trend, so that t = 93. The residuals are -3, -1, 1, 3 with a variance of 20/3. So τ² = 20/3 - 1,
λ = 0.85, and μ̂ is 90.45, 92.15, 93.85 and 95.55.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from benchmarks.search import Table
from widthsearch.errors import StudyError

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Expected:
    """The expected accuracies of a table's networks.

    Attributes:
        mean: μ̂, (N,).
        noise: v, (N,).
        spread: τ².
        basis: Orthonormal columns that span the trend, (N, columns).
        trend: What the trend consists of: ``mean``, ``axes`` or ``axes and pairs``.
    """

    mean: Vector
    noise: Vector
    spread: float
    basis: NDArray[np.float64]
    trend: str

    @classmethod
    def of(cls, table: Table) -> Expected:
        """Estimate them from all rows of a table.

        Raises:
            StudyError: It has one row alone.
        """
        seen, count = table.mean, np.isfinite(table.accuracy).sum(axis=1)
        fits = []
        for trend, basis in trends(table):
            residual = seen - basis @ (basis.T @ seen)
            left = 1 - np.square(basis).sum(axis=1)
            if left.min() > 1e-6:  # else some row decides alone what is predicted for it
                fits.append((float(np.square(residual / left).mean()), trend, basis, residual))
        if not fits:
            raise StudyError("a table must have two networks or more, but has one; add rows")
        _, trend, basis, residual = min(fits, key=lambda fit: fit[0])
        unexplained = float(residual @ residual) / max(1, len(seen) - basis.shape[1])
        repeats = count - 1
        if repeats.any():
            squares = np.nansum(np.square(table.accuracy - seen[:, None]))
            noise = float(squares) / repeats.sum() / count
        else:
            noise = np.full(len(seen), unexplained)
        spread = max(0.0, unexplained - float(noise.mean()))
        kept = spread / (spread + noise) if spread else np.zeros(len(seen))
        mean = seen - (1 - kept) * residual
        return cls(mean, noise, spread, basis, trend)

    def variance(self, weights: Vector) -> float:
        """The variance of the error of Σ_r c_r μ̂_r, for weights c of shape (N,).

        With D the diagonal of λ and a = D c + H (I - D) c, the error is a·(u + e) - c·u, where e
        are the errors of the means: its variance is τ² |a - c|² + Σ v_r a_r².
        """
        kept = self.spread / (self.spread + self.noise) if self.spread else 0.0 * self.noise
        a = kept * weights + self.basis @ (self.basis.T @ ((1 - kept) * weights))
        return float(self.spread * np.square(a - weights).sum() + self.noise @ np.square(a))


def trends(table: Table) -> list[tuple[str, NDArray[np.float64]]]:
    """Trends of at most a third as many columns as rows, each with an orthonormal basis."""
    columns = [np.ones((len(table.widths), 1))]
    out = [("mean", orthonormal(columns[0]))]
    effects = [
        (column[:, None] == levels[1:]) - 1 / len(levels)
        for levels, column in zip(table.levels, table.widths.T, strict=True)
    ]
    pairs = (
        (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)
        for a, b in itertools.combinations(effects, 2)
    )
    sizes = [effect.shape[1] for effect in effects]
    number = 1 + sum(sizes)
    if 3 * number <= len(table.widths):
        columns += effects
        out.append(("axes", orthonormal(np.hstack(columns))))
    number += sum(a * b for a, b in itertools.combinations(sizes, 2))
    if 3 * number <= len(table.widths):
        out.append(("axes and pairs", orthonormal(np.hstack([*columns, *pairs]))))
    return out


def orthonormal(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal columns that span those of a matrix, of which some may be dependent."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    kept = values > 1e-9 * values.max()
    basis: NDArray[np.float64] = columns @ (vectors[:, kept] / np.sqrt(values[kept]))
    return basis


@dataclass(frozen=True, eq=False)
class Uniform:
    """The accuracy of uniform widths at any MACs between those of the table's uniform networks.

    Attributes:
        rows: The rows of uniform widths, by ascending MACs.
        log_macs: Their log MACs, ascending.
        mean: Their μ̂.
    """

    rows: NDArray[np.intp]
    log_macs: Vector
    mean: Vector

    @classmethod
    def of(cls, table: Table, expected: Expected, base: NDArray[np.int64]) -> Uniform:
        """Through the rows nearest to multiples of the base.

        Raises:
            StudyError: There are fewer than two.
        """
        rows = table.multiples(base)
        rows = rows[np.unique(table.macs[rows], return_index=True)[1]]
        if len(rows) < 2:
            raise StudyError(
                "a table must have two networks or more that are multiples of the base, to compare "
                f"others with, but has {len(rows)}: add rows, or name the space of their base"
            )
        return cls(rows, np.log(table.macs[rows]), expected.mean[rows])

    def at(self, log_macs: Vector, mean: Vector | None = None) -> Vector:
        """U at some log MACs, (M,) to (M,): NaN outside; or with other accuracies of the rows."""
        values = self.mean if mean is None else mean
        found: Vector = PchipInterpolator(self.log_macs, values, extrapolate=False)(log_macs)
        return found

    def weights(self, log_macs: Vector) -> Vector:
        """The derivative of the mean of U at some log MACs by the accuracy of each row, (rows,)."""
        step = 1e-6
        moved = [self.at(log_macs, self.mean + step * one).mean() for one in np.eye(len(self.rows))]
        return (np.array(moved) - self.at(log_macs).mean()) / step


@dataclass(frozen=True)
class Points:
    """The points over uniform widths of a method's networks, at some budgets.

    Attributes:
        gain: The mean of g over seeds and budgets.
        noise: Its standard error by the trainings of the table, of uniform widths as well.
        seeds: Its standard error by the seeds of the method.
        grid: Its standard error by the choice of budgets, which round to rows.
        by_budget: The mean over seeds at each budget; NaN where no seed has a row to compare.
    """

    gain: float
    noise: float
    seeds: float
    grid: float
    by_budget: tuple[float, ...]

    @property
    def se(self) -> float:
        """The standard error: the three together."""
        return float(np.sqrt(self.noise**2 + self.seeds**2 + self.grid**2))


@dataclass(frozen=True, eq=False)
class Judge:
    """Points over uniform widths on a table whose MACs are those of a space.

    Attributes:
        table: The table.
        base: The widths of the base, (A,).
    """

    table: Table
    base: NDArray[np.int64]

    @cached_property
    def expected(self) -> Expected:
        """The expected accuracies."""
        return Expected.of(self.table)

    @cached_property
    def uniform(self) -> Uniform:
        """The curve of uniform widths."""
        return Uniform.of(self.table, self.expected, self.base)

    @cached_property
    def gains(self) -> Vector:
        """g of each row, (N,); NaN beyond the uniform networks."""
        return self.expected.mean - self.uniform.at(np.log(self.table.macs))

    def points(self, rows: NDArray[np.intp]) -> Points | None:
        """The points of the rows of a method, (seeds, budgets); None if none can be compared."""
        gains = self.gains[rows]
        compared = np.isfinite(gains)
        if not compared.any():
            return None
        used = rows[compared]
        weights = np.bincount(used, minlength=len(self.table.macs)) / len(used)
        log_macs = np.log(self.table.macs[used])
        np.subtract.at(weights, self.uniform.rows, self.uniform.weights(log_macs))
        noise = np.sqrt(self.expected.variance(weights))
        of_seeds = [g[c].mean() for g, c in zip(gains, compared, strict=True) if c.any()]
        seeds = np.std(of_seeds, ddof=1) / np.sqrt(len(of_seeds)) if len(of_seeds) > 1 else 0.0
        grid = np.sqrt(
            np.mean([rounding(g[c], r[c]) for g, r, c in zip(gains, rows, compared, strict=True)])
        )
        by_budget = [
            float(g[c].mean()) if c.any() else np.nan
            for g, c in zip(gains.T, compared.T, strict=True)
        ]
        gain = float(gains[compared].mean())
        return Points(gain, float(noise), float(seeds), float(grid), tuple(by_budget))

    def best(self, budgets: Vector, also: NDArray[np.intp], share: float = 0.0) -> Vector:
        """The points of the best network at each budget, (budgets,).

        Args:
            budgets: MACs, ascending.
            also: Rows that count at a budget wherever their MACs are, (…, budgets): the methods'.
            share: The mean of this share of the networks in place of the best one.
        """
        ratio = budgets[1] / budgets[0] if len(budgets) > 1 else 1.1
        floors = np.append(budgets[0] / ratio, budgets[:-1])
        out = []
        for low, high, rows in zip(floors, budgets, also.reshape(-1, len(budgets)).T, strict=True):
            macs = self.table.macs
            inside = (macs > min(low, macs[macs <= high].max(initial=0) - 1)) & (macs <= high)
            found = self.gains[inside]
            if not share:
                found = np.concatenate([found, self.gains[rows]])
            found = np.sort(found[np.isfinite(found)])
            out.append(found[-max(1, round(share * len(found))) :].mean() if len(found) else np.nan)
        return np.array(out)


def rounding(gains: Vector, rows: NDArray[np.intp]) -> float:
    """The variance of a mean over budgets, from differences of neighbours (von Neumann 1941).

    Budgets with the same row are one. A trend over budgets, which is no error, hardly counts.
    """
    runs = np.flatnonzero(np.diff(rows, prepend=-1))
    if len(runs) < 2:
        return 0.0
    return float(np.square(np.diff(gains[runs])).mean() / 2 / len(runs))
