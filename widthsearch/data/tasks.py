"""Tasks: what networks are trained on, how it is split, and batches made on the device.

A task is numpy arrays, so that processes can share it without a copy. A seeded share of every class
is held out of train as the validation split; that is what a search looks at. The test split is only
for final training: :meth:`Task.for_search` takes it away.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from widthsearch.data import decoding
from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.data.decoding import Split as Split
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
        everything = decoding.digits()
        kept, held = stratified(everything.labels, share=0.2, seed=0)
        train, test = everything.subset(kept), everything.subset(held)
        task = _task(config, train, test, validation=0.25, augmentation=Augmentation(1))
        return replace(task, names=tuple(map(str, range(10))))
    if config.name in ("cifar10", "image_folder"):
        if config.name == "cifar10":
            train, test, names = decoding.cifar10(config.folder)
        else:
            assert config.folder is not None, "TaskConfig requires it"
            train, test, names = decoding.image_folder(config.folder, config.image_size)
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
        decoding.read_dataset(half, f"{which} of task {config.name!r}")
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


class DeviceLoader:
    """A split as one tensor on a device, and batches made there.

    On the CPU the tensor is the split's own memory. Augmenting is one gather: shift, reflection and
    mirroring are in the index into the flat array of all images, so no padded or mirrored copy is
    ever made. With normalisation one CPU core makes 190,000 images of 3×32×32 a second. Nothing
    waits for the device, so a CUDA graph can hold all of it.

    Args:
        split: The images and labels.
        task: Whose mean, std and augmentation to use.
        batch_size: Images a batch; never more than there are.
        device: Where the tensors lie.
        memory_format: Of the batches.

    Attributes:
        batch_size: Images a batch.
    """

    def __init__(
        self,
        split: Split,
        task: Task,
        batch_size: int,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        with warnings.catch_warnings():  # arrays shared between processes are read-only: so are we
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._images = torch.from_numpy(split.images).to(device)
            self._labels = torch.from_numpy(split.labels).to(device)
        self.batch_size = min(batch_size, len(split))
        self._memory_format = memory_format
        self._augmentation = task.augmentation
        _, channels, height, width = split.images.shape
        mean, std = (torch.tensor(m).view(1, -1, 1, 1) for m in (task.mean, task.std))
        self._scale, self._shift = (1 / (255 * std)).to(device), (-mean / std).to(device)
        padding = task.augmentation.crop_padding
        self._rows = (_reflected(height, padding) * width).to(device)
        self._columns = _reflected(width, padding).to(device)
        self._planes = (torch.arange(channels) * (height * width)).to(device)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._labels)

    @property
    def steps(self) -> int:
        """The number of whole batches."""
        return len(self._labels) // self.batch_size

    def batches(
        self,
        *,
        augment: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images float32 (N, C, H, W), normalised, and labels int64 (N,).

        Without a generator: every image once, in order, the last batch as large as is left. With
        one (on the CPU, whatever the device): shuffled, and whole batches only. So every step of
        training has as many images as the others (BatchNorm cannot learn from one image), and the
        few that are left out are others in every epoch. Augmenting needs a generator.

        Args:
            augment: Whether to augment.
            generator: See above.
        """
        if generator is None:
            assert not augment, "augmenting needs a generator"
            for start in range(0, len(self), self.batch_size):
                part = slice(start, start + self.batch_size)
                yield self._normalised(self._images[part]), self._labels[part]
            return
        # All of the epoch's draws at once: one transfer an epoch, the same draws on any device.
        draws = self.draws(generator).to(self._images.device)
        for start in range(0, self.steps * self.batch_size, self.batch_size):
            batch = draws[:, start : start + self.batch_size]
            yield self.augmented(batch) if augment else self.plain(batch[0])

    def draws(self, generator: torch.Generator, epoch: int | None = None) -> Tensor:
        """An epoch's order of images and what each is augmented by, drawn on the CPU.

        Args:
            generator: What to draw from, on the CPU.
            epoch: Its number. In an even one those images are mirrored that are not in an odd one;
                None draws which are.

        Returns:
            int64 (6, images), a column an image: its index, its row in the tables of shifts down
            and right, whether it is mirrored, and where the square's centre is cut out.
        """
        count, augmentation = len(self), self._augmentation
        height, width = self._images.shape[2:]
        order = torch.randperm(count, generator=generator)
        shifts = torch.randint(2 * augmentation.crop_padding + 1, (2, count), generator=generator)
        if epoch is None:
            mirrored = torch.rand(count, generator=generator) < 0.5
        else:
            sides = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
            mirrored = sides[order] ^ bool(epoch % 2)
        draws = [order, *shifts, (mirrored & augmentation.flip).long()]
        for side in (height, width):
            draws.append(
                torch.randint(side, (count,), generator=generator)
                if augmentation.cutout
                else torch.zeros_like(order)
            )
        return torch.stack(draws)

    def plain(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The images with these indices, int64 (N,), as :meth:`batches` gives them."""
        return self._normalised(self._images[chosen]), self._labels[chosen]

    def augmented(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The images of columns of :meth:`draws`, int64 (6, N), on the device; likewise."""
        chosen, down, right, mirrored, *centre = draws
        rows_NH = self._rows[down] + (chosen * self._images[0].numel())[:, None]  # noqa: N806
        columns_NW = self._columns[right]  # noqa: N806
        columns_NW = torch.where(  # noqa: N806
            mirrored[:, None].bool(), columns_NW.flip(1), columns_NW
        )
        index_NCHW = (  # noqa: N806
            rows_NH[:, None, :, None]
            + self._planes[None, :, None, None]
            + columns_NW[:, None, None, :]
        )
        pixels = self._images.view(-1).index_select(0, index_NCHW.view(-1)).view(index_NCHW.shape)
        blank = self._cut_out(*centre) if self._augmentation.cutout else None
        return self._normalised(pixels, blank), self._labels[chosen]

    def _cut_out(self, row: Tensor, column: Tensor) -> Tensor:
        """Which pixels are blanked, (N, 1, H, W), around centres (N,)."""
        side = self._augmentation.cutout
        inside = []
        for size, centre in zip(self._images.shape[2:], (row, column), strict=True):
            first = (centre - side // 2)[:, None]
            at = torch.arange(size, device=centre.device)
            inside.append((at >= first) & (at < first + side))
        return inside[0][:, None, :, None] & inside[1][:, None, None, :]

    def _normalised(self, images: Tensor, blank: Tensor | None = None) -> Tensor:
        floats = images.to(torch.float32).mul_(self._scale).add_(self._shift)
        if blank is not None:
            floats.masked_fill_(blank, 0.0)
        # Last, for arithmetic across three channels that lie innermost takes ten times as long.
        return floats.contiguous(memory_format=self._memory_format)


def _reflected(size: int, padding: int) -> Tensor:
    """Where pixels come from, (2 × padding + 1, size): row s is shifted by s - padding."""
    shifted = torch.arange(-padding, padding + 1)[:, None] + torch.arange(size)
    return (size - 1) - (size - 1 - shifted.abs()).abs()
