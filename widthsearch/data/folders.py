"""Images in files: listed at once, and decoded where they are needed, in parallel.

A folder is laid out as for torchvision's ``ImageFolder``, and has its classes and its images in its
order. Differences: hidden files are no images, links to folders are not followed (they may form a
loop), and a listing is one array of names, which processes share, not one object an image.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from widthsearch.data.config import IMAGE_FOLDER_LAYOUT
from widthsearch.errors import DataError, ImageError
from widthsearch.utils.devices import cores

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
WIDE = ("I", "F")
"""The first letters of PIL's modes with more than 8 bits."""

_READ = 64  # images a batch where all are read
_FEW = 64  # images that are decoded sooner than a process has started


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in files, in place of an array uint8 (N, 3, H, W).

    Attributes:
        root: The folder, an absolute path.
        names: The paths of the files in it, as bytes, (N,).
        size: The side in pixels to which the images are scaled (the shorter side, bilinear with
            antialiasing) and cropped (the longer side, centred); None leaves them as they are.
        image_shape: The shape of every image, (3, H, W).

    Example:
        >>> import tempfile
        >>> root = tempfile.mkdtemp()
        >>> for i, name in enumerate(("a.png", "b.png", "c.png")):
        ...     Image.new("RGB", (6, 4), (i, i, i)).save(Path(root, name))
        >>> files = ImageFiles.of(root, ["a.png", "b.png", "c.png"], size=None)
        >>> files.shape, files[[0, 2]].read()[:, 0, 0, 0]
        ((3, 3, 4, 6), array([0, 2], dtype=uint8))
    """

    root: str
    names: NDArray[np.bytes_]
    size: int | None
    image_shape: tuple[int, ...]

    @classmethod
    def of(cls, root: Path | str, names: Sequence[str], size: int | None) -> ImageFiles:
        """The images with these names; the first one gives the shape.

        Raises:
            ImageError: The first one cannot be used.
        """
        files = cls(str(Path(root).resolve()), np.array([*map(os.fsencode, names)]), size, ())
        shape = _pixels(files.path(0), size).shape
        return replace(files, image_shape=shape)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that they stand for."""
        return len(self), *self.image_shape

    @property
    def nbytes(self) -> int:
        """The bytes of that array."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, chosen: Any) -> ImageFiles:
        """The images with these indices, or where a mask is true."""
        return replace(self, names=self.names[chosen])

    def joined(self, other: ImageFiles) -> ImageFiles:
        """The images of both."""
        assert self.root == other.root
        return replace(self, names=np.concatenate([self.names, other.names]))

    def path(self, index: int) -> str:
        """The path of an image."""
        return f"{self.root}/{os.fsdecode(self.names[index])}"

    def decoded(self, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
        """These images, decoded in this process, uint8 (n, 3, H, W).

        Raises:
            ImageError: One cannot be read, has more than 8 bits a channel, or another size.
        """
        images = np.empty((len(chosen), *self.image_shape), np.uint8)
        for row, index in zip(images, chosen.tolist(), strict=True):
            pixels = _pixels(path := self.path(index), self.size)
            if pixels.shape != self.image_shape:
                _, height, width = self.image_shape
                raise ImageError(
                    f"images must be of one size, but others are {width}×{height} and {path} is "
                    f"{pixels.shape[2]}×{pixels.shape[1]}; set `image_size`"
                )
            row[:] = pixels
        return images

    def batches(
        self, chosen: Sequence[NDArray[np.int64]], processes: int, *, pinned: bool = False
    ) -> Iterator[Tensor]:
        """Decode batches in processes of their own, two batches ahead each.

        The processes end with the iterator, and within a few seconds after this process has ended,
        however it did.

        Args:
            chosen: The indices of each batch.
            processes: The number of processes; fewer where there are few images.
            pinned: Whether to return tensors in pinned memory, which a GPU reads without waiting.

        Yields:
            uint8 (n, 3, H, W).

        Raises:
            ImageError: An image cannot be used.
            MemoryError: A process was killed.
        """
        few = len(chosen) == 1 or sum(map(len, chosen)) <= _FEW
        workers = 0 if few else min(processes, cores(), len(chosen))
        _import_codecs(self.size)
        loader: Any = DataLoader(
            _Decoder(self),
            batch_size=None,
            sampler=chosen,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=pinned,
            # A fork starts in milliseconds and shares the listing. Its code needs nothing of this
            # process's threads. Where there is no fork, torch starts processes as it can.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # else it would draw from the network's
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is multi-threaded", DeprecationWarning)
            decoded = iter(loader)
        try:
            for batch in decoded:
                if isinstance(batch, ImageError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise MemoryError(
                "a process that decodes images died (killed, or out of memory?)"
            ) from error

    def read(self, on_read: Callable[[int], object] = lambda count: None) -> NDArray[np.uint8]:
        """Decode all images on all cores, uint8 (N, 3, H, W).

        Args:
            on_read: Called with the number of images read since its last call.
        """
        images = np.empty(self.shape, np.uint8)
        chosen = np.split(np.arange(len(self)), range(_READ, len(self), _READ))
        for of, batch in zip(chosen, self.batches(chosen, cores()), strict=True):
            images[of[0] : of[0] + len(of)] = batch.numpy()
            on_read(len(of))
        return images


class _Decoder(Dataset[Any]):
    """Decodes a batch; an image that cannot be used is the result, since a raised one has lines."""

    def __init__(self, files: ImageFiles) -> None:
        self._files = files

    def __getitem__(self, chosen: NDArray[np.int64]) -> Tensor | ImageError:
        try:
            return torch.from_numpy(self._files.decoded(chosen))
        except ImageError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def _import_codecs(size: int | None) -> None:
    """Import here what decoding needs, not in each process."""
    Image.init()
    if size is not None:
        import torchvision.transforms.v2.functional  # noqa: F401


def _pixels(path: str, size: int | None) -> NDArray[np.uint8]:
    """An image as uint8 (3, H, W), scaled and cropped by torchvision."""
    try:
        with Image.open(path) as file:
            if file.mode[0] in WIDE:
                raise ImageError(
                    f"every image must have 8 bits per channel, but {path} has mode {file.mode!r}, "
                    "which would be clipped; scale its values to 0 to 255 and save it with 8 bits"
                )
            image = file.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # PIL raises any type
        raise ImageError(
            f"every image must be readable, but {path} is not ({error}); repair or remove it"
        ) from error
    if size is not None and image.size != (size, size):
        from torchvision.transforms.v2 import functional

        image = functional.center_crop(functional.resize(image, [size]), [size])
    return np.asarray(image).transpose(2, 0, 1)


# --- the listing ---


def listed(folder: str, image_size: int | None) -> tuple[Any, Any, tuple[str, ...]]:
    """List a folder with torchvision's ``ImageFolder`` layout for train and for test.

    Returns:
        The files and the labels of train, those of test, and the names of the classes.

    Raises:
        DataError: The layout is wrong, or an image is no file.
        ImageError: The first image of a half cannot be used.
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
    train, test = (_half(root / half, classes, image_size) for half in ("train", "test"))
    return train, test, tuple(classes)


