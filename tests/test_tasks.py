"""Tasks: their splits, their configuration, and the user's own datasets."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import rows
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import TensorDataset

from widthsearch.data import sources
from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.data.loaders import DeviceLoader
from widthsearch.data.sources import Split
from widthsearch.data.tasks import load_task, stratified, task_from_datasets
from widthsearch.errors import DataError

# --- splits ---


def test_digits_are_stratified() -> None:
    """All 1,797 digits are used once, and every split has every class in proportion."""
    task = load_task("digits")
    assert task.test is not None
    splits = (task.train, task.validation, task.test)
    assert [len(split) for split in splits] == [1079, 359, 359]
    assert sorted(r for s in splits for r in rows(s)) == sorted(rows(sources.digits()))
    for split in splits:
        counts = np.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 0.06 * counts.max() + 1
        # With one channel odd strides are legal, and would be taken for channels_last.
        assert split.images.strides == (64, 64, 8, 1)
    assert task.input_shape == (1, 8, 8)
    assert task.classes == 10
    assert task.names == tuple("0123456789")
    assert task.train.images.max() == 255
    assert task.augmentation == Augmentation(crop_padding=1, flip=False)


def test_the_split_seed_changes_only_train_and_validation() -> None:
    """Same seed, same splits; another seed holds out other images of the same training half."""
    first, again, other = (load_task(TaskConfig("digits", split_seed=seed)) for seed in (0, 0, 1))
    assert first.test is not None and other.test is not None
    assert rows(first.train) == rows(again.train)
    assert rows(first.validation) == rows(again.validation)
    assert rows(first.validation) != rows(other.validation)
    assert rows(first.test) == rows(other.test)


def test_the_training_split_is_normalised() -> None:
    """Its images have mean 0 and standard deviation 1."""
    task = load_task("digits")
    images, _ = DeviceLoader(task.train, task, len(task.train)).plain()
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_a_search_has_no_test_split() -> None:
    """The task of its workers lacks the test split, and shares the other arrays."""
    task = load_task("digits")
    searched = task.for_search()
    assert searched.test is None
    assert searched.train is task.train
    assert len(pickle.dumps(searched)) < len(pickle.dumps(task))


@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=5), st.floats(0.01, 0.99), st.integers(0, 5)
)
def test_stratified_split_holds_out_a_share_of_each_class(
    sizes: list[int], share: float, seed: int
) -> None:
    """Kept and held out are disjoint, complete, and within one image of the share in each class."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    numbers = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    kept, held = stratified(Split(numbers, labels), share, seed)
    assert sorted([*kept.images.flat, *held.images.flat]) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        out = int((held.labels == label).sum())
        assert 1 <= out <= size - 1
        assert abs(out - share * size) <= 1


# --- the user's own datasets ---


def test_a_pair_of_datasets_becomes_a_task() -> None:
    """Float tensors of 0 to 1 and PIL images give the same uint8 images."""
    values = torch.arange(8 * 16, dtype=torch.uint8).view(8, 1, 4, 4)
    labels = torch.arange(8) % 2
    floats = TensorDataset(values / 255, labels)
    pil = [(Image.fromarray(v[0].numpy()), int(y)) for v, y in zip(values, labels, strict=True)]
    config = TaskConfig("mine", validation=0.25)
    task = task_from_datasets(floats, pil, config)
    assert task.test is not None
    assert (task.test.images == values.numpy()).all()
    assert sorted(rows(task.train) + rows(task.validation)) == sorted(rows(task.test))
    assert task.augmentation == Augmentation(0, flip=False)


def test_a_reference_names_a_pair_of_datasets(tmp_path: Path) -> None:
    """``path/to/file.py:function`` is imported and called; its faults are one line."""
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
        "def exits():\n"
        "    raise SystemExit(3)\n"
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
    with pytest.raises(DataError, match="exits' failed: SystemExit: 3"):
        load_task(f"{file}:exits")


def test_classes_must_be_complete() -> None:
    """A gap in the labels, or a class that is in test only, is refused."""
    image = torch.zeros(1, 4, 4)
    few = [(image, 0), (image, 0), (image, 2), (image, 2)]
    two = [(image, 0), (image, 0), (image, 1), (image, 1)]
    with pytest.raises(DataError, match="'mine' has 0 images of class 1 of 3"):
        task_from_datasets(few, two, TaskConfig("mine"))
    with pytest.raises(DataError, match="label 2 in test and 2 classes in train"):
        task_from_datasets(two, few, TaskConfig("mine"))
    with pytest.raises(DataError, match="its length is 0"):
        task_from_datasets(two, [], TaskConfig("mine"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig("mnist"), "a task must be digits, cifar10, .*but was 'mnist'"),
        (TaskConfig("digit"), "but was 'digit'; did you mean 'digits'"),
        (TaskConfig("digits", crop_padding=8), "less than the image's side.*crop_padding=8"),
    ],
)
def test_an_impossible_task_is_refused(config: TaskConfig, message: str) -> None:
    """The message names the rule and the value."""
    with pytest.raises(DataError, match=message):
        load_task(config)
