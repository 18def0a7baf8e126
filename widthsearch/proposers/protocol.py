"""The interface of every proposer: a frozen dataclass of hyperparameters, called with a space.

Imports no torch, so that a study can be read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from widthsearch.errors import StudyError
from widthsearch.training.recipe import Recipe
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from widthsearch.data.tasks import Task
    from widthsearch.space.search_space import SearchSpace

PredictedLatency = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Predicted latency in ms of width vectors: shape (N, axes) to (N,)."""


def _say_nothing(message: str) -> None:
    pass


@dataclass(frozen=True)
class Setting:
    """What a method is given beside the space and the data.

    Attributes:
        seed: The same seed on the same device gives the same proposal.
        device: Where to compute, e.g. ``cpu`` or ``cuda:0``.
        recipe: How the study trains its candidates; methods that train follow it where they have
            no settings of their own.
        lowest: The smallest network that is wanted, as a share of the base's MACs: methods that
            train need not go on below it.
        latency: Predicted latency of this space, where that is known.
        report: Is told how far the method is, a line each time.
    """

    seed: int = 0
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)
    lowest: float = 0.1
    latency: PredictedLatency | None = None
    report: Callable[[str], None] = _say_nothing


@dataclass(frozen=True)
class Proposal:
    """What a method proposes.

    Attributes:
        method: The proposer's name.
        trajectory: Widths from wide to narrow; no axis ever grows along it.
        provenance: The hyperparameters and what was measured on the way, as plain JSON values.
    """

    method: str
    trajectory: tuple[Widths, ...]
    provenance: Mapping[str, Any]

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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` reads them back."""
        return {
            "method": self.method,
            "axes": list(self.trajectory[0].names),
            "trajectory": [list(widths.vector) for widths in self.trajectory],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Proposal:
        """The proposal behind :meth:`to_json`'s values."""
        names = tuple(content["axes"])
        trajectory = tuple(Widths(names, tuple(vector)) for vector in content["trajectory"])
        return cls(content["method"], trajectory, content["provenance"])


class Proposer(Protocol):
    """Looks at a model and data, and returns a trajectory of widths.

    A user's own is any function with these arguments, or a dataclass whose instances are. One with
    ``reads_data = False`` may also be asked without a task, as may a user's own without that field.
    """

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """Propose.

        Args:
            space: The space; every member of the proposal lies on its grid.
            task: The data; only its train and validation splits are read.
            setting: The seed, the device, and what else there is to know.
        """
        ...
