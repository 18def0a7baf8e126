"""Sections of a study's configuration: resources, rungs, proposers, and the two kinds of recipes.

Imports no torch: the fields of proposers are validated by :meth:`ProposerConfig.make`, which
imports the method.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    model_validator,
)

from widthsearch.errors import StudyError
from widthsearch.proposers import PROPOSERS, Proposer, proposer_class
from widthsearch.training.recipe import OwnRecipe, Recipe
from widthsearch.utils.references import load_function, reference_of
from widthsearch.utils.validation import explain, filled, hint, validated_dataclass


def _whole_above_one(amount: float) -> float:
    if amount > 1 and amount != int(amount):
        raise ValueError(f"must be a share of one or a whole number, but was {amount:g}")
    return amount


def _at_most_one_gpu(amount: float) -> float:
    if amount > 1:
        raise ValueError(
            f"must be at most 1, but was {amount:g}: a trial trains on one GPU; 0.5 lets two share "
            "one"
        )
    return amount


@validated_dataclass("resources")
class Resources:
    """The share of a machine that one trial takes.

    Attributes:
        cpu: CPU cores; also the number of threads that it trains with (at least one).
        gpu: GPUs, at most one; 0.5 lets two trials share one.

    Raises:
        StudyError: A value breaks a rule.

    Example:
        >>> Resources(cpu=2).gpu
        0.0
        >>> Resources(gpu=2)
        Traceback (most recent call last):
        widthsearch.errors.StudyError: resources.gpu must be at most 1, but was 2: a trial trains \
on one GPU; 0.5 lets two share one
    """

    cpu: Annotated[float, Field(gt=0), AfterValidator(_whole_above_one)] = 1.0
    gpu: Annotated[float, Field(ge=0), AfterValidator(_at_most_one_gpu)] = 0.0


@validated_dataclass("early_stopping")
class Rungs:
    """Early stopping by successive halving, with non-dominated rungs.

    Attributes:
        kind: ``rungs``.
        first_epoch: The epoch of the first rung; each next one is ``eta`` times as late.
        eta: Of each rung, one in ``eta`` goes on.

    Raises:
        StudyError: A value breaks a rule.

    Example:
        >>> Rungs(first_epoch=2, eta=3).rungs(epochs=20)
        (2, 6, 18)
    """

    kind: Literal["rungs"] = "rungs"
    first_epoch: int = Field(default=3, ge=1)
    eta: int = Field(default=3, ge=2)

    def rungs(self, epochs: int) -> tuple[int, ...]:
        """The epochs at which a trial may be stopped, out of ``epochs``."""
        every = (self.first_epoch * self.eta**i for i in itertools.count())
        return tuple(itertools.takewhile(lambda rung: rung < epochs, every))


@validated_dataclass("patience")
class Patience:
    """The end of a study whose next networks are expected to improve the front little.

    Attributes:
        suggestions: The number of suggestions in a row,
        gain: each of which was expected to add less than this share to the hypervolume of the front
            at that time (over score × log costs, see :mod:`widthsearch.bayesopt.acquisition`).

    Raises:
        StudyError: A value breaks a rule.

    Example:
        >>> Patience(10).gain
        0.001
    """

    suggestions: int = Field(ge=1)
    gain: float = Field(default=0.001, gt=0, lt=1)


class ProposerConfig(BaseModel):
    """A proposer's name, with its fields beside it.

    The name is checked here, the fields where the proposer is made.

    Attributes:
        method: The proposer's name; or a user's own as ``package.module:name`` or
            ``path/to/file.py:name``: a dataclass or a function, see
            :class:`~widthsearch.proposers.Proposer`.

    Example:
        >>> ProposerConfig.of("uniform", {"members": 4}).make()
        Uniform(members=4)
        >>> ProposerConfig.of("uniform", {"member": 4}).make("proposers.0")
        Traceback (most recent call last):
        widthsearch.errors.StudyError: unknown key 'proposers.0.member'; did you mean 'members'?
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str

    @model_validator(mode="after")
    def _check(self) -> ProposerConfig:
        if ":" not in self.method and self.method not in PROPOSERS:
            raise ValueError(
                f"must name a proposer or be `module:name`, but was {self.method!r}"
                f"{hint(self.method, PROPOSERS)}"
            )
        return self

    @classmethod
    def of(cls, method: str, fields: Mapping[str, Any]) -> ProposerConfig:
        """The configuration of a method with these fields.

        Raises:
            StudyError: There is no such method.
        """
        try:
            return cls(method=method, **fields)
        except ValidationError as error:
            raise StudyError(explain(error, {}, "method")) from None

    def make(self, place: str = "") -> Proposer:
        """The proposer with its fields; imports it.

        Args:
            place: The place of this section in the configuration, for messages.

        Raises:
            StudyError: The proposer cannot be imported or does not take the fields.
        """
        if ":" not in self.method:
            return self._filled(proposer_class(self.method), place)
        own: Any = load_function(self.method, StudyError)
        fields = self.model_extra or {}
        if isinstance(own, type) and dataclasses.is_dataclass(own):
            made = self._filled(own, place)
        elif isinstance(own, type):
            raise StudyError(
                f"a proposer must be a function or a dataclass, but {self.method!r} is another "
                "class: decorate it, @dataclass(frozen=True)"
            )
        else:
            try:
                inspect.signature(own).bind(None, None, None, **fields)
            except (TypeError, ValueError) as error:
                raise StudyError(f"proposer {self.method!r}: {error}") from None
            made = functools.partial(own, **fields)
        if not callable(made):
            raise StudyError(
                f"a proposer's instances must be callable, but those of {self.method!r} are not: "
                "give it `__call__(self, space, task, setting)`"
            )
        return made

    def _filled(self, proposer: Any, place: str) -> Proposer:
        made: Proposer = filled(proposer, self.model_extra or {}, place)
        return made

    def reads_data(self) -> bool | None:
        """Whether the method reads the task's data; None if a user's own does not say."""
        return self._says("reads_data")

    def trains(self) -> bool | None:
        """Whether the method trains networks; None if a user's own does not say."""
        return self._says("trains")

    def _says(self, attribute: str) -> bool | None:
        own = ":" in self.method
        return getattr(self.make(self.method), attribute, None if own else True)


Start = Literal["scratch", "extract", "scratch_b"]
"""New weights; those of the base, cut; new ones for as much computation as the base and the cut."""

Importance = Literal["magnitude", "slimming", "sensitivity", "fisher"]
"""What the channels of a base are kept by."""

DATA_IMPORTANCES = ("sensitivity", "fisher")
"""Those that read data."""


class FreeRecipe(dict[str, Any]):
    """The values of a recipe with any keys, before they are validated as an ``OwnRecipe``.

    Example:
        >>> from pydantic import TypeAdapter
        >>> TypeAdapter(AnyRecipe).validate_python(FreeRecipe(epochs=3, crop=48))
        OwnRecipe(epochs=3, crop=48)
    """


AnyRecipe = Annotated[
    Annotated[Recipe, Tag("[built-in]")] | Annotated[OwnRecipe, Tag("[own]")],
    Discriminator(lambda r: "[own]" if isinstance(r, OwnRecipe | FreeRecipe) else "[built-in]"),
]
"""The recipe of the built-in trainer, or of the user's own."""

Function = Annotated[str | Callable[..., Any], PlainSerializer(reference_of)]
"""A function, or its reference."""
