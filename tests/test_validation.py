"""Configurations: each broken rule is one line with the place, the rule and the value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.errors import DataError, StudyError
from widthsearch.latency.config import LatencyConfig
from widthsearch.training.recipe import Recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be greater than or equal to 1, but was 0"),
        ({"batch_size": 1}, "batch_size must be greater than or equal to 2, but was 1"),
        ({"lr": -0.1}, "lr must be greater than 0, but was -0.1"),
        ({"lr": math.nan}, "lr must be a finite number, but was nan"),
        ({"momentum": 1.0}, "momentum must be less than 1, but was 1.0"),
        ({"weight_decay": -1}, "weight_decay must be greater than or equal to 0, but was -1"),
        ({"warmup_epochs": -1}, "warmup_epochs must be greater than or equal to 0, but was -1"),
        ({"label_smoothing": 1.0}, "label_smoothing must be less than 1, but was 1.0"),
        ({"schedule": "step"}, "schedule must be 'cosine', 'one_cycle' or 'constant', but was 'st"),
        ({"precision": "fp16"}, "precision must be 'auto', 'fp32' or 'bf16', but was 'fp16'"),
        ({"momentum": 0.0}, ": momentum must be greater than 0 with nesterov, but was 0; set nest"),
        ({"epochs": 3, "warmup_epochs": 3}, ": warmup_epochs must be less than epochs, but they "),
    ],
)
def test_an_invalid_recipe_is_refused(change: dict[str, Any], message: str) -> None:
    """The place is the section ``recipe``, as in a study file."""
    with pytest.raises(StudyError, match=rf"^recipe\.?{message}"):
        Recipe(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be greater than or equal to 1, but was 0"),
        ({"threads": 0}, "threads must be greater than or equal to 1, but was 0"),
        ({"pairs": 3}, "pairs must be greater than or equal to 4, but was 3"),
        ({"backend": "onnx"}, "backend must be 'eager', 'graph', 'compile' or 'onnxruntime', but "),
        ({"dtype": "int8"}, "dtype must be 'float32' or 'bfloat16', but was 'int8'"),
        ({"backend": "graph"}, ": backend 'graph' needs a CUDA device, but device is 'cpu'; set "),
        ({"backend": "onnxruntime", "device": "cuda"}, ": .* they are 'cuda' and 'float32'; set"),
        ({"backend": "onnxruntime", "dtype": "bfloat16"}, ": .* they are 'cpu' and 'bfloat16'; s"),
    ],
)
def test_an_invalid_latency_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    """The place is the section ``latency``, as in a study file."""
    with pytest.raises(StudyError, match=rf"^latency\.?{message}"):
        LatencyConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": 1.0}, "validation must be less than 1, but was 1.0"),
        ({"split_seed": -1}, "split_seed must be greater than or equal to 0, but was -1"),
        ({"crop_padding": -1}, "crop_padding must be greater than or equal to 0, but was -1"),
        ({"cutout": -1}, "cutout must be greater than or equal to 0, but was -1"),
        ({"image_size": 0}, "image_size must be greater than or equal to 1, but was 0"),
        ({"folder": "x"}, ": folder is for cifar10 and image_folder only, but task 'digits' has"),
        ({"name": "cifar10", "image_size": 8}, ": image_size is for image_folder only, but task"),
        (
            {"name": "image_folder"},
            r": 'image_folder' needs a folder, but has none; write `task: {name: image_folder, "
            r"folder: path}` for a folder with <folder>/train/<class>/\*\.jpg and <folder>/test/",
        ),
    ],
)
def test_an_invalid_task_is_refused(change: dict[str, Any], message: str) -> None:
    """The place is the section ``task``, as in a study file."""
    with pytest.raises(DataError, match=rf"^task\.?{message}"):
        TaskConfig(**{"name": "digits", **change})


def test_an_unknown_key_and_a_positional_argument_are_named() -> None:
    """An unknown key has a hint; a positional argument has its field's name."""
    with pytest.raises(StudyError, match=r"unknown key 'recipe.epoch'; did you mean 'epochs'"):
        Recipe(epoch=3)  # type: ignore[call-arg]
    with pytest.raises(StudyError, match=r"recipe.batch_size must be a whole number, but was 'x'"):
        Recipe(3, "x")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"augmentation.crop_padding must be .*, but was -1"):
        Augmentation(-1)
