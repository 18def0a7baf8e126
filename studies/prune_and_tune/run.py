"""Prune-and-tune against the same widths from scratch and against reduced networks.

At each budget of MACs the table has

* trained networks pruned by Fisher information or magnitude and fine-tuned on the way, and the same
  after another fine-tuning by a whole schedule;
* networks of their widths from scratch, for the epochs or for the compute of the base;
* networks reduced in width or depth without pruning, the same at the measured latency of the pruned
  networks, and those of reduced width with all the compute of pruning and tuning.

From the repository's root::

    python -m studies.prune_and_tune.run --seeds 3
    python -m studies.prune_and_tune.run --task image_folder --folder FOLDER --device cuda
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from studies.compare import Entry, Result, compare, ratios, table, train
from studies.sensitivity.run import at_each_seed
from studies.setup import parser, setup
from widthsearch import LatencyConfig, SearchSpace, Widths
from widthsearch.data.tasks import Task
from widthsearch.latency.meter import LatencyMeter
from widthsearch.proposers import Setting
from widthsearch.proposers.families import LinearFamily
from widthsearch.proposers.fisher import Fisher
from widthsearch.proposers.magnitude import Magnitude
from widthsearch.proposers.tuning import FineTuner, PruneAndTune


class Pruned:
    """The first networks of a method within each budget, of one seed.

    Attributes:
        widths: The widths by budget.
        tuned: The validation accuracy, fine-tuned on the way.
        networks: The network.
        epochs: All training so far, in epochs of the base network by MACs.
    """

    def __init__(
        self,
        method: PruneAndTune,
        space: SearchSpace,
        task: Task,
        setting: Setting,
        budgets: Sequence[float],
    ) -> None:
        base = space.cost(space.base).macs
        self.networks: dict[float, nn.Module] = {}
        networks = self.networks

        class Keeping(PruneAndTune):
            """The method, which keeps a copy of the first network within each budget."""

            name = method.name

            def score(self, tuner: FineTuner) -> list[Tensor]:
                """The scores of the method."""
                scores = method.score(tuner)
                for budget in budgets:
                    if space.cost(tuner.graph.widths).macs <= budget * base:
                        networks.setdefault(budget, copy.deepcopy(tuner.model))
                return scores

        proposal = Keeping(method.every, method.lr, method.per)(space, task, setting)
        self.widths: dict[float, Widths] = {}
        self.tuned: dict[float, float] = {}
        self.epochs: dict[float, float] = {}
        for widths, member in zip(proposal.trajectory, proposal.provenance["members"], strict=True):
            for budget in budgets:
                if member["macs"] <= budget * base and budget not in self.widths:
                    self.widths[budget] = widths
                    self.tuned[budget] = member["accuracy"]
                    self.epochs[budget] = member["epochs"]


def no_slower(
    name: str,
    space: SearchSpace,
    limits: Mapping[str, Sequence[float]],
    base: Entry,
    meter: LatencyMeter,
) -> list[Entry]:
    """For each pruned network, the largest member of a linear family that is not slower.

    Args:
        name: The name of the family in the table.
        space: The space of the family.
        limits: The latency of each pruned network by name and seed, relative to the base.
        base: The base network.
        meter: The latency meter.
    """
    members = LinearFamily(space, space.base).members
    narrower = members[space.macs(members) <= base.macs][::-1]
    some = narrower[np.unique(np.linspace(0, len(narrower) - 1, 20).round().astype(int))]
    measured = [
        (widths, meter.measure(space.build(widths, seed=0)).ratio)
        for widths in map(space.widths, some.tolist())
    ]
    out = []
    for method, of_seeds in limits.items():
        chosen = []
        for limit in of_seeds:
            fast = [w for w, ratio in measured if ratio <= limit]
            chosen.append(fast[0] if fast else measured[-1][0])
        out.append(at_each_seed(f"{name} as fast as {method}", space, chosen))
    return out


def main() -> None:
    """Prune, train and print the table."""
    asked = parser(__doc__, seeds=3)
    asked.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.2])
    asked.add_argument("--every", type=int, default=100, help="fine-tuning steps per removal")
    asked.add_argument("--lr", type=float, default=0.01, help="learning rate of fine-tuning")
    asked.add_argument(
        "--pairs", type=int, default=60, help="pairs of latency measurements; 0 for none"
    )
    options = asked.parse_args()
    made = setup(options)
    space, task, recipe = made.space, made.task.for_search(), made.recipe
    device, seeds, epochs = options.device, options.seeds, made.recipe.epochs
    again = replace(recipe, lr=options.lr)
    base = Entry.of("base", space, space.base)
    methods: dict[str, PruneAndTune] = {
        "fisher per MAC": Fisher(options.every, options.lr, per="macs"),
        "l1": Magnitude(options.every, options.lr, per="channel", norm="l1"),
    }
    results: list[Result] = compare([base], task, recipe, seeds=seeds, base=base, device=device)
    scratch: list[Entry] = []
    most: dict[float, int] = {}
    for name, method in methods.items():
        started = time.perf_counter()
        pruned = [
            Pruned(
                method,
                space,
                task,
                Setting(seed=s, device=device, recipe=recipe, lowest=min(options.budgets)),
                options.budgets,
            )
            for s in range(seeds)
        ]
        print(f"{name}: {(time.perf_counter() - started) / seeds:.0f} s a seed")
        for budget in options.budgets:
            spent = round(sum(p.epochs[budget] for p in pruned) / seeds)
            entry = at_each_seed(f"{name} ×{budget:g}", space, [p.widths[budget] for p in pruned])
            tuned = replace(entry, name=f"{entry.name}, pruned and fine-tuned")
            results.append(Result(tuned, spent, tuple(p.tuned[budget] for p in pruned)))
            more = tuple(
                train(p.networks[budget], task, again, s, device=device)
                for s, p in enumerate(pruned)
            )
            spent += round(epochs * entry.macs / base.macs)
            annealed = replace(entry, name=f"{entry.name}, then fine-tuned by a schedule")
            results.append(Result(annealed, spent, more))
            most[budget] = max(spent, most.get(budget, 0))
            for result in results[-2:]:
                print(f"{result.entry.name}: {result.mean:.2f} ± {result.std:.2f}")
            scratch.append(replace(entry, name=f"{entry.name}, from scratch"))
    reduced = {"uniform width": space}
    if made.shallow is not None:
        reduced["less depth"] = made.shallow
    of_pruned = {entry.name.removesuffix(", from scratch"): entry for entry in scratch}
    narrow: dict[tuple[str, float], Entry] = {}
    for budget in options.budgets:
        for name, of in reduced.items():
            widths = LinearFamily(of, of.base).solve(budget * base.macs)
            narrow[name, budget] = Entry.of(f"{name} ×{budget:g}", of, widths)
    scratch += narrow.values()
    for schedule in ("epochs", "compute"):
        results += compare(
            scratch,
            task,
            recipe,
            seeds=seeds,
            base=base,
            schedule=schedule,
            device=device,
        )
    for budget, spent in most.items():  # the compute of the costliest pruned network
        results += compare(
            [narrow["uniform width", budget]],
            task,
            replace(recipe, epochs=spent),
            seeds=seeds,
            base=base,
            schedule="compute",
            device=device,
        )
    times = None
    if options.pairs:
        latency = LatencyConfig(device, batch_size=made.latency_batch, pairs=options.pairs)
        meter = LatencyMeter(base.build(0), task.input_shape, latency)
        limits = {
            name: [meter.measure(entry.build(seed)).ratio for seed in range(seeds)]
            for name, entry in of_pruned.items()
        }
        as_fast = [
            fast
            for name, of in reduced.items()
            for fast in no_slower(name, of, limits, base, meter)
        ]
        results += compare(
            as_fast, task, recipe, seeds=seeds, base=base, schedule="compute", device=device
        )
        times = ratios([*scratch, *as_fast], base, task, recipe, latency=latency, device=device)
    print(table(results, base, times))


if __name__ == "__main__":
    main()