def _folders(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(name for name in names if not name.startswith("."))


def _half(
    half: Path, classes: Sequence[str], size: int | None
) -> tuple[ImageFiles, NDArray[np.int64]]:
    """All images below the class folders of a half with their labels, in order of name."""
    names: list[str] = []
    counts = []
    for name in classes:
        found = sorted(_images(half, name), key=lambda path: path.split("/"))
        if not found:
            raise DataError(
                f"every class needs images ({' '.join(IMAGE_SUFFIXES)}), but {half / name} has "
                f"none; lay them out as {IMAGE_FOLDER_LAYOUT}"
            )
        names += found
        counts.append(len(found))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return ImageFiles.of(half, names, size), labels


def _images(half: Path, folder: str) -> Iterator[str]:
    """The images in a folder of a half, and in the folders in it, as paths from the half."""
    try:
        entries = list(os.scandir(half / folder))
    except FileNotFoundError:
        return
    for entry in entries:
        path = f"{folder}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.name.lower().endswith(IMAGE_SUFFIXES):
            if not entry.is_file():  # a pipe would be waited for
                raise DataError(f"every image must be a file, but {half / path} is none; remove it")
            yield path
        elif entry.is_dir(follow_symlinks=False):
            yield from _images(half, path)


# --- in memory, or from the files ---


@dataclass(frozen=True)
class Loading:
    """Where the images of a folder are while networks learn from them.

    Attributes:
        resident: Whether they are decoded once and kept in memory; else batches are read from the
            files, in each epoch again.
        reason: Why, in one line.

    Example:
        >>> Loading.chosen((50_000, 3, 32, 32), {"memory": 8 * 10**9}).resident
        True
        >>> print(Loading.chosen((10**6, 3, 224, 224), {"memory": 64 * 10**9}).reason)
        1,000,000 images of 3×224×224 are streamed from their files, because in memory they would \
take 150.5 GB, and a quarter of the free memory is 16.0 GB
    """

    resident: bool
    reason: str

    @classmethod
    def chosen(
        cls, shape: tuple[int, ...], free: dict[str, int], wanted: str | None = None
    ) -> Loading:
        """Resident if the images take at most a quarter of each memory.

        While they are read, they are there twice, and they leave room for networks.

        Args:
            shape: The shape of all images, (N, C, H, W).
            free: The free bytes of each memory that would hold them, by its name.
            wanted: ``resident`` or ``stream``, whatever is free.
        """
        count, *one = shape
        taken = int(np.prod(shape, dtype=np.int64))
        images = f"{count:,} images of {'×'.join(map(str, one))}"
        stream = f"{images} are streamed from their files"
        if wanted is not None:
            kept = f"{images} are kept in memory, {_bytes(taken)}"
            return cls(wanted == "resident", kept if wanted == "resident" else stream)
        name, least = min(free.items(), key=lambda item: item[1])
        quarter = f"a quarter of the free {name} is {_bytes(least / 4)}"
        if 4 * taken <= least:
            return cls(True, f"{images} are kept in memory: {_bytes(taken)}, and {quarter}")
        return cls(
            False, f"{stream}, because in memory they would take {_bytes(taken)}, and {quarter}"
        )


def _bytes(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.1f} MB"


def progress_bar(done: int, total: int) -> str:
    """How far the reading of images is, in one line."""
    full = 20 * done // total
    return f"reading images ▕{'█' * full}{' ' * (20 - full)}▏ {done:,} of {total:,}"
