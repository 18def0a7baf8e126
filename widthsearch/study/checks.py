"""Checks before a study is driven: of its parts against each other, and against its storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from widthsearch.bayesopt.metric import COSTS, EXACT_COSTS
from widthsearch.data.config import REPORTED
from widthsearch.data.tasks import Task
from widthsearch.errors import StudyError
from widthsearch.latency.config import LatencyConfig
from widthsearch.modules.source import source_digest
from widthsearch.space.computation import outputs, random_inputs
from widthsearch.space.cost import EXACT
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.earlier import EarlierStudy
from widthsearch.study.job import check_functions, study_job
from widthsearch.study.progress import Notify
from widthsearch.study.storage import SpaceRecord, Store
from widthsearch.training.optimizers import check_optimizer
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import check_input_shape, check_model, check_recipe
from widthsearch.utils.devices import check_device

_FIXED = (
    *("task", "trainer", "data", "recipe", "metric", "objectives", "latency", "seed"),
    *("loss", "batches", "start", "weights", "importance", "prior"),
)
"""Sections that make trials and proposals comparable: fixed once a study has begun."""

_FREE = ("task.loading",)
"""Keys in those sections that change no number."""

_DERIVED = ("proposal:", "precision", "concurrency")
"""Beginnings of the storage's keys whose values follow from the configuration."""


def check_parts(config: StudyConfig, spaces: Mapping[str, SearchSpace], task: Task | None) -> None:
    """Check that the spaces, the task, the trainer, the limits and the devices fit together.

    Args:
        config: The study's configuration.
        spaces: Its spaces by name.
        task: Its task; None where it has a trainer of its own.

    Raises:
        DataError: A space was traced at another input shape, or its base does not fit the task.
        StudyError: No network is within the limits, a batch is larger than the training split,
            costs are too large to be compared exactly, the recipe does not fit the study's own
            trainer, or its optimizer does not exist or take its arguments, or a function that
            the configuration names is not there or takes other arguments.
        DeviceError: A device is not there.
    """
    study_job(config)
    check_functions(config)
    if isinstance(config.recipe, Recipe):
        check_optimizer(config.recipe)
    for space in spaces.values():
        _check_costs(space)
    _check_limits(config, spaces)
    if task is not None:
        assert isinstance(config.recipe, Recipe)
        check_recipe(config.recipe, task)
        for space in spaces.values():
            check_input_shape(space, task)
    if config.ray_address is None:
        device = check_device(config.device)
        for space in spaces.values():
            if task is not None:
                check_model(space.build(space.base, seed=config.seed).to(device), task, device)
        if "latency_ms" in config.objectives:
            check_device((config.latency or LatencyConfig()).device)


def check_reported(config: StudyConfig, task: Task) -> None:
    """Check that the built-in trainer reports the metric and the objectives.

    Raises:
        StudyError: It does not.
    """
    reported = (*REPORTED[task.loss_name], "loss")
    for name in (config.metric.name, *config.objectives):
        if name not in (*reported, *COSTS):
            raise StudyError(
                f"the built-in trainer reports {', '.join(reported[:-1])} and loss for task "
                f"{task.name!r}, but the study needs {name}: change `metric` or `objectives`, or "
                "add a `trainer` that reports it"
            )


def _check_costs(space: SearchSpace) -> None:
    """Check that costs are exact as float64, which points of a front are."""
    for name, cost in asdict(space.cost([axis.max_width for axis in space.axes])).items():
        if cost > EXACT:
            raise StudyError(
                f"a study's costs must be at most 2^53 = {EXACT:,}, so that they are compared "
                f"exactly, but the widest network of space {space.name!r} has {cost:,} {name}: "
                "lower the axes' max_width or the input shape"
            )


def _check_limits(config: StudyConfig, spaces: Mapping[str, SearchSpace]) -> None:
    """Check that exact costs can be within the limits."""
    for name, (low, high) in config.limits.items():
        if name not in EXACT_COSTS:
            continue
        ends = [
            getattr(space.cost([getattr(axis, end) for axis in space.axes]), name)
            for space in spaces.values()
            for end in ("min_width", "max_width")
        ]
        if min(ends) > high or max(ends) < low:
            raise StudyError(
                f"some network must be within the limits, but limits.{name} is [{low:g}, "
                f"{high:g}] and networks have {min(ends):,} to {max(ends):,}: change the "
                "limits or the constraints"
            )


def met_budgets(
    budgets: Sequence[float], spaces: Mapping[str, SearchSpace], notify: Notify
) -> tuple[float, ...]:
    """The budgets that some network meets, or that the widest one is within; it stands for those.

    All of them where none is met: that is an error of the families.

    Args:
        budgets: Shares of the MACs of the first space's base.
        spaces: The spaces by name.
        notify: Called with a line on the others.

    Raises:
        StudyError: All are above the widest network, as percentages are.
    """
    first = next(iter(spaces.values()))
    base = first.cost(first.base).macs
    least = min(s.cost([a.min_width for a in s.axes]).macs for s in spaces.values()) / base
    most = max(s.cost([a.max_width for a in s.axes]).macs for s in spaces.values()) / base
    above = [budget for budget in budgets if budget > most]
    listed = ", ".join(f"{budget:g}" for budget in above)
    shares = "budgets are shares of the base's MACs, so that 0.1 means 10%"
    if len(above) == len(budgets):
        raise StudyError(
            f"some network must be as wide as a budget, but budgets are {listed} and networks have "
            f"{least:.3g} to {most:.3g} of the base's MACs; {shares}"
        )
    if above:
        notify(
            f"budgets {listed} are above the widest network, which has {most:.3g} of the base's "
            f"MACs and stands for them; {shares}",
            "event",
        )
    met = tuple(budget for budget in budgets if budget >= least)
    if met and len(met) < len(budgets):
        left = ", ".join(f"{budget:g}" for budget in budgets if budget < least)
        notify(
            f"budgets {left} are left out: the narrowest network has {least:.3f} of the base's "
            "MACs",
            "event",
        )
    return met or tuple(budgets)


