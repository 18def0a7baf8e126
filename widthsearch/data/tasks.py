"""Tasks: what networks are trained on, how it is split, and batches made on the device.

A task is numpy arrays, so that processes can share it without a copy. A seeded share of every class
is held out of train as the validation split; that is what a search looks at. The test split is only
for final training: :meth:`Task.for_search` takes it away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widthsearch.data import sources
from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.data.sources import Split
from widthsearch.errors import DataError
from widthsearch.utils.references import load_function


@dataclass(frozen=True, eq=False)
class Task:
    """What networks are trained on.

    Attributes:
        name: As in the task's configuration.
        train: What networks learn from.
        validation: Held out of train, class by class; what a search compares networks on.
        test: Only for final training; None in what a search's workers get.
        classes: The number of classes.
        mean: Mean of each channel over train, black being 0 and white 1.
        std: Standard deviation of each channel over train, likewise.
        augmentation: What is done to the training images.
        names: What each class is called; empty where the task does not know.
    """

    name: str
    train: Split
    validation: Split
    test: Split | None
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    names: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, H, W)."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def for_search(self) -> Task:
        """The task without its test split."""
        return replace(self, test=None)


def load_task(config: TaskConfig | str) -> Task:
    """The task that a configuration, or just a name, asks for.

    Raises:
        DataError: There is no such task, or its data is missing or cannot be used.
    """
    if isinstance(config, str):
        config = TaskConfig(config)
    if config.name == "digits":
        everything = sources.digits()
        kept, held = stratified(everything.labels, share=0.2, seed=0)
        train, test = everything.subset(kept), everything.subset(held)
        task = _task(config, train, test, validation=0.25, augmentation=Augmentation(1))
        return replace(task, names=tuple(map(str, range(10))))
    if config.name in ("cifar10", "image_folder"):
        if config.name == "cifar10":
            train, test, names = sources.cifar10(config.folder)
        else:
            assert config.folder is not None, "TaskConfig requires it"
            train, test, names = sources.image_folder(config.folder, config.image_size)
        augmentation = Augmentation(min(train.images.shape[2:]) // 8, flip=True)
        task = _task(config, train, test, validation=0.1, augmentation=augmentation)
        return replace(task, names=names)
    if ":" not in config.name:
        raise DataError(
            "a task must be digits, cifar10, image_folder, package.module:function or "
            f"path/to/file.py:function, but was {config.name!r}"
        )
    function = load_function(config.name, DataError)
    try:
        pair = function()
    except Exception as error:
        raise DataError(
            f"task {config.name!r} failed: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(
            f"task {config.name!r} must return two datasets (train, test), but returned {pair!r}"
        )
    train_set, test_set = pair
    return task_from_datasets(train_set, test_set, config)


def task_from_datasets(train: Any, test: Any, config: TaskConfig) -> Task:
    """A task from two map-style torch datasets; each is read once, from 0 to its length.

    They give ``(image, label)``: a PIL image, a uint8 tensor of 0 to 255 or a float tensor of 0 to
    1, all of one shape (C, H, W) or (H, W), and an integer. Normalisation and augmentation are
    widthsearch's, which does them on the device: a random transform in the dataset would be frozen.

    Raises:
        DataError: The datasets give something else.
    """
    halves = (
        sources.read_dataset(half, f"{which} of task {config.name!r}")
        for which, half in (("train", train), ("test", test))
    )
    return _task(config, *halves, validation=0.1, augmentation=Augmentation())


def _task(
    config: TaskConfig, train: Split, test: Split, *, validation: float, augmentation: Augmentation
) -> Task:
    """The task with the configuration's choices, where it has none with the ones given."""
    name, shape = config.name, train.images.shape[1:]
    if test.images.shape[1:] != shape:
        raise DataError(
            f"train and test must have images of one shape (C, H, W), but those of task {name!r} "
            f"have {shape} and {test.images.shape[1:]}"
        )
    counts = np.bincount(train.labels)
    classes = len(counts)
    if classes < 2 or counts.min() < 2:
        rare = int(counts.argmin())
        raise DataError(
            "train needs 2 classes or more, counted from 0, and 2 images or more of each (some are "
            f"held out), but task {name!r} has {counts[rare]} images of class {rare} of {classes}"
        )
    if (most := int(test.labels.max())) >= classes:
        raise DataError(
            f"test may only have classes of train, but task {name!r} has label {most} in test and "
            f"{classes} classes in train"
        )
    if config.crop_padding is not None:
        augmentation = replace(augmentation, crop_padding=config.crop_padding)
    if config.flip is not None:
        augmentation = replace(augmentation, flip=config.flip)
    if config.cutout is not None:
        augmentation = replace(augmentation, cutout=config.cutout)
    if augmentation.crop_padding >= min(shape[1:]):
        raise DataError(
            "`crop_padding` must be less than the image's side, but task "
            f"{name!r} has crop_padding={augmentation.crop_padding} and images of {shape}"
        )
    share = validation if config.validation is None else config.validation
    kept, held = stratified(train.labels, share, config.split_seed)
    train, held_out = train.subset(kept), train.subset(held)
    mean, std = _channel_statistics(train.images)
    return Task(name, train, held_out, test, classes, mean, std, augmentation)


def stratified(
    labels: NDArray[np.int64], share: float, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices to keep and to hold out, ascending: the share of every class, at least 1 each way."""
    rng = np.random.default_rng(seed)
    out = np.zeros(len(labels), dtype=np.bool_)
    for label in range(int(labels.max()) + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        out[members[: min(max(round(share * len(members)), 1), len(members) - 1)]] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def _channel_statistics(
    images: NDArray[np.uint8],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from exact counts of the 256 values."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 1024):  # bincount widens what it counts eightfold
            counts += np.bincount(images[start : start + 1024, channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        means.append(mean)
        # A constant channel becomes 0, not NaN.
        stds.append(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())) or 1.0)
    return tuple(means), tuple(stds)
