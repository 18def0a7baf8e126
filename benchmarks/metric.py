"""Calibration of the surrogate and of learning curves for metrics other than accuracy.

    python -m benchmarks.metric record FILE      # trains the networks of a regression
    python -m benchmarks.metric report FILE      # compares the transforms

The networks have three hidden layers, and learn Friedman's first function (Multivariate Adaptive
Regression Splines, Annals of Statistics 19, 1991). A file is JSON: of each network its widths, and
after each epoch two metrics on held-out samples: ``rmse``, and ``within``, the percentage of
samples whose prediction is off by less than 1.

The report compares transforms of a metric by intervals of 90%: for each fit, of networks that are
left out one at a time, and of networks that the fit has never seen; and of learning curves, how
often the final value lies in the interval that some first epochs predict.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.bayesopt.kernel import Coordinates
from widthsearch.bayesopt.learning_curves import CurveRegression
from widthsearch.bayesopt.metric import Metric
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.space.search_space import SearchSpace

INPUTS, EPOCHS, BATCH = 10, 16, 32
METRICS = {
    "rmse": Metric("rmse", "minimize"),
    "within": Metric("within", "maximize", (0, 100)),
}


def net() -> nn.Module:
    """Three hidden layers."""
    sizes = (INPUTS, 24, 24, 24)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(24, 1))


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of Friedman's first function, with noise of 0.5."""
    x = torch.rand(count, INPUTS, generator=torch.Generator().manual_seed(seed))
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y += 10 * x[:, 3] + 5 * x[:, 4] - 14.4  # the mean
    y += 0.5 * torch.randn(count, generator=torch.Generator().manual_seed(seed + 1))
    return 12**0.5 * (x - 0.5), y[:, None]


def curves(network: nn.Module, seed: int) -> dict[str, list[float]]:
    """The metrics on 1,000 held-out samples after each epoch on 2,000 others."""
    (x, y), (held_out, truth) = split(2000, 0), split(1000, 100)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    order = torch.Generator().manual_seed(seed)
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.mse_loss(network(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            error = network(held_out) - truth
        values["rmse"].append(round(float(error.square().mean().sqrt()), 4))
        values["within"].append(round(100 * float((error.abs() < 1).float().mean()), 1))
    return values


def space() -> SearchSpace:
    """Widths from 4 to 48."""
    return SearchSpace.from_model(net, (INPUTS,), min_width=1 / 6, max_width=2.0, step=1)


def record(file: Path, networks: int) -> None:
    torch.set_num_threads(1)
    rng, own, lines = np.random.default_rng(0), space(), []
    for seed in range(networks):
        logs = [rng.uniform(np.log(a.min_width), np.log(a.max_width)) for a in own.axes]
        widths = own.nearest(np.exp(logs))
        values = curves(own.build(widths, seed=seed), seed)
        lines.append(json.dumps({"widths": list(widths.vector), **values}))
    file.write_text('{"trials": [\n' + ",\n".join(lines) + "\n]}\n")


class Recorded:
    """The networks of a file, by one metric.

    Attributes:
        coordinates: The axes and costs.
        observations: The finished trainings.
    """

    def __init__(self, file: Path, metric: str) -> None:
        trials, own = json.loads(file.read_text())["trials"], space()
        self.coordinates = Coordinates.of(own)
        self.observations = []
        for trial in trials:
            widths, values = tuple(trial["widths"]), tuple(trial[metric])
            cost = float(own.macs(widths))
            self.observations.append(Observation(widths, values[-1], (cost,), values))


def coverage(
    recorded: Recorded, metric: Metric, count: int, draws: int = 20
) -> tuple[float, float, float]:
    """Of 90% intervals: of trainings left out one at a time, and of unseen ones.

    Args:
        recorded: The networks.
        metric: The metric, with a transform.
        count: The number of trainings in each fit.
        draws: Fits to random subsets.

    Returns:
        Both shares, and the mean negative log density of unseen values in the metric's unit.
    """
    rng, left_out, unseen, density = np.random.default_rng(0), [], [], []
    for _ in range(draws):
        order = rng.permutation(len(recorded.observations))
        seen = [recorded.observations[i] for i in order[:count]]
        others = [recorded.observations[i] for i in order[count:]]
        surrogate = Surrogate.fit_observations((recorded.coordinates, seen), metric=metric)
        left_out.append(surrogate.coverage(0.9))
        posterior = surrogate.posterior([o.widths for o in others])
        sd = np.hypot(posterior.sd, surrogate.noise)
        scores = metric.score([o.value or 0.0 for o in others])
        z = (scores - posterior.mean) / sd
        unseen.append(float((np.abs(z) < 1.645).mean()))
        slope = metric.slope(scores)
        density.append(float((z**2 / 2 + np.log(sd * slope)).mean() + np.log(2 * np.pi) / 2))
    return float(np.mean(left_out)), float(np.mean(unseen)), float(np.mean(density))


def curve_coverage(recorded: Recorded, metric: Metric, epoch: int, count: int = 40) -> float:
    """How often a final value lies in the 90% interval that its first epochs predict."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(20):
        order = rng.permutation(len(recorded.observations))
        seen = [recorded.observations[i] for i in order[:count]]
        regression = CurveRegression.fit(seen, epoch, metric)
        assert regression is not None
        for i in order[count:]:
            trial = recorded.observations[i]
            found = regression.predict(replace(trial, value=None, curve=trial.curve[:epoch]))
            off = abs(float(metric.link(trial.value or 0.0)) - found.location)
            inside.append(off < float(stdtrit(found.dof, 0.95)) * found.scale)
    return float(np.mean(inside))


def report(file: Path) -> None:
    for name, own in METRICS.items():
        recorded = Recorded(file, name)
        print(f"\n## {name}, {len(recorded.observations)} networks\n")
        print("| transform | trainings | left out | unseen | −log density |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for metric in (own, replace(own, transform="linear")):
            for count in (20, 40, 80):
                left_out, unseen, density = coverage(recorded, metric, count)
                shown = f"{left_out:.3f} | {unseen:.3f} | {density:.2f}"
                print(f"| {metric.kind} | {count} | {shown} |")
        print("\n| epochs of a curve | final value within its 90% |\n| ---: | ---: |")
        for epoch in (1, EPOCHS // 4, EPOCHS // 2, EPOCHS - 1):
            print(f"| {epoch} of {EPOCHS} | {curve_coverage(recorded, own, epoch):.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "report"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--networks", type=int, default=160)
    options = parser.parse_args()
    if options.what == "record":
        record(options.file, options.networks)
    else:
        report(options.file)


if __name__ == "__main__":
    main()
