"""Tasks: their splits, where they come from, and the batches made on the device."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import TensorDataset

from widthsearch.data import sources
from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.data.loaders import DeviceLoader
from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task, load_task, stratified, task_from_datasets
from widthsearch.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.delenv("WIDTHSEARCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "widthsearch" / "image_folder"


def rows(split: Split) -> list[bytes]:
    """Each image's bytes."""
    return [image.tobytes() for image in split.images]


def make_task(split: Split, crop_padding: int = 0, flip: bool = False) -> Task:
    """A task around one split, normalised by nothing but the 255."""
    channels = split.images.shape[1]
    augmentation = Augmentation(crop_padding, flip)
    mean, std = (0.0,) * channels, (1.0,) * channels
    return Task("made", split, split, None, 10, mean, std, augmentation)


def random_split(count: int, channels: int, height: int, width: int, seed: int = 0) -> Split:
    """Noise, and labels that count up so that each tells its image."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    return Split(images, np.arange(count, dtype=np.int64))


# --- digits and splits ---


def test_digits_are_split_in_balance() -> None:
    """All 1,797 digits are used once, and every split has every class in proportion."""
    task = load_task("digits")
    assert task.test is not None
    splits = (task.train, task.validation, task.test)
    assert [len(split) for split in splits] == [1079, 359, 359]
    assert sorted(r for s in splits for r in rows(s)) == sorted(rows(sources.digits()))
    for split in splits:
        counts = np.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 0.06 * counts.max() + 1
    assert task.input_shape == (1, 8, 8)
    assert task.classes == 10
    assert task.names == tuple("0123456789")
    assert task.train.images.max() == 255
    assert task.augmentation == Augmentation(crop_padding=1, flip=False)


def test_digits_are_the_same_each_time_and_the_seed_moves_only_validation() -> None:
    """Same seed, same splits; another seed holds out other images, but leaves test alone."""
    first, again, other = (load_task(TaskConfig("digits", split_seed=seed)) for seed in (0, 0, 1))
    assert first.test is not None and other.test is not None
    assert rows(first.train) == rows(again.train)
    assert rows(first.validation) == rows(again.validation)
    assert rows(first.validation) != rows(other.validation)
    assert rows(first.test) == rows(other.test)


def test_statistics_are_those_of_train() -> None:
    """Normalised with them, the training images have mean 0 and standard deviation 1."""
    task = load_task("digits")
    ((images, _),) = DeviceLoader(task.train, task, len(task.train)).batches()
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_search_gets_no_test_split() -> None:
    """What workers get lacks the test split, and is otherwise the same arrays."""
    task = load_task("digits")
    searched = task.for_search()
    assert searched.test is None
    assert searched.train is task.train
    assert len(pickle.dumps(searched)) < len(pickle.dumps(task))


@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=5),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_stratified_split_holds_out_a_share_of_each_class(
    sizes: list[int], share: float, seed: int
) -> None:
    """Kept and held out are disjoint, complete, and within one image of the share in each class."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    kept, held = stratified(labels, share, seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        out = int((labels[held] == label).sum())
        assert 1 <= out <= size - 1
        assert abs(out - share * size) <= 1


# --- batches ---


def slow_augmented(
    image: torch.Tensor, padding: int, down: int, right: int, mirror: bool
) -> torch.Tensor:
    """One image, shifted and mirrored the plain way: pad by reflection, cut, flip."""
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
    """The one gather gives, pixel for pixel, what pad, crop and flip give for each image."""
    padding = min(padding, height - 1, width - 1)
    split = random_split(12, channels, height, width, seed)
    loader = DeviceLoader(split, make_task(split, padding, flip), batch_size=5)
    batches = list(loader.batches(augment=True, generator=torch.Generator().manual_seed(seed)))
    assert [len(labels) for _, labels in batches] == [5, 5]
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
    """Of two epochs in a row each image is mirrored in one; without flip in none."""
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
    """Around its centre, cut off at the rim, in every channel; the rest is as without it."""
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


def test_batches_in_order_give_every_image_once() -> None:
    """Without a generator nothing is shuffled, augmented or left out."""
    split = random_split(11, 3, 4, 4)
    loader = DeviceLoader(split, make_task(split, 1, flip=True), batch_size=4)
    batches = list(loader.batches())
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    images = torch.cat([images for images, _ in batches])
    assert torch.equal((images * 255).round().to(torch.uint8), torch.from_numpy(split.images))
    assert torch.cat([labels for _, labels in batches]).tolist() == split.labels.tolist()


