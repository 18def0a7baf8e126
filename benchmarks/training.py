"""Training speed: this project's loop relative to a plain PyTorch loop, in turns in one process.

    python -m benchmarks.training [--device cuda] [--data FOLDER] [--networks resnet20,resnet18]

Three loops take turns, with the same images, batch size, optimizer and augmentation:

- ``plain``: torchvision transforms in a ``DataLoader``, eager fp32;
- ``eager``: images stored and augmented on the device, channels_last; bf16 autocast on a GPU, fp32
  on a CPU;
- ``ours``: the loop of a study: additionally one CUDA graph per step on a GPU; bf16 on a CPU where
  a probe finds it faster.

Then each loop trains to a target accuracy (only training time counts, not validation), and as many
candidates as fit train at once. ``FOLDER`` has the layout of the task image_folder; without it the
images are synthetic: one blurred pattern per class, shifted, with noise.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from search_spaces import resnet_cifar
from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task, load_task
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.autotune import probe_concurrency, probe_precision
from widthsearch.training.recipe import Recipe
from widthsearch.training.sgd import parameter_groups
from widthsearch.training.trainer import Trainer, evaluate
from widthsearch.utils.devices import hardware_name


class Images(Dataset[tuple[torch.Tensor, int]]):
    """A split as a torchvision dataset: image by image, with transforms."""

    def __init__(self, split: Split, task: Task) -> None:
        self.split = split
        padding = task.augmentation.crop_padding
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(split.images.shape[2:], padding, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(task.mean, task.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = self.transform(self.split.images[i].transpose(1, 2, 0))
        return image, int(self.split.labels[i])


class Plain:
    """The loop of a tutorial."""

    mode = "fp32, contiguous, eager"

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe, device: str) -> None:
        self.model, self.recipe, self.device = model.to(device), recipe, device
        cuda = device.startswith("cuda")
        workers = min(8, os.cpu_count() or 1) if cuda else 0  # on a CPU they would use its cores
        self.loader = DataLoader(
            Images(task.train, task),
            recipe.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=cuda,
        )
        self.optimizer = torch.optim.SGD(
            parameter_groups(model, recipe.weight_decay),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
        )
        self.epoch = 0

    def train(self) -> float:
        """An epoch; its seconds."""
        self.model.train()
        started = time.perf_counter()
        steps = len(self.loader)
        for step, (images, labels) in enumerate(self.loader, self.epoch * steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate(step, steps)
            images, labels = (x.to(self.device, non_blocking=True) for x in (images, labels))
            loss = F.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        loss.item()
        self.epoch += 1
        return time.perf_counter() - started


class Ours:
    """This project's loop."""

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe, device: str) -> None:
        self.trainer = Trainer(model, task, recipe, seed=0, device=device)
        self.model = model

    @property
    def mode(self) -> str:
        return self.trainer.mode

    def train(self) -> float:
        """An epoch; its seconds."""
        return self.trainer.run_epoch().seconds


def loops(
    space: SearchSpace, task: Task, recipe: Recipe, device: str, fastest: str
) -> dict[str, Callable[[Task], Plain | Ours]]:
    def net() -> nn.Module:
        return space.build(space.base, seed=0)

    cuda = device.startswith("cuda")
    eager = replace(recipe, precision="bf16" if cuda else "fp32", capture=False)
    ours = replace(recipe, precision=fastest)
    return {
        "plain": lambda task: Plain(net(), task, recipe, device),
        "eager": lambda task: Ours(net(), task, eager, device),
        "ours": lambda task: Ours(net(), task, ours, device),
    }


def shortened(task: Task, train: int, validation: int) -> Task:
    """A task with the first images of each split."""
    return replace(
        task,
        train=task.train.subset(np.arange(min(train, len(task.train)))),
        validation=task.validation.subset(np.arange(min(validation, len(task.validation)))),
    )


def rates(
    makers: dict[str, Callable[[Task], Plain | Ours]], task: Task, steps: int, end: float
) -> dict[str, list[float]]:
    """Images per second in blocks of training, in turns until the end, at least three turns."""
    made = {name: make(shortened(task, steps, 2)) for name, make in makers.items()}
    for loop in made.values():
        loop.train()
    found: dict[str, list[float]] = {name: [] for name in made}
    while len(found["plain"]) < 3 or time.perf_counter() < end:
        for name, loop in made.items():
            found[name].append(steps / loop.train())
    for name, loop in made.items():
        print(f"    {name:<6} {statistics.median(found[name]):>9,.0f} images/s   {loop.mode}")
    return found


def until(
    make: Callable[[Task], Plain | Ours], task: Task, accuracy: float, device: str, end: float
) -> tuple[float, float, int]:
    """Seconds of training to a target accuracy, the best accuracy, and the number of epochs."""
    loop = make(task)
    seconds, best, epochs = 0.0, 0.0, 0
    while best < accuracy and time.perf_counter() < end:
        seconds += loop.train()
        epochs += 1
        reached = evaluate(loop.model, task, "validation", device, "fp32")
        best = best if math.isnan(reached) else max(best, reached)
    return seconds if best >= accuracy else math.inf, best, epochs


