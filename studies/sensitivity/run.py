"""Sensitivity at initialisation against baselines that look at nothing, at equal MACs.

For each seed every method makes a proposal, and its widths at each budget are trained from scratch
by the same recipe. From the repository's root::

    python -m studies.sensitivity.run --seeds 5
    python -m studies.sensitivity.run --task image_folder --folder FOLDER --device cuda
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from torch import nn

from studies.compare import Entry, compare, ratios, table
from studies.setup import parser, setup
from widthsearch import LatencyConfig, SearchSpace, Widths
from widthsearch.proposers import Proposer, Setting
from widthsearch.proposers.balanced import Balanced
from widthsearch.proposers.constant import Constant
from widthsearch.proposers.families import scale_proposal
from widthsearch.proposers.naswot import Naswot
from widthsearch.proposers.random import Random
from widthsearch.proposers.sensitivity import Sensitivity
from widthsearch.proposers.slimming import Slimming
from widthsearch.proposers.synflow import SynFlow
from widthsearch.proposers.taper import SLOPES, Taper
from widthsearch.proposers.taylor import Taylor
from widthsearch.proposers.uniform import Uniform

METHODS: Mapping[str, Proposer] = {
    "sensitivity": Sensitivity(),
    "sensitivity, cost fixed": Sensitivity(cost="fixed"),
    "sensitivity, per channel": Sensitivity(per="channel"),
    "synflow": SynFlow(),
    "slimming": Slimming(),
    "taylor": Taylor(),
    "naswot": Naswot(),
    "uniform": Uniform(),
    "balanced": Balanced(),
    "constant": Constant(),
    **{f"taper {slope:g}": Taper(slope=slope) for slope in SLOPES},
    "random": Random(),
}


def at_each_seed(name: str, space: SearchSpace, widths: list[Widths]) -> Entry:
    """An entry that trains with each seed the widths that were proposed with that seed."""
    vectors = [w.vector for w in widths]

    def build(seed: int) -> nn.Module:
        return space.build(widths[seed], seed=seed)

    macs, params = (int(np.mean(of(vectors))) for of in (space.macs, space.params))
    return Entry(name, build, macs, params)


def main() -> None:
    """Propose, train and print the table."""
    options = parser(__doc__, seeds=5)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    options.add_argument(
        "--pairs", type=int, default=60, help="pairs of latency measurements; 0 for none"
    )
    chosen = options.parse_args()
    made = setup(chosen)
    space, task, recipe = made.space, made.task.for_search(), made.recipe
    seeds, device = chosen.seeds, chosen.device
    base = Entry.of("base", space, space.base)
    entries = [base]
    proposals: dict[str, list[Callable[[float], Widths]]] = {}
    for name in chosen.methods:
        started = time.perf_counter()
        of_seeds = [
            METHODS[name](space, task, Setting(seed=s, device=device, recipe=recipe))
            for s in range(seeds)
        ]
        print(f"{name}: {(time.perf_counter() - started) / seeds:.2f} s a proposal")
        proposals[name] = [
            lambda share, p=p: scale_proposal(space, p, share * base.macs)  # type: ignore[misc]
            for p in of_seeds
        ]
    for budget in chosen.budgets:
        for name, solved in proposals.items():
            widths = [at(budget) for at in solved]
            entries.append(at_each_seed(f"{name} ×{budget:g}", space, widths))
    results = compare(entries, task, recipe, seeds=seeds, base=base, device=device)
    times = None
    if chosen.pairs:
        timed = [e for e in entries if e.name.split(" ×")[0] in ("sensitivity", "uniform")]
        meter = LatencyConfig(device, batch_size=made.latency_batch, pairs=chosen.pairs)
        times = ratios(timed, base, task, recipe, latency=meter, device=device)
    print(table(results, base, times))


if __name__ == "__main__":
    main()