def test_training_batches_are_whole_and_leave_out_others_each_epoch() -> None:
    """Every step has the same number of images; what is left out changes from epoch to epoch."""
    split = random_split(11, 1, 4, 4)
    loader = DeviceLoader(split, make_task(split), batch_size=4)
    generator = torch.Generator().manual_seed(0)
    epochs = [
        [label for _, labels in loader.batches(generator=generator) for label in labels.tolist()]
        for _ in range(3)
    ]
    assert loader.steps == 2
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) > 1
    assert DeviceLoader(split, make_task(split), batch_size=64).steps == 1


def test_batches_share_memory_with_read_only_arrays() -> None:
    """Arrays in shared memory are neither copied nor written, and give no warning."""
    split = random_split(6, 3, 4, 4)
    split.images.flags.writeable = False
    before = split.images.copy()
    loader = DeviceLoader(split, make_task(split, 1), 3, memory_format=torch.channels_last)
    images, _ = next(loader.batches(augment=True, generator=torch.Generator()))
    assert loader._images.data_ptr() == split.images.ctypes.data
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (split.images == before).all()


# --- image_folder ---


def make_folder(root: Path, size: Callable[[int], tuple[int, int]] = lambda i: (6, 6)) -> Path:
    """Two classes of tiny PNGs: 4 for train, 2 for test of each; each of one grey."""
    for half, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            (root / half / name).mkdir(parents=True)
            for i in range(count):
                grey = 100 * label + 10 * i
                image = Image.new("RGB", size(i), (grey, grey, grey))
                image.save(root / half / name / f"{i}.png")
    return root


def folder_task(root: Path, **settings: int | float | bool) -> Task:
    """The task of a folder."""
    return load_task(TaskConfig("image_folder", folder=str(root), **settings))  # type: ignore[arg-type]


def test_image_folder_is_decoded_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time comes from the cache; a change of a file decodes again."""
    root = make_folder(tmp_path / "images")
    decoded = []
    read = sources._read_image
    monkeypatch.setattr(
        sources, "_read_image", lambda path, size: decoded.append(path) or read(path, size)
    )
    first = folder_task(root, validation=0.25)
    times = len(decoded)
    again = folder_task(root, validation=0.25)
    assert len(decoded) == times
    assert first.test is not None and again.test is not None
    assert rows(first.train) == rows(again.train)
    assert rows(first.test) == rows(again.test)
    assert first.test.images[:, 0, 0, 0].tolist() == [0, 10, 100, 110]
    assert first.test.labels.tolist() == [0, 0, 1, 1]
    assert [len(first.train), len(first.validation)] == [6, 2]
    assert len(list(cache.iterdir())) == 1
    Image.new("RGB", (6, 6), (99, 99, 99)).save(root / "test" / "ant" / "0.png")
    changed = folder_task(root, validation=0.25)
    assert changed.test is not None
    assert changed.test.images[0, 0, 0, 0] == 99
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_cache_is_decoded_again(tmp_path: Path, cache: Path) -> None:
    """A cache that was cut off is made anew."""
    root = make_folder(tmp_path / "images")
    first = folder_task(root)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert rows(folder_task(root).train) == rows(first.train)
    assert rows(folder_task(root).train) == rows(first.train)


@pytest.mark.parametrize("where", ["file", "", None])
def test_without_a_cache_images_are_decoded_each_time(
    where: str | None,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It cannot be made or the disk is full (one warning), or none is wanted."""
    root = make_folder(tmp_path / "images")
    expected = rows(folder_task(root).train)
    for file in cache.iterdir():
        file.unlink()
    if where is None:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(Path, "replace", Mock(side_effect=full))
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("WIDTHSEARCH_CACHE", str(tmp_path / where) if where else "")
    with caplog.at_level(logging.WARNING):
        assert rows(folder_task(root).train) == expected
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (where != "")
    assert all("so they are decoded each time; name another folder in" in line for line in said)
    assert list(cache.iterdir()) == []


def test_what_is_hidden_is_passed_over(tmp_path: Path) -> None:
    """Neither a class nor an image."""
    root = make_folder(tmp_path / "images")
    counts = [len(split) for split in (folder_task(root).train, folder_task(root).validation)]
    for hidden in ("train/.ipynb_checkpoints", "test/.git", "train/ant/.ipynb_checkpoints"):
        (root / hidden).mkdir()
        Image.new("RGB", (6, 6)).save(root / hidden / "0-checkpoint.png")
    (root / "train/bee/._0.png").write_bytes(b"of a Mac")
    task = folder_task(root)
    assert [len(split) for split in (task.train, task.validation)] == counts
    assert (task.classes, task.names) == (2, ("ant", "bee"))


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.float32, "F")])
def test_images_of_more_than_8_bits_are_refused(
    dtype: type[np.generic], mode: str, tmp_path: Path
) -> None:
    """In a folder and in a dataset: they would be clipped to white or black."""
    root = make_folder(tmp_path / "images")
    deep = Image.fromarray(np.full((6, 6), 3000, dtype))
    deep.save(root / "train" / "ant" / "9.tif")
    message = rf"8 bits a channel, but .*ant/9\.tif has mode '{mode}', .*scale its values to 0 to"
    with pytest.raises(DataError, match=message):
        folder_task(root)
    with pytest.raises(DataError, match=f"its image has mode '{mode}'; scale it to 8 bits"):
        task_from_datasets(Listed([(deep, 0)]), Listed([(deep, 0)]), TaskConfig("mine"))


