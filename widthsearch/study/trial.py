"""Outcomes: what became of a candidate, as plain values.

Nothing here needs torch, so a stored study can be read and its front drawn without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from widthsearch.latency.config import Latency
    from widthsearch.space.cost import Cost
    from widthsearch.training.recipe import EpochResult
    from widthsearch.widths import Widths


@dataclass(frozen=True)
class Outcome:
    """A candidate that is done: finished, stopped early, or failed.

    Attributes:
        id: The trial's number in the study.
        space: The name of the space that the widths are of.
        widths: The architecture.
        state: ``finished`` after the recipe's last epoch, ``stopped`` at a rung, or ``failed``.
        origin: Where the widths came from, e.g. ``{"proposer": "sensitivity", "family": "linear",
            "budget": 0.5}``, ``{"sampler": "tpe"}`` or ``{"base": True}``.
        seed: The seed of its initialisation, order of images and augmentation.
        cost: Its MACs, parameters and activation elements; exact.
        latency: Its measured inference latency; None where the study measures none.
        accuracy: Top-1 on the validation split after the last epoch, in percent; None unless
            finished.
        curve: One result per epoch that was trained.
        error: Why it failed, in one line; None unless failed.
    """

    id: int
    space: str
    widths: Widths
    state: Literal["finished", "stopped", "failed"]
    origin: Mapping[str, Any]
    seed: int
    cost: Cost
    latency: Latency | None
    accuracy: float | None
    curve: tuple[EpochResult, ...]
    error: str | None = None

    def __post_init__(self) -> None:
        assert (self.state == "finished") == (self.accuracy is not None), self
        assert self.accuracy is None or math.isfinite(self.accuracy), self
        assert (self.state == "failed") == (self.error is not None), self

    @property
    def latency_ms(self) -> float | None:
        """The median measured latency in milliseconds, where there is one."""
        return None if self.latency is None else self.latency.median_ms

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, costs and latency flat; NaN (a diverged epoch) as null."""
        return {
            "id": self.id,
            "state": self.state,
            "origin": dict(self.origin),
            "seed": self.seed,
            "space": self.space,
            "widths": self.widths.to_json(),
            "accuracy": self.accuracy,
            "macs": self.cost.macs,
            "params": self.cost.params,
            "activations": self.cost.activations,
            "latency_ms": self.latency_ms,
            "latency": None if self.latency is None else self.latency.to_json(),
            "curve": [
                {
                    k: None if isinstance(v, float) and not math.isfinite(v) else v
                    for k, v in asdict(result).items()
                }
                for result in self.curve
            ],
            "error": self.error,
        }


class Architecture(Protocol):
    """What has widths of a space."""

    @property
    def space(self) -> str:
        """The space's name."""
        ...

    @property
    def widths(self) -> Widths:
        """The widths."""
        ...


def unmended(outcomes: Sequence[Outcome], begun: Iterable[Architecture] = ()) -> list[Outcome]:
    """Failed outcomes, by ID, whose architecture no other one has that came later or did not fail.

    Args:
        outcomes: All of a study.
        begun: What is being trained.
    """
    done = [outcome for outcome in outcomes if outcome.state != "failed"]
    known = {(trial.space, trial.widths) for trial in (*done, *begun)}
    found = []
    for outcome in sorted(outcomes, key=lambda o: -o.id):
        if outcome.state == "failed" and (outcome.space, outcome.widths) not in known:
            known.add((outcome.space, outcome.widths))
            found.append(outcome)
    return found[::-1]
