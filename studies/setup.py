"""The common options of the proposers' studies, and the networks and data that they name.

One CPU core trains a network on a subset of CIFAR-10 at half its resolution in a minute::

    --task image_folder --folder FOLDER --image-size 16 --images 5000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from search_spaces.quickstart import DigitsResNet, digits_resnet
from search_spaces.resnet_cifar import resnet
from search_spaces.vgg import vgg
from search_spaces.wide_resnet import wrn
from widthsearch import Recipe, SearchSpace, TaskConfig, load_task
from widthsearch.data.tasks import Task, stratified


def shallow_digits_resnet() -> SearchSpace:
    """The quickstart's network without its first block."""

    def shallow() -> nn.Module:
        model: nn.Module = DigitsResNet()
        model.block1 = nn.Sequential()
        return model

    return SearchSpace.from_model(
        shallow, (1, 8, 8), name="shallow", min_width=0.125, max_width=1.5
    )


def vgg16_quarter() -> SearchSpace:
    """VGG-16 at a quarter of its widths, which one CPU core trains in minutes."""
    narrow = vgg(16).build(0.25, seed=0)
    return SearchSpace.from_model(narrow, (3, 32, 32), name="vgg16_quarter")


BASES: Mapping[str, tuple[Callable[[int], SearchSpace], Callable[[int], SearchSpace] | None]] = {
    "digits_resnet": (lambda _: digits_resnet(), lambda _: shallow_digits_resnet()),
    "resnet20": (lambda side: resnet(20, side=side), lambda side: resnet(14, side=side)),
    "resnet56": (lambda side: resnet(56, side=side), lambda side: resnet(38, side=side)),
    "wrn_40_2": (lambda side: wrn(40, 2, side=side), lambda side: wrn(28, 2, side=side)),
    "vgg16": (lambda _: vgg(16), None),
    "vgg16_quarter": (lambda _: vgg16_quarter(), None),
}
"""By name: the space of a base network for images of a given side, and that of a shallower one."""


@dataclass(frozen=True, eq=False)
class Setup:
    """The networks and data that the options name.

    Attributes:
        space: The space of the base network.
        shallow: The space of a shallower network, if there is one.
        task: The data, with the test split.
        recipe: The recipe of every training.
        latency_batch: Batch size of latency measurements.
    """

    space: SearchSpace
    shallow: SearchSpace | None
    task: Task
    recipe: Recipe
    latency_batch: int


def parser(description: str, seeds: int, image_base: str = "resnet20") -> argparse.ArgumentParser:
    """A parser with the common options.

    Args:
        description: Its first line is shown.
        seeds: The default number of seeds.
        image_base: The default base network on images.
    """
    out = argparse.ArgumentParser(description=description.splitlines()[0])
    out.add_argument("--task", default="digits", choices=["digits", "image_folder"])
    out.add_argument(
        "--folder", help="folder of image_folder, with train/<class>/ and test/<class>/"
    )
    out.add_argument(
        "--image-size", type=int, default=32, help="side of the images of image_folder, in pixels"
    )
    out.add_argument("--images", type=int, help="number of training images; by default all")
    out.add_argument(
        "--base", choices=sorted(BASES), help="base network; the default depends on the task"
    )
    out.add_argument("--seeds", type=int, default=seeds)
    out.add_argument("--epochs", type=int)
    out.add_argument("--device", default="cpu")
    out.set_defaults(image_base=image_base)
    return out


def setup(options: argparse.Namespace) -> Setup:
    """Load what the options name, and use one CPU thread from now on."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    digits = options.task == "digits"
    name = options.base or ("digits_resnet" if digits else options.image_base)
    make, make_shallow = BASES[name]
    side = 8 if digits else options.image_size
    if digits:
        task = load_task("digits")
        recipe = Recipe(epochs=16, batch_size=64, label_smoothing=0.1)
    else:
        task = load_task(TaskConfig("image_folder", folder=options.folder, image_size=side))
        recipe = Recipe(epochs=30, batch_size=128, label_smoothing=0.1)
    if options.images:
        kept, _ = stratified(task.train, 1 - options.images / len(task.train), seed=0)
        task = replace(task, train=kept)
    space = make(side)
    if space.input_shape != task.input_shape:
        raise SystemExit(f"{name} takes {space.input_shape}, but images are {task.input_shape}")
    return Setup(
        space,
        make_shallow(side) if make_shallow else None,
        task,
        replace(recipe, epochs=options.epochs or recipe.epochs),
        32 if digits else 128,
    )