def test_images_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    """They are refused with both names; with a size they are scaled and cropped."""
    root = make_folder(tmp_path / "images", lambda i: (6 + i, 6))
    with pytest.raises(DataError, match=r"0\.png is 6×6 and .*1\.png is 7×6; set `image_size`"):
        folder_task(root)
    assert folder_task(root, image_size=4).input_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("folder", "spoil", "message"),
    [
        ("nowhere", lambda root: None, r"train/<class>/\*\.jpg and <.*, but .*nowhere is missing"),
        ("train", lambda root: None, r"must be laid out as .*train/train is missing"),
        ("", lambda root: (root / "train/bee/0.png").rename(root / "0.png"), None),
        (
            "",
            lambda root: [path.unlink() for path in (root / "train/bee").iterdir()],
            r"every class needs images \(\.bmp .*\), but .*train/bee has none; lay them out as <f",
        ),
        (
            "",
            lambda root: (root / "train/bee").rename(root / "bee"),
            r"2 classes or more, but .*train has 1 .*lay the images out as <folder>/train/<class>/",
        ),
        ("", lambda root: (root / "test/cat").mkdir(), "test also has 'cat'; remove it, or add it"),
        (
            "",
            lambda root: (root / "train/ant/0.png").write_bytes(b"no image"),
            r"train/ant/0\.png is not .*mend or remove it",
        ),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, folder: str, spoil: Callable[[Path], object], message: str | None
) -> None:
    """Each gets one line that names the file or folder; a stray file beside train does no harm."""
    root = make_folder(tmp_path / "images")
    spoil(root)
    if message is None:
        folder_task(root / folder)
        return
    with pytest.raises(DataError, match=message) as error:
        folder_task(root / folder)
    assert "\n" not in str(error.value)


# --- cifar10 ---


def test_cifar10_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arrays become N, C, H, W; by default it lies in the cache, and crops and flips are on."""
    asked = []

    class Small:
        """A CIFAR-10 of four images."""

        classes: ClassVar[list[str]] = ["plane", "car"]

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            asked.append((root, train, download))
            self.data = np.random.default_rng(train).integers(0, 256, (4, 32, 32, 3), np.uint8)
            self.targets = [0, 1, 0, 1]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Small)
    task = load_task("cifar10")
    folder = tmp_path / "cache" / "widthsearch" / "cifar10"
    assert asked == [(folder, True, True), (folder, False, True)]
    assert task.test is not None
    expected = np.random.default_rng(False).integers(0, 256, (4, 32, 32, 3), np.uint8)
    assert (task.test.images[2, 1] == expected[2, :, :, 1]).all()
    assert task.test.labels.tolist() == [0, 1, 0, 1]
    assert task.augmentation == Augmentation(crop_padding=4, flip=True)
    assert task.names == ("plane", "car")
    plain = load_task(TaskConfig("cifar10", folder="~", crop_padding=0, flip=False))
    assert asked[-1][0] == Path.home()
    assert plain.augmentation == Augmentation(crop_padding=0, flip=False)
    monkeypatch.setenv("WIDTHSEARCH_CACHE", "")
    with pytest.raises(
        DataError, match="WIDTHSEARCH_CACHE is empty, so there is none; set `folder"
    ):
        load_task("cifar10")


def test_cifar10_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says where it was looked for and what to put there."""

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no\nroute")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", unreachable)
    message = r"must lie in .*mine or be .*no route.*put cifar-10-python\.tar\.gz there"
    with pytest.raises(DataError, match=message) as error:
        load_task(TaskConfig("cifar10", folder=str(tmp_path / "mine")))
    assert "\n" not in str(error.value)


# --- datasets of the user's own ---