def benchmark(name: str, task: Task, options: argparse.Namespace, seconds: float) -> None:
    space: SearchSpace = getattr(resnet_cifar, name)()
    device, cuda = options.device, options.device.startswith("cuda")
    begun = time.perf_counter()
    recipe = Recipe(
        epochs=10**4,
        batch_size=options.batch_size,
        lr=0.1,
        schedule="constant",
        warmup_epochs=0.5,
    )
    fastest = "auto"
    if not cuda:
        probe = probe_precision(space.build(space.base, seed=0), task, recipe, device=device)
        fastest = probe.precision
        print(f"{name}: probe says {fastest} (fp32 over bf16 {probe.speedup:.2f})")
    makers = loops(space, task, recipe, device, fastest)
    print(f"{name}, batch {options.batch_size}:")
    steps = (64 if cuda else options.block) * options.batch_size
    found = rates(makers, task, steps, begun + 0.4 * seconds)
    for other in ("plain", "eager"):
        pairs = [ours / theirs for ours, theirs in zip(found["ours"], found[other], strict=True)]
        spread = f"{min(pairs):.2f} to {max(pairs):.2f} in {len(pairs)} turns"
        print(f"    ours over {other:<5} {statistics.median(pairs):6.2f}×   ({spread})")
    if options.target:
        few = task if cuda else shortened(task, options.images, 500)
        taken = {}
        for i, (loop, make) in enumerate(makers.items(), 1):
            end = begun + (0.4 + 0.4 * i / len(makers)) * seconds
            taken[loop], best, epochs = until(make, few, options.target, device, end)
            print(
                f"    {loop:<6} {taken[loop]:>8.1f} s of training to {options.target:g}%"
                f"   (best {best:.1f}% in {epochs} epochs of {len(few.train)} images)"
            )
        for other in ("plain", "eager"):
            if math.isfinite(taken[other] - taken["ours"]):
                print(f"    {other} over ours {taken[other] / taken['ours']:6.2f}×")
    if options.at_once:
        numbers = [int(n) for n in options.at_once.split(",")]
        probed = probe_concurrency(
            pickle.dumps(space),
            task,
            replace(recipe, precision=fastest, epochs=30),
            device=device,
            numbers=numbers,
            seconds=max(1.0, 0.15 * seconds / len(numbers)),
        )
        print("    at once   candidates per hour (30 epochs)   over one")
        one = next(iter(probed.candidates_per_hour.values()))
        for number, rate in probed.candidates_per_hour.items():
            print(f"    {number:>7}   {rate:>18,.2f}   {rate / one:>21.2f}")
        print(f"    best {probed.best}" + (f"; {probed.limit}" if probed.limit else ""))


def synthetic(count: int) -> Task:
    """Ten blurred patterns, shifted and with noise."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(10, 3, 8, 8)).repeat(4, axis=2).repeat(4, axis=3)

    def split(size: int) -> Split:
        labels = np.arange(size, dtype=np.int64) % 10
        images = np.empty((size, 3, 32, 32), dtype=np.uint8)
        for i, label in enumerate(labels):
            moved = np.roll(coarse[label], rng.integers(-4, 5, 2), axis=(1, 2))
            noisy = 128 + 24 * moved + 48 * rng.normal(size=moved.shape)
            images[i] = noisy.clip(0, 255).astype(np.uint8)
        return Split(images, labels)

    mean, std = (0.5,) * 3, (0.2,) * 3
    return Task(
        "synthetic", split(count), split(1000), None, 10, mean, std, Augmentation(4, flip=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", help="a folder with train/<class>/… and test/<class>/…")
    parser.add_argument("--networks", default="resnet20,resnet18")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=480, help="of all networks together")
    parser.add_argument("--target", type=float, help="accuracy in percent; by default 80, or 60")
    parser.add_argument("--images", type=int, default=2560, help="to that accuracy, on a CPU")
    parser.add_argument("--block", type=int, default=2, help="steps a turn, on a CPU")
    parser.add_argument("--at-once", default="1,2,4,8", help="candidates; empty for none")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each loop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    if options.target is None:
        options.target = 80.0 if cuda else 60.0
    if options.data:
        task = load_task(TaskConfig("image_folder", folder=options.data))
    else:
        task = synthetic(25600 if cuda else 2560)
    print(f"{hardware_name(torch.device(options.device))}, {options.threads} threads")
    print(f"torch {torch.__version__}, Python {platform.python_version()}; images: {task.name}")
    networks = options.networks.split(",")
    for name in networks:
        benchmark(name, task, options, options.seconds / len(networks))


if __name__ == "__main__":
    main()
