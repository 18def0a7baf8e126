"""Studies on images in files: final training, messages, and the reading of images by Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import tiny
from pictures import make_pictures
from torch import nn

from widthsearch.api import Study
from widthsearch.data.folders import ImageFiles
from widthsearch.errors import ImageError
from widthsearch.export import train
from widthsearch.runner.reading import put
from widthsearch.space.search_space import SearchSpace


def network() -> nn.Module:
    """A convolution for two classes."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    )


def study(folder: Path, pictures: Path, loading: str) -> Study:
    """A study of one trial."""
    config = tiny.config(
        task={"name": "image_folder", "folder": str(pictures), "loading": loading},
        recipe={"epochs": 1, "batch_size": 32, "precision": "fp32"},
        trials=1,
    )
    space = SearchSpace.from_model(network, (3, 8, 8), name="net", step=4)
    return Study(config, space, folder=folder / loading)


def test_a_final_training_is_the_same_from_memory_and_from_files(tmp_path: Path) -> None:
    """The run says where the images are, and its driver has read none of them."""
    pictures = make_pictures(tmp_path / "pictures")
    cards = []
    for loading, place in (("resident", "kept in memory"), ("stream", "streamed from their files")):
        made = study(tmp_path, pictures, loading)
        events = [each.message for each in tiny.run(made) if each.level == "event"]
        assert any(f"144 images of 3×8×8 are {place}" in line for line in events)
        assert isinstance(made.task.train.images, ImageFiles)
        lines: list[str] = []
        cards.append(train(made, made.pick("best"), seeds=1, on_message=lines.append))
        # Those of the validation split are evaluated on beside, and are read for that.
        assert any("of 156" in line for line in lines) == (loading == "resident")
    tested = [card["test_accuracy"] for card in cards]
    assert tested[0] == tested[1]
    assert cards[0]["request"] == cards[1]["request"]
    data = made.data(final=True)
    assert len(data.train) == 120
    assert len(made.data().train) == 120 - len(data.validation)


@pytest.mark.ray
def test_ray_reads_images_into_its_memory(shared_ray: None, tmp_path: Path) -> None:
    """With a bar; a damaged image is the error of the reading, in one line."""
    made = study(tmp_path, make_pictures(tmp_path / "pictures"), "resident")
    task, lines = made.task.for_search(), []
    read = ray.get(put(task, "the data", lines.append)).load()
    assert isinstance(read.train.images, np.ndarray)
    assert not read.train.images.flags.writeable  # Ray's own memory
    assert (read.train.images == task.train.read().images).all()
    assert lines[-1] == "reading images ▕████████████████████▏ 120 of 120"
    assert isinstance(task.validation.images, ImageFiles)
    damaged = Path(task.validation.images.path(0))
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(ImageError, match=rf"{damaged.name} is not .*; repair or remove it$"):
        put(task, "the data", lines.append)
