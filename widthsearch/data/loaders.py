"""Batches of a task's images, made on the device."""
# ruff: noqa: N806  letters of a name are the dims of a tensor

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task


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

    def __init__(
        self,
        split: Split,
        task: Task,
        batch_size: int,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        with warnings.catch_warnings():  # shared arrays are read-only, and nothing writes to them
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
            sides = self._images.shape[2:]
            centre = torch.stack([torch.randint(n, (count,), generator=generator) for n in sides])
        return torch.stack([order, *shifts, (mirrored & augmentation.flip).long(), *centre])

    def plain(self, chosen: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """A batch of images as they are, normalised: float32 (N, C, H, W), and labels int64 (N,).

        Args:
            chosen: The images' indices, int64 (N,); by default all images.
        """
        return self._normalised(self._images[chosen]), self._labels[chosen]

    def augmented(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of augmented images, of columns of :meth:`draws`, int64 (6, N), on the device.

        A training uses whole batches only, because BatchNorm cannot learn from one image; the order
        of each epoch decides which images it skips.
        """
        chosen, down, right, mirrored, *centre = draws
        rows_NH = self._rows[down] + (chosen * self._images[0].numel())[:, None]
        columns_NW = self._columns[right]
        columns_NW = torch.where(mirrored[:, None].bool(), columns_NW.flip(1), columns_NW)
        pixels_NCW = self._planes[None, :, None] + columns_NW[:, None, :]
        index_NCHW = rows_NH[:, None, :, None] + pixels_NCW[:, :, None, :]
        pixels = self._images.view(-1).index_select(0, index_NCHW.view(-1)).view(index_NCHW.shape)
        blank = self._cut_out(*centre) if self._augmentation.cutout else None
        return self._normalised(pixels, blank), self._labels[chosen]

    def _cut_out(self, row: Tensor, column: Tensor) -> Tensor:
        """The mask of blanked pixels, (N, 1, H, W), around centres (N,)."""
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
        # Converted last: arithmetic with three channels innermost takes ten times as long.
        return floats.contiguous(memory_format=self._memory_format)


def _reflected(size: int, padding: int) -> Tensor:
    """Source indices of shifted pixels, (2 × padding + 1, size): row s is shifted by s - padding.

    For example ``_reflected(3, 1)`` is ``[[1, 0, 1], [0, 1, 2], [1, 2, 1]]``.
    """
    shifted = torch.arange(-padding, padding + 1)[:, None] + torch.arange(size)
    return (size - 1) - (size - 1 - shifted.abs()).abs()
