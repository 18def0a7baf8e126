"""Filter groups: the time of a learning step, relative to a plain training step in turns with it.

    python -m benchmarks.groups [--device cpu] [--batch 128] [--rounds 15] [--groups 4]

Two networks of each space take turns, step by step, in one process: one trains plainly, the other
learns groups. A learning step has two passes forward and backward where a plain step has one, so
the ratio is at least 2. The last column is the excess over 2.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch import load_space
from widthsearch.proposers.filter_groups.learning import GroupLearning, find_layers
from widthsearch.training.sgd import parameter_groups, sgd_step

SPACES = {
    "digits_resnet": "search_spaces/quickstart.py:digits_resnet",
    "resnet20": "search_spaces/resnet_cifar.py:resnet20",
    "resnet56": "search_spaces/resnet_cifar.py:resnet56",
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameter_groups(model, 5e-4), lr=0.01, momentum=0.9, nesterov=True, fused=True
    )


def row(reference: str, batch: int, rounds: int, groups: int, device: str) -> tuple[float, ...]:
    """Seconds of a plain step and of a learning step, and the median of their ratios."""
    space = load_space(reference)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *space.input_shape, generator=generator).to(device)
    x = x.to(memory_format=torch.channels_last)
    y = (torch.arange(batch) % 10).to(device)

    def backward_of(model: nn.Module) -> Callable[[], Tensor]:
        def backward() -> Tensor:
            loss = F.cross_entropy(model(x), y)
            torch.autograd.backward(loss)
            return loss.detach()

        return backward

    models = [
        space.build(1.0, seed=0).to(device, memory_format=torch.channels_last) for _ in range(2)
    ]
    optimizers = [optimizer_of(model) for model in models]
    learning = GroupLearning(
        models[1],
        find_layers(space),
        groups=groups,
        lr=1e-3,
        temperature=0.5,
        penalties=[2e-3 * 0.01] * (rounds + 3),
    )
    calls = [backward_of(model) for model in models]

    steps = (sgd_step, learning.step)
    taken: list[list[float]] = []
    for _ in range(rounds + 3):  # the first three are a warm-up
        times = []
        for step, optimizer, call in zip(steps, optimizers, calls, strict=True):
            started = time.perf_counter()
            step(optimizer, call)
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        taken.append(times)
    counted = taken[3:]
    medians = [statistics.median(t[i] for t in counted) for i in range(2)]
    ratio = statistics.median(t[1] / t[0] for t in counted)
    return medians[0], medians[1], ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--groups", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"batch {options.batch}, {options.groups} groups, {options.device}, median of rounds\n")
    print("| space | plain step | grouped step | ratio | beyond two plain steps |")
    print("| --- | --: | --: | --: | --: |")
    for name, reference in SPACES.items():
        plain, grouped, ratio = row(
            reference, options.batch, options.rounds, options.groups, options.device
        )
        print(
            f"| {name} | {plain * 1e3:.1f} ms | {grouped * 1e3:.1f} ms | {ratio:.2f} "
            f"| {ratio - 2:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
