"""Activation density against uniform widths at equal MACs; prints the tables of README.md.

From the repository's root: ``python -m studies.activation_density.run --seeds 5``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from studies.compare import train
from studies.setup import parser, setup
from widthsearch import Recipe, SearchSpace, Widths
from widthsearch.data.tasks import Task
from widthsearch.proposers import Proposal, Setting
from widthsearch.proposers.activation_density import ActivationDensity
from widthsearch.proposers.families import scale_proposal
from widthsearch.proposers.uniform import Uniform

VARIANTS: Mapping[str, ActivationDensity] = {
    "reinit": ActivationDensity(patience=48),
    "extract": ActivationDensity(patience=48, weights="extract"),
    "one epoch a phase": ActivationDensity(max_steps=1, drop=100),
    "patient": ActivationDensity(patience=320, max_steps=3200),
}


@dataclass(frozen=True)
class Row:
    """The network of a phase, of one seed.

    Attributes:
        variant: The variant of the method.
        phase: The number of the phase, from 1.
        epochs: The epochs of the phase.
        plateau: The accuracy at the end of the phase.
        macs: MACs as a share of the base's.
        params: Parameters as a share of the base's.
        complexity: All training so far and this network once in full, by the base once in full.
        scratch: The accuracy of these widths after training from scratch by the whole recipe.
        uniform: The same for uniform widths of at most as many MACs.
        base: The same for the base.
    """

    variant: str
    phase: int
    epochs: int
    plateau: float
    macs: float
    params: float
    complexity: float
    scratch: float
    uniform: float
    base: float


def rows(
    space: SearchSpace, task: Task, recipe: Recipe, seed: int, proposals: Mapping[str, Proposal]
) -> list[Row]:
    """All phases but the first of the proposals of one seed."""
    accuracies: dict[Widths, float] = {}

    def accuracy(widths: Widths) -> float:
        if widths not in accuracies:
            model = space.build(widths, seed=seed)
            accuracies[widths] = train(model, task, recipe, seed, split="test")
        return accuracies[widths]

    full = space.cost(space.base)
    uniform = Uniform()(space, task, Setting())
    out = []
    for variant, proposal in proposals.items():
        spent = 0
        for number, phase in enumerate(proposal.provenance["phases"], start=1):
            spent += phase["epochs"] * phase["macs"]
            if number == 1:
                continue
            widths = space.widths(phase["widths"])
            out.append(
                Row(
                    variant,
                    number,
                    phase["epochs"],
                    phase["accuracy"],
                    phase["macs"] / full.macs,
                    space.cost(widths).params / full.params,
                    spent / (recipe.epochs * full.macs) + phase["macs"] / full.macs,
                    accuracy(widths),
                    accuracy(scale_proposal(space, uniform, phase["macs"])),
                    accuracy(space.base),
                )
            )
    return out


def mean_and_spread(values: list[float]) -> str:
    """Mean ± standard deviation (n - 1)."""
    spread = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.2f} ± {spread:.2f}"


def accuracy_table(found: list[Row]) -> str:
    """A line for each variant and phase, over the seeds that reached the phase."""
    head = ["variant", "phase", "n", "MACs", "params", "epochs", "at plateau", "from scratch"]
    head += ["uniform", "density − uniform", "− base", "complexity"]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for variant, phase in sorted({(r.variant, r.phase) for r in found}):
        mine = [r for r in found if (r.variant, r.phase) == (variant, phase)]
        lines.append(
            [
                variant,
                str(phase),
                str(len(mine)),
                f"1/{1 / np.mean([r.macs for r in mine]):.1f}",
                f"1/{1 / np.mean([r.params for r in mine]):.1f}",
                f"{np.mean([r.epochs for r in mine]):.1f}",
                mean_and_spread([r.plateau for r in mine]),
                mean_and_spread([r.scratch for r in mine]),
                mean_and_spread([r.uniform for r in mine]),
                mean_and_spread([r.scratch - r.uniform for r in mine]),
                mean_and_spread([r.scratch - r.base for r in mine]),
                f"{np.mean([r.complexity for r in mine]):.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def density_table(space: SearchSpace, proposals: list[Mapping[str, Proposal]]) -> str:
    """The density of each axis at the end of a phase, mean and range over seeds."""
    lines = [["variant", "phase", *space.names], ["---", *["--:"] * (len(space.axes) + 1)]]
    for variant in proposals[0]:
        phases = [p[variant].provenance["phases"] for p in proposals]
        for number in range(min(map(len, phases))):
            d = np.array([of_seed[number]["densities"] for of_seed in phases])
            spans = zip(d.mean(0), d.min(0), d.max(0), strict=True)
            cells = [f"{m:.2f} ({a:.2f}–{b:.2f})" for m, a, b in spans]
            lines.append([variant, str(number + 1), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Propose, train and print the tables."""
    options = parser(__doc__, seeds=5, image_base="vgg16_quarter")
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3])
    options.add_argument("--weight-decay", type=float, default=5e-4)
    options.add_argument("--lowest", type=float, default=0.01)
    options.add_argument("--step", type=int, help="grid step of every axis; by default the space's")
    options.set_defaults(epochs=32)
    arguments = options.parse_args()
    made = setup(arguments)
    space, task = made.space, made.task
    recipe = replace(made.recipe, weight_decay=arguments.weight_decay)
    if arguments.step:
        space = space.constrained(step=arguments.step, min_width=dict.fromkeys(space.names, 1))
    found, proposals = [], []
    for seed in range(arguments.seeds):
        setting = Setting(seed, arguments.device, recipe, arguments.lowest, report=print)
        asked = {
            name: VARIANTS[name](space, task.for_search(), setting) for name in arguments.variants
        }
        for name, proposal in asked.items():
            print(f"seed {seed}, {name}: {proposal.provenance['stopped']}", flush=True)
        proposals.append(asked)
        found += rows(space, task, recipe, seed, asked)
    print(accuracy_table(found), density_table(space, proposals), sep="\n\n")


if __name__ == "__main__":
    main()
