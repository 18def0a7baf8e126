"""Folders of small images in files, and their tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from widthsearch.data.config import TaskConfig
from widthsearch.data.tasks import Task, load_task


def make_pictures(root: Path, train: int = 120, test: int = 24, side: int = 8) -> Path:
    """PNGs of noise in two classes, one of them brighter."""
    rng = np.random.default_rng(0)
    for half, count in (("train", train), ("test", test)):
        for i in range(count):
            folder = root / half / ("dark", "bright")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 128, (side, side, 3)) + 100 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


def pictures(root: Path, **changes: Any) -> Task:
    """The task of a folder, with every augmentation."""
    values = {"crop_padding": 2, "cutout": 3, "validation": 0.2, **changes}
    return load_task(TaskConfig("image_folder", str(root), **values))
