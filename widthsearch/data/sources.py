"""Sources of images: each returns the train and the test half of a dataset as uint8 arrays.

Decoded image folders are cached. Nothing is unpickled without a checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from widthsearch.data.config import IMAGE_FOLDER_LAYOUT, LossName
from widthsearch.errors import DataError
from widthsearch.utils.files import VARIABLE, cache_folder, write_atomically

_logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_CACHED = ("train_images", "train_labels", "test_images", "test_labels")
_WIDE = ("I", "F")  # the first letters of PIL's modes with more than 8 bits


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their targets.

    Attributes:
        images: uint8 (N, C, H, W), 0 to 255.
        labels: int64 (N,), 0 to classes - 1; or float32 (N, K): K labels of 0 or 1, or K values.

    Example:
        >>> split = Split(np.zeros((3, 1, 2, 2), np.uint8), np.array([0, 1, 1]))
        >>> len(split), split.subset(split.labels == 1).images.shape
        (3, (2, 1, 2, 2))
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | NDArray[np.float32]

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8 and self.images.ndim == 4, self.images.shape
        form = {1: np.int64, 2: np.float32}.get(self.labels.ndim)
        assert self.labels.dtype == form and len(self.labels) == len(self.images)
        # numpy leaves the strides of dims of size 1 open, and torch would mistake unusual ones for
        # channels_last.
        canonical = self.images.reshape(-1).reshape(self.images.shape)
        object.__setattr__(self, "images", canonical)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: NDArray[np.intp | np.bool_]) -> Split:
        """A copy of the images with these indices, or where a mask is true."""
        return Split(self.images[indices], self.labels[indices])

    def joined(self, other: Split) -> Split:
        """The images of both splits."""
        images = np.concatenate([self.images, other.images])
        return Split(images, np.concatenate([self.labels, other.labels]))


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

    The images are decoded once and cached, with a key of the listing (relative paths, sizes,
    modification times) and the image size; the cache takes as much disk as the decoded images. If
    the cache cannot be written, the images are decoded each time. Hidden files are ignored.

    Returns:
        The train half, the test half, and the names of the classes.

    Raises:
        DataError: The layout is wrong, or an image cannot be used.
    """
    root = Path(folder).expanduser()
    for needed in (root, root / "train", root / "test"):
        if not needed.is_dir():
            raise DataError(
                f"image_folder must be laid out as {IMAGE_FOLDER_LAYOUT}, but {needed} is missing"
            )
    classes = _folders(root / "train")
    if len(classes) < 2:
        raise DataError(
            f"image_folder needs 2 classes or more, but {root / 'train'} has {len(classes)} "
            f"sub-folders; lay the images out as {IMAGE_FOLDER_LAYOUT}"
        )
    if strangers := sorted({*_folders(root / "test")} - {*classes}):
        raise DataError(
            f"test must have no other classes than train, but {root / 'test'} also has "
            f"{strangers[0]!r}; remove it, or add it to train"
        )
    halves = [_listed(root / half, classes) for half in ("train", "test")]
    key = hashlib.sha256(json.dumps([3, image_size]).encode())
    for path, _ in halves[0] + halves[1]:
        status = path.stat()
        entry = (str(path.relative_to(root)), status.st_size, status.st_mtime_ns)
        key.update(json.dumps(entry).encode())
    where = cache_folder("image_folder")
    cache = None if where is None else where / f"{key.hexdigest()[:24]}.npz"
    found = None if cache is None else _read_cache(cache)
    if found is None:
        found = _read(halves[0], image_size), _read(halves[1], image_size)
        if cache is not None:
            _write_cache(cache, *found)
    return *found, tuple(classes)


def _read_cache(file: Path) -> tuple[Split, Split] | None:
    """The halves in a cache file; None if it is missing or damaged."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            arrays = [stored[name] for name in _CACHED]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Split(*arrays[:2]), Split(*arrays[2:])


def _write_cache(file: Path, train: Split, test: Split) -> None:
    arrays = (train.images, train.labels, test.images, test.labels)
    named: dict[str, Any] = dict(zip(_CACHED, arrays, strict=True))
    try:
        write_atomically(file, lambda opened: np.savez(opened, **named))
    except OSError as error:
        _logger.warning(
            "decoded images cannot be cached in %s (%s), so they are decoded each time; name "
            "another folder in %s",
            file.parent,
            error.strerror or error,
            VARIABLE,
        )


def _folders(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(name for name in names if not name.startswith("."))


def _listed(half: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """All images below the class folders of a half with their labels, in order of name."""
    listed = []
    for label, name in enumerate(classes):
        paths = sorted(
            path
            for path in (half / name).rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(half).parts)
        )
        for path in paths:
            if not path.is_file():  # a pipe would be waited for
                raise DataError(f"every image must be a file, but {path} is none; remove it")
        if not paths:
            raise DataError(
                f"every class needs images ({' '.join(IMAGE_SUFFIXES)}), but {half / name} has "
                f"none; lay them out as {IMAGE_FOLDER_LAYOUT}"
            )
        listed += [(path, label) for path in paths]
    return listed


def _read(listed: Sequence[tuple[Path, int]], size: int | None) -> Split:
    # In one thread: with small images, threads wait for each other (6,800 CIFAR JPEGs per second,
    # 5,100 in two threads).
    first = _read_image(listed[0][0], size)
    images = np.empty((len(listed), *first.shape), dtype=np.uint8)
    for i, (path, _) in enumerate(listed):
        image = _read_image(path, size)
        if image.shape != first.shape:
            raise DataError(
                f"images must be of one size, but {listed[0][0]} is {_size(first)} and {path} is "
                f"{_size(image)}; set `image_size`"
            )
        images[i] = image
    return Split(images, np.array([label for _, label in listed], dtype=np.int64))


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[2]}×{image.shape[1]}"


def _read_image(path: Path, size: int | None) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as file:
            if file.mode[0] in _WIDE:
                raise DataError(
                    f"every image must have 8 bits per channel, but {path} has mode {file.mode!r}, "
                    "which would be clipped; scale its values to 0 to 255 and save it with 8 bits"
                )
            image = file.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # PIL raises any type
        raise DataError(
            f"every image must be readable, but {path} is not ({error}); repair or remove it"
        ) from error
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


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
    if (found := operator.index(label)) < 0:
        raise ValueError(f"label {found}")
    return found


def _values(target: Any) -> NDArray[np.float32]:
    """A number, or a vector of numbers, as float32 (K,)."""
    values = np.asarray(target, dtype=np.float32)
    if values.ndim > 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"target {np.array2string(values, threshold=8)}")
    return values.reshape(-1)


def _labels(target: Any) -> NDArray[np.float32]:
    """A vector of 0 and 1 as float32 (K,)."""
    values = _values(target)
    if np.ndim(target) != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"labels {np.array2string(values, threshold=8)}")
    return values


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
        if image.mode[0] in _WIDE:
            raise ValueError(f"its image has mode {image.mode!r}; scale it to 8 bits")
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))[None]
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"its image is a {type(image).__name__}")
    if image.ndim not in (2, 3):
        raise ValueError(f"its image has shape {tuple(image.shape)}")
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
