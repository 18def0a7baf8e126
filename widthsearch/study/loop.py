"""The loop of a study without an engine: which trial comes next, and how each one ends.

A :class:`Search` trains nothing. An engine (the runner, or a plain loop of ten lines in a test)
asks it for trials, trains each epoch by epoch, and reports::

    while not search.done:
        trial = search.ask()                  # None: wait until a running trial has ended
        ...
        continues = search.report(trial.number, curve)

Every change of its state is in the storage first, so a search made anew after any kill continues
where the last one ended.

Example:
    >>> import tempfile
    >>> from torch import nn
    >>> from widthsearch.study.storage import Store
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> spaces = {"net": SearchSpace.from_model(net, (3, 8, 8), name="net")}
    >>> config = StudyConfig(name="mine", trials=2, recipe={"epochs": 1})
    >>> url = f"sqlite:///{tempfile.mkdtemp()}/study.db"
    >>> store = Store.create(url, "mine", config.objectives)
    >>> with DriverLock(store) as driver_lock:
    ...     search = Search(config, spaces, driver_lock)
    ...     while (trial := search.ask()) is not None:
    ...         more = search.report(trial.number, [EpochResult(1, 0.1, 90.0, 1.0)])
    >>> [trial.widths.vector for trial in search.trials.values()]
    [(1,), (16,)]
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from widthsearch.bayesopt.metric import COSTS
from widthsearch.errors import StudyError, WidthsearchError, one_line
from widthsearch.latency.config import Latency
from widthsearch.latency.predictor import LatencyPredictor
from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.budget import RECORD_SECONDS, Budget
from widthsearch.study.comparisons import Comparisons
from widthsearch.study.config import StudyConfig
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.front import objective_value
from widthsearch.study.posterior import MetricPosterior
from widthsearch.study.progress import Level, Pace, Progress
from widthsearch.study.queue import CandidateQueue
from widthsearch.study.stopping import is_stopped
from widthsearch.study.suggestions import LatencyEstimates, Suggestions
from widthsearch.study.trial import Trial, TrialState
from widthsearch.training.recipe import EpochResult, checked_curve

FAILURES_IN_A_ROW = 5
"""After so many the study stops: a broken machine would use up the whole queue."""

_logger = logging.getLogger(__name__)


class Search:
    """The state of a study that is being driven.

    The queue is first the failed trials to train again, then the candidates, then suggestions.

    With ``measure``, trials come in generations: all of one are measured while nothing else of the
    study runs, then they train, and the next one begins when all have ended. The first is the whole
    queue; those of suggestions have twice as many trials as train at once, so that a slow one keeps
    few waiting.

    Args:
        config: The study's configuration.
        spaces: The spaces by name.
        driver_lock: The lock of the study's storage, which this process holds.
        candidates: Networks to train before any is suggested.
        measure: Measures a trial's latency, given the base model's once that is known; None where
            latency is no objective.
        profiles: Stored latency profiles, by space.
        retry: Whether to train again the trials that failed.
        budget: Ends the search before it has all its trials; None where nothing does.
        on_progress: Called with the progress of the study.

    Attributes:
        trials: Every trial, running ones too, by number.
    """

    def __init__(
        self,
        config: StudyConfig,
        spaces: Mapping[str, SearchSpace],
        driver_lock: DriverLock,
        *,
        candidates: Iterable[Candidate] = (),
        measure: Callable[[Trial, float | None], Latency] | None = None,
        profiles: Mapping[str, LatencyPredictor] | None = None,
        retry: bool = False,
        budget: Budget | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.config = config
        self.spaces = spaces
        self._store = driver_lock.store
        self.driver_lock = driver_lock
        self._measure = measure
        self._budget = budget
        self._on_progress = on_progress
        self._store.fail_partial(spaces)
        self.trials = {trial.number: trial for trial in self._store.trials(spaces)}
        # Running trials are in one of these until an engine has them.
        self._interrupted = self._in_state(TrialState.RUNNING)  # by a kill of the last driver
        self._ready: deque[Trial] = deque()
        self._need_alone: deque[int] = deque()  # these ran out of memory
        self._trained_alone: set[int] = set()
        self._queue = CandidateQueue(self.trials.values(), candidates, config.limits, retry=retry)
        self._comparisons = Comparisons.of(
            config, spaces, self.trials, self._queue.superseded, self._store
        )
        self._latency = LatencyEstimates(spaces, profiles or {}, self.trials)
        self._earlier = self._store.earlier()
        self._suggestions = Suggestions(config, self._latency, self._queue.proposed, self._earlier)
        self._exhausted = self._announced = False
        self._failures = 0
        self._counted = ((-1, -1), 0)
        self._pace = Pace(self._done)
        if budget is not None:
            self._announce()

    @property
    def done(self) -> bool:
        """Whether every trial has ended, or waits for more hours."""
        return len(self.running) == len(self._waiting) and not self._may_begin()

    @property
    def ended(self) -> str | None:
        """Why no further trial begins, though there are fewer than ``trials``; None else."""
        if self._begun >= self._total and not self._waiting:
            return None
        late = None if self._budget is None else self._budget.out_of_time()
        return late or (None if self._comparisons.lacking() else _without_networks(self))

    @property
    def running(self) -> tuple[int, ...]:
        """The numbers of the trials that have begun and not ended."""
        return tuple(trial.number for trial in self._in_state(TrialState.RUNNING))

    @cached_property
    def posterior(self) -> MetricPosterior:
        """The posterior of the trials that have ended; computed anew once another one has."""
        return MetricPosterior.of(self.config, [*self.trials.values()], self.spaces, self._earlier)

    def ask(self) -> Trial | None:
        """The next trial to train.

        Returns:
            None while there is none before another one has ended, or at all.

        Raises:
            StudyError: Another driver took over, or too many trials failed in a row.
        """
        self.driver_lock.check()
        if self._need_alone or any(self.is_alone(number) for number in self.running):
            return self._next_alone()
        waiting = self._waiting
        self._make_ready([t for t in self._interrupted if t.number not in waiting])
        self._interrupted = [t for t in self._interrupted if t.number in waiting]
        while not self._ready and self._may_begin():
            self._make_ready(self._begin_generation())
        self._announce()
        waiting = self._waiting
        trial = next((t for t in self._ready if t.number not in waiting), None)
        if trial is not None:
            self._ready.remove(trial)
        return trial

    def report(self, number: int, curve: Sequence[EpochResult]) -> bool:
        """Record an epoch of a trial, and decide whether the trial continues.

        An epoch may be reported again after a restart; early stopping then decides anew.

        Args:
            number: The trial's number.
            curve: All its epochs so far, from 1 on.

        Returns:
            Whether the trial continues.

        Raises:
            StudyError: It is no curve of a running trial, or as for :meth:`ask`.
        """
        trial = self.trials[number] = reported(self, number, curve)
        self._pace.record_epoch()
        self._store.record_curve(number, trial.curve)
        if (reason := fault(trial, self.config)) is not None:
            self.fail(number, reason)
        elif trial.curve[-1].epoch >= trial.epochs(self.config.recipe.epochs):
            trial = replace(trial, state=TrialState.FINISHED)
            self._store.finish(number, [*_objectives(trial, self.config).values()])
            self._close(trial)
        elif is_stopped(trial, self.trials.values(), self.config):
            self._store.stop(number)
            self._close(replace(trial, state=TrialState.STOPPED))
        else:
            self.notify()
            return True
        return False

    def fail(self, number: int, reason: str) -> None:
        """Record that a trial cannot be trained.

        Args:
            number: The trial's number.
            reason: The reason, in one line.

        Raises:
            StudyError: ``FAILURES_IN_A_ROW`` trials failed in a row.
        """
        widths = ", ".join(map(str, running_trial(self.trials, number).widths.vector))
        reason = f"{reason}; the widths are [{widths}]"  # what it takes to see it again
        self._store.fail(number, reason)
        self._close(replace(self.trials[number], state=TrialState.FAILED, error=reason))
        if self._failures >= FAILURES_IN_A_ROW:
            raise StudyError(
                f"{self._failures} candidates failed in a row, so study {self.config.name!r} "
                f"stops; the last one, trial {number}: {reason}"
            )

    def retry_alone(self, number: int) -> bool:
        """Train a trial that ran out of memory once more, alone; False if it was so before."""
        if number in self._trained_alone:
            return False
        self._trained_alone.add(number)
        self._need_alone.append(number)
        self.notify(
            f"trial {number} ran out of memory; it will be trained again by itself", "warning"
        )
        return True

    def is_alone(self, number: int) -> bool:
        """Whether a trial is being trained while no other one runs."""
        begun = number in self._trained_alone and number not in self._need_alone
        return begun and number in self.running

    def notify(self, message: str = "", level: Level = "status", /) -> None:
        """Log what just happened, if anything, and call back with the progress of the study."""
        if message:
            _logger.info(message)
        if self._budget is not None:
            self._budget.record(after=RECORD_SECONDS)
        if self._on_progress is not None:
            done, running = self._done, len(self.running)
            total = done + running + (0 if self.ended else max(0, self._total - self._begun))
            limit = math.inf if self._budget is None else self._budget.seconds_left
            posterior = self._pace.shown(done, lambda: self.posterior, last=self.done)
            now = self._pace.progress(posterior, done, running, total, limit)
            self._on_progress(replace(now, message=message, level=level))

    def _announce(self) -> None:
        """Say once why the study ends before it has all its trials."""
        if not self._announced and (reason := self.ended) is not None:
            self._announced = True
            begun = self._begun - len(self._waiting)
            self.notify(f"{reason}: the study ends after {begun} of {self._total} trials", "event")

    @property
    def _begun(self) -> int:
        """The trials of this search that have begun; a failed one and its repetition count once."""
        known = len(self.trials), len(self._queue.superseded)
        if self._counted[0] != known:
            counted = self.trials.keys() - self._queue.superseded
            own = sum("confirms" not in self.trials[number].origin for number in counted)
            self._counted = known, own
        return self._counted[1]

    @property
    def _total(self) -> int:
        """The trials that this search is to have."""
        return self.config.trials

    @property
    def _waiting(self) -> set[int]:
        """The trials that have begun, but whose training does not, since the hours are over."""
        if self._budget is None or self._budget.out_of_time() is None:
            return set()
        return {t.number for t in (*self._ready, *self._interrupted) if not t.curve}

    def _may_begin(self) -> bool:
        if self._begun >= self._total or self.ended or (self._measure and self.running):
            return False
        return self._comparisons.next() is not None or _without_networks(self) is None

    def _next_alone(self) -> Trial | None:
        """The next trial that needs a machine to itself, once no other one is being trained."""
        idle = {*self._need_alone, *(trial.number for trial in self._ready)}
        idle.update(trial.number for trial in self._interrupted)
        if not self._need_alone or not idle.issuperset(self.running):
            return None
        return self.trials[self._need_alone.popleft()]

    def _begin_generation(self) -> list[Trial]:
        """Begin the next trials; a single one where no latency is measured."""
        several = self._measure is not None
        size = (len(self._queue) or 2 * self.config.at_once) if several else 1
        generation = []
        for _ in range(min(size, self._total - self._begun)):
            candidate = self._comparisons.next()
            if candidate is None and self._comparisons.room(self._total - self._begun) <= 0:
                break
            candidate = candidate or self._queue.pop() or self._suggest()
            if candidate is None:
                self._exhausted = True
                break
            generation.append(self._begin(candidate))
        return generation

    def _suggest(self) -> Candidate | None:
        """A candidate once the queue is empty; None where no network is left."""
        return self._suggestions.next(self._queue.seen)

    def _begin(self, candidate: Candidate) -> Trial:
        trial = self._store.begin(self.spaces, *self._comparisons.prepared(candidate))
        same = [t for t in self.trials.values() if t.architecture == trial.architecture]
        if latency := next((t.latency for t in same if t.latency), None):  # whatever its seed
            self._store.record_latency(trial.number, latency)
            trial = replace(trial, latency=latency)
        self.trials[trial.number] = trial
        self._queue.seen.add(trial.architecture)
        return trial

    def _make_ready(self, trials: Sequence[Trial]) -> None:
        """Measure the trials' latency where it is an objective; nothing else of the study runs."""
        for i, trial in enumerate(trials):
            if self._measure is not None and trial.latency is None:
                self.notify(f"measuring the latency of candidate {i + 1} of {len(trials)}")
                latency = _measured(self._measure, trial, self._latency.base_ms)
                if isinstance(latency, str):
                    self.fail(trial.number, latency)
                    continue
                self._store.record_latency(trial.number, latency)
                trial = self.trials[trial.number] = replace(trial, latency=latency)
            self._ready.append(trial)

    def _in_state(self, state: TrialState) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state == state]

    @property
    def _done(self) -> int:
        return len(self.trials) - len(self.running)

    def _close(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        if self._budget is not None:
            self._budget.record()
        vars(self).pop("posterior", None)
        failed = trial.state == TrialState.FAILED
        self._failures = self._failures + 1 if failed else 0
        if failed:
            self.notify(f"trial {trial.number} failed: {trial.error}", "warning")
        else:
            self.notify()
        self._announce()


def reported(search: Search, number: int, curve: Sequence[EpochResult]) -> Trial:
    """A trial with the curve that was reported.

    Raises:
        StudyError: The search has ended, or it is no curve of a running trial.
    """
    search.driver_lock.check_kept()
    trial = running_trial(search.trials, number)
    epochs = trial.epochs(search.config.recipe.epochs)
    return replace(trial, curve=checked_curve(curve, number, epochs))


def running_trial(trials: Mapping[int, Trial], number: int) -> Trial:
    """The running trial of a number.

    Raises:
        StudyError: There is none.
    """
    trial = trials.get(number) if isinstance(number, int) else None
    if trial is None or trial.state != TrialState.RUNNING:
        given = number if isinstance(number, int) else f"a {type(number).__name__}"
        running = ", ".join(str(n) for n, t in trials.items() if t.state == TrialState.RUNNING)
        raise StudyError(
            "a report must be of the number of a running trial, but was of "
            f"{given}{f', which has {trial.state}' if trial else ''}; running are "
            f"{running or 'none'}"
        )
    return trial


def fault(trial: Trial, config: StudyConfig) -> str | None:
    """Why a trial fails after the last epoch of its curve; None where it does not."""
    last, value, metric = trial.curve[-1], trial.values[-1], config.metric
    if not math.isfinite(value):
        finite = last.loss is None or math.isfinite(last.loss)
        shown = f"{metric.name} is {value}" if finite else f"loss is {last.loss}"
        return f"training diverged in epoch {last.epoch}: its {shown}"
    if not metric.contains(value):
        low, high = metric.ends
        return (
            f"{metric.name} must be in its range [{low:g}, {high:g}], but was {value:g} in epoch "
            f"{last.epoch}: change metric.range, or the report"
        )
    if last.epoch < trial.epochs(config.recipe.epochs):
        return None
    trial = replace(trial, state=TrialState.FINISHED)
    for name, value in _objectives(trial, config).items():
        if name not in (metric.name, *COSTS) and not 0 < value < math.inf:
            known = ", ".join((metric.name, *trial.reported))
            return (
                f"objective {name!r} must be reported, above 0, but was {value:g} in epoch "
                f"{last.epoch}, which reported {known}"
            )
    return None


def _objectives(trial: Trial, config: StudyConfig) -> dict[str, float]:
    """The value of each objective of a finished trial."""
    return {name: objective_value(trial, name, config.metric) for name in config.objectives}


def _without_networks(search: Search) -> str | None:
    """Why no further network begins, but perhaps comparisons of those that began; None else."""
    if search._exhausted:
        limits = " within the limits" if search.config.limits else ""
        return f"every width vector of the space{limits} has been tried"
    if search._comparisons.room(search._total - search._begun) <= 0:
        return "fewer trials are left than a network has starts"
    budget = None if search._queue else search._budget
    return None if budget is None else budget.out_of_patience(search.trials.values())


def _measured(
    measure: Callable[[Trial, float | None], Latency], trial: Trial, base_ms: float | None
) -> Latency | str:
    """A trial's latency, or why it cannot be measured."""
    try:
        return measure(trial, base_ms)
    except WidthsearchError:
        raise  # the device's error, not the candidate's
    except Exception as error:
        _logger.info("trial %d cannot be measured", trial.number, exc_info=True)
        return one_line(error)
