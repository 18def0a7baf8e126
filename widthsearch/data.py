"""Tasks: datasets as uint8 arrays, their splits, and batches made on the device.

A task is decoded once into numpy arrays (so that processes can share them without a copy). A seeded
share of every class is held out of train as the validation split; that is what a search looks at.
The test split is only for final training: :meth:`Task.for_search` takes it away.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import operator
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from widthsearch.errors import DataError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_PAIR = (
    "(image, label): a PIL image, a uint8 tensor of 0 to 255 or a float tensor of 0 to 1, of shape "
    "(C, H, W) or (H, W), and an integer"
)


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 (N, C, H, W), 0 to 255.
        labels: int64 (N,), 0 to classes - 1.
    """

    images: Images
    labels: Labels

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8 and self.images.ndim == 4, self.images.shape
        assert self.labels.dtype == np.int64 and self.labels.shape == (len(self.images),)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, drawn anew for each image in each epoch.

    Attributes:
        crop_padding: Images are shifted by up to this many pixels each way; the rim is reflected.
        flip: Whether half of the images are mirrored left to right.
    """

    crop_padding: int = 0
    flip: bool = False


@dataclass(frozen=True, eq=False)
class Task:
    """What networks are trained on.

    Attributes:
        name: As in the task's configuration.
        train: What networks learn from.
        validation: Held out of train, class by class; what a search compares networks on.
        test: Only for final training; None in what a search's workers get.
        classes: The number of classes.
        mean: Mean of each channel of train, in units of 255 (so 0 to 1).
        std: Standard deviation of each channel of train, in the same units.
        augmentation: What is done to the training images.
    """

    name: str
    train: Split
    validation: Split
    test: Split | None
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, H, W)."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def for_search(self) -> Task:
        """The task without its test split."""
        return replace(self, test=None)


@dataclass(frozen=True)
class TaskConfig:
    """Which task, and how to prepare it. None leaves a choice to the task.

    Attributes:
        name: ``digits``, ``cifar10``, ``image_folder``, or ``package.module:function`` or
            ``path/to/file.py:function`` with a function that returns two datasets (train, test).
        folder: Where ``image_folder`` lies, or where ``cifar10`` lies or is downloaded to.
        image_size: Side in pixels to which ``image_folder`` is scaled (short side) and centrally
            cropped; needed where its images differ in size.
        validation: The share of every class of train that is held out; 0.25 for ``digits`` (few
            images), else 0.1.
        split_seed: Which images are held out.
        crop_padding: See :class:`Augmentation`; 1 for ``digits``, an eighth of the image for
            ``cifar10`` (4) and ``image_folder``, 0 for datasets of your own.
        flip: See :class:`Augmentation`; on for ``cifar10`` and ``image_folder``.
    """

    name: str
    folder: str | None = None
    image_size: int | None = None
    validation: float | None = None
    split_seed: int = 0
    crop_padding: int | None = None
    flip: bool | None = None

    def __post_init__(self) -> None:
        rules = {
            "validation": ("more than 0 and less than 1", lambda v: 0 < v < 1),
            "image_size": ("at least 1", lambda v: v >= 1),
            "crop_padding": ("at least 0", lambda v: v >= 0),
            "split_seed": ("at least 0", lambda v: v >= 0),
        }
        for field, (rule, holds) in rules.items():
            value = getattr(self, field)
            if value is not None and not holds(value):
                raise DataError(f"`{field}` must be {rule}, but task {self.name!r} has {value}")
        for field, takers in {
            "folder": ("cifar10", "image_folder"),
            "image_size": ("image_folder",),
        }.items():
            if getattr(self, field) is not None and self.name not in takers:
                raise DataError(
                    f"`{field}` is only for {' and '.join(takers)}, but task {self.name!r} has "
                    f"{getattr(self, field)!r}; leave it out"
                )


# --- loading ---


def load_task(config: TaskConfig | str) -> Task:
    """The task that a configuration (or just a name) asks for.

    Raises:
        DataError: The name is unknown, or its data is missing or cannot be used.
    """
    if isinstance(config, str):
        config = TaskConfig(config)
    if config.name == "digits":
        train, test = _digits()
        return _task(config, train, test, validation=0.25, crop_padding=1, flip=False)
    if config.name in ("cifar10", "image_folder"):
        train, test = (_cifar10 if config.name == "cifar10" else _image_folder)(config)
        eighth = min(train.images.shape[2:]) // 8
        return _task(config, train, test, validation=0.1, crop_padding=eighth, flip=True)
    if ":" not in config.name:
        raise DataError(
            "a task must be digits, cifar10, image_folder, package.module:function or "
            f"path/to/file.py:function, but was {config.name!r}"
        )
    pair = _imported(config.name)()
    try:
        train_set, test_set = pair
    except (TypeError, ValueError):
        raise DataError(
            f"task {config.name!r} must return two datasets (train, test), but returned "
            f"{type(pair).__name__}"
        ) from None
    return task_from_datasets(train_set, test_set, config)


def task_from_datasets(train: Any, test: Any, config: TaskConfig) -> Task:
    """A task from two map-style torch datasets; each is read once, from 0 to its length.

    They give ``(image, label)``: a PIL image, a uint8 tensor of 0 to 255 or a float tensor of 0 to
    1, of shape (C, H, W) or (H, W), and an integer. Normalisation and augmentation belong to
    widthsearch, which does them on the device: a random transform in the dataset would be frozen.

    Raises:
        DataError: The datasets give something else.
    """
    train_split = _decoded(train, f"train of task {config.name!r}")
    test_split = _decoded(test, f"test of task {config.name!r}")
    return _task(config, train_split, test_split, validation=0.1, crop_padding=0, flip=False)


def _task(
    config: TaskConfig,
    train: Split,
    test: Split,
    *,
    validation: float,
    crop_padding: int,
    flip: bool,
) -> Task:
    """The task with the configuration's choices, or else the defaults given here."""
    name = config.name
    classes = int(train.labels.max()) + 1
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"train and test must have images of one shape (C, H, W), but task {name!r} has "
            f"{train.images.shape[1:]} and {test.images.shape[1:]}"
        )
    counts = np.bincount(train.labels, minlength=classes)
    if (counts < 2).any():
        raise DataError(
            "every class needs 2 training images or more (some are held out), but class "
            f"{int(counts.argmin())} of task {name!r} has {counts.min()} of {len(train)}; labels "
            "count from 0 without a gap"
        )
    if test.labels.max() >= classes:
        raise DataError(
            f"test may only have classes of train, but task {name!r} has {classes} classes in "
            f"train and label {test.labels.max()} in test"
        )
    share = validation if config.validation is None else config.validation
    kept, held = stratified(train.labels, share, config.split_seed)
    train, held_out = _subset(train, kept), _subset(train, held)
    mean, std = _channel_statistics(train.images)
    padding = crop_padding if config.crop_padding is None else config.crop_padding
    most = min(train.images.shape[2:]) - 1
    if padding > most:
        raise DataError(
            f"`crop_padding` must be less than the image's side, but task {name!r} has "
            f"crop_padding={padding} and images of {train.images.shape[1:]}; at most {most}"
        )
    flips = flip if config.flip is None else config.flip
    augmentation = Augmentation(padding, flips)
    return Task(name, train, held_out, test, classes, mean, std, augmentation)


