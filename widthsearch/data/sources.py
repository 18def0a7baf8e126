"""Sources of images: each returns the train and the test half of a dataset.

The images are uint8 arrays, but those of folders are in their files. Nothing is unpickled without a
checksum.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from widthsearch.data.config import LossName
from widthsearch.data.folders import WIDE, ImageFiles, listed
from widthsearch.errors import DataError
from widthsearch.utils.files import VARIABLE, cache_folder


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their targets.

    Attributes:
        images: uint8 (N, C, H, W), 0 to 255; or files that have them.
        labels: int64 (N,), 0 to classes - 1; or float32 (N, K): K labels of 0 or 1, or K values.

    Example:
        >>> split = Split(np.zeros((3, 1, 2, 2), np.uint8), np.array([0, 1, 1]))
        >>> len(split), split.subset(split.labels == 1).images.shape
        (3, (2, 1, 2, 2))
    """

    images: NDArray[np.uint8] | ImageFiles
    labels: NDArray[np.int64] | NDArray[np.float32]

    def __post_init__(self) -> None:
        form = {1: np.int64, 2: np.float32}.get(self.labels.ndim)
        assert self.labels.dtype == form and len(self.labels) == len(self.images)
        if isinstance(self.images, ImageFiles):
            return
        assert self.images.dtype == np.uint8 and self.images.ndim == 4, self.images.shape
        # numpy leaves the strides of dims of size 1 open, and torch would mistake unusual ones for
        # channels_last.
        canonical = self.images.reshape(-1).reshape(self.images.shape)
        object.__setattr__(self, "images", canonical)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: NDArray[np.intp | np.bool_]) -> Split:
        """The images with these indices, or where a mask is true; arrays are copied."""
        return Split(self.images[indices], self.labels[indices])

    def joined(self, other: Split) -> Split:
        """The images of both splits."""
        labels, images = np.concatenate([self.labels, other.labels]), self.images
        if isinstance(images, ImageFiles):
            assert isinstance(other.images, ImageFiles)
            return Split(images.joined(other.images), labels)
        return Split(np.concatenate([images, other.images]), labels)

    def read(self, on_read: Callable[[int], object] = lambda count: None) -> Split:
        """The split with its images in memory; see :meth:`ImageFiles.read`."""
        if isinstance(self.images, ImageFiles):
            return replace(self, images=self.images.read(on_read))
        return self


# --- scikit-learn's digits, CIFAR-10 ---


