"""The digits, and a small convolutional network that learns them in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn

from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task, load_task
from widthsearch.training.recipe import EpochResult
from widthsearch.training.trainer import Trainer


@cache
def digits() -> Task:
    """The digits."""
    return load_task("digits")


@cache
def few() -> Task:
    """A quarter of the digits' training images, for tests of anything but accuracy."""
    train = digits().train
    return replace(digits(), train=train.subset(np.arange(0, len(train), 4)))


def convnet(
    seed: int = 0,
    width: int = 16,
    dropout: float = 0.0,
    middle: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Two convolutions with BatchNorm, something between them, dropout, and a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *([] if middle is None else [middle()]),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * 16, 10),
        )


def rows(split: Split) -> list[bytes]:
    """Each image's bytes."""
    return [image.tobytes() for image in split.images]


def finish(run: Trainer) -> None:
    """Train to the end."""
    while not run.finished:
        run.run_epoch()


def untimed(curve: tuple[EpochResult, ...]) -> list[EpochResult]:
    """A curve without times and modes."""
    return [replace(result, seconds=0, mode="") for result in curve]


def weights(model: nn.Module) -> list[list[float]]:
    """Every parameter and buffer, exactly."""
    return [tensor.flatten().tolist() for tensor in model.state_dict().values()]
