"""Tables by formulas, for `benchmarks.search`: each has something that a surrogate may not expect.

    python -m benchmarks.tables FOLDER

writes ``additive.csv``, ``bottleneck.csv``, ``nonmono.csv``, ``capacity.csv`` and ``rough.csv``.
All are chains of 3×3 convolutions with a linear layer at the end; accuracies are in percent, with
normal noise a seed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def costs(
    widths: NDArray[np.int64], sides: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """MACs and parameters of chains (N, A) on maps of these sides; 3 inputs, 10 classes."""
    before = np.full(len(widths), 3)
    macs, params = np.zeros((2, len(widths)), np.int64)
    for layer, side in zip(widths.T, sides, strict=True):
        weights = 9 * before * layer
        params += weights + 2 * layer
        macs += weights * side**2
        before = layer
    return macs + 10 * before, params + 10 * before


def grid(levels: Sequence[Sequence[int] | NDArray[np.int64]]) -> NDArray[np.int64]:
    """Every width vector, (N, A)."""
    return np.array(list(itertools.product(*levels)))


def _relative(widths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log widths from 0 at the least to 1 at the most, axis by axis."""
    low, high = widths.min(0), widths.max(0)
    scaled: NDArray[np.float64] = (np.log(widths) - np.log(low)) / np.log(high / low)
    return scaled


def additive() -> tuple[NDArray[np.int64], Sequence[int], NDArray[np.float64]]:
    """Five axes, each of which saturates; one without effect."""
    rng = np.random.default_rng(1)
    widths = grid([np.arange(8, 49, 8) * s for s in (1, 1, 2, 2, 4)])
    share = widths / widths.max(0)
    worth = np.array([3, 0.1, 2, 0, 4])
    mean = 90 + 1.5 * (worth * (1 - np.exp(-2 * share**0.7))).sum(1)
    mean -= 0.8 * np.log(share[:, 0]) * np.log(share[:, 4])
    noise = rng.normal(0, 0.35, (len(widths), 3))
    return widths, (32, 32, 16, 16, 8), mean[:, None] + noise


def bottleneck() -> tuple[NDArray[np.int64], Sequence[int], NDArray[np.float64]]:
    """Six axes with uneven levels; the narrowest counts most."""
    rng = np.random.default_rng(2)
    widths = grid([np.array([16, 24, 32, 48, 64]) * s for s in (1, 1, 1, 2, 2, 4)])
    logs = np.log2(widths / widths.max(0)) / 2
    mean = 75 + 6 * logs.min(1) + 4 * logs.mean(1) + 1.5 * logs[:, 0] * logs[:, 1]
    mean += np.sin(3 * logs[:, 3])
    noise = rng.normal(0, 0.2, (len(widths), 5))
    return widths, (32, 32, 16, 16, 8, 8), mean[:, None] + noise


def nonmono() -> tuple[NDArray[np.int64], Sequence[int], NDArray[np.float64]]:
    """Eight axes; one is best inside, two should be alike, and noise grows with the error."""
    rng = np.random.default_rng(3)
    levels = [(8, 16, 32)] * 4 + [(16, 32, 64, 128)] * 2 + [(32, 64, 96)] * 2
    widths = grid(levels)
    logs = _relative(widths)
    slopes = np.array([0.5, 0.1, 0.2, 0.3, 0.5, 0.2, 0.05, 0.3])
    bends = 1.2 * (logs[:, 4] - 0.6) ** 2 + 0.3 * (logs[:, 0] - logs[:, 1]) ** 2
    error = np.exp(0.9 - (slopes * logs).sum(1) + bends)
    noise = rng.normal(0, 1, (len(widths), 3)) * (0.24 * error[:, None] + 0.1)
    return widths, (16, 16, 16, 16, 8, 8, 4, 4), 100 - 8 * error[:, None] + noise


def capacity() -> tuple[NDArray[np.int64], Sequence[int], NDArray[np.float64]]:
    """Four axes; mostly a function of all parameters, and one axis harms."""
    rng = np.random.default_rng(4)
    steps = [(4, 33), (8, 65), (8, 65), (16, 129)]
    widths = grid([np.arange(step, end, step) for step, end in steps])
    sides = (28, 14, 14, 7)
    params = costs(widths, sides)[1]
    logs = _relative(widths)
    mean = 98 - 30 * (params / params.min()) ** -0.35 - 1.2 * logs[:, 1]
    mean += 0.5 * np.cos(4 * logs[:, 2])
    noise = rng.normal(0, 0.5, (len(widths), 2))
    return widths, sides, mean[:, None] + noise


def rough() -> tuple[NDArray[np.int64], Sequence[int], NDArray[np.float64]]:
    """Seven axes; steps of random heights, and a random effect of each pair of levels."""
    rng = np.random.default_rng(5)
    levels = [np.array([16, 32, 48, 64]) * s for s in (1, 1, 2, 2, 4, 4, 8)]
    widths = grid(levels)
    at = [np.searchsorted(level, column) for level, column in zip(levels, widths.T, strict=True)]
    mean = np.full(len(widths), 70.0)
    for a, level in enumerate(at):
        steps = rng.gamma(0.7, 1, 4) * np.array([0, 1, 0.6, 0.3])
        mean += 0.4 * np.cumsum(steps)[level]
        for b in range(a):
            mean += 0.08 * rng.normal(size=(4, 4))[level, at[b]]
    noise = rng.normal(0, 0.25, (len(widths), 3))
    return widths, (32, 32, 16, 16, 8, 8, 4), mean[:, None] + noise


TABLES = {f.__name__: f for f in (additive, bottleneck, nonmono, capacity, rough)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in TABLES.items():
        widths, sides, accuracy = make()
        macs, params = costs(widths, sides)
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            header = [f"width_{a}" for a in range(widths.shape[1])] + ["macs", "params"]
            writer.writerow(header + [f"accuracy_{s}" for s in range(accuracy.shape[1])])
            for row in zip(widths.tolist(), macs, params, accuracy.round(4), strict=True):
                writer.writerow([*row[0], row[1], row[2], *row[3]])
        print(f"{folder / name}.csv: {len(widths)} networks, {widths.shape[1]} axes")


if __name__ == "__main__":
    main()