def digits() -> Split:
    """scikit-learn's 1,797 digits of 1×8×8 pixels, with 17 grey levels scaled to 0 to 255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return Split(pixels[:, None], bunch.target.astype(np.int64))


def cifar10(folder: str | None) -> tuple[Split, Split, tuple[str, ...]]:
    """CIFAR-10 (3×32×32) and the names of its classes; downloaded if it is not in the folder.

    Raises:
        DataError: The data is neither in the folder nor downloadable.
    """
    from torchvision.datasets import CIFAR10  # checks the MD5 of each file before it unpickles it

    place = Path(folder).expanduser() if folder else cache_folder("cifar10")
    if place is None:
        raise DataError(
            f"cifar10 is stored in the cache, but {VARIABLE} is empty, which turns the cache off; "
            "write `task: {name: cifar10, folder: path}`"
        )
    try:
        halves = [CIFAR10(place, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cifar10 must be in {place} or be downloadable, but is neither "
            f"({' '.join(str(error).split())}); put cifar-10-python.tar.gz there, or use the task "
            "image_folder"
        ) from error
    train, test = (
        Split(half.data.transpose(0, 3, 1, 2), np.array(half.targets, dtype=np.int64))
        for half in halves
    )
    return train, test, tuple(halves[0].classes)


# --- folders of images ---


def image_folder(folder: str, image_size: int | None) -> tuple[Split, Split, tuple[str, ...]]:
    """A folder with torchvision's ImageFolder layout for train and for test, as RGB.

    The images are listed, and none is decoded but the first of each half.

    Returns:
        The train half, the test half, and the names of the classes.

    Raises:
        DataError: The layout is wrong, or an image cannot be used.
    """
    train, test, names = listed(folder, image_size)
    return Split(*train), Split(*test), names


# --- the user's own datasets ---


def read_dataset(dataset: Any, name: str, loss: LossName = "cross_entropy") -> Split:
    """Read a map-style torch dataset once, from 0 to its length.

    Args:
        dataset: Items (image, target), see :func:`~widthsearch.data.tasks.task_from_datasets`.
        name: The dataset's name in messages.
        loss: The loss, which decides the form of a target.

    Raises:
        DataError: An item has another form.
    """
    images: list[NDArray[np.uint8]] = []
    labels: list[Any] = []
    as_target, rule = _TARGETS[loss]
    try:
        for i in range(len(dataset)):
            image, label = dataset[i]
            images.append(_as_uint8(image))
            labels.append(as_target(label))
            if images[i].shape != images[0].shape:
                raise ValueError(f"shape {images[i].shape}, and the first has {images[0].shape}")
            if np.shape(labels[i]) != np.shape(labels[0]):
                raise ValueError(f"{len(labels[i])} values, and the first has {len(labels[0])}")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} must have items (image, label), where all images have one shape (C, H, W) or "
            "(H, W) and are PIL images, uint8 tensors of 0 to 255 or float tensors of 0 to 1, and "
            f"labels are {rule}, but item {max(0, len(images) - 1)} breaks this rule: {error}"
        ) from error
    if not images:
        raise DataError(f"{name} must have images, but its length is 0")
    if loss == "cross_entropy":
        return Split(np.stack(images), np.array(labels, dtype=np.int64))
    return Split(np.stack(images), np.stack(labels))


def _class(label: Any) -> int:
    """A class as an integer from 0."""
    try:
        found = operator.index(label)
    except TypeError:
        _check_flat(label)
        raise TypeError(
            f"label {reprlib.repr(label)}; give the task the loss of other labels, bce, mse or l1"
        ) from None
    if found < 0:
        raise ValueError(f"label {found}")
    return found


def _check_flat(target: Any) -> None:
    """Check that a target is no map over an image, or another array of rows.

    Raises:
        ValueError: It is.
    """
    if len(shape := getattr(target, "shape", ())) > 1:
        raise ValueError(f"a target of shape {tuple(shape)}; {_OWN_TRAINER}")


def _values(target: Any) -> NDArray[np.float32]:
    """A number, or a vector of numbers, as float32 (K,)."""
    values = np.asarray(target, dtype=np.float32)
    _check_flat(values)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"target {np.array2string(values, threshold=8)}")
    return values.reshape(-1)


def _labels(target: Any) -> NDArray[np.float32]:
    """A vector of 0 and 1 as float32 (K,)."""
    values = _values(target)
    if np.ndim(target) != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"labels {np.array2string(values, threshold=8)}")
    return values


_OWN_TRAINER = "give the study a `trainer` of your own in place of the task: it takes any data"
"""The way out for data that the built-in trainer does not take."""

_VALUES = (_values, "finite numbers or vectors of them, all of one length")
_TARGETS: Mapping[LossName, tuple[Callable[[Any], Any], str]] = {
    "cross_entropy": (_class, "integers from 0"),
    "bce": (_labels, "vectors of 0 and 1, all of one length"),
    "mse": _VALUES,
    "l1": _VALUES,
}
"""The conversion of a target for each loss, and its form in words."""


def _as_uint8(image: object) -> NDArray[np.uint8]:
    """One image as uint8 (C, H, W)."""
    if isinstance(image, Image.Image):
        if image.mode[0] in WIDE:
            raise ValueError(f"its image has mode {image.mode!r}; scale it to 8 bits")
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))[None]
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"its image is a {type(image).__name__}")
    if image.ndim not in (2, 3):
        raise ValueError(f"its image has shape {tuple(image.shape)}; {_OWN_TRAINER}")
    if image.is_floating_point():
        least, most = image.min().item(), image.max().item()
        if not 0 <= least <= most <= 1:
            raise ValueError(
                f"its image has values from {least:g} to {most:g} (leave normalisation to "
                "widthsearch)"
            )
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"its image is of {image.dtype}")
    pixels: NDArray[np.uint8] = image.cpu().numpy()
    return pixels if image.ndim == 3 else pixels[None]
