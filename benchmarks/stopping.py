"""Early stopping on recorded curves: epochs saved and front lost, by rule.

    python -m benchmarks.stopping record FILE [--space REFERENCE] [--task NAME] [--trials 80] …
    python -m benchmarks.stopping replay [FILE …] [--orders 20]

``record`` trains networks of a space to their end (the base, families of two proposers at
budgets drawn log-uniformly, random widths) and writes curves and costs as one JSON file.
``replay`` runs recorded studies again in random orders of arrival, so many trials at once, under
each rule; without files, on synthetic curves.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from widthsearch import Recipe, load_space
from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.early_stopping import FrontStopping
from widthsearch.bayesopt.observation import Observation
from widthsearch.data.config import TaskConfig
from widthsearch.data.tasks import Task, load_task
from widthsearch.latency.config import LatencyConfig
from widthsearch.latency.meter import LatencyMeter
from widthsearch.proposers import Setting, proposer_class
from widthsearch.proposers.families import scale_proposal
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.trainer import fit
from widthsearch.widths import Widths


def drawn(space: SearchSpace, task: Task, trials: int, rng: np.random.Generator) -> list[Widths]:
    """The base, then half from the families of proposers and half random widths."""
    base = space.cost(space.base).macs
    least = space.cost([axis.min_width for axis in space.axes]).macs
    methods = map(proposer_class, ("sensitivity", "uniform"))
    proposals = [method()(space, task, Setting()) for method in methods]
    out = {space.base: None}
    while len(out) < trials:
        if rng.random() < 0.5:
            low, high = np.log(max(1.5 * least, 0.02 * base)), np.log(1.5 * base)
            budget = float(np.exp(rng.uniform(low, high)))
            out[scale_proposal(space, proposals[rng.integers(len(proposals))], budget)] = None
        else:
            scale = np.exp(rng.uniform(np.log(0.15), np.log(1.2)))
            shape = scale * np.exp(rng.normal(0, 0.4, len(space.axes)))
            out[space.nearest([s * a.base for s, a in zip(shape, space.axes, strict=True)])] = None
    return list(out)


def record(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    space = load_space(options.space)
    config = TaskConfig(options.task, options.data, options.image_size)
    task = load_task(config).for_search()
    if options.images:
        kept = rng.permutation(len(task.train))[: options.images]
        task = replace(task, train=task.train.subset(kept))
    recipe = Recipe(
        epochs=options.epochs,
        batch_size=64,
        lr=0.1,
        label_smoothing=0.1,
        precision=options.precision,
    )
    timing = LatencyConfig(batch_size=32, pairs=12)
    meter = LatencyMeter(space.build(1.0, seed=0), task.input_shape, timing)
    trials = []
    for seed, widths in enumerate(drawn(space, task, options.trials, rng)):
        network = space.build(widths, seed=seed)
        latency = meter.measure(network)
        curve = fit(network, task, recipe, seed=seed)
        cost = space.cost(widths)
        trials.append(
            {
                "widths": list(widths.vector),
                "macs": cost.macs,
                "params": cost.params,
                "latency_ms": round(latency.median_ms, 5),
                "accuracy": [round(result.value, 3) for result in curve],
            }
        )
        print(len(trials), cost.macs, curve[-1].value, flush=True)
        Path(options.file).write_text(json.dumps({"space": space.name, "trials": trials}))


@dataclass(frozen=True, eq=False)
class Recorded:
    """Networks that were trained to their end.

    Attributes:
        name: What tables call them.
        accuracy: After each epoch, in percent, shape (N, epochs).
        costs: Shape (N, cost objectives).
    """

    name: str
    accuracy: NDArray[np.float64]
    costs: NDArray[np.float64]

    @classmethod
    def read(cls, file: Path, costs: Sequence[str]) -> Recorded:
        content = json.loads(file.read_text())
        trials = content["trials"]
        values = [[trial[cost] for cost in costs] for trial in trials]
        name = f"{file.stem} ({len(trials)} networks of {content['space']})"
        return cls(name, np.array([t["accuracy"] for t in trials]), np.array(values, np.float64))

    @classmethod
    def synthetic(cls, crossing: bool, trials: int = 100, epochs: int = 30) -> Recorded:
        """Power laws whose end depends on cost and luck, with noise in every epoch.

        With ``crossing``, those that end higher begin lower.
        """
        rng = np.random.default_rng(0)
        macs = np.exp(rng.uniform(0, 4, trials))
        luck = rng.normal(0, 1, trials)
        error = np.exp(3.0 - 0.35 * np.log(macs) + 0.15 * luck)
        rate = 0.9 * np.exp(0.25 * (luck if crossing else -luck))
        epoch = np.arange(1, epochs + 1)
        excess = 60 * epoch[None, :] ** -rate[:, None] - 60 * epochs ** -rate[:, None]
        noise = rng.normal(0, 0.15, (trials, epochs)) * (1 + 10 / epoch)
        accuracy = np.clip(100 - error[:, None] - excess + noise, 0, 100)
        name = f"synthetic, {'crossing' if crossing else 'power laws'} ({trials} networks)"
        return cls(name, accuracy, macs[:, None])

    def hypervolume(self, members: Sequence[int]) -> float:
        """Of accuracy and log costs; reference: the lowest accuracy and the highest costs."""
        logs = np.log(self.costs / self.costs.min(0)) / np.log(
            self.costs.max(0) / self.costs.min(0)
        )
        points = np.column_stack([-self.accuracy[:, -1] / np.ptp(self.accuracy[:, -1]), logs])
        return pareto.hypervolume(points[list(members)], points.max(0))

    def observation(self, trial: int, epoch: int) -> Observation:
        curve = tuple(self.accuracy[trial, :epoch])
        accuracy = curve[-1] if epoch == self.accuracy.shape[1] else None
        return Observation((), accuracy, tuple(self.costs[trial]), curve)


Rule = Callable[[Recorded, int, dict[int, int]], bool]
"""Whether to stop a trial; the dictionary has the epochs of all that have begun, itself too."""


def clairvoyant(recorded: Recorded, trial: int, epochs: dict[int, int]) -> bool:
    """Knows how all curves end: the most that any rule can save without a loss."""
    last = recorded.accuracy.shape[1]
    return any(
        done == last
        and (recorded.costs[peer] <= recorded.costs[trial]).all()
        and recorded.accuracy[peer, -1] >= recorded.accuracy[trial, -1]
        for peer, done in epochs.items()
    )


def rungs(first: int, eta: int) -> Rule:
    def rule(recorded: Recorded, trial: int, epochs: dict[int, int]) -> bool:
        epoch = epochs[trial]
        if epoch not in [first * eta**i for i in range(10)]:
            return False
        peers = [peer for peer, done in epochs.items() if done >= epoch]
        points = np.column_stack([-recorded.accuracy[peers, epoch - 1], recorded.costs[peers]])
        return not pareto.promoted(points, peers.index(trial), eta)

    return rule


def front(stopping: FrontStopping) -> Rule:
    def rule(recorded: Recorded, trial: int, epochs: dict[int, int]) -> bool:
        last = recorded.accuracy.shape[1]
        finished = [peer for peer, done in epochs.items() if done == last]
        peers = [recorded.observation(peer, last) for peer in finished]
        return stopping(recorded.observation(trial, epochs[trial]), peers)

    return rule


RULES: dict[str, Rule] = {
    "clairvoyant": clairvoyant,
    "rungs 3, 9 (one in 3)": rungs(3, 3),
    "rungs 4, 8 (one in 2)": rungs(4, 2),
    **{f"front, chance {c}": front(FrontStopping(chance=c)) for c in (0.05, 0.1, 0.2)},
}


def study(recorded: Recorded, rule: Rule, order: Sequence[int], concurrency: int) -> dict[int, int]:
    """The epochs that each trial is trained for; an epoch takes longer where MACs are more."""
    last = recorded.accuracy.shape[1]
    seconds = 0.3 + recorded.costs[:, 0] / recorded.costs[:, 0].max()
    queue, epochs = list(order[::-1]), dict[int, int]()
    running = [(seconds[trial], trial) for trial in (queue.pop() for _ in range(concurrency))]
    heapq.heapify(running)
    while running:
        now, trial = heapq.heappop(running)
        epochs[trial] = epochs.get(trial, 0) + 1
        if epochs[trial] < last and not rule(recorded, trial, epochs):
            heapq.heappush(running, (now + seconds[trial], trial))
        elif queue:
            trial = queue.pop()
            heapq.heappush(running, (now + seconds[trial], trial))
    return epochs


def replay(options: argparse.Namespace) -> None:
    studies = [Recorded.read(Path(file), options.costs.split(",")) for file in options.files]
    for recorded in studies or [Recorded.synthetic(crossing) for crossing in (False, True)]:
        trials, last = recorded.accuracy.shape
        seconds = 0.3 + recorded.costs[:, 0] / recorded.costs[:, 0].max()
        whole = recorded.hypervolume(range(trials))
        print(f"\n### {recorded.name}, {last} epochs\n")
        print(
            "| rule | at once | epochs saved | time saved | hypervolume lost | worst | finished |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for (name, rule), concurrency in itertools.product(RULES.items(), (2, 8)):
            rows = []
            for seed in range(options.orders):
                order = np.random.default_rng(seed).permutation(trials).tolist()
                epochs = study(recorded, rule, order, concurrency)
                finished = [trial for trial, done in epochs.items() if done == last]
                spent = sum(seconds[trial] * done for trial, done in epochs.items())
                rows.append(
                    (
                        1 - sum(epochs.values()) / (trials * last),
                        1 - spent / (seconds.sum() * last),
                        1 - recorded.hypervolume(finished) / whole,
                        len(finished),
                    )
                )
            saved, time, lost, count = np.mean(rows, 0)
            print(
                f"| {name} | {concurrency} | {saved:.1%} | {time:.1%} | {lost:.2%} | "
                f"{max(row[2] for row in rows):.2%} | {count:.0f} of {trials} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file")
    recording.add_argument("--space", default="search_spaces/quickstart.py:digits_resnet")
    recording.add_argument("--task", default="digits")
    recording.add_argument("--data", help="the data folder, for image_folder and cifar10")
    recording.add_argument("--image-size", type=int)
    recording.add_argument("--images", type=int, help="train on so many alone")
    recording.add_argument("--epochs", type=int, default=16)
    recording.add_argument("--trials", type=int, default=80)
    recording.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    recording.add_argument("--seed", type=int, default=0)
    recording.set_defaults(run=record)
    replaying = commands.add_parser("replay")
    replaying.add_argument("files", nargs="*")
    replaying.add_argument("--orders", type=int, default=20, help="random orders of arrival")
    replaying.add_argument("--costs", default="macs", help="macs, params and latency_ms, by commas")
    replaying.set_defaults(run=replay)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