def stratified(
    labels: Labels, share: float, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices to keep and to hold out: the share of every class, at least 1 each way; ascending."""
    rng = np.random.default_rng(seed)
    held = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held.append(rng.permutation(members)[:count])
    out = np.zeros(len(labels), dtype=np.bool_)
    out[np.concatenate(held)] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def _subset(split: Split, indices: NDArray[np.intp]) -> Split:
    return Split(split.images[indices], split.labels[indices])


def _channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, from exact counts of the 256 values."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 1024):  # bincount widens its input eightfold
            counts += np.bincount(images[start : start + 1024, channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        std = float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum()))
        means.append(mean)
        stds.append(std or 1.0)  # a constant channel becomes 0, not NaN
    return tuple(means), tuple(stds)


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 scanned digits of 8×8 pixels; a fifth of each class is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # from 0 .. 16
    everything = Split(pixels, digits.target.astype(np.int64))
    train, test = stratified(everything.labels, share=0.2, seed=0)
    return _subset(everything, train), _subset(everything, test)


def _cifar10(config: TaskConfig) -> tuple[Split, Split]:
    from torchvision.datasets import CIFAR10  # checks each file's MD5 before it reads it

    folder = Path(config.folder).expanduser() if config.folder else cache_folder() / "cifar10"
    try:
        halves = [CIFAR10(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cifar10 must lie in {folder} or be downloadable, but: {error}; put "
            "cifar-10-python.tar.gz there, or use image_folder"
        ) from error
    train, test = (
        Split(
            np.ascontiguousarray(half.data.transpose(0, 3, 1, 2)),
            np.array(half.targets, dtype=np.int64),
        )
        for half in halves
    )
    return train, test


def cache_folder() -> Path:
    """Where decoded datasets are kept: ``$XDG_CACHE_HOME/widthsearch``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "widthsearch"


def _image_folder(config: TaskConfig) -> tuple[Split, Split]:
    """``<folder>/train/<class>/*`` and ``<folder>/test/<class>/*``, decoded once and cached.

    The cache's key is what was listed (relative paths, sizes, times of change) and the image size;
    it takes as much disk as the decoded images.
    """
    layout = "<folder>/train/<class>/<image> and <folder>/test/<class>/<image>"
    if config.folder is None:
        raise DataError(f"image_folder needs `folder`: a folder laid out as {layout}")
    folder = Path(config.folder).expanduser()
    for needed in (folder, folder / "train", folder / "test"):
        if not needed.is_dir():
            raise DataError(f"image_folder must be laid out as {layout}, but {needed} is no folder")
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if len(classes) < 2:
        raise DataError(
            f"image_folder needs 2 classes or more, but {folder / 'train'} has {len(classes)} "
            "sub-folders; put each class's images into one of its own"
        )
    strangers = {path.name for path in (folder / "test").iterdir() if path.is_dir()} - {*classes}
    if strangers:
        raise DataError(
            f"test may only have classes of train, but {folder / 'test'} also has "
            f"{sorted(strangers)[0]!r}"
        )
    listed: dict[str, list[tuple[Path, int]]] = {}
    for part in ("train", "test"):
        listed[part] = []
        for label, name in enumerate(classes):
            listed[part] += [
                (path, label)
                for path in sorted((folder / part / name).rglob("*"))
                if path.suffix.lower() in IMAGE_SUFFIXES
            ]
        labels = {label for _, label in listed[part]}
        if missing := [c for i, c in enumerate(classes) if i not in labels]:
            raise DataError(
                f"every class needs images, but {folder / part / missing[0]} has none "
                f"({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
    key = hashlib.sha256(json.dumps([1, config.image_size]).encode())
    for path, _ in listed["train"] + listed["test"]:
        status = path.stat()
        entry = [str(path.relative_to(folder)), status.st_size, status.st_mtime_ns]
        key.update(json.dumps(entry).encode())
    cache = cache_folder() / "image_folder" / f"{key.hexdigest()[:24]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as stored:
            train, test = (Split(stored[part], stored[f"{part}_labels"]) for part in listed)
        return train, test
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or damaged: decode
    train, test = (
        Split(
            _read_images([path for path, _ in files], config.image_size),
            np.array([label for _, label in files], dtype=np.int64),
        )
        for files in listed.values()
    )
    cache.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cache.with_suffix(f".{os.getpid()}.npz")
    np.savez(
        unfinished,
        train=train.images,
        train_labels=train.labels,
        test=test.images,
        test_labels=test.labels,
    )
    unfinished.replace(cache)
    return train, test


def _read_images(paths: Sequence[Path], size: int | None) -> Images:
    """RGB images (N, 3, H, W), scaled and cropped to a square of ``size`` where it is given."""

    def read(path: Path) -> Images:
        try:
            with Image.open(path) as image:
                return np.asarray(_fitted(image.convert("RGB"), size)).transpose(2, 0, 1)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"every image must be readable, but {path} is not: {error}; mend or remove it"
            ) from error

    first = read(paths[0])
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(pool.map(read, paths)):
            if image.shape != first.shape:
                raise DataError(
                    f"images must have one size, but {paths[0]} is {first.shape[2]}×"
                    f"{first.shape[1]} and {paths[i]} is {image.shape[2]}×{image.shape[1]}; set "
                    "`image_size`"
                )
            images[i] = image
    return images


def _fitted(image: Image.Image, size: int | None) -> Image.Image:
    if size is None or image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _imported(reference: str) -> Callable[[], Any]:
    """The function that ``package.module:function`` or ``path/to/file.py:function`` names."""
    place, _, name = reference.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(place)
        function = getattr(module, name)
    except (ImportError, OSError, AttributeError) as error:
        raise DataError(f"task {reference!r} cannot be imported: {error}") from error
    if not callable(function):
        raise DataError(f"task {reference!r} must be a function, but is {function!r}")
    return function  # type: ignore[no-any-return]


def _decoded(dataset: Any, whose: str) -> Split:
    images: list[Images] = []
    labels: list[int] = []
    for i in range(len(dataset)):
        item = dataset[i]
        try:
            image, label = item
            images.append(_as_uint8(image))
            labels.append(operator.index(label))
        except (TypeError, ValueError) as error:
            raise DataError(f"{whose} must give {_PAIR}, but item {i} does not: {error}") from error
        if images[i].shape != images[0].shape or labels[i] < 0:
            raise DataError(
                f"{whose} must give images of one shape and labels from 0, but item {i} has shape "
                f"{images[i].shape} (the first has {images[0].shape}) and label {labels[i]}"
            )
    if not images:
        raise DataError(f"{whose} must have images, but its length is 0")
    return Split(np.stack(images), np.array(labels, dtype=np.int64))


def _as_uint8(image: object) -> Images:
    """One image as uint8 (C, H, W)."""
    if isinstance(image, Image.Image):
        grey = image.mode in ("1", "L")
        array = np.asarray(image.convert("L" if grey else "RGB"))
        return array[None] if grey else array.transpose(2, 0, 1)
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"its image is of type {type(image).__name__}")
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3:
        raise ValueError(f"its image has shape {tuple(image.shape)}")
    if image.is_floating_point():
        least, most = float(image.min()), float(image.max())
        if not 0 <= least <= most <= 1:
            raise ValueError(
                f"its image has values from {least:g} to {most:g}; leave normalisation to "
                "widthsearch"
            )
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"its image is of dtype {image.dtype}")
    return image.cpu().numpy()  # type: ignore[no-any-return]


