"""Configurations: each broken rule is one line with the place, the rule and the value."""

from __future__ import annotations

from typing import Any

import pytest
from refusals import refusals
from strategies import refused

from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.errors import DataError, StudyError
from widthsearch.latency.config import LatencyConfig
from widthsearch.training.recipe import Recipe


@refusals("recipe")
def test_an_invalid_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    """The place is the section ``recipe``, as in a study file."""
    with refused(StudyError, message):
        Recipe(**values)


@refusals("latency")
def test_an_invalid_latency_configuration_is_refused(values: dict[str, Any], message: str) -> None:
    """The place is the section ``latency``, as in a study file."""
    with refused(StudyError, message):
        LatencyConfig(**values)


@refusals("task")
def test_an_invalid_task_is_refused(values: dict[str, Any], message: str) -> None:
    """The place is the section ``task``, as in a study file."""
    with refused(DataError, message):
        TaskConfig(**values)


def test_an_unknown_key_and_a_positional_argument_are_named() -> None:
    """An unknown key has a hint; a positional argument has its field's name."""
    with pytest.raises(StudyError, match=r"unknown key 'recipe.epoch'; did you mean 'epochs'"):
        Recipe(epoch=3)  # type: ignore[call-arg]
    with pytest.raises(StudyError, match=r"recipe.batch_size must be a whole number, but was 'x'"):
        Recipe(3, "x")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"augmentation.crop_padding must be .*, but was -1"):
        Augmentation(-1)
