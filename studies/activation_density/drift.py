"""The drift of densities at the peak learning rate; prints the lines of README.md.

From the repository's root: ``python -m studies.activation_density.drift --weight-decay 5e-4``.
"""

from __future__ import annotations

import math
from dataclasses import replace

from studies.setup import parser, setup
from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.data.tasks import steps_of_epoch
from widthsearch.proposers.activation_density import density_of_axes, held
from widthsearch.proposers.density import DensityMeter
from widthsearch.training.trainer import Trainer


def main() -> None:
    """Train the base network and print its densities at the end of some epochs."""
    options = parser(__doc__, seeds=1, image_base="vgg16_quarter")
    options.add_argument("--weight-decay", type=float, default=5e-4)
    options.add_argument("--steps", type=int, nargs="+", default=[16, 80, 320, 800, 1600, 3200])
    options.set_defaults(epochs=32)
    arguments = options.parse_args()
    made = setup(arguments)
    space, task = made.space, made.task.for_search()
    recipe = replace(made.recipe, weight_decay=arguments.weight_decay)
    of_epoch = steps_of_epoch(task, recipe.batch_size)
    shown = {math.ceil(steps / of_epoch) for steps in arguments.steps}
    for seed in range(arguments.seeds):
        model = space.build(space.base, seed=seed)
        run = Trainer(model, task, held(recipe, max(shown)), seed=seed, device=arguments.device)
        graph = build_dependency_graph(space.unconstrained.model, space.unconstrained.base)
        while not run.finished:
            with DensityMeter(graph, model, None, {}) as meter:
                run.run_epoch()
            if run.epoch in shown:
                densities = density_of_axes(space, meter.counts())
                cells = " ".join(f"{d:.2f}" for d in densities)
                print(f"seed {seed}, {run.epoch * of_epoch} steps: {cells}", flush=True)


if __name__ == "__main__":
    main()
