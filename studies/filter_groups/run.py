"""Learned filter groups: plain and branched networks against uniform widths, at equal MACs.

    python -m studies.filter_groups.run [--seeds 3] [--shares 0.4 0.2 0.1] [--penalty 0.1]
    python -m studies.filter_groups.run --task image_folder --folder FOLDER --penalty 0.02

Each seed learns groups of its own, with a base network of that seed. At each share of the base's
MACs the table has these networks, trained from scratch by one recipe:

* ``uniform``: uniform widths;
* ``plain``: the projection of the branched network to plain widths, scaled to the share;
* ``branched``: the learned branches;
* ``shuffled``: branches of the same sizes with random channels;

and ``tuned``: the branched network with its pruned weights, fine-tuned by the recipe at a fifth of
the learning rate, as in the paper. Its weights were trained twice before, so that there is also the
uniform network after three times as many epochs. Latency is that of the networks of seed 0 in
alternation with the base network; branched networks have batch norm folded and branches merged
(``deploy``).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from studies.compare import Entry, Result, compare, table, train
from studies.setup import parser, setup
from widthsearch import LatencyConfig, SearchSpace
from widthsearch.data.tasks import Task
from widthsearch.latency.folding import fold_batchnorm
from widthsearch.latency.meter import LatencyMeter
from widthsearch.proposers import Setting
from widthsearch.proposers.families import LinearFamily
from widthsearch.proposers.filter_groups.architecture import Branch, BranchedArchitecture
from widthsearch.proposers.filter_groups.branched_layers import (
    deploy,
    with_branches,
    without_branches,
)
from widthsearch.proposers.filter_groups.branched_space import branched
from widthsearch.proposers.filter_groups.proposer import FilterGroups
from widthsearch.proposers.filter_groups.pruning import GroupPruning
from widthsearch.space.constraints import Constraints
from widthsearch.utils.devices import fixed_threads
from widthsearch.widths import Widths


class Learned:
    """The networks from the groups of one seed, at each share of the base's MACs.

    Attributes:
        architectures: The branched architectures.
        plain: The plain projections, scaled to the share.
        inherited: The branched networks with the pruned weights.
    """

    def __init__(
        self,
        space: SearchSpace,
        task: Task,
        proposer: FilterGroups,
        setting: Setting,
        shares: list[float],
    ) -> None:
        model, groups, measured = proposer.learned(space, task, setting)
        pruning = GroupPruning(space, model, groups, proposer.groups)
        print(f"seed {setting.seed}: {measured}", flush=True)
        units = {a.name: t.divisor for a, t in zip(space.axes, space.trace.axes, strict=True)}
        fine = space.with_constraints(Constraints(min=units, step=1))
        base = space.cost(space.base).macs
        self.architectures: dict[float, BranchedArchitecture] = {}
        self.plain: dict[float, Widths] = {}
        self.inherited: dict[float, nn.Module] = {}
        for share in shares:
            beta = pruning.solve(share * base)
            assert beta is not None, f"{share} of the base's MACs is out of reach"
            pruned = pruning.pruned(beta)
            self.architectures[share] = pruning.architecture(pruned)
            profile = pruning.projected(pruned)
            self.plain[share] = LinearFamily(space, profile).solve(share * base)
            narrow = fine.extract(model, pruning.keep(pruned))
            self.inherited[share] = with_branches(narrow, self.architectures[share])


def shuffled(
    space: SearchSpace, architecture: BranchedArchitecture, seed: int
) -> BranchedArchitecture:
    """Branches of the same sizes with random channels."""
    rng = random.Random(seed)
    layers = {}
    for layer, branches in architecture.layers.items():
        inputs = architecture.sizes(space, layer)[1]
        made = [channel for branch in branches for channel in branch.filters]
        rng.shuffle(made)
        drawn, start = [], 0
        for branch in branches:
            filters = sorted(made[start : start + len(branch.filters)])
            start += len(branch.filters)
            reads = sorted(rng.sample(range(inputs), len(branch.inputs)))
            drawn.append(Branch(tuple(filters), tuple(reads)))
        layers[layer] = tuple(drawn)
    return BranchedArchitecture(architecture.widths, layers)


def by_seed(name: str, networks: list[tuple[SearchSpace, Widths]]) -> Entry:
    """An entry with an architecture per seed; its cost is the mean of theirs."""
    costs = [space.cost(widths) for space, widths in networks]

    def build(seed: int) -> nn.Module:
        space, widths = networks[seed]
        return space.build(widths, seed=seed)

    macs, params = (round(np.mean([getattr(c, q) for c in costs])) for q in ("macs", "params"))
    return Entry(name, build, macs, params)


def for_inference(net: nn.Module, architecture: BranchedArchitecture, shape: tuple) -> nn.Module:
    """A branched network for inference: batch norm is folded, then branches are merged."""
    plain = without_branches(net.eval())
    fold_batchnorm(plain, torch.randn(1, *shape))
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return deploy(with_branches(plain, architecture))


def main() -> None:
    """Learn groups with each seed, train all networks and print the tables."""
    asked = parser(__doc__, seeds=3)
    asked.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.2, 0.1])
    asked.add_argument("--groups", type=int, default=4)
    asked.add_argument("--penalty", type=float, default=0.1)
    asked.add_argument("--group-lr", type=float, default=1e-2)
    options = asked.parse_args()
    made = setup(options)
    space, task, recipe = made.space, made.task.for_search(), made.recipe
    proposer = FilterGroups(
        groups=options.groups, penalty=options.penalty, group_lr=options.group_lr
    )
    seeds = range(options.seeds)
    learned = [
        Learned(
            space,
            task,
            proposer,
            Setting(seed=seed, device=options.device, recipe=recipe),
            options.shares,
        )
        for seed in seeds
    ]
    base = Entry.of("base", space, space.base)
    entries: list[Entry] = [base]
    tuned: list[Result] = []
    for share in options.shares:
        budget = share * base.macs
        uniform = LinearFamily(space, space.base).solve(budget)
        spaces = {
            "branched": [branched(space, of.architectures[share]) for of in learned],
            "shuffled": [
                branched(space, shuffled(space, of.architectures[share], seed))
                for seed, of in enumerate(learned)
            ],
        }
        entries.append(Entry.of(f"uniform {share:g}", space, uniform))
        entries.append(by_seed(f"plain {share:g}", [(space, of.plain[share]) for of in learned]))
        for kind, of_kind in spaces.items():
            entries.append(by_seed(f"{kind} {share:g}", [(s, s.base) for s in of_kind]))
        accuracies = tuple(
            train(
                of.inherited[share],
                task,
                replace(recipe, lr=recipe.lr / 5),
                seed,
                device=options.device,
            )
            for seed, of in enumerate(learned)
        )
        as_branched = entries[-2]
        entry = Entry(f"tuned {share:g}", as_branched.build, as_branched.macs, as_branched.params)
        tuned.append(Result(entry, recipe.epochs, accuracies))
    results = compare(entries, task, recipe, seeds=options.seeds, base=base, device=options.device)
    longer = compare(
        [e for e in entries if e.name.startswith("uniform")],
        task,
        replace(recipe, epochs=3 * recipe.epochs),
        seeds=options.seeds,
        base=base,
        device=options.device,
    )
    print("\n" + table([*results, *tuned, *longer], base))

    def deployed(share: float) -> nn.Module:
        architecture = learned[0].architectures[share]
        narrow = branched(space, architecture)
        return for_inference(narrow.build(narrow.base, seed=0), architecture, task.input_shape)

    latency(entries, base, task, options.shares, deployed, options.device)


def latency(
    entries: list[Entry],
    base: Entry,
    task: Task,
    shares: list[float],
    deployed: Callable[[float], nn.Module],
    device: str,
) -> None:
    """Print the times of the networks of seed 0 as ratios to the base network's."""
    print("\n| network | MACs × base | convolutions | latency, batch 1 | CPU time, batch 32 |")
    print("| --- | --: | --: | --: | --: |")
    meter = LatencyMeter(base.build(0), task.input_shape, LatencyConfig(device))
    for share in shares:
        for kind in ("uniform", "plain", "branched"):
            entry = next(e for e in entries if e.name == f"{kind} {share:g}")
            net = deployed(share) if kind == "branched" else entry.build(0)
            convolutions = sum(isinstance(m, nn.Conv2d) for m in net.modules())
            measured = meter.measure(net)
            ratio = cpu_ratio(net, base.build(0), (32, *task.input_shape))
            print(
                f"| {entry.name} | {entry.macs / base.macs:.3f} | {convolutions} "
                f"| {measured.ratio:.2f} ± {measured.ratio_spread:.2f} | {ratio:.2f} |",
                flush=True,
            )


def cpu_ratio(net: nn.Module, base: nn.Module, shape: tuple[int, ...]) -> float:
    """The ratio of the CPU times of two networks with one thread, the median of 60 pairs.

    CPU time, because wall times above a time slice include waiting on a machine with other work.
    """
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    nets = [n.eval().to(memory_format=torch.channels_last) for n in (base, net)]
    for n in nets:
        fold_batchnorm(n, x)
    pairs = []
    with fixed_threads(1), torch.inference_mode():
        for _ in range(65):
            taken = []
            for n in nets:
                n(x)
                started = time.process_time()
                n(x)
                taken.append(time.process_time() - started)
            pairs.append(taken[1] / taken[0])
    return float(np.median(pairs[5:]))


if __name__ == "__main__":
    main()
