"""What a search gains from an earlier study of the same axes under a cheap recipe.

    python -m benchmarks.earlier record FILE      # trains the networks; ends where it was ended
    python -m benchmarks.earlier report FILE [--runs 20]

`record` trains every width vector of a small convolutional network on scikit-learn's digits, with
two seeds under a full and under a cheap recipe, into a table of `benchmarks.search` with further
columns ``cheap_*``.

`report` simulates searches of that table. The earlier study is a search of 40 cheap trainings. It
is given as it is, or with its accuracies shuffled or negated, which mislead. The score is that of
`benchmarks.search`: the share of the hypervolume by mean accuracy under the full recipe. The second
table turns it round: how many full trainings reach what a search without an earlier study has after
so many.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from benchmarks.search import Table
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.search import BayesianSearch
from widthsearch.space.search_space import SearchSpace

LEVELS = ((2, 4, 8, 16, 32), (4, 8, 16, 32, 64), (4, 8, 16, 32, 64))
EPOCHS = {"accuracy": 8, "cheap": 2}
SEEDS, BATCH = 2, 64
EARLIER = 40
MARKS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40)


def net() -> nn.Module:
    """Three convolutions."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((1, *(levels[-1] for levels in LEVELS))):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(LEVELS[-1][-1], 10))


def train(network: nn.Module, epochs: int, seed: int) -> float:
    """Top-1 accuracy in percent on 597 digits after training with 1,200 others."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[:1200], order[1200:]
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, epochs=epochs, steps_per_epoch=len(kept) // BATCH
    )
    for _ in range(epochs):
        shuffled = kept[torch.randperm(len(kept), generator=draws)]
        for batch in shuffled[: len(kept) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        right = network(x[held_out]).argmax(dim=1) == y[held_out]
    return 100 * float(right.float().mean())


def record(file: Path) -> None:
    torch.set_num_threads(1)
    space = SearchSpace.from_model(net, (1, 8, 8), min_width=1 / 16, step=1)
    columns = [f"{name}_{seed}" for name in EPOCHS for seed in range(SEEDS)]
    if not file.exists():
        file.write_text(",".join(["width_0,width_1,width_2,macs,params", *columns]) + "\n")
    done = len(file.read_text().splitlines()) - 1
    vectors = np.array(list(itertools.product(*LEVELS)))
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    for vector in vectors[done:].tolist():
        found = [
            round(train(space.build(vector, seed=seed), epochs, seed), 3)
            for epochs in EPOCHS.values()
            for seed in range(SEEDS)
        ]
        cost = space.cost(vector)
        with file.open("a", newline="", encoding="utf-8") as rows:
            csv.writer(rows).writerow([*vector, cost.macs, cost.params, *found])


def search(
    table: Table, seed: int, marks: Sequence[int], earlier: Sequence[Observation] = ()
) -> tuple[list[float], list[Observation]]:
    """The score at each number of trials, and the trials."""
    draws = np.random.default_rng((seed, 0))
    studies = [earlier] if earlier else []
    chosen = BayesianSearch(table.coordinates, seed=seed, allowed=table.widths, earlier=studies)
    trials: list[Observation] = []
    scores = []
    for count in range(1, max(marks) + 1):
        suggestion = chosen.suggest(trials)
        assert suggestion is not None
        vector = suggestion.widths.vector
        row = int(table.rows(np.array([vector]))[0])
        accuracy = float(draws.choice(table.accuracy[row]))
        trials.append(Observation(vector, accuracy, (float(table.macs[row]),)))
        if count in marks:
            surrogate = chosen.surrogate(trials)
            widths = [o.widths for o in trials]
            rows = table.rows(np.array(widths)).tolist()
            scores.append(table.score(rows, surrogate.mean(widths).tolist())["volume"])
    return scores, trials


def report(file: Path, runs: int) -> None:
    full, cheap = Table.read(file), Table.read(file, "cheap_")
    correlation = np.corrcoef(full.mean, cheap.mean)[0, 1]
    noise = [float(np.sqrt(t.accuracy.var(axis=1, ddof=1).mean())) for t in (full, cheap)]
    print(f"{len(full.mean)} networks; correlation of mean accuracies {correlation:.2f}; noise of ")
    print(f"a training {noise[0]:.2f} points under the full recipe, {noise[1]:.2f} cheap\n")
    scores: dict[str, list[list[float]]] = {}
    for seed in range(runs):
        trials = search(cheap, 1000 + seed, [EARLIER])[1]
        values = np.array([o.value for o in trials])
        shuffled = np.random.default_rng(seed).permutation(values)
        kinds = {"cheap": values, "shuffled": shuffled, "negated": 100 - values}
        for name, accuracies in {"none": None, **kinds}.items():
            earlier = [] if accuracies is None else list(map(replaced, trials, accuracies.tolist()))
            scores.setdefault(name, []).append(search(full, seed, MARKS, earlier)[0])
    print("| earlier study |", " | ".join(f"{mark} trials" for mark in MARKS), "|")
    print("| --- |", " | ".join("---:" for _ in MARKS), "|")
    for name, rows in scores.items():
        mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(runs)
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(mean, error, strict=True)]
        print(f"| {name} |", " | ".join(cells), "|")
    curves = {name: np.mean(rows, axis=0) for name, rows in scores.items()}
    print("\nFull trainings for the same hypervolume, between marks by interpolation:\n")
    for name, curve in curves.items():
        needed = np.interp(curves["none"], np.maximum.accumulate(curve), MARKS)
        print(f"| {name} |", " | ".join(f"{count:.1f}" for count in needed), "|")


def replaced(trial: Observation, value: float) -> Observation:
    return replace(trial, value=value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "report"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    if options.what == "record":
        record(options.file)
    else:
        report(options.file, options.runs)


if __name__ == "__main__":
    main()
