"""How far a study is, as plain values for a live view."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.study.posterior import MetricPosterior

Level = Literal["status", "event", "warning"]
"""The importance of a message: ``status`` is replaced by the next one, ``event`` stays on the
screen, ``warning`` stays and is highlighted."""


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        done: Trials that have ended, in whatever state.
        running: Trials that have begun and not ended.
        total: Trials that there will be.
        best_value: The best estimated value of the metric on the front; None while that is empty.
        front_size: Members of the front.
        elapsed: Seconds since this run began.
        remaining: Seconds to go at the pace since the first epoch of this run; None before a trial
            has ended in it.
        message: What just happened; may be empty.
        level: The importance of the message.
        estimated: Whether the best value is the surrogate's estimate; else it is a mean of
            trainings.
        metric: The metric.

    Example:
        >>> progress = Progress(4, 2, 32, 97.5, front_size=3, elapsed=60.0, remaining=420.0)
        >>> f"{progress.done} of {progress.total}, best {progress.best_value}%"
        '4 of 32, best 97.5%'
    """

    done: int
    running: int
    total: int
    best_value: float | None
    front_size: int
    elapsed: float
    remaining: float | None
    message: str = ""
    level: Level = "status"
    estimated: bool = False
    metric: Metric = ACCURACY


OnProgress = Callable[[Progress], None]
"""Called with the progress of a study."""


class Notify(Protocol):
    """Called with a message about a study and its importance."""

    def __call__(self, message: str, level: Level = "status", /) -> None:
        """Show the message."""
        ...


@dataclass
class Pace:
    """The pace of a run, from its first epoch on.

    Attributes:
        done: Trials that had ended before the run.
        started: The time at which it began.
        first_epoch: The time of its first epoch; None until then.

    Example:
        >>> posterior = MetricPosterior([], {}, ("accuracy", "macs"))
        >>> pace = Pace(done=4)
        >>> pace.progress(posterior, 4, 2, 8).remaining is None  # no trial has ended in this run
        True
        >>> pace.record_epoch()
        >>> pace.progress(posterior, 6, 2, 8).remaining >= 0
        True
    """

    done: int
    started: float = field(default_factory=time.monotonic)
    first_epoch: float | None = None
    _shown: tuple[int, MetricPosterior] | None = None

    def shown(
        self, done: int, posterior: Callable[[], MetricPosterior], *, last: bool
    ) -> MetricPosterior:
        """The posterior for the display; of 200 trials or more, it may be 0.5% of them behind.

        Args:
            done: Trials that have ended.
            posterior: Computes that of all of them.
            last: Whether no trial is left.
        """
        if last or self._shown is None or done - self._shown[0] > done // 200:
            self._shown = done, posterior()
        return self._shown[1]

    def record_epoch(self) -> None:
        """Note that an epoch was trained."""
        self.first_epoch = self.first_epoch or time.monotonic()

    def progress(
        self,
        posterior: MetricPosterior,
        done: int,
        running: int,
        total: int,
        limit: float = math.inf,
    ) -> Progress:
        """The progress of the run now.

        Args:
            posterior: That of the study's trials.
            done: Trials that have ended.
            running: Trials that have begun and not ended.
            total: Trials that there will be.
            limit: The most seconds that are left.
        """
        now, remaining = time.monotonic(), None
        if done != self.done and self.first_epoch is not None:
            remaining = (now - self.first_epoch) / (done - self.done) * (total - done)
            remaining = min(remaining, limit)
        best, size = posterior.best_value, len(posterior.front())
        return Progress(
            done,
            running,
            total,
            best,
            size,
            now - self.started,
            remaining,
            estimated=posterior.surrogate is not None,
            metric=posterior.metric,
        )
