"""A study's configuration: one YAML, wholly validated before anything runs.

Every error is one line that names the place, the rule and the value.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from widthsearch.bayesopt.early_stopping import FrontStopping
from widthsearch.data.config import TaskConfig
from widthsearch.errors import SpaceError, StudyError
from widthsearch.latency.config import LatencyConfig
from widthsearch.proposers import PROPOSERS, Proposer, proposer_class
from widthsearch.space.constraints import Constraints
from widthsearch.training.recipe import Recipe
from widthsearch.utils.references import load_function
from widthsearch.utils.validation import explain, hint

Objective = Literal["accuracy", "macs", "params", "latency_ms"]

_FROZEN = ConfigDict(extra="forbid", frozen=True)


def _whole_above_one(amount: float) -> float:
    if amount > 1 and amount != int(amount):
        raise ValueError(f"must be a share of one or a whole number, but was {amount:g}")
    return amount


def _count_or_auto(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"must be 1 or more, or auto, but was {value!r}")
    return value


def _fit_for_a_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            "must be letters, digits, '.', '_' and '-', and begin with a letter or digit, but was "
            f"{name!r}"
        )
    return name


class Resources(BaseModel):
    """What one trial takes of the machine.

    Attributes:
        cpu: CPU cores; also the number of threads that it trains with (at least one).
        gpu: GPUs; 0.5 lets two trials share one.
    """

    model_config = _FROZEN

    cpu: Annotated[float, Field(gt=0), AfterValidator(_whole_above_one)] = 1.0
    gpu: Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] = 0.0


class Rungs(BaseModel):
    """Early stopping by successive halving, with non-dominated rungs.

    Attributes:
        kind: ``rungs``.
        first_epoch: The epoch of the first rung; each next one is ``eta`` times as late.
        eta: Of each rung, one in ``eta`` goes on.
    """

    model_config = _FROZEN

    kind: Literal["rungs"] = "rungs"
    first_epoch: Annotated[int, Field(ge=1)] = 3
    eta: Annotated[int, Field(ge=2)] = 3

    def rungs(self, epochs: int) -> tuple[int, ...]:
        """The epochs at which a trial may be stopped, out of ``epochs``."""
        rungs = []
        rung = self.first_epoch
        while rung < epochs:
            rungs.append(rung)
            rung *= self.eta
        return tuple(rungs)


class ProposerConfig(BaseModel):
    """A proposer by its name, with its fields beside it.

    Attributes:
        method: The proposer's name; or a user's own as ``package.module:name`` or
            ``path/to/file.py:name``: a dataclass or a function, see
            :class:`~widthsearch.proposers.Proposer`. That one is imported when it is asked.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str

    @model_validator(mode="after")
    def _check(self) -> ProposerConfig:
        if ":" in self.method:
            return self
        if self.method not in PROPOSERS:
            raise ValueError(
                f"must name a proposer or be `module:name`, but was {self.method!r}"
                f"{hint(self.method, PROPOSERS)}"
            )
        self.make()
        return self

    @classmethod
    def of(cls, method: str, fields: Mapping[str, Any]) -> ProposerConfig:
        """The same from Python.

        Raises:
            StudyError: One line that says which rule is broken.
        """
        try:
            return cls(method=method, **fields)
        except ValidationError as error:
            raise StudyError(explain(error, _SECTIONS)) from None

    def make(self) -> Proposer:
        """The proposer itself.

        Raises:
            StudyError: A user's own cannot be imported or does not take the fields.
            ValueError: One of ours does not take the fields.
        """
        if ":" not in self.method:
            return self._filled(proposer_class(self.method))
        own: Any = load_function(self.method, StudyError)
        if isinstance(own, type) and not dataclasses.is_dataclass(own):
            raise StudyError(
                f"a proposer must be a function or a dataclass, but {self.method!r} is another "
                "class: decorate it, @dataclass(frozen=True)"
            )
        try:
            if isinstance(own, type):
                made = self._filled(own)
            else:
                inspect.signature(own).bind(None, None, None, **(self.model_extra or {}))
                made = functools.partial(own, **(self.model_extra or {}))
        except (TypeError, ValueError) as error:
            raise StudyError(f"proposer {self.method!r}: {error}") from None
        if not callable(made):
            raise StudyError(
                f"a proposer's instances must be callable, but those of {self.method!r} are not: "
                "give it `__call__(self, space, task, setting)`"
            )
        return made

    def _filled(self, proposer: Any) -> Proposer:
        known = {field.name for field in dataclasses.fields(proposer)}
        fields = self.model_extra or {}
        for key in fields:
            if key not in known:
                raise ValueError(f"unknown key {key!r}{hint(key, known)}")
        try:
            made: Proposer = TypeAdapter(proposer).validate_python(fields)
        except ValidationError as error:
            raise ValueError(explain(error, {"": proposer})) from None
        return made


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


