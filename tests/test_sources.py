"""Sources of images: folders, CIFAR-10, and the user's own datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.data.tasks import Task, load_task, task_from_datasets
from widthsearch.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder is empty."""
    monkeypatch.delenv("WIDTHSEARCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def test_an_image_folder_is_read_in_order(tmp_path: Path) -> None:
    """Its images have the order of their names, and nothing is written beside them."""
    root = make_folder(tmp_path / "images")
    before = sorted(root.rglob("*"))
    task = folder_task(root, validation=0.25)
    assert task.test is not None
    assert isinstance(task.test.images, np.ndarray)
    assert task.test.images[:, 0, 0, 0].tolist() == [0, 10, 100, 110]
    assert task.test.labels.tolist() == [0, 0, 1, 1]
    assert [len(task.train), len(task.validation)] == [6, 2]
    assert sorted(tmp_path.rglob("*")) == sorted([root, *before])


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    """A hidden folder is no class, a hidden file no image."""
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
    """In a folder and in a dataset: PIL would clip them to white or black."""
    root = make_folder(tmp_path / "images")
    deep = Image.fromarray(np.full((6, 6), 3000, dtype))
    deep.save(root / "train" / "ant" / "9.tif")
    message = rf"8 bits per channel, but .*ant/9\.tif has mode '{mode}', .*scale its values to 0 to"
    with pytest.raises(DataError, match=message):
        folder_task(root)
    with pytest.raises(DataError, match=f"its image has mode '{mode}'; scale it to 8 bits"):
        task_from_datasets([(deep, 0)], [(deep, 0)], TaskConfig("mine"))


def test_images_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    """Without a size the error names a file; with one, images are scaled and cropped."""
    root = make_folder(tmp_path / "images", lambda i: (6 + i, 6))
    with pytest.raises(DataError, match=r"others are 6×6 and .*1\.png is 7×6; set `image_size`"):
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
            r"train/ant/0\.png is not .*repair or remove it",
        ),
    ],
)
def test_a_wrong_layout_is_refused(
    tmp_path: Path, folder: str, spoil: Callable[[Path], object], message: str | None
) -> None:
    """The error is one line with the file or folder; a stray file next to train is ignored."""
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
    """Its arrays become N, C, H, W; it is in the cache by default, and crops and flips are on."""
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
        DataError, match=r"WIDTHSEARCH_CACHE is empty, .* write `task: {name: cifar10, folder: p"
    ):
        load_task("cifar10")


def test_cifar10_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the folder and the file to put there."""

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no\nroute")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", unreachable)
    message = r"must be in .*mine or be .*no route.*put cifar-10-python\.tar\.gz there"
    with pytest.raises(DataError, match=message) as error:
        load_task(TaskConfig("cifar10", folder=str(tmp_path / "mine")))
    assert "\n" not in str(error.value)


# --- the user's own datasets ---


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.zeros(1, 4, 4), 0.5), "label 0.5; give the task the loss of"),
        ((torch.full((1, 4, 4), 3.0), 0), "values from 3 to 3 .leave normalisation to"),
        ((np.zeros((4, 4, 3)), 0), "its image is a ndarray"),
        ((torch.zeros(1, 4, 5), 0), r"shape \(1, 4, 5\), and the first has \(1, 4, 4\)"),
        ((torch.zeros(1, 4, 4, dtype=torch.int64), 0), "its image is of torch.int64"),
        ((torch.zeros(16), 0), r"its image has shape \(16,\); give the study a `trainer`"),
        ((torch.zeros(1, 4, 4), -1), "label -1"),
        (torch.zeros(3, 4, 4), "too many values to unpack"),
    ],
)
def test_an_invalid_item_of_a_dataset_is_refused(item: object, message: str) -> None:
    """The error names the item, its fault and the rule."""
    good = (torch.zeros(1, 4, 4), 0)
    with pytest.raises(DataError, match=message) as error:
        task_from_datasets([good, good, item], [good], TaskConfig("mine"))
    assert str(error.value).startswith("train of task 'mine' must have items (image, label)")
