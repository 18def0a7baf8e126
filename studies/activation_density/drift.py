"""The drift of densities at the peak learning rate; prints the lines of README.md.

From the repository's root: ``python -m studies.activation_density.drift --weight-decay 5e-4``.
"""

from __future__ import annotations

import argparse

import torch

from search_spaces.quickstart import digits_resnet
from widthsearch import Recipe
from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.data.tasks import load_task
from widthsearch.proposers.activation_density import density_of_axes, held
from widthsearch.proposers.density import DensityMeter
from widthsearch.training.trainer import Trainer


def main() -> None:
    """Train the base network and print its densities after certain epochs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    space, task = digits_resnet(), load_task("digits").for_search()
    recipe = Recipe(
        epochs=32,
        batch_size=64,
        lr=0.1,
        label_smoothing=0.1,
        weight_decay=arguments.weight_decay,
    )
    model = space.build(space.base, seed=arguments.seed)
    run = Trainer(model, task, held(recipe, arguments.epochs), seed=arguments.seed)
    graph = build_dependency_graph(space.model, space.base)
    while not run.finished:
        with DensityMeter(graph, model, None, {}) as meter:
            run.run_epoch()
        if run.epoch in (1, 5, 20, 50, 100, 200):
            densities = density_of_axes(space, meter.counts())
            print(run.epoch, " ".join(f"{d:.2f}" for d in densities), flush=True)


if __name__ == "__main__":
    main()