def claim(
    store: Store,
    config: StudyConfig,
    spaces: Mapping[str, SearchSpace],
    weights: dict[str, Any] | None = None,
    earlier: Sequence[EarlierStudy] = (),
) -> None:
    """Write the configuration and the spaces into the storage, or compare them with what it holds.

    So it does with the weights of ``start: extract``, as :meth:`BaseWeights.to_json` has them. The
    trials of earlier studies are kept as they are when the first trial begins.

    Until a trial has begun only the objectives are kept: the storage's study was made with them.

    Raises:
        StudyError: A fixed section of the configuration, or a space, is another one.
    """
    name, now = config.name, config.to_json()
    described = [_described(space) for space in spaces.values()]
    stored, before = store.attribute("spaces"), store.attribute("config")
    begun = stored is not None and store.begun
    fixed = _FIXED if begun else ("objectives",)
    defaults = StudyConfig(name=name, trials=1).to_json()  # of keys that are new since then
    for key in fixed if stored is not None else ():
        for place, old, new in _differences(key, before.get(key, defaults[key]), now[key]):
            raise StudyError(
                f"a study keeps its {key}, but {name!r} was begun with {place}={old!r} and "
                f"now has {new!r}: put it back, or give the study another name"
            )
    if begun and (of_begun := store.attribute("weights")) != weights:
        raise StudyError(
            f"a study keeps the weights that it starts from, but the content of {config.weights!r} "
            f"or its channels' importance has changed since {name!r} was begun "
            f"({of_begun and of_begun['digest']}, now {weights and weights['digest']}): put it "
            "back, or give the study another name"
        )
    if begun:
        _check_spaces(name, stored, described)
    elif stored is not None and (before, stored) != (now, described):
        store.forget(*_DERIVED)
    store.set_attribute("config", now)
    if not begun and weights != store.attribute("weights"):
        store.set_attribute("weights", weights)
    kept = [study.to_json() for study in earlier]
    if not begun and kept != (store.attribute("prior") or []):
        store.set_attribute("prior", kept)
    if not begun:
        store.set_attribute("spaces", described)  # last: with it the study is there


def _check_spaces(name: str, stored: list[Any], now: list[Any]) -> None:
    begun, given = ([space["name"] for space in each] for each in (stored, now))
    if begun != given and len(begun) + len(given) > 2:
        raise StudyError(
            f"a study keeps its spaces, but {name!r} was begun with {', '.join(begun)} and is "
            f"now given {', '.join(given)}: put them back, or give the study another name"
        )
    for old, new in zip(stored, now, strict=True):
        if old["fingerprint"] != new["fingerprint"]:
            raise StudyError(
                f"a study keeps its space, but {name!r} was begun with {old['name']!r} "
                f"({len(old['axes'])} axes, {old['macs']:,} MACs) and is now given "
                f"{new['name']!r} ({len(new['axes'])} axes, {new['macs']:,} MACs): put the space "
                "back, or give the study another name"
            )
        if changed := _changed_code(old, new):
            raise StudyError(
                f"a study keeps its model, but {changed} since {name!r} was begun: put the code of "
                f"{old['name']!r} back, or give the study another name"
            )


def _changed_code(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What has changed in a model's code; a study of an older version has no digests."""
    before, after = old.get("output", new["output"]), new["output"]
    if len(before) != len(after) or not np.allclose(before, after, 1e-3, equal_nan=True):
        return "its output on a fixed input has changed"
    if old.get("code") and new["code"] and old["code"] != new["code"]:
        return "the source of its classes has changed"
    return None


def _described(space: SearchSpace) -> dict[str, Any]:
    """The values that a storage keeps of a space."""
    return {
        **SpaceRecord.of(space).to_json(),
        "fingerprint": space.fingerprint,
        "macs": space.cost(space.base).macs,
        "code": source_digest(space.model.template),
        "output": _fixed_output(space),
    }


def _fixed_output(space: SearchSpace) -> list[float]:
    """A few figures of the base's output at seed 0; rounding differs between machines."""
    found: list[float] = []
    for out in outputs(space.build(space.base, seed=0).eval(), random_inputs(space, 2, seed=0)):
        values = out.double().flatten()
        weights = torch.linspace(1, 2, len(values), dtype=torch.float64)
        found += [float(f"{x:.6g}") for x in (values.abs().mean(), (values * weights).abs().mean())]
        found += [float(f"{x:.6g}") for x in values[:4]]
    return found


def _differences(place: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The leaves at which two JSON values differ, each with its place."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in now.keys() & before.keys():  # a key that is new since then has its default
            yield from _differences(f"{place}.{key}", before[key], now[key])
    elif before != now and place not in _FREE:
        yield place, before, now