# --- batches ---


class DeviceLoader:
    """A split as one tensor on a device, and batches made there.

    On the CPU the tensors share memory with the split's arrays. Augmenting is one gather: each
    output pixel's place in the flat array of all images, with shift, reflection and mirroring in
    the index, so neither padded nor flipped copies exist. With normalisation, 32×32 colour images
    come at 200,000 a second from one CPU core.

    Args:
        split: The images and labels.
        task: Whose mean, std and augmentation to use.
        batch_size: Images a batch.
        device: Where the tensors lie.
        memory_format: Of the batches.
    """

    def __init__(
        self,
        split: Split,
        task: Task,
        batch_size: int,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        with warnings.catch_warnings():  # arrays shared between processes are read-only; so are we
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._images = torch.from_numpy(split.images).to(device)
            self._labels = torch.from_numpy(split.labels).to(device)
        self._batch_size = min(batch_size, len(split))
        self._device = self._images.device
        self._memory_format = memory_format
        _, channels, height, width = self._images.shape
        mean, std = (
            torch.tensor(m, device=device).view(1, -1, 1, 1) for m in (task.mean, task.std)
        )
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._flip = task.augmentation.flip
        self._padding = task.augmentation.crop_padding
        self._rows = _reflected(height, self._padding, self._device)
        self._columns = _reflected(width, self._padding, self._device)
        self._channels = torch.arange(channels, device=device) * (height * width)

    @property
    def steps(self) -> int:
        """The number of whole batches."""
        return len(self._labels) // self._batch_size

    def batches(
        self, *, augment: bool = False, generator: torch.Generator | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of images float32 (N, C, H, W), normalised, and labels int64 (N,).

        Without a generator: every image once, in order, the last batch as large as is left. With
        one (on the CPU, whatever the device): shuffled, and whole batches only, so that every step
        of training sees as many images (BatchNorm cannot learn from a batch of one); the images
        left over, fewer than a batch, are others in every epoch. Augmenting needs a generator.
        """
        count = len(self._labels)
        if generator is None:
            assert not augment, "augmenting needs a generator"
            for start in range(0, count, self._batch_size):
                part = slice(start, start + self._batch_size)
                yield self._normalised(self._images[part]), self._labels[part]
            return
        order = torch.randperm(count, generator=generator)
        # The whole epoch's draws at once: one copy to the device an epoch, the same for any device.
        shifts = torch.randint(2 * self._padding + 1, (2, count), generator=generator)
        flips = torch.rand(count, generator=generator) < (0.5 if self._flip else 0.0)
        order, shifts, flips = (t.to(self._device) for t in (order, shifts, flips))
        for start in range(0, self.steps * self._batch_size, self._batch_size):
            part = slice(start, start + self._batch_size)
            chosen = order[part]
            if augment:
                images = self._augmented(chosen, shifts[0, part], shifts[1, part], flips[part])
            else:
                images = self._images[chosen]
            yield self._normalised(images), self._labels[chosen]

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        x_NCHW = images.to(torch.float32, memory_format=self._memory_format, copy=True)  # noqa: N806
        return x_NCHW.mul_(self._scale).add_(self._shift)

    def _augmented(
        self, chosen: torch.Tensor, down: torch.Tensor, right: torch.Tensor, flips: torch.Tensor
    ) -> torch.Tensor:
        _, channels, height, width = self._images.shape
        rows_NH = self._rows[down] * width  # noqa: N806
        columns_NW = self._columns[right]  # noqa: N806
        columns_NW = torch.where(flips[:, None], columns_NW.flip(1), columns_NW)  # noqa: N806
        rows_NH += (chosen * (channels * height * width))[:, None]  # noqa: N806
        index_NCHW = (  # noqa: N806
            rows_NH[:, None, :, None]
            + columns_NW[:, None, None, :]
            + self._channels[None, :, None, None]
        )
        pixels = self._images.view(-1).index_select(0, index_NCHW.view(-1))
        return pixels.view(index_NCHW.shape)


def _reflected(size: int, padding: int, device: torch.device) -> torch.Tensor:
    """Source positions (2 padding + 1, size): row s is ``size`` pixels shifted by s - padding."""
    at = (
        torch.arange(size, device=device)
        + torch.arange(-padding, padding + 1, device=device)[:, None]
    )
    return (size - 1) - ((size - 1) - at.abs()).abs()
