"""The trainer of a study, its data, and the task of its methods, from the configuration."""

from __future__ import annotations

from typing import Any

from widthsearch.data.tasks import OwnTask
from widthsearch.errors import DataError, StudyError, located
from widthsearch.study.config import StudyConfig
from widthsearch.training.job import Job, own_job
from widthsearch.training.recipe import OwnRecipe, recipe_values
from widthsearch.training.trainer import train_classifier
from widthsearch.utils.references import check_takes, load_function, reference_of


def study_job(config: StudyConfig, *, final: bool = False) -> Job:
    """The built-in trainer, or the study's own, with the study's recipe.

    Args:
        config: The study's configuration.
        final: Whether final trainings are meant.

    Raises:
        StudyError: The own trainer cannot be imported or is none, or the recipe does not fit it.
    """
    recipe, trainer, content = config.recipe, config.trainer, config.to_json()
    (content["task"] or {}).pop("loading", None)  # it changes no number
    identity = {
        **{key: content[key] for key in ("trainer", "task", "data")},
        **({"final_data": content["final_data"]} if final else {}),
        "recipe": recipe_values(recipe),
    }
    if trainer is None:
        assert not isinstance(recipe, OwnRecipe)
        name = "the built-in trainer"
        metric = config.metric.name
        return Job(train_classifier, name, recipe, recipe.epochs, metric, identity)
    assert isinstance(recipe, OwnRecipe)
    function = load_function(trainer, StudyError)
    return own_job(function, reference_of(trainer), recipe, config.metric.name, identity)


def own_task(config: StudyConfig) -> OwnTask | None:
    """The loss and the batches of a study with a trainer of its own; None where it names none.

    Raises:
        StudyError: One of them cannot be imported.
        DataError: One of them takes other arguments.
    """
    if config.loss is None or config.batches is None:
        return None
    loss, batches = (load_function(of, StudyError) for of in (config.loss, config.batches))
    return OwnTask(loss, batches, reference_of(config.loss))


def check_functions(config: StudyConfig) -> None:
    """Import the functions of data that a configuration names, and check that they take nothing.

    Those of loss and batches are checked where :func:`own_task` makes the task.

    Raises:
        StudyError: One cannot be imported, or takes other arguments.
    """
    for key in ("data", "final_data"):
        if (function := getattr(config, key)) is not None:
            loaded = load_function(function, StudyError)
            check_takes(key, reference_of(function), loaded, (), StudyError)


def load_data(config: StudyConfig, *, final: bool) -> Any:
    """Call the study's own ``data`` function, or ``final_data`` for a final training.

    Returns:
        None where the configuration names no function.

    Raises:
        DataError: The function cannot be imported, fails, or returns None.
    """
    function = (config.final_data if final else None) or config.data
    if function is None:
        return None
    try:
        data = load_function(function, DataError)()
    except (Exception, SystemExit) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data {reference_of(function)!r} failed: {located(error)}") from error
    if data is None:
        raise DataError(
            f"data must return what the trainer reads, but {reference_of(function)!r} returned "
            "None: add a `return`"
        )
    return data
