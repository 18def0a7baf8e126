"""The budget of a study beside its number of trials: its hours, and its patience."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from widthsearch.study.config import StudyConfig
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial

RECORD_SECONDS = 60.0
"""The time of a study is stored at least this often, while it is driven."""


@dataclass
class Budget:
    """When a study ends before it has all its trials.

    Its hours are the wall time for which it was driven, over all its runs: with proposers and
    measurements of latency, but without the pauses between runs. A kill forgets the time since it
    was last stored, at most ``RECORD_SECONDS``.

    Attributes:
        config: The study's configuration.
        store: Its storage, which keeps the time.
        clock: The time in seconds from any moment on.

    Example:
        >>> import tempfile
        >>> config = StudyConfig(name="mine", trials=8, hours=2)
        >>> store = Store.create(f"sqlite:///{tempfile.mkdtemp()}/study.db", "mine", ["accuracy"])
        >>> times = iter([0.0, 5400.0, 5400.0])
        >>> Budget(config, store, lambda: next(times)).record()  # one and a half hours
        >>> Budget(config, store).seconds_left // 60
        29.0
    """

    config: StudyConfig
    store: Store
    clock: Callable[[], float] = time.monotonic
    _before: float = field(init=False)
    _started: float = field(init=False)
    _recorded: float = field(init=False)

    def __post_init__(self) -> None:
        stored = self.store.attribute("seconds")
        self._before = float(stored) if isinstance(stored, int | float) else 0.0
        self._started = self._recorded = self.clock()

    @property
    def seconds_left(self) -> float:
        """The time that is left; infinite for a study without hours."""
        hours = self.config.hours
        spent = self._before + self.clock() - self._started
        return math.inf if hours is None else max(0.0, 3600 * hours - spent)

    def record(self, *, after: float = 0.0) -> None:
        """Store the time so far, if it was last stored so many seconds ago."""
        now = self.clock()
        if now - self._recorded >= after:
            self._recorded = now
            self.store.set_attribute("seconds", self._before + now - self._started)

    def out_of_time(self) -> str | None:
        """Why the study ends now, if its hours are over."""
        return f"its {self.config.hours:g} hours are over" if self.seconds_left <= 0 else None

    def out_of_patience(self, trials: Collection[Trial]) -> str | None:
        """Why the study suggests no further network, if the last ones were expected to gain little.

        Args:
            trials: All trials of the study.
        """
        patience = self.config.patience
        if patience is None:
            return None
        suggested = [t for t in sorted(trials, key=lambda t: t.number) if "sampler" in t.origin]
        last = [t.origin.get("gain", math.inf) for t in suggested[-patience.suggestions :]]
        if len(last) < patience.suggestions or max(last) >= patience.gain:
            return None
        return (
            f"each of the last {len(last)} suggestions was expected to add less than "
            f"{100 * patience.gain:g}% to the front's hypervolume"
        )
