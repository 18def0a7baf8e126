"""A study's configuration: one YAML, validated as a whole before anything runs.

Every error is one line that names the place, the rule and the value. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from widthsearch.bayesopt.early_stopping import FrontStopping
from widthsearch.bayesopt.metric import ACCURACY, COSTS, EXACT_COSTS, Metric
from widthsearch.data.config import TaskConfig
from widthsearch.errors import SpaceError, StudyError
from widthsearch.latency.config import LatencyConfig
from widthsearch.space.constraints import Constraints
from widthsearch.study.sections import (
    AnyRecipe,
    FreeRecipe,
    Function,
    Importance,
    Patience,
    ProposerConfig,
    Resources,
    Rungs,
    Start,
)
from widthsearch.training.recipe import Recipe
from widthsearch.utils.references import reference_of
from widthsearch.utils.safe_yaml import dump_yaml, read_yaml
from widthsearch.utils.validation import boolean_as_number, explain


def _count_or_auto(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"must be 1 or more, or auto, but was {value!r}")
    return value


def _bare_suggestions(value: Any) -> Any:
    return {"suggestions": value} if type(value) in (int, float) else value


def _interval(value: Any, validate: ValidatorFunctionWrapHandler) -> tuple[float, float]:
    low, high = 1.0, 0.0
    with contextlib.suppress(TypeError, ValueError):
        first, last = [value] if isinstance(value, str) else value  # a text is no pair of letters
        low, high = validate(
            (-math.inf if first is None else first, math.inf if last is None else last)
        )
    if not low < high:
        raise ValueError(f"must be [min, max] with min < max (null: no bound), but was {value!r}")
    return low, high


def _fit_for_a_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            "must be letters, digits, '.', '_' and '-', and begin with a letter or digit, but was "
            f"{name!r}"
        )
    return name


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Stopping = Annotated[FrontStopping | Rungs, Field(discriminator="kind")]


def _named(key: str, default: str | None = None) -> BeforeValidator:
    """Accept a bare name where a mapping with that name under ``key`` is meant, or no name."""

    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        if default is not None and isinstance(value, Mapping):
            return {key: default, **value}
        return value

    return BeforeValidator(whole)


NamedProposer = Annotated[ProposerConfig, _named("method")]
Share = Annotated[float, Field(gt=0)]
Family = Literal["linear", "power", "copycat", "mixture"]
Interval = Annotated[
    tuple[float, float],
    WrapValidator(_interval),
    PlainSerializer(lambda ends: [None if math.isinf(end) else end for end in ends]),
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][\w./-]*$")]


def _with_accuracy(value: Any) -> Any:
    """Fill the fields of accuracy in percent, where the metric is named so."""
    value = {"name": value} if value == ACCURACY.name else value
    if isinstance(value, Mapping) and value.get("name") == ACCURACY.name and "range" not in value:
        return {**dataclasses.asdict(ACCURACY), **value}
    return value


class StudyConfig(BaseModel):
    """The configuration of a study: the space, the data, the training, the search and its extent.

    Attributes:
        name: The study's name, and its folder's.
        space: A reference to the space; None when a Python user gives the object itself.
        spaces: References to several instead, for one front of depth × width, say. Shares of a base
            model are shares of the first's.
        input: The input's shape (C, H, W), for spaces that leave it open.
        constraints: Pinned, tied, bounded and aligned axes of the space.
        task: The data of the built-in trainer; None when a Python user gives the object itself.
        trainer: A trainer of your own instead: a function ``train(network, trial)``, see
            :mod:`widthsearch.training.job`, or its reference.
        data: A function without arguments, or its reference: what it returns is ``trial.data`` of
            the own trainer.
        final_data: Likewise, for final trainings; None for the same data.
        loss: A function ``loss(network, batch)``, or its reference: the mean loss of a batch, a
            tensor of one number. With ``batches`` it lets methods that read data propose widths for
            an own trainer, see :class:`~widthsearch.data.tasks.OwnTask`.
        batches: A function ``batches(split, seed)``, or its reference: the batches of a pass over
            the split ``"train"`` or ``"validation"``.
        recipe: How each candidate is trained. For an own trainer any keys beside ``epochs``.
        start: What trainings start from: ``scratch``, new weights; or ``extract``, the weights of a
            trained base, cut to the widths of the network. With several, the search, its front and
            its picks are of the first; each network that finishes is trained again from the others,
            with the same seed, and ``pareto`` compares them. ``scratch_b`` trains from scratch for
            as many more epochs as the base's training takes in MACs (Scratch-B, Liu et al. 2019).
        weights: The base's weights: a file of its ``state_dict``, or a folder of ``widthsearch
            train --search-data``.
        importance: What its channels are kept by: ``magnitude``, the L1 norm of filters;
            ``slimming``, the scales of norms; ``sensitivity`` or ``fisher``, by gradients on data.
        widths: Files of :meth:`~widthsearch.space.search_space.SearchSpace.save_widths` whose
            networks are trained after the base and before all others, also off the grid, up to the
            axes' bounds.
        prior: Earlier studies of the same axes and metric, under another recipe or resolution or of
            other data, whose trials the surrogate learns from: names in the same folder of studies,
            or folders. The share of their trials in it is learned.
        proposers: The methods whose proposals are scaled into families.
        budgets: The share of the base model's MACs of each family member.
        families: How proposals are scaled: ``copycat`` (one profile at all sizes), ``linear`` (the
            trajectory's member nearest to the size), ``power`` (a trajectory's own trend), and the
            ``mixture`` of each two.
        baselines: The share of the trials that are baselines: uniform widths at each budget (in
            every space: depth × width), then balanced, constant, tapered and random ones.
        metric: What trainings are compared by, one of the numbers that they report. By default
            top-1 accuracy in percent; with the task's loss ``bce`` mean average precision in
            percent, ``map``, and with ``mse`` or ``l1`` the root mean square error, ``rmse``.
        objectives: What the front is of: the metric; the costs ``macs``, ``params``,
            ``activations``, ``weight_bytes``, ``latency_ms``; and other positive numbers that
            trainings report, to be minimised. By default the metric and ``macs``.
        limits: The interval [min, max] of some of these, null for no bound. No network with exact
            costs outside is trained, except the bases; none is on the front by its estimate.
        latency: How latency is measured.
        early_stopping: ``front`` stops a trial that is unlikely to reach the front at its own
            costs, ``rungs`` all but the best of each rung; None trains everything to its end.
        trials: The number of trials in all: the base model, the families' members, and the
            sampler's own for the rest. Failed ones count.
        hours: No trial begins once the study was driven for so many hours, over all its runs; those
            that run then are trained to their end. None for no bound.
        patience: The study ends once so many suggestions in a row were expected to improve the
            front little; None for no such end. See :class:`~widthsearch.study.sections.Patience`.
        concurrency: The number of trials at once; ``auto`` finds by a short probe of this machine
            the number that trains the most candidates an hour, and gives each its share of the GPU.
        resources: The share of a machine that each trial takes.
        timeout: The seconds without a report after which a training has hung: it fails, and its
            worker process is replaced. They must suffice for the longest epoch, and for the first
            one with the loading of the data. None only warns of a training that seems to hang.
        device: Where they train.
        seed: The seed that everything random in the study derives from.
        storage: Any Optuna URL; None for a SQLite file in the study's folder.
        ray_address: A Ray cluster's address; None to start Ray on this machine.

    Raises:
        StudyError: A value breaks a rule.

    Example:
        >>> StudyConfig(name="mine", task="digits", trials=32).recipe.epochs
        10
        >>> StudyConfig(name="mine", trials=0)
        Traceback (most recent call last):
        widthsearch.errors.StudyError: trials must be greater than or equal to 1, but was 0
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(_fit_for_a_folder)]
    space: str | None = None
    spaces: tuple[str, ...] = ()
    input: tuple[int, int, int] | None = None
    constraints: Constraints = Constraints()
    task: Annotated[TaskConfig, _named("name")] | None = None
    trainer: Function | None = None
    data: Function | None = None
    final_data: Function | None = None
    loss: Function | None = None
    batches: Function | None = None
    recipe: AnyRecipe = Recipe()
    start: Annotated[tuple[Start, ...], BeforeValidator(_listed)] = ("scratch",)
    weights: str | None = None
    importance: Importance = "magnitude"
    widths: tuple[str, ...] = ()
    prior: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    proposers: tuple[NamedProposer, ...] = (ProposerConfig(method="sensitivity"),)
    budgets: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.2, 0.35, 0.5, 0.75)
    families: Annotated[tuple[Family, ...], Field(min_length=1)] = ("copycat", "power")
    baselines: Annotated[float, Field(ge=0, lt=1)] = 0.25
    metric: Annotated[Metric, BeforeValidator(_with_accuracy)] = ACCURACY
    objectives: tuple[Name, ...] = ()
    limits: Mapping[Name, Interval] = {}
    latency: LatencyConfig | None = None
    early_stopping: Annotated[Stopping, _named("kind", "front")] | None = None
    trials: Annotated[int, Field(ge=1, le=10**6)]
    hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    patience: Annotated[Patience | None, BeforeValidator(_bare_suggestions)] = None
    concurrency: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = 1
    resources: Resources = Resources()
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    device: str = "cpu"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    storage: str | None = None
    ray_address: str | None = None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            message = explain(error, _SECTIONS)
            raise StudyError(f"{message}{_form(message)}") from None
        except SpaceError as error:
            raise StudyError(f"constraints: {error}") from None
        if fault := boolean_as_number(values, self, ""):
            raise StudyError(fault)

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        """Fill the defaults that depend on others: metric, objectives, with an own trainer more.

        Then the recipe is free, and by default no method reads data that it has no loss for.
        """
        task = values.get("task")
        loss = task.get("loss") if isinstance(task, Mapping) else getattr(task, "loss", None)
        if isinstance(loss, str) and loss in _METRICS:
            values = {"metric": _METRICS[loss], **values}
        metric = values.get("metric", ACCURACY)
        named = isinstance(metric, Mapping)
        name = metric.get("name") if named else getattr(metric, "name", metric)
        values = {"objectives": (name, "macs"), **values}
        if values.get("trainer") is None:
            return values
        recipe = values.get("recipe", {})
        recipe = FreeRecipe(recipe) if isinstance(recipe, Mapping) else recipe
        default = {} if values.get("loss") else {"proposers": ["synflow"]}
        return {**default, **values, "recipe": recipe}

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if self.trainer is not None and self.task is not None:
            raise ValueError(
                f"a study has a task or a trainer, but was given both ({self.task.name!r} and "
                f"{reference_of(self.trainer)!r}): a trainer has its `data`"
            )
        for key in ("data", "final_data", "loss", "batches"):
            if self.trainer is None and (function := getattr(self, key)) is not None:
                raise ValueError(
                    f"{key} is for an own trainer, but there is none and {key} is "
                    f"{reference_of(function)!r}: add `trainer`, or use `task`"
                )
        if (self.loss is None) != (self.batches is None):
            missing, other = ("loss", "batches") if self.loss is None else ("batches", "loss")
            raise ValueError(
                f"loss and batches go together, but {other} is "
                f"{reference_of(getattr(self, other))!r} and there is no {missing}: add it"
            )
        if self.trainer is not None and self.concurrency == "auto":
            raise ValueError(
                "concurrency 'auto' probes the built-in trainer, but the trainer is "
                f"{reference_of(self.trainer)!r}: give a number"
            )
        if self.space is not None and self.spaces:
            raise ValueError(
                f"a study has a space or spaces, but was given both ({self.space!r} and "
                f"{', '.join(self.spaces)})"
            )
        _check_start(self)
        metric, names = self.metric.name, self.objectives
        listed = f"[{', '.join(names)}]"
        if metric not in names or len(set(names)) < len(names):
            raise ValueError(f"objectives must hold {metric} and no name twice, but are {listed}")
        known = (metric, *COSTS)
        reported = [name for name in names if name not in known]
        for name in reported:
            if close := difflib.get_close_matches(name, known, 1):
                raise ValueError(f"unknown objective {name!r}; did you mean {close[0]!r}?")
        if self.latency is not None and "latency_ms" not in self.objectives:
            raise ValueError(
                f"latency is measured where it is an objective, but objectives are {listed}: add "
                "latency_ms, or leave the latency section out"
            )
        for name in self.limits.keys() - {*names, *EXACT_COSTS}:
            if close := difflib.get_close_matches(name, [*names, *EXACT_COSTS], 1):
                raise ValueError(f"unknown limit {name!r}; did you mean {close[0]!r}?")
            raise ValueError(
                f"a limit of {name} needs it among the objectives, but they are {listed}: add it, "
                "or leave the limit out"
            )
        (low, high), ends = self.limits.get(metric, (-math.inf, math.inf)), self.metric.ends
        if low > ends[1] or high < ends[0]:
            raise ValueError(
                f"limits.{metric} must leave a part of the metric's range, [{ends[0]:g}, "
                f"{ends[1]:g}], but was [{low:g}, {high:g}]; change the limit, or metric.range"
            )
        if self.name in self.prior:
            raise ValueError(f"prior must name other studies, but {self.name!r} is this one")
        stopping = self.early_stopping
        if stopping is not None and len(self.objectives) == 1:
            raise ValueError(
                f"early_stopping needs a cost among the objectives, but they are {listed}: add "
                "macs, or leave early_stopping out"
            )
        if stopping is not None and reported:
            raise ValueError(
                "early_stopping compares costs that are known before a training ends, but "
                f"objectives hold {reported[0]}: leave it out, or early_stopping"
            )
        if stopping is not None and stopping.first_epoch >= self.recipe.epochs:
            raise ValueError(
                "early_stopping.first_epoch must be less than recipe.epochs, but they are "
                f"{stopping.first_epoch} and {self.recipe.epochs}"
            )
        if self.device.startswith("cuda") and self.resources.gpu == 0:
            raise ValueError(
                f"device {self.device!r} needs resources.gpu above 0, but it is 0: 0.5 lets two "
                "trials share one GPU"
            )
        if self.device == "cpu" and self.resources.gpu and self.trainer is None:
            raise ValueError(
                f"resources.gpu is for device cuda, but is {self.resources.gpu:g} on device 'cpu': "
                "set the device to cuda, or leave gpu out"
            )
        if self.device.startswith("cuda:") and self.device != "cuda:0":
            raise ValueError(
                f"device must be cpu or cuda, since Ray assigns the GPUs to trials, but is "
                f"{self.device!r}: set CUDA_VISIBLE_DEVICES to use some GPUs only"
            )
        if self.concurrency == "auto" and self.ray_address is not None:
            raise ValueError(
                "concurrency 'auto' probes this machine, but the trials run on the cluster at "
                f"{self.ray_address!r}: give a number"
            )
        return self

    @property
    def at_once(self) -> int:
        """The number of trials at once.

        Raises:
            StudyError: It is ``auto``: the driver of a study decides it.
        """
        if isinstance(self.concurrency, str):
            raise StudyError("concurrency 'auto' is decided when a study is run")
        return self.concurrency

    @property
    def method_recipe(self) -> Recipe:
        """The recipe of methods that train; with an own trainer plain SGD for as many epochs.

        Its lower learning rate suits more losses than the default one. Each method takes a recipe
        of its own instead, such as ``pretrain``.
        """
        if isinstance(self.recipe, Recipe):
            return self.recipe
        return Recipe(epochs=self.recipe.epochs, lr=0.01, precision="fp32")

    @classmethod
    def from_yaml(cls, path: Path) -> StudyConfig:
        """Read a study file.

        Raises:
            StudyError: It is not there, is not YAML, or breaks a rule: one line, with the place.
        """
        values = read_yaml(path)
        try:
            return cls(**values)
        except StudyError as error:
            raise StudyError(f"{path}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, defaults included; ``StudyConfig(**...)`` reads it back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The same as YAML."""
        return dump_yaml(self.to_json())


def _check_start(config: StudyConfig) -> None:
    """Check the starts with their weights, and that trials come in whole comparisons."""
    starts, listed = config.start, ", ".join(config.start)
    if not starts or len(set(starts)) < len(starts) or starts[0] == "scratch_b":
        raise ValueError(
            f"start must be scratch, extract, or a list without repetition that begins with one of "
            f"them, but was [{listed}]"
        )
    if ("extract" in starts) != (config.weights is not None):
        raise ValueError(
            f"start 'extract' and weights go together, but start is [{listed}] and weights are "
            f"{config.weights!r}: give both, or neither"
        )
    if "extract" not in starts and config.importance != "magnitude":
        raise ValueError(
            f"importance is what 'extract' keeps channels by, but start is [{listed}] and "
            f"importance {config.importance!r}: leave it out, or add extract with its weights"
        )
    if "scratch_b" in starts and "extract" not in starts:
        raise ValueError(
            f"start 'scratch_b' is compared with 'extract', but start is [{listed}]: add it"
        )
    if len(config.spaces) > 1 and config.weights is not None:
        raise ValueError(
            f"weights are of one space's base, but spaces are {', '.join(config.spaces)}: make a "
            "study of each"
        )
    if config.trials % len(starts):
        raise ValueError(
            "trials must be a multiple of the number of starts, since each network is trained from "
            f"each, but they are {config.trials} and [{listed}]"
        )


_METRICS: Mapping[Any, Mapping[str, Any]] = {
    "bce": {"name": "map", "goal": "maximize", "range": (0, 100)},
    "mse": {"name": "rmse", "goal": "minimize"},
    "l1": {"name": "rmse", "goal": "minimize"},
}
"""The default metric of a task's loss, where it is not accuracy."""

_SECTIONS: dict[str, Any] = {
    "": StudyConfig,
    "constraints": Constraints,
    "metric": Metric,
    "task": TaskConfig,
    "recipe": Recipe,
    "latency": LatencyConfig,
    "early_stopping.front": FrontStopping,
    "early_stopping.rungs": Rungs,
    "patience": Patience,
    "resources": Resources,
}

_FORMS = {
    "task": "`task: digits`, or `task: {name: image_folder, folder: path}`",
    "limits": "`limits: {macs: [0, 2e6]}`",
    "metric": "`metric: {name: rmse, goal: minimize}`",
    "input": "`input: [3, 32, 32]` (channels, height, width)",
}
"""An example of each section whose form is hard to guess."""


def _form(message: str) -> str:
    """The end of a message about the form of one of those sections; empty for others."""
    place = re.match(
        r"(?:key ')?(task(?=\.name|'| )|limits|metric(?='| )|input)[\w.]*'? "
        r"(?:must(?! be (?:greater|less))|is missing)",
        message,
    )
    return f"; write {_FORMS[place[1]]}" if place and "`" not in message else ""
