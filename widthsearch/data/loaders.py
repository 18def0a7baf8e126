"""Batches of a task on the device: made there of a task's images, or moved there."""
# ruff: noqa: N806  letters of a name are the dims of a tensor

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.data.folders import ImageFiles
from widthsearch.data.sources import Split
from widthsearch.errors import DataError
from widthsearch.torch_internals import tree_leaves, tree_map_only

if TYPE_CHECKING:  # tasks.py imports this file
    from widthsearch.data.tasks import OwnTask, Task


class DeviceLoader:
    """Makes batches on a device, from a split that is one tensor there.

    On the CPU the tensor shares the split's memory. Augmentation is one gather: shift, reflection
    and mirroring are in the index into the flat array of all images, so no padded or mirrored copy
    is made. With normalisation one CPU core makes 190,000 images of 3×32×32 per second. No
    operation waits for the device, so a CUDA graph can contain all of them.

    Args:
        split: The images and labels.
        task: Provides mean, std and augmentation.
        batch_size: Images per batch; at most the size of the split is used.
        device: The device of the tensors.
        memory_format: The memory format of the batches.

    Attributes:
        batch_size: Images per batch.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> task = load_task("digits")
        >>> loader = DeviceLoader(task.train, task, batch_size=128)
        >>> images, labels = loader.plain(torch.arange(128))
        >>> images.shape, labels.shape, loader.steps
        (torch.Size([128, 1, 8, 8]), torch.Size([128]), 8)
    """

    resident: ClassVar[bool] = True

    def __init__(
        self,
        split: Split,
        task: Task,
        batch_size: int,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._device = torch.device(device)
        self._images = self._placed(split.images)
        self._labels = _from_numpy(split.labels).to(device)
        self.batch_size = min(batch_size, len(split))
        self._task = task
        # A CUDA graph repeats a step at fixed addresses: steps read these tensors only.
        self._batch = torch.arange(self.batch_size, device=device)
        self._planned = torch.empty(6, 0, dtype=torch.int64, device=device)
        self._memory_format = memory_format
        self._augmentation = task.augmentation
        _, channels, height, width = self._shape = split.images.shape
        mean, std = (torch.tensor(m).view(1, -1, 1, 1) for m in (task.mean, task.std))
        self._scale, self._shift = (1 / (255 * std)).to(device), (-mean / std).to(device)
        padding = task.augmentation.crop_padding
        self._rows = (_reflected(height, padding) * width).to(device)
        self._columns = _reflected(width, padding).to(device)
        self._planes = (torch.arange(channels) * (height * width)).to(device)

    def _placed(self, images: NDArray[np.uint8] | ImageFiles) -> Tensor:
        """The images on the device."""
        assert not isinstance(images, ImageFiles)
        return _from_numpy(images).to(self._device)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._labels)

    @property
    def steps(self) -> int:
        """The number of whole batches."""
        return len(self._labels) // self.batch_size

    def draws(self, generator: torch.Generator, epoch: int | None = None) -> Tensor:
        """Draw an epoch's order of images and their augmentation, on the CPU.

        Args:
            generator: A generator on the CPU.
            epoch: The epoch's number: even epochs mirror the images that odd ones do not. None
                draws the mirrored images at random.

        Returns:
            int64 (6, images). A column has an image's index, its rows in the tables of vertical and
            horizontal shifts, whether it is mirrored, and the row and column of the centre of the
            cut-out square.
        """
        count, augmentation = len(self), self._augmentation
        order = torch.randperm(count, generator=generator)
        shifts = torch.randint(2 * augmentation.crop_padding + 1, (2, count), generator=generator)
        if epoch is None:
            mirrored = torch.rand(count, generator=generator) < 0.5
        else:
            odd = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
            mirrored = odd[order] ^ bool(epoch % 2)
        centre = torch.zeros(2, count, dtype=torch.int64)
        if augmentation.cutout:
            sides = self._shape[2:]
            centre = torch.stack([torch.randint(n, (count,), generator=generator) for n in sides])
        return torch.stack([order, *shifts, (mirrored & augmentation.flip).long(), *centre])

    def passes(self, steps: int) -> float:
        """The share of the images that so many steps read."""
        return steps * self.batch_size / len(self)

    def begin(self, steps: int, generator: torch.Generator, epoch: int | None = None) -> Tensor:
        """Draw the next batches, so many, for :meth:`batch`.

        Returns:
            The columns of :meth:`draws`, whose arguments these are.
        """
        whole = self.steps * self.batch_size
        passes = math.ceil(steps / self.steps)
        draws = torch.cat([self.draws(generator, epoch)[:, :whole] for _ in range(passes)], 1)
        draws = draws[:, : steps * self.batch_size]
        if draws.shape != self._planned.shape:
            self._planned = torch.zeros_like(draws, device=self._batch.device)
        self._planned.copy_(draws)
        return draws

    def batch(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """The augmented batch of a step; its number, (1,), is on the device."""
        return self.augmented(self._planned.index_select(1, at * self.batch_size + self._batch))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], smoothing: float) -> Tensor:
        """The mean loss of a batch, ()."""
        return self._task.loss(model, batch, smoothing)

    def plain(self, chosen: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """A batch of images as they are, normalised: float32 (N, C, H, W), and labels int64 (N,).

        Args:
            chosen: The images' indices, int64 (N,); by default all images.
        """
        return self._normalised(self._images[chosen]), self._labels[chosen]

    def plain_batches(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches as of :meth:`plain`, of images in an order, int64 (n,) on the CPU."""
        return (self.plain(chosen.to(self._device)) for chosen in _parts(order, self.batch_size))

    def augmented(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of augmented images, of columns of :meth:`draws`, int64 (6, N), on the device.

        A training uses whole batches only, because BatchNorm cannot learn from one image; the order
        of each epoch decides which images it skips.
        """
        return self._augmented(self._images, draws[0], draws)

    def _augmented(self, images: Tensor, at: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Augment images of these indices; the draws have their indices in the split."""
        chosen, down, right, mirrored, *centre = draws
        rows_NH = self._rows[down] + (at * math.prod(self._shape[1:]))[:, None]
        columns_NW = self._columns[right]
        columns_NW = torch.where(mirrored[:, None].bool(), columns_NW.flip(1), columns_NW)
        pixels_NCW = self._planes[None, :, None] + columns_NW[:, None, :]
        index_NCHW = rows_NH[:, None, :, None] + pixels_NCW[:, :, None, :]
        pixels = images.view(-1).index_select(0, index_NCHW.view(-1)).view(index_NCHW.shape)
        blank = self._cut_out(*centre) if self._augmentation.cutout else None
        return self._normalised(pixels, blank), self._labels[chosen]

    def _cut_out(self, row: Tensor, column: Tensor) -> Tensor:
        """The mask of blanked pixels, (N, 1, H, W), around centres (N,)."""
        side = self._augmentation.cutout
        inside = []
        for size, centre in zip(self._shape[2:], (row, column), strict=True):
            first = (centre - side // 2)[:, None]
            at = torch.arange(size, device=centre.device)
            inside.append((at >= first) & (at < first + side))
        return inside[0][:, None, :, None] & inside[1][:, None, None, :]

    def _normalised(self, images: Tensor, blank: Tensor | None = None) -> Tensor:
        floats = images.to(torch.float32).mul_(self._scale).add_(self._shift)
        if blank is not None:
            floats.masked_fill_(blank, 0.0)
        # Converted last: arithmetic with three channels innermost takes ten times as long.
        return floats.contiguous(memory_format=self._memory_format)


class FileLoader(DeviceLoader):
    """Makes the same batches from images in files, which processes decode ahead of their use.

    Only uint8 pixels come from them: the order and the augmentation are drawn here, and images are
    augmented on the device. So an epoch has the numbers that it has with images in memory. As many
    processes decode as torch has threads here, which in a study is the trial's share of the CPUs.

    Args:
        split: The images, in files, and the labels.
        task: As for :class:`DeviceLoader`, like the other arguments.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from widthsearch.data.config import TaskConfig
        >>> from widthsearch.data.tasks import load_task
        >>> folder = tempfile.mkdtemp()
        >>> for i in range(12):
        ...     path = Path(folder, ("train", "test")[i % 2], ("a", "b")[i // 2 % 2], f"{i}.png")
        ...     path.parent.mkdir(parents=True, exist_ok=True)
        ...     Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(path)
        >>> task = load_task(TaskConfig("image_folder", folder, loading="stream"))
        >>> loader = FileLoader(task.train, task, batch_size=2)
        >>> _ = loader.begin(2, torch.Generator().manual_seed(0))
        >>> images, labels = loader.batch()
        >>> images.shape, labels.shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2]))
    """

    resident: ClassVar[bool] = False

    def _placed(self, images: NDArray[np.uint8] | ImageFiles) -> Tensor:
        """Images are read when they are needed."""
        assert isinstance(images, ImageFiles)
        self._files = images
        return torch.empty(0, dtype=torch.uint8)

    def begin(self, steps: int, generator: torch.Generator, epoch: int | None = None) -> Tensor:
        """Draw the next batches, and begin to decode them; see :meth:`DeviceLoader.begin`."""
        draws = super().begin(steps, generator, epoch)
        self._pixels, self._step, self._steps = self._decoded(draws[0]), 0, steps
        return draws

    def batch(self, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next augmented batch."""
        assert self._step < self._steps
        images = next(self._pixels)
        columns = self._step * self.batch_size + self._batch
        self._step += 1
        if self._step == self._steps:
            self._pixels.close()
        return self._augmented(images, self._batch, self._planned.index_select(1, columns))

    def plain(self, chosen: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """See :meth:`DeviceLoader.plain`."""
        of = torch.arange(len(self))[chosen]
        pixels = torch.from_numpy(self._files.decoded(of.numpy()))
        return self._normalised(pixels.to(self._device)), self._labels[chosen]

    def plain_batches(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`DeviceLoader.plain_batches`."""
        chosen = _parts(order, self.batch_size)
        for of, pixels in zip(chosen, self._decoded(order), strict=True):
            yield self._normalised(pixels), self._labels[of.to(self._device)]

    def _decoded(self, order: Tensor) -> Generator[Tensor, None, None]:
        """The pixels of batches of these images, on the device."""
        cuda = self._device.type == "cuda"
        chosen = [of.numpy() for of in _parts(order, self.batch_size)]
        for pixels in self._files.batches(chosen, torch.get_num_threads(), pinned=cuda):
            yield pixels.to(self._device, non_blocking=True)


def loader_of(
    split: Split,
    task: Task,
    batch_size: int,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> DeviceLoader:
    """The loader of a split: of images in memory, or in files."""
    made = FileLoader if isinstance(split.images, ImageFiles) else DeviceLoader
    return made(split, task, batch_size, device, memory_format)


class StreamLoader:
    """Moves the batches of an own task to a device, one pass after the other.

    Args:
        task: The task.
        device: The device of the tensors.

    Attributes:
        batch_size: The number of samples in the last batch.

    Example:
        >>> from widthsearch.data.tasks import OwnTask
        >>> x = torch.randn(10, 2)
        >>> task = OwnTask(lambda net, x: net(x).square().mean(), lambda split, seed: x.split(4))
        >>> loader = StreamLoader(task)
        >>> loader.begin(4, torch.Generator().manual_seed(0))
        >>> [len(loader.batch()) for _ in range(4)], loader.steps
        ([4, 4, 2, 4], 3)
    """

    resident: ClassVar[bool] = False

    def __init__(self, task: OwnTask, device: torch.device | str = "cpu") -> None:
        self._task, self._device = task, device
        self.batch_size = 0  # known with the first batch

    @cached_property
    def steps(self) -> int:
        """The number of batches of a pass; counted by a pass where they have no length.

        Raises:
            DataError: The task has no batches of "train".
        """
        found: Any = self._task.batches("train", 0)
        try:
            count = len(found)
        except TypeError:  # of a generator, or of a DataLoader of a stream
            count = sum(1 for _ in found)
        if not count:
            raise self._task.without_batches("train")
        return count

    def passes(self, steps: int) -> float:
        """The share of a pass that so many steps are."""
        return steps / self.steps

    def begin(self, steps: int, generator: torch.Generator, epoch: int | None = None) -> None:
        """Start a pass; others follow as the steps need them, each with a seed that is drawn."""
        self._batches = self._endless(generator)

    def batch(self, at: Tensor | None = None) -> Any:
        """The next batch, on the device."""
        batch = next(self._batches)
        self.batch_size = samples(batch)
        return moved(batch, self._device)

    def loss(self, model: nn.Module, batch: Any, smoothing: float) -> Tensor:
        """The mean loss of a batch, ().

        Raises:
            DataError: There is label smoothing, which needs labels of classes.
        """
        if smoothing:
            raise DataError(
                "`label_smoothing` is for tasks of images and labels, but the study has a loss of "
                f"its own and label_smoothing={smoothing:g}; leave it out"
            )
        return self._task.loss(model, batch)

    def _endless(self, generator: torch.Generator) -> Iterator[Any]:
        batch = None
        while True:
            seed = int(torch.randint(2**31, (), generator=generator))
            for batch in self._task.batches("train", seed):
                yield batch
            if batch is None:
                raise self._task.without_batches("train")
            batch = None


def moved(batch: Any, device: torch.device | str) -> Any:
    """A batch with its tensors on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def samples(batch: Any) -> int:
    """The number of samples of a batch: the length of its first tensor.

    Raises:
        DataError: The batch has no tensor, or no sample.
    """
    leaves = tree_leaves(batch)
    found = next((len(x) for x in leaves if isinstance(x, Tensor) and x.dim()), None)
    if found:
        return found
    what, way = "no sample", "; leave it out"
    if found is None:
        kinds = {
            "tensors without dims" if isinstance(leaf, Tensor) else type(leaf).__name__
            for leaf in leaves
        }
        held = f"{type(batch).__name__} of " if not any(leaf is batch for leaf in leaves) else ""
        what, way = held + (", ".join(sorted(kinds)) or "nothing"), ""
        if any(isinstance(leaf, np.ndarray) for leaf in leaves):
            way = "; convert arrays by torch.from_numpy"
    raise DataError(
        "a batch must be tensors, or tuples, lists and mappings of tensors, of one sample or more, "
        f"but `batches` has one of {what}{way}"
    )


def _parts(order: Tensor, size: int) -> list[Tensor]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def _from_numpy(array: NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():  # shared arrays are read-only, and nothing writes to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _reflected(size: int, padding: int) -> Tensor:
    """Source indices of shifted pixels, (2 × padding + 1, size): row s is shifted by s - padding.

    For example ``_reflected(3, 1)`` is ``[[1, 0, 1], [0, 1, 2], [1, 2, 1]]``.
    """
    shifted = torch.arange(-padding, padding + 1)[:, None] + torch.arange(size)
    return (size - 1) - (size - 1 - shifted.abs()).abs()
