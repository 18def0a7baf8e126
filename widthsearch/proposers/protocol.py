"""The interface of every proposer: a frozen dataclass of hyperparameters, called with a space.

Imports no torch, so that a study can be read without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from widthsearch.errors import StudyError
from widthsearch.training.recipe import Recipe
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from widthsearch.data.tasks import AnyTask
    from widthsearch.space.search_space import SearchSpace

PredictedLatency = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Predicted latency in ms of width vectors: shape (N, axes) to (N,)."""

# Types of hyperparameters.
Count = Annotated[int, Field(ge=1, le=10**6)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Checkpoint = Annotated[str, AfterValidator(lambda path: str(Path(path).absolute()))]
"""A file of weights, relative to the working directory of the study."""
LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _ignore(message: str) -> None:
    pass


@dataclass(frozen=True)
class Setting:
    """The circumstances of a proposal, beside the space and the data.

    Attributes:
        seed: The same seed on the same device gives the same proposal.
        device: The device of all computation, e.g. ``cpu`` or ``cuda:0``.
        recipe: The study's recipe; of a study with a trainer of its own, plain SGD. Methods that
            train use it unless they have a recipe of their own.
        lowest: The smallest network of interest, as a share of the base's MACs: methods that train
            may stop there.
        latency: Predicted latency of this space; None if unknown.
        report: Called with one line of progress at a time.

    Example:
        >>> setting = Setting(seed=3, lowest=0.25, report=print)
        >>> setting.report(f"down to {setting.lowest} of the base on {setting.device}")
        down to 0.25 of the base on cpu
    """

    seed: int = 0
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)
    lowest: float = 0.1
    latency: PredictedLatency | None = None
    report: Callable[[str], None] = _ignore


@dataclass(frozen=True)
class Proposal:
    """The result of a method: a trajectory of widths.

    Attributes:
        method: The name of the proposer.
        trajectory: Widths from wide to narrow; no axis ever grows along it.
        profile: The widths whose multiples the method proposes at every size, as uniform widths do
            with the base; None where a member's shape depends on its size.
        provenance: The hyperparameters and measurements of the method, as plain JSON values. A list
            of lines under ``warnings`` is shown to the user.

    Raises:
        StudyError: The trajectory is empty, or an axis grows along it.

    Example:
        >>> wide, narrow = Widths(("a", "b"), (8, 16)), Widths(("a", "b"), (4, 16))
        >>> Proposal("mine", (wide, narrow), {"seed": 0}).to_json()["trajectory"]
        [[8, 16], [4, 16]]
        >>> Proposal("mine", (narrow, wide), {})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        widthsearch.errors.StudyError: no axis may grow along a proposal's trajectory, ...
    """

    method: str
    trajectory: tuple[Widths, ...]
    provenance: Mapping[str, Any]
    profile: Widths | None = None

    def __post_init__(self) -> None:
        if not self.trajectory:
            raise StudyError(f"a proposal must have a member, but that of {self.method!r} has none")
        for wide, narrow in pairwise(self.trajectory):
            if wide.names != narrow.names or any(
                a < b for a, b in zip(wide.vector, narrow.vector, strict=True)
            ):
                raise StudyError(
                    "no axis may grow along a proposal's trajectory, from wide to narrow, but that "
                    f"of {self.method!r} goes from {dict(wide)} to {dict(narrow)}"
                )

    @property
    def warnings(self) -> list[str]:
        """The lines under ``warnings`` in the provenance."""
        lines = self.provenance.get("warnings", [])
        return [str(line) for line in lines] if isinstance(lines, list) else []

    def to_json(self) -> dict[str, Any]:
        """The proposal as plain JSON values, see :meth:`from_json`.

        Numbers of the provenance that are not finite, such as a score of -inf, become None: JSON
        has none of them.
        """
        return {
            "method": self.method,
            "axes": list(self.trajectory[0].names),
            "trajectory": [list(widths.vector) for widths in self.trajectory],
            "profile": None if self.profile is None else list(self.profile.vector),
            "provenance": _finite(self.provenance),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Proposal:
        """Read the values of :meth:`to_json`."""
        names = tuple(content["axes"])
        trajectory = tuple(Widths(names, tuple(vector)) for vector in content["trajectory"])
        vector = content.get("profile")
        profile = None if vector is None else Widths(names, tuple(vector))
        return cls(content["method"], trajectory, content["provenance"], profile)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Proposer(Protocol):
    """A method that proposes a trajectory of widths from a model and data.

    A user's proposer is any function with these arguments, or a dataclass with such a
    ``__call__``. A class attribute ``reads_data = False`` says that ``task`` may be None; a user's
    proposer without the attribute may also be called so. ``trains = False`` says that it trains no
    network, so that ``run --dry-run`` runs it too.
    """

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Propose widths.

        Args:
            space: The space; every member of the proposal lies on its grid.
            task: The data, of which a method reads the train and validation splits only. Whatever
                the task, ``task.batches("train", seed)`` are its batches, and
                ``task.loss(network, batch)`` is the mean loss of one.
            setting: The seed, the device and the rest of the circumstances.
        """
        ...
