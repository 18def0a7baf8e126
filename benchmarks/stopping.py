"""Early stopping on recorded curves: epochs saved and front lost, by rule.

    python -m benchmarks.stopping record FILE [--space REFERENCE] [--task NAME] [--trials 80] …
    python -m benchmarks.stopping replay [FILE …] [--orders 20]

``record`` trains networks of a space to their end (the base, families of two proposers at
budgets drawn log-uniformly, random widths) and writes curves and costs as one JSON file; with
``--repeats`` each network is trained again with so many other seeds, of which only the end is kept.
``replay`` runs recorded studies again in random orders of arrival, so many trials at once, under
each rule; without files, on synthetic curves. Two losses of hypervolume are told, against training
all to the end:

* *seen*: of all finished networks by their own final accuracy, luck and all;
* *handed over*: of the front by posterior mean, as a study hands it over, scored by the mean
  accuracy of its members' other seeds (where there are any).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from widthsearch import Recipe, load_space, pareto
from widthsearch.data import Task, TaskConfig, load_task
from widthsearch.families import along
from widthsearch.latency import LatencyConfig, LatencyMeter
from widthsearch.proposers import PROPOSERS, Setting
from widthsearch.space import SearchSpace
from widthsearch.stopping import Curve, FrontStopping
from widthsearch.storage import SpaceRecord
from widthsearch.surrogate import Coordinates, Surrogate
from widthsearch.training import evaluate, fit
from widthsearch.widths import Widths


def drawn(space: SearchSpace, task: Task, trials: int, rng: np.random.Generator) -> list[Widths]:
    """The base, then half from the families of proposers and half random widths."""
    base = space.cost(space.base).macs
    least = space.cost([axis.least for axis in space.axes]).macs
    proposals = [PROPOSERS[name]()(space, task, Setting()) for name in ("sensitivity", "uniform")]
    out = {space.base: None}
    while len(out) < trials:
        if rng.random() < 0.5:
            low, high = np.log(max(1.5 * least, 0.02 * base)), np.log(1.5 * base)
            budget = float(np.exp(rng.uniform(low, high)))
            out[along(space, proposals[rng.integers(len(proposals))], budget)] = None
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
    recipe = Recipe(epochs=options.epochs, batch_size=64, lr=0.1, label_smoothing=0.1)
    timing = LatencyConfig(batch_size=32, pairs=12)
    meter = LatencyMeter(space.build(1.0, seed=0), task.input_shape, timing)
    trials = []
    for seed, widths in enumerate(drawn(space, task, options.trials, rng)):
        network = space.build(widths, seed=seed)
        latency = meter.measure(network)
        curve = fit(network, task, recipe, seed=seed)
        cost = space.cost(widths)
        again = [
            last_accuracy(space, widths, task, recipe, seed + repeat * options.trials)
            for repeat in range(1, options.repeats + 1)
        ]
        trials.append(
            {
                "widths": list(widths.vector),
                "macs": cost.macs,
                "params": cost.params,
                "latency_ms": round(latency.median_ms, 5),
                "accuracy": [round(result.accuracy, 3) for result in curve],
                "again": again,
            }
        )
        print(len(trials), cost.macs, curve[-1].accuracy, flush=True)
        content = {"space": SpaceRecord.of(space).to_json(), "trials": trials}
        Path(options.file).write_text(json.dumps(content))


def last_accuracy(
    space: SearchSpace, widths: Widths, task: Task, recipe: Recipe, seed: int
) -> float:
    """The validation accuracy after a whole training; it is not evaluated on the way."""
    network = space.build(widths, seed=seed)
    few = replace(task, validation=task.validation.subset(np.arange(2)))
    fit(network, few, recipe, seed=seed)
    return round(evaluate(network, task, "validation", "cpu"), 3)


@dataclass(frozen=True, eq=False)
class Recorded:
    """Networks that were trained to their end.

    Attributes:
        name: What tables call them.
        accuracy: After each epoch, in percent, shape (N, epochs).
        costs: Shape (N, cost objectives).
        space: Theirs; None of curves by formulas.
        widths: Shape (N, axes).
        again: Final accuracy of other seeds, shape (N, seeds).
    """

    name: str
    accuracy: NDArray[np.float64]
    costs: NDArray[np.float64]
    space: SpaceRecord | None = None
    widths: NDArray[np.int64] | None = None
    again: NDArray[np.float64] | None = None

    @classmethod
    def read(cls, file: Path, costs: Sequence[str]) -> Recorded:
        content = json.loads(file.read_text())
        trials = content["trials"]
        values = [[trial[cost] for cost in costs] for trial in trials]
        space = SpaceRecord.from_json(content["space"])
        name = f"{file.stem} ({len(trials)} networks of {space.name})"
        again = np.array([trial.get("again", []) for trial in trials], np.float64)
        return cls(
            name,
            np.array([trial["accuracy"] for trial in trials]),
            np.array(values, np.float64),
            space,
            np.array([trial["widths"] for trial in trials]),
            again if again.size else None,
        )

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

    def handed_over(self, epochs: Mapping[int, int]) -> float:
        """The hypervolume, by other seeds, of the front by posterior mean after so many epochs."""
        assert self.again is not None
        assert self.space is not None
        assert self.widths is not None
        costs = {"macs": self.space.macs, "params": self.space.params}
        last = self.accuracy.shape[1]
        surrogate = Surrogate.of_trainings(
            Coordinates(self.space.axes, costs),
            [self.widths[i].tolist() for i in epochs],
            [float(self.accuracy[i, -1]) if e == last else None for i, e in epochs.items()],
            [self.accuracy[i, :e].tolist() for i, e in epochs.items()],
        )
        finished = [i for i, done in epochs.items() if done == last]
        believed = surrogate.predict(self.widths[finished]).mean
        kept = pareto.non_dominated(np.column_stack([-believed, self.costs[finished]]))
        return self.hypervolume(np.array(finished)[kept].tolist(), self.again.mean(1))

    def hypervolume(
        self, members: Sequence[int], accuracy: NDArray[np.float64] | None = None
    ) -> float:
        """Of accuracy and log costs; reference: the lowest accuracy and the highest costs."""
        accuracy = self.accuracy[:, -1] if accuracy is None else accuracy
        logs = np.log(self.costs / self.costs.min(0)) / np.log(
            self.costs.max(0) / self.costs.min(0)
        )
        points = np.column_stack([-accuracy / np.ptp(accuracy), logs])
        return pareto.hypervolume(points[list(members)], points.max(0))

    def curve(self, trial: int, epoch: int) -> Curve:
        return Curve(tuple(self.accuracy[trial, :epoch]), tuple(self.costs[trial]))


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
        finished = [recorded.curve(peer, last) for peer, done in epochs.items() if done == last]
        return stopping(recorded.curve(trial, epochs[trial]), finished)

    return rule


RULES: dict[str, Rule] = {
    "clairvoyant": clairvoyant,
    "rungs 3, 9 (one in 3)": rungs(3, 3),
    "rungs 4, 8 (one in 2)": rungs(4, 2),
    **{f"front, chance {c}": front(FrontStopping(chance=c)) for c in (0.05, 0.1, 0.2, 0.3)},
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
        everything = dict.fromkeys(range(trials), last)
        best = math.nan if recorded.again is None else recorded.handed_over(everything)
        print(f"\n### {recorded.name}, {last} epochs\n")
        print(
            "| rule | at once | epochs saved | time saved | hypervolume lost: seen | worst "
            "| handed over | finished |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
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
                        1 - (math.nan if math.isnan(best) else recorded.handed_over(epochs) / best),
                        len(finished),
                    )
                )
            saved, time, lost, true, count = np.mean(rows, 0)
            handed = "" if math.isnan(true) else f"{true:.2%}"
            print(
                f"| {name} | {concurrency} | {saved:.1%} | {time:.1%} | {lost:.2%} | "
                f"{max(row[2] for row in rows):.2%} | {handed} | {count:.0f} of {trials} |",
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
    recording.add_argument("--seed", type=int, default=0)
    recording.add_argument("--repeats", type=int, default=0, help="other seeds of each network")
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