class Listed:
    """A map-style dataset over a list."""

    def __init__(self, items: list[object]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        return self.items[i]


def test_a_pair_of_datasets_becomes_a_task() -> None:
    """Float tensors of 0 to 1 and PIL images give the same uint8 images."""
    values = torch.arange(8 * 16, dtype=torch.uint8).view(8, 1, 4, 4)
    labels = torch.arange(8) % 2
    floats = TensorDataset(values / 255, labels)
    pil = Listed(
        [(Image.fromarray(v[0].numpy()), int(y)) for v, y in zip(values, labels, strict=True)]
    )
    config = TaskConfig("mine", validation=0.25)
    task = task_from_datasets(floats, pil, config)
    assert task.test is not None
    assert (task.test.images == values.numpy()).all()
    assert sorted(rows(task.train) + rows(task.validation)) == sorted(rows(task.test))
    assert task.augmentation == Augmentation(0, flip=False)


def test_a_reference_names_a_pair_of_datasets(tmp_path: Path) -> None:
    """``path/to/file.py:function`` is imported and called."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def pair():\n"
        "    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)\n"
        "    half = TensorDataset(images, torch.arange(8) % 2)\n"
        "    return half, half\n"
        "def single():\n"
        "    return 3\n"
    )
    task = load_task(f"{file}:pair")
    assert task.input_shape == (3, 4, 4)
    assert task.std == (1.0, 1.0, 1.0)  # constant images are left at 0, not divided by 0
    with pytest.raises(
        DataError, match=r"must return two datasets \(train, test\), but returned 3"
    ):
        load_task(f"{file}:single")
    with pytest.raises(DataError, match="has no function 'pairs'; did you mean 'pair'"):
        load_task(f"{file}:pairs")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.zeros(1, 4, 4), 0.5), "item 2 does not: 'float' object"),
        ((torch.full((1, 4, 4), 3.0), 0), "values from 3 to 3 .leave normalisation to"),
        ((np.zeros((4, 4, 3)), 0), "its image is a ndarray"),
        ((torch.zeros(1, 4, 5), 0), r"shape \(1, 4, 5\), and the first has \(1, 4, 4\)"),
        ((torch.zeros(1, 4, 4, dtype=torch.int64), 0), "its image is of torch.int64"),
        ((torch.zeros(16), 0), r"its image has shape \(16,\)"),
        ((torch.zeros(1, 4, 4), -1), "label -1"),
        (torch.zeros(3, 4, 4), "too many values to unpack"),
    ],
)
def test_datasets_that_give_something_else(item: object, message: str) -> None:
    """The error says which item, what it is, and what is expected."""
    good = (torch.zeros(1, 4, 4), 0)
    with pytest.raises(DataError, match=message) as error:
        task_from_datasets(Listed([good, good, item]), Listed([good]), TaskConfig("mine"))
    assert str(error.value).startswith("train of task 'mine' must give (image, label)")


def test_classes_must_be_complete() -> None:
    """A gap in the labels, a lone image or a stranger in test is refused."""
    image = torch.zeros(1, 4, 4)
    few = Listed([(image, 0), (image, 0), (image, 2), (image, 2)])
    two = Listed([(image, 0), (image, 0), (image, 1), (image, 1)])
    with pytest.raises(DataError, match="'mine' has 0 images of class 1 of 3"):
        task_from_datasets(few, two, TaskConfig("mine"))
    with pytest.raises(DataError, match="label 2 in test and 2 classes in train"):
        task_from_datasets(two, few, TaskConfig("mine"))
    with pytest.raises(DataError, match="its length is 0"):
        task_from_datasets(two, Listed([]), TaskConfig("mine"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "mnist"}, "a task must be digits, cifar10, .*but was 'mnist'"),
        ({"name": "digits", "validation": 1.0}, "task.validation must be less than 1, but was 1.0"),
        ({"name": "digits", "crop_padding": -1}, "task.crop_padding must be .*, but was -1"),
        ({"name": "digits", "cutout": -1}, "task.cutout must be .*, but was -1"),
        ({"name": "digits", "crop_padding": 8}, "less than the image's side.*crop_padding=8"),
        ({"name": "digits", "folder": "x"}, "task: folder is for cifar10 and image_folder only"),
        ({"name": "cifar10", "image_size": 8}, "task: image_size is for image_folder only"),
        (
            {"name": "image_folder"},
            r"needs a folder, but has none; write `task: {name: image_folder, folder: path}` for a "
            r"folder with <folder>/train/<class>/\*\.jpg and <folder>/test/<class>/\*\.jpg",
        ),
        (
            {"name": "image_folder", "folder": "x", "image_size": 0},
            "task.image_size must be greater than or equal to 1, but was 0",
        ),
        ({"name": "digits", "fold": 3}, "unknown key 'task.fold'; did you mean 'folder'"),
    ],
)
def test_configurations_that_cannot_be(config: dict[str, object], message: str) -> None:
    """Each is refused with the rule, the field and its value."""
    with pytest.raises(DataError, match=message):
        load_task(TaskConfig(**config))  # type: ignore[arg-type]
