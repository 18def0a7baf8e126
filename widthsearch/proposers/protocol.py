"""What every proposer is: a frozen dataclass of hyperparameters whose call is the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from widthsearch.data import Task
from widthsearch.space import SearchSpace
from widthsearch.widths import Widths


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
        assert self.trajectory, "a proposal has at least one member"
        for wide, narrow in zip(self.trajectory, self.trajectory[1:], strict=False):
            assert all(a >= b for a, b in zip(wide.vector, narrow.vector, strict=True))

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
    """Looks at a model and data, and returns a trajectory of widths."""

    def __call__(self, space: SearchSpace, task: Task, *, seed: int, device: str) -> Proposal:
        """Propose.

        Args:
            space: The space; proposals lie on its grid.
            task: The data; only its train and validation splits are read.
            seed: The same seed on the same device gives the same proposal.
            device: Where to compute, e.g. ``cpu`` or ``cuda:0``.
        """
        ...
