"""The engine-free study loop: which candidate comes next, and what becomes of it.

``Search`` does not know who trains. An engine (``runner.py``, or ten lines of a plain loop in a
test) asks it for trials, trains each epoch by epoch, and reports::

    while not search.done:
        trial = search.ask()                  # None: wait for a trial that is being trained
        ...
        goes_on = search.report(trial.number, curve)

Whatever it knows it wrote to the storage first, so a search made anew after any kill goes on where
the last one ended.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from widthsearch import pareto
from widthsearch.config import StudyConfig
from widthsearch.errors import StudyError, WidthsearchError
from widthsearch.latency import Latency
from widthsearch.outcomes import Outcome
from widthsearch.sampler import Known, draw
from widthsearch.space import SearchSpace
from widthsearch.storage import Lease, Store, Trial
from widthsearch.training import EpochResult
from widthsearch.widths import Widths

FAILURES_IN_A_ROW = 5
"""So many, and the study stops: a broken machine would burn the whole queue."""

Candidate = tuple[Widths, dict[str, Any]]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a study stands.

    Attributes:
        done: Trials that are done, whatever became of them.
        running: Trials that have begun and are not done.
        total: Trials that there will be.
        best_accuracy: The best finished trial's, in percent.
        front_size: Members of the front.
        elapsed: Seconds since this run began.
        remaining: Seconds to go, from the trials done in this run; None before the first.
        message: What just happened; may be empty.
    """

    done: int
    running: int
    total: int
    best_accuracy: float | None
    front_size: int
    elapsed: float
    remaining: float | None
    message: str = ""


class Search:
    """The state of a study that is being driven.

    With ``measure``, trials come in generations: all of one are measured while nothing else of the
    study runs, then they train, and only when all are done the next one is asked. The first is the
    whole queue; the sampler's have twice as many trials as train at once, so that a slow one keeps
    few waiting.

    Attributes:
        config: The study's configuration.
        space: The space.
        outcomes: The trials that are done, by number.
    """

    def __init__(
        self,
        config: StudyConfig,
        space: SearchSpace,
        store: Store,
        lease: Lease,
        *,
        candidates: Iterable[Candidate],
        measure: Callable[[Trial], Latency] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.config = config
        self.space = space
        self._store = store
        self._lease = lease
        self._measure = measure
        self._on_progress = on_progress
        self._names = tuple(axis.name for axis in space.axes)
        stopping = config.early_stopping
        self._rungs = stopping.rungs(config.recipe.epochs) if stopping else ()

        self.outcomes = {outcome.id: outcome for outcome in store.outcomes(self._names)}
        self._taken_up = store.take_up(self._names)
        self._open = {trial.number: trial for trial in self._taken_up}  # begun and not done
        self._ready: deque[Trial] = deque()  # of these, those that no engine has been given
        self._seen = {trial.widths for trial in (*self.outcomes.values(), *self._taken_up)}
        base: Candidate = (space.base, {"base": True})
        unseen = {widths: origin for widths, origin in [*candidates, base]}
        unseen = {base[0]: base[1], **unseen, base[0]: base[1]}
        self._queue = deque(item for item in unseen.items() if item[0] not in self._seen)
        self._exhausted = False
        self._failures = 0
        self._started = time.monotonic()
        self._done_before = len(self.outcomes)
        self._front: tuple[int, int] = (-1, 0)  # (outcomes it was drawn from, its size)
