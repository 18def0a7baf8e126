"""Configurations: each broken rule is one line with the place, the rule and the value."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import study_grammar as grammar
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusals
from strategies import refused

from widthsearch.data.config import Augmentation, TaskConfig
from widthsearch.errors import DataError, StudyError, WidthsearchError
from widthsearch.latency.config import LatencyConfig
from widthsearch.study.config import StudyConfig
from widthsearch.training.optimizers import check_optimizer
from widthsearch.training.recipe import Recipe
from widthsearch.utils.validation import filled


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


@dataclass(frozen=True)
class Warmup:
    """A part of a recipe."""

    steps: int = 0


@dataclass(frozen=True)
class Own:
    """The recipe of a trainer of one's own."""

    batch: int = 32
    lr: float | None = None
    flip: bool = False
    either: int | bool = 0
    sizes: tuple[int, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    warmup: Warmup = Warmup()
    anything: Any = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": True}, "recipe.batch must be a whole number, but was True"),
        ({"lr": False}, "recipe.lr must be a number, but was False"),
        ({"sizes": [8, True]}, "recipe.sizes.1 must be a whole number, but was True"),
        ({"weights": {"a": True}}, "recipe.weights.a must be a number, but was True"),
        ({"warmup": {"steps": True}}, "recipe.warmup.steps must be a whole number, but was True"),
        ({"batch": 2.5}, "recipe.batch must be a whole number, but was 2.5"),
    ],
)
def test_a_boolean_is_no_number_of_an_own_recipe(values: dict[str, Any], message: str) -> None:
    """Nor is a part of a number a whole one."""
    with refused(StudyError, message):
        filled(Own, values, "recipe")


def test_booleans_where_they_belong_and_whole_floats_are_taken() -> None:
    """In fields that may be true or false, or anything."""
    given = {"flip": True, "either": True, "anything": True, "batch": 64.0}
    assert filled(Own, given, "recipe") == Own(64, flip=True, either=True, anything=True)


@given(grammar.documents(), st.booleans(), st.data())
def test_no_number_of_a_study_is_a_boolean(
    document: dict[str, Any], value: bool, data: st.DataObject
) -> None:
    """Whatever its section; keys of an own recipe are the trainer's."""
    _read(document)
    document = copy.deepcopy(document)
    free = {("recipe", "lr")} if "trainer" in document else set()
    numbers = [
        (*path, last)
        for *path, last in grammar.places(document)
        if type(_at(document, path)[last]) in (int, float) and (*path, last) not in free
    ]
    *path, last = data.draw(st.sampled_from(numbers))
    _at(document, path)[last] = value
    with pytest.raises(WidthsearchError):  # perhaps of another rule, which it breaks as well
        _read(document)


def _at(document: Any, path: list[Any]) -> Any:
    for key in path:
        document = document[key]
    return document


def _read(document: dict[str, Any]) -> None:
    """Read a study, with what is read where its methods and its optimizer are made."""
    config = StudyConfig(**document)
    for method in config.proposers:
        method.make()
    if isinstance(config.recipe, Recipe):
        check_optimizer(config.recipe)
