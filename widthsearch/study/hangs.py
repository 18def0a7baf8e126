"""Notices trainings that make no report.

Imports no torch and no Ray: the engine calls :class:`HangWatch`, and ends what has hung.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from widthsearch.study.trial import Trial

MEDIANS = 10
"""A training that is silent for so many median epochs is reported."""

LEAST_SECONDS = 60.0
"""No training is reported before: the first epoch of a process loads data and compiles code."""

_STEP = 5.0
"""The most that one :meth:`HangWatch.check` counts, in seconds. While the driver itself stands
still (frozen, or busy with a suggestion), reports wait and no training is silent."""


@dataclass(eq=False)
class HangWatch:
    """How long each training has made no report.

    Attributes:
        timeout: The seconds without a report after which a training has hung; None for never.
        clock: The time in seconds.

    Example:
        >>> from widthsearch.space.cost import Cost
        >>> from widthsearch.training.recipe import EpochResult
        >>> from widthsearch.widths import Widths
        >>> now = 0.0
        >>> widths, curve = Widths(("fc",), (8,)), (EpochResult(1, 0.5, 91.0, 2.0),)
        >>> trial = Trial(3, "net", widths, {}, 0, Cost(9, 9, 9), curve=curve)
        >>> watch = HangWatch(timeout=90.0, clock=lambda: now)
        >>> watch.start(3)
        >>> for now in range(5, 65, 5):
        ...     warnings = watch.check({3: trial})
        >>> warnings
        ['trial 3 with widths [8] has made no report for 60 s, 30 times the median epoch of 2 s']
        >>> watch.hung()
        []
    """

    timeout: float | None = None
    clock: Callable[[], float] = time.monotonic
    _silent: dict[int, float] = field(default_factory=dict, init=False)
    _warned: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._checked = self.clock()

    def start(self, number: int) -> None:
        """Note that a training begins, in whatever process, or that it has made a report."""
        self._silent[number] = 0.0

    def stop(self, number: int) -> None:
        """Note that a training is not running any more."""
        self._silent.pop(number, None)

    def check(self, trials: Mapping[int, Trial]) -> list[str]:
        """Count the time since the last check.

        Args:
            trials: All trials of the study; their epochs give the median.

        Returns:
            A warning for each training that is silent for ``MEDIANS`` median epochs and
            ``LEAST_SECONDS``, once a trial. Without any epoch there is no measure, and no warning.
        """
        now = self.clock()
        passed, self._checked = min(now - self._checked, _STEP), now
        for number in self._silent:
            self._silent[number] += passed
        late = [n for n in self._silent.keys() - self._warned if self._silent[n] >= LEAST_SECONDS]
        epochs = [result.seconds for trial in trials.values() if late for result in trial.curve]
        median = max(statistics.median(epochs), 1e-3) if epochs else math.inf
        late = [number for number in sorted(late) if self._silent[number] >= MEDIANS * median]
        self._warned.update(late)
        return [
            f"trial {number} with widths [{', '.join(map(str, trials[number].widths.vector))}] has "
            f"made no report for {self._silent[number]:.0f} s, "
            f"{self._silent[number] / median:.0f} times the median epoch of {median:.3g} s"
            for number in late
        ]

    def hung(self) -> list[int]:
        """The trainings that are silent for longer than the time-out."""
        limit = self.timeout
        return [n for n, seconds in self._silent.items() if limit is not None and seconds > limit]