class StudyConfig(BaseModel):
    """Everything that a study is: what is searched, trained, measured, and how much of it.

    Attributes:
        name: The study's name, and its folder's.
        space: A reference to the space; None when a Python user gives the object itself.
        spaces: References to several, instead: depth × width, say, in one front. What is relative
            to a base is relative to the first's.
        input: The input's shape (C, H, W), for spaces that leave it open.
        constraints: What is pinned, tied, bounded and aligned in the space.
        task: The data; None when a Python user gives the object itself.
        recipe: How each candidate is trained.
        proposers: The methods whose proposals are scaled into families.
        budgets: The share of the base model's MACs of each family member.
        families: How proposals are scaled: ``linear``, ``power`` (a trajectory's own trend), and
            the ``mixture`` of each two.
        baselines: The share of the trials that are baselines: uniform widths at each budget (in
            every space: depth × width), then random ones.
        objectives: What the front is of; latency_ms is measured.
        limits: The least and most of a cost (``macs``, ``params``, ``latency_ms``) that matter: the
            sampler asks for no network outside.
        latency: How latency is measured.
        early_stopping: ``front`` stops what will hardly reach the front at its own costs, ``rungs``
            all but the best of each rung; None trains everything to its end.
        trials: How many candidates there are in all: the base model, the families' members, and the
            sampler's own for the rest. Failed ones count.
        concurrency: How many train at once; ``auto`` finds by a short probe of this machine what
            trains the most candidates an hour, and gives each its share of the GPU.
        resources: What each of them takes.
        device: Where they train.
        seed: The seed that everything random in the study derives from.
        storage: Any Optuna URL; None for a SQLite file in the study's folder.
        ray_address: A Ray cluster's address; None to start Ray on this machine.
    """

    model_config = _FROZEN

    name: Annotated[str, AfterValidator(_fit_for_a_folder)]
    space: str | None = None
    spaces: tuple[str, ...] = ()
    input: tuple[int, int, int] | None = None
    constraints: Constraints = Constraints()
    task: Annotated[TaskConfig, _named("name")] | None = None
    recipe: Recipe = Recipe()
    proposers: tuple[Annotated[ProposerConfig, _named("method")], ...] = (
        ProposerConfig(method="sensitivity"),
    )
    budgets: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        0.1,
        0.2,
        0.35,
        0.5,
        0.75,
    )
    families: Annotated[tuple[Literal["linear", "power", "mixture"], ...], Field(min_length=1)] = (
        "linear",
        "power",
    )
    baselines: Annotated[float, Field(ge=0, lt=1)] = 0.25
    objectives: tuple[Objective, ...] = ("accuracy", "macs")
    limits: Mapping[Literal["macs", "params", "latency_ms"], tuple[float, float]] = {}
    latency: LatencyConfig | None = None
    early_stopping: Annotated[Stopping, _named("kind", "front")] | None = None
    trials: Annotated[int, Field(ge=1)]
    concurrency: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = 1
    resources: Resources = Resources()
    device: str = "cpu"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    storage: str | None = None
    ray_address: str | None = None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise StudyError(explain(error, _SECTIONS)) from None
        except SpaceError as error:
            raise StudyError(f"constraints: {error}") from None

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if self.space is not None and self.spaces:
            raise ValueError(
                f"a study has a space or spaces, but was given both ({self.space!r} and "
                f"{', '.join(self.spaces)})"
            )
        if "accuracy" not in self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(
                "objectives must hold accuracy and no name twice, but are "
                f"[{', '.join(self.objectives)}]"
            )
        if self.latency is not None and "latency_ms" not in self.objectives:
            raise ValueError(
                "latency is measured where it is an objective, but objectives are "
                f"[{', '.join(self.objectives)}]: add latency_ms, or leave the latency section out"
            )
        for name, (low, high) in self.limits.items():
            if not 0 <= low < high:
                raise ValueError(f"limits.{name} must be [least, most], but is [{low:g}, {high:g}]")
            if name == "latency_ms" and name not in self.objectives:
                raise ValueError("limits of latency_ms need it among the objectives")
        stopping = self.early_stopping
        if stopping is not None and len(self.objectives) == 1:
            raise ValueError(
                "early_stopping is never by accuracy alone, but objectives are [accuracy]: add "
                "macs, or leave early_stopping out"
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
        if self.device.startswith("cuda:") and self.device != "cuda:0":
            raise ValueError(
                f"device must be cpu or cuda, for Ray gives each trial its GPU, but is "
                f"{self.device!r}: set CUDA_VISIBLE_DEVICES to use some GPUs alone"
            )
        if self.concurrency == "auto" and self.ray_address is not None:
            raise ValueError(
                "concurrency 'auto' probes this machine, but the trials run on the cluster at "
                f"{self.ray_address!r}: give a number"
            )
        return self

    @property
    def at_once(self) -> int:
        """How many train at once, where that is decided."""
        if isinstance(self.concurrency, str):
            raise StudyError("concurrency 'auto' is decided when a study is run")
        return self.concurrency

    @classmethod
    def from_yaml(cls, path: Path) -> StudyConfig:
        """Read a study file.

        Raises:
            StudyError: It is not there, is not YAML, or breaks a rule: one line, with the place.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise StudyError(f"the study file {str(path)!r} cannot be read: {reason}") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
            raise StudyError(f"{path} is not safe YAML: {error.problem}{place}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a character, a date, depth
            raise StudyError(f"{path} is not safe YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise StudyError(f"{path} must be a mapping of keys to values, such as `name: mine`")
        try:
            return cls(**values)
        except StudyError as error:
            raise StudyError(f"{path}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, defaults included; ``StudyConfig(**...)`` reads it back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The same as YAML."""
        return yaml.safe_dump(self.to_json(), sort_keys=False)


_SECTIONS: dict[str, Any] = {
    "": StudyConfig,
    "constraints": Constraints,
    "task": TaskConfig,
    "recipe": Recipe,
    "latency": LatencyConfig,
    "early_stopping.front": FrontStopping,
    "early_stopping.rungs": Rungs,
    "resources": Resources,
}
