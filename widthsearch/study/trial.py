"""One trial of a study: a network, its training and its state, as plain values.

Nothing here needs torch, so a stored study can be read and its front drawn without it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from widthsearch.errors import StudyError
from widthsearch.latency.config import Latency
from widthsearch.space.cost import Cost
from widthsearch.training.recipe import EpochResult
from widthsearch.widths import Widths

Architecture = tuple[str, Widths]
"""A network of a study: the name of its space, and its widths."""


class TrialState(StrEnum):
    """The state of a trial; every state but ``running`` is final."""

    RUNNING = "running"
    """It has begun: it waits for its training, or is being trained."""
    FINISHED = "finished"
    """It was trained for all epochs of the recipe."""
    STOPPED = "stopped"
    """Early stopping ended it."""
    FAILED = "failed"
    """It could not be trained, or its training diverged."""


@dataclass(frozen=True)
class Trial:
    """One training of one network.

    Attributes:
        number: Its number in the study, from 0; tables and JSON call it ``id``.
        space: The name of the space that the widths belong to.
        widths: The architecture.
        origin: Where the widths came from, e.g. ``{"proposer": "sensitivity", "family": "linear",
            "budget": 0.5}``, ``{"sampler": "search"}`` or ``{"base": True}``; and where its weights
            did: ``start``, unless they are new. ``{"compares": 3, "start": "extract"}`` trains the
            network of trial 3 again from another start.
        seed: The seed of its initialisation, order of images and augmentation.
        cost: Its MACs, parameters, activation elements and weight bytes; exact.
        latency: Its measured inference latency; None where it is not measured.
        curve: One result per epoch trained so far.
        state: Whether it is running, or how it ended.
        error: Why it failed, in one line; None unless it failed.

    Example:
        >>> from dataclasses import replace
        >>> from widthsearch.space.cost import Cost
        >>> from widthsearch.training.recipe import EpochResult
        >>> from widthsearch.widths import Widths
        >>> trial = Trial(0, "net", Widths(("conv1",), (8,)), {"base": True}, 0, Cost(900, 80, 64))
        >>> trial.state, trial.value
        (<TrialState.RUNNING: 'running'>, None)
        >>> curve = (EpochResult(epoch=1, loss=0.4, value=91.5, seconds=2.0),)
        >>> replace(trial, curve=curve, state=TrialState.FINISHED).value
        91.5
    """

    number: int
    space: str
    widths: Widths
    origin: Mapping[str, Any]
    seed: int
    cost: Cost
    latency: Latency | None = None
    curve: tuple[EpochResult, ...] = ()
    state: TrialState = TrialState.RUNNING
    error: str | None = None

    def __post_init__(self) -> None:
        assert (self.state == TrialState.FAILED) == (self.error is not None), self
        assert self.value is None or math.isfinite(self.value), self

    @property
    def architecture(self) -> Architecture:
        """The network that is trained."""
        return self.space, self.widths

    @property
    def start(self) -> str:
        """``scratch``, ``extract`` or ``scratch_b``."""
        return str(self.origin.get("start", "scratch"))

    def epochs(self, of_recipe: int) -> int:
        """The number of its epochs: that of the recipe, but for ``scratch_b``."""
        return int(self.origin.get("epochs", of_recipe))

    @property
    def is_comparison(self) -> bool:
        """Whether it trains another trial's network from another start.

        The search, its estimates and the front do not see it.
        """
        return "compares" in self.origin

    @property
    def value(self) -> float | None:
        """The study's metric after the last epoch, in its unit; None unless finished."""
        return self.curve[-1].value if self.state == TrialState.FINISHED else None

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The study's metric after each epoch so far."""
        return tuple(result.value for result in self.curve)

    @property
    def reported(self) -> dict[str, float]:
        """The other numbers of the last epoch by name, e.g. ``loss``; empty unless finished."""
        if self.state != TrialState.FINISHED:
            return {}
        last = self.curve[-1]
        return {**({} if last.loss is None else {"loss": last.loss}), **last.metrics}

    @property
    def latency_ms(self) -> float | None:
        """The median measured latency in milliseconds; None where it is not measured."""
        return None if self.latency is None else self.latency.median_ms

    def to_json(self, metric: str = "accuracy") -> dict[str, Any]:
        """Everything as JSON values: costs and latency flat, NaN (a diverged epoch) as null.

        The number stands under ``id``.

        Args:
            metric: The name of the study's metric, under which its values stand.
        """
        return {
            "id": self.number,
            "state": self.state.value,
            "origin": dict(self.origin),
            "seed": self.seed,
            "space": self.space,
            "widths": self.widths.to_json(),
            metric: self.value,
            **asdict(self.cost),
            "latency_ms": self.latency_ms,
            "latency": self.latency and self.latency.to_json(),
            "curve": [_row(result, metric) for result in self.curve],
            "error": self.error,
        }


def _row(result: EpochResult, metric: str) -> dict[str, Any]:
    """An epoch as JSON values, all reported numbers by their names."""
    fields = {metric if key == "accuracy" else key: v for key, v in asdict(result).items()}
    fields = {**fields.pop("metrics"), **fields}
    return {
        key: None if isinstance(v, float) and not math.isfinite(v) else v
        for key, v in fields.items()
    }


def unresolved_failures(trials: Collection[Trial]) -> list[Trial]:
    """The failed trials, by number, whose training has no later trial and none that is well.

    Args:
        trials: All trials of a study; running ones resolve a failure too.
    """

    def training(trial: Trial) -> tuple[Architecture, str]:
        return trial.architecture, trial.start if trial.is_comparison else ""

    known = {training(t) for t in trials if t.state != TrialState.FAILED}
    found = []
    for trial in sorted(trials, key=lambda t: -t.number):
        if trial.state == TrialState.FAILED and training(trial) not in known:
            known.add(training(trial))
            found.append(trial)
    return found[::-1]


def count_begun(trials: Collection[Trial]) -> int:
    """How many of a study's own trials have begun.

    A failed trial and its repetition count once; a confirmation of a network does not count.
    """
    well = [trial for trial in trials if trial.state != TrialState.FAILED]
    begun = [*well, *unresolved_failures(trials)]
    return sum("confirms" not in trial.origin for trial in begun)


def check_finished(name: str, trials: Collection[Trial], ended: str | None) -> None:
    """Check that some trial of a study has finished.

    Args:
        name: The study's name.
        trials: Its trials.
        ended: Why it ended before its last trial; None where it did not.

    Raises:
        StudyError: None has.
    """
    if all(trial.state != TrialState.FINISHED for trial in trials):
        reasons = [trial.error for trial in trials if trial.error]
        if not reasons and ended is not None:
            raise StudyError(f"study {name!r} has no finished trial: {ended}")
        raise StudyError(
            f"study {name!r} has no finished trial; the last failed: "
            f"{reasons[-1] if reasons else 'none'}; see logs/run.log, and after a fix run again "
            "with --retry"
        )
