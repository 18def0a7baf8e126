"""Batches made on the device: augmentation, normalisation, order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widthsearch.data.config import Augmentation
from widthsearch.data.loaders import DeviceLoader
from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task


def make_task(split: Split, crop_padding: int = 0, flip: bool = False) -> Task:
    """A task of one split with mean 0 and standard deviation 1."""
    channels = split.images.shape[1]
    augmentation = Augmentation(crop_padding, flip)
    mean, std = (0.0,) * channels, (1.0,) * channels
    return Task("made", split, split, None, 10, mean, std, augmentation)


def random_split(count: int, channels: int, height: int, width: int, seed: int = 0) -> Split:
    """Noise, and labels that count up, so that a label identifies its image."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    return Split(images, np.arange(count, dtype=np.int64))


def slow_augmented(
    image: torch.Tensor, padding: int, down: int, right: int, mirror: bool
) -> torch.Tensor:
    """The reference for one image: pad by reflection, crop, flip."""
    padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
    _, height, width = image.shape
    cut = padded[:, down : down + height, right : right + width]
    return torch.from_numpy((cut[:, :, ::-1] if mirror else cut).copy())


@settings(deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 7), st.integers(2, 7), st.integers(0, 4), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_augmenting_a_batch_equals_augmenting_image_by_image(
    channels: int, height: int, width: int, padding: int, flip: bool, seed: int
) -> None:
    """The one gather equals pad, crop and flip of each image, pixel for pixel."""
    padding = min(padding, height - 1, width - 1)
    split = random_split(12, channels, height, width, seed)
    loader = DeviceLoader(split, make_task(split, padding, flip), batch_size=5)
    drawn = loader.draws(torch.Generator().manual_seed(seed))
    batches = [loader.augmented(columns) for columns in drawn.split(5, dim=1)]
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(12, generator=draws)
    shifts = torch.randint(2 * padding + 1, (2, 12), generator=draws)
    mirrored = (torch.rand(12, generator=draws) < 0.5) & flip
    for i, (image, label) in enumerate(
        (image, label) for batch in batches for image, label in zip(*batch, strict=True)
    ):
        assert label == order[i]
        expected = slow_augmented(
            torch.from_numpy(split.images[order[i]]),
            padding,
            int(shifts[0, i]),
            int(shifts[1, i]),
            bool(mirrored[i]),
        )
        assert torch.equal((image * 255).round().to(torch.uint8), expected)


def test_flips_alternate_from_epoch_to_epoch() -> None:
    """Each image is mirrored in one of two consecutive epochs; without flip in none."""
    split = random_split(40, 1, 4, 4)
    for flip in (True, False):
        loader = DeviceLoader(split, make_task(split, 0, flip), batch_size=8)
        mirrored = []
        for epoch in range(4):
            draws = loader.draws(torch.Generator().manual_seed(epoch), epoch)
            mirrored.append(dict(zip(draws[0].tolist(), draws[3].tolist(), strict=True)))
        first, second, third, _ = mirrored
        assert first == third
        assert all(first[i] + second[i] == flip for i in range(40))
        assert (5 < sum(first.values()) < 35) == flip


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 7), st.integers(2, 7), st.integers(0, 99))
def test_cutout_blanks_one_square(side: int, height: int, width: int, seed: int) -> None:
    """Around its centre, clipped at the border, in all channels; other pixels are unchanged."""
    split = random_split(6, 3, height, width, seed)
    task = make_task(split, 1, flip=True)
    cut = replace(task, augmentation=replace(task.augmentation, cutout=side))
    loader, whole = DeviceLoader(split, cut, 6), DeviceLoader(split, task, 6)
    draws = loader.draws(torch.Generator().manual_seed(seed))
    images, labels = loader.augmented(draws)
    expected, same = whole.augmented(draws)
    assert torch.equal(labels, same)
    assert len(whole.draws(torch.Generator())) == len(draws) == 6
    for i in range(6):
        row, column = (int(draws[k, i]) for k in (4, 5))
        assert 0 <= row < height
        assert 0 <= column < width
        top, left = row - side // 2, column - side // 2
        rows = slice(max(top, 0), top + side)
        columns = slice(max(left, 0), left + side)
        expected[i, :, rows, columns] = 0
    assert torch.equal(images, expected)


def test_plain_images_are_in_order() -> None:
    """Nothing is shuffled, augmented or skipped."""
    split = random_split(11, 3, 4, 4)
    loader = DeviceLoader(split, make_task(split, 1, flip=True), batch_size=4)
    images, labels = loader.plain()
    assert torch.equal((images * 255).round().to(torch.uint8), torch.from_numpy(split.images))
    assert labels.tolist() == split.labels.tolist()


def test_each_epoch_has_another_order() -> None:
    """An epoch's whole batches therefore skip other images."""
    loader = DeviceLoader(random_split(11, 1, 4, 4), make_task(random_split(11, 1, 4, 4)), 4)
    generator = torch.Generator().manual_seed(0)
    orders = [loader.draws(generator)[0].tolist() for _ in range(3)]
    assert loader.steps == 2
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len({frozenset(order[:8]) for order in orders}) > 1


def test_batches_share_memory_with_read_only_arrays() -> None:
    """Arrays in shared memory are neither copied nor written to, and cause no warning."""
    split = random_split(6, 3, 4, 4)
    split.images.flags.writeable = False
    before = split.images.copy()
    loader = DeviceLoader(split, make_task(split, 1), 3, memory_format=torch.channels_last)
    images, _ = loader.augmented(loader.draws(torch.Generator()))
    assert loader._images.data_ptr() == split.images.ctypes.data
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (split.images == before).all()
