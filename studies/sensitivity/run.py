"""Sensitivity at initialisation against uniform and random widths, at equal MACs.

For each seed every method proposes anew, and each proposal at each budget is trained from scratch
by the same recipe. From the repository's root::

    python -m studies.sensitivity.run --seeds 5
    python -m studies.sensitivity.run --task image_folder --folder FOLDER --device cuda
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from search_spaces.quickstart import digits_resnet
from search_spaces.resnet_cifar import resnet20
from studies.compare import Entry, compare, ratios, table
from widthsearch import LatencyConfig, Recipe, SearchSpace, TaskConfig, Widths, load_task
from widthsearch.families import along
from widthsearch.proposers import Proposer, Random, Sensitivity, Setting, Slimming, SynFlow, Uniform

METHODS: Mapping[str, Proposer] = {
    "sensitivity": Sensitivity(),
    "sensitivity, cost fixed": Sensitivity(cost="fixed"),
    "sensitivity, per channel": Sensitivity(per="channel"),
    "synflow, per MAC": SynFlow(per="macs"),
    "slimming, per MAC": Slimming(per="macs"),
    "uniform": Uniform(),
    "random": Random(),
}


def at_each_seed(name: str, space: SearchSpace, widths: list[Widths]) -> Entry:
    """An entry whose widths are those that were proposed with the seed that it trains with."""
    vectors = [w.vector for w in widths]

    def build(seed: int) -> nn.Module:
        return space.build(widths[seed], seed=seed)

    macs, params = (int(np.mean(of(vectors))) for of in (space.macs, space.params))
    return Entry(name, build, macs, params)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="digits", choices=["digits", "image_folder"])
    parser.add_argument("--folder", help="of image_folder")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=60, help="of latency; 0 leaves it out")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    small = options.task == "digits"
    space = digits_resnet() if small else resnet20()
    task = load_task(TaskConfig(options.task, folder=options.folder)).for_search()
    epochs = options.epochs or (16 if small else 30)
    recipe = Recipe(epochs=epochs, batch_size=64 if small else 128, label_smoothing=0.1)
    base = Entry.of("base", space, space.base)
    entries = [base]
    proposals: dict[str, list[Callable[[float], Widths]]] = {}
    for name, method in METHODS.items():
        started = time.perf_counter()
        made = [
            method(space, task, Setting(seed=s, device=options.device, recipe=recipe))
            for s in range(options.seeds)
        ]
        print(f"{name}: {(time.perf_counter() - started) / options.seeds:.2f} s a proposal")
        proposals[name] = [
            lambda share, p=p: along(space, p, share * base.macs)  # type: ignore[misc]
            for p in made
        ]
    for budget in options.budgets:
        for name, solved in proposals.items():
            widths = [at(budget) for at in solved]
            entries.append(at_each_seed(f"{name} ×{budget:g}", space, widths))
    results = compare(entries, task, recipe, seeds=options.seeds, base=base, device=options.device)
    times = None
    if options.pairs:
        timed = [e for e in entries if e.name.split(" ×")[0] in ("sensitivity", "uniform")]
        meter = LatencyConfig(options.device, batch_size=32 if small else 128, pairs=options.pairs)
        times = ratios(timed, base, task, recipe, latency=meter, device=options.device)
    print(table(results, base, times))


if __name__ == "__main__":
    main()
