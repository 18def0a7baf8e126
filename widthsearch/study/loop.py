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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.early_stopping import FrontStopping
from widthsearch.bayesopt.kernel import Coordinates
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.pareto import Points
from widthsearch.bayesopt.search import BayesianSearch
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.errors import StudyError, WidthsearchError, one_line
from widthsearch.latency.config import Latency
from widthsearch.latency.predictor import LatencyPredictor
from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import Rungs, StudyConfig
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.posterior import AccuracyPosterior
from widthsearch.study.progress import Level, Progress
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial, TrialState, unresolved_failures
from widthsearch.training.recipe import EpochResult
from widthsearch.widths import Widths

FAILURES_IN_A_ROW = 5
"""So many, and the study stops: a broken machine would burn the whole queue."""

_logger = logging.getLogger(__name__)


class Search:
    """The state of a study that is being driven.

    With ``retry``, what failed before is trained again, first.

    With ``measure`` (of a trial; it is given the base model's latency once that is known), trials
    come in generations: all of one are measured while nothing else of the study runs, then they
    train, and only when all are done the next one is asked. The first is the whole queue; the
    sampler's have twice as many trials as train at once, so that a slow one keeps few waiting.

    Attributes:
        config: The study's configuration.
        spaces: The spaces by name.
        trials: Every trial, running ones too, by number.
    """

    def __init__(
        self,
        config: StudyConfig,
        spaces: Mapping[str, SearchSpace],
        store: Store,
        driver_lock: DriverLock,
        *,
        candidates: Iterable[Candidate] = (),
        measure: Callable[[Trial, float | None], Latency] | None = None,
        profiles: Mapping[str, LatencyPredictor] | None = None,
        retry: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.config = config
        self.spaces = spaces
        self._store = store
        self._driver_lock = driver_lock
        self._measure = measure
        self._profiles = profiles or {}
        self._latency_models: dict[str, tuple[int, LatencyPredictor]] = {}
        self._on_progress = on_progress
        names = {name: space.names for name, space in spaces.items()}
        stopping = config.early_stopping
        self._rungs: Collection[int] = range(1, config.recipe.epochs)
        if isinstance(stopping, Rungs):
            self._rungs = stopping.rungs(config.recipe.epochs)

        store.fail_partial(names)
        self.trials = {trial.number: trial for trial in store.trials(names)}
        running = [trial for trial in self.trials.values() if trial.state == TrialState.RUNNING]
        self._taken_up = running  # begun by a driver that was killed
        self._ready: deque[Trial] = deque()  # running ones that no engine has been given yet
        self._waiting: deque[int] = deque()  # running ones that need a machine to themselves
        self._retried: set[int] = set()  # those that were given one
        failed = unresolved_failures(list(self.trials.values()))
        again = {t.number: Candidate(t.space, t.widths, t.origin) for t in failed if retry}
        left = {trial.number for trial in failed} - again.keys()
        self._superseded = {
            trial.number
            for trial in self.trials.values()
            if trial.state == TrialState.FAILED and trial.number not in left
        }
        self._seen = {(t.space, t.widths) for t in self.trials.values() if t.number not in again}
        queue: dict[tuple[str, Widths], Candidate] = {}
        for candidate in (*again.values(), *candidates):
            queue.setdefault((candidate.space, candidate.widths), candidate)
        self._queue = deque(c for key, c in queue.items() if key not in self._seen)
        placed = Coordinates.together([Coordinates.of(space) for space in spaces.values()])
        self._samplers = {
            name: BayesianSearch(
                coordinates,
                config.objectives,
                seed=config.seed,
                limits=config.limits,
                latency=partial(self._predicted, name),
                profiles=[c.widths for c in queue.values() if c.space == name],
            )
            for name, coordinates in zip(spaces, placed, strict=True)
        }
        self._exhausted = False
        self._failures = 0
        self._started = time.monotonic()
        self._first_epoch: float | None = None
        self._done_before = self._done
        self._posterior: tuple[int, AccuracyPosterior] | None = None

    @property
    def done(self) -> bool:
        """Whether every trial is done."""
        return not self.running and not self._may_begin()

    @property
    def running(self) -> tuple[int, ...]:
        """The numbers of the trials that have begun and not ended."""
        return tuple(t.number for t in self.trials.values() if t.state == TrialState.RUNNING)

    @property
    def posterior(self) -> AccuracyPosterior:
        """The posterior of the trials that have ended; computed anew once another one has."""
        if self._posterior is None or self._posterior[0] != self._done:
            trials, config = list(self.trials.values()), self.config
            self._posterior = (
                self._done,
                AccuracyPosterior(trials, self.spaces, config.objectives, config.limits),
            )
        return self._posterior[1]

    @property
    def _done(self) -> int:
        return len(self.trials) - len(self.running)

    def ask(self) -> Trial | None:
        """The next trial to train; None while there is none before another one is done, or at all.

        Raises:
            StudyError: Another driver took over, or too many trials failed in a row.
        """
        self._driver_lock.check()
        if self._waiting or any(self.is_alone(number) for number in self.running):
            return self._next_alone()
        if self._taken_up:
            self._make_ready(self._taken_up)
            self._taken_up = []
        while not self._ready and self._may_begin():
            self._make_ready(self._generation())
        return self._ready.popleft() if self._ready else None

    def report(self, number: int, curve: Sequence[EpochResult]) -> bool:
        """Tell of an epoch; ``curve`` is all of them so far. Returns whether the trial goes on.

        An epoch may be reported again after a restart; its rung is then decided anew.
        """
        self._driver_lock.check()
        self._first_epoch = self._first_epoch or time.monotonic()
        trial = self.trials[number] = replace(self.trials[number], curve=tuple(curve))
        self._store.record_curve(number, trial.curve)
        last = trial.curve[-1]
        if not math.isfinite(last.accuracy):
            self.fail(number, f"training diverged in epoch {last.epoch}: its loss is {last.loss}")
            return False
        if last.epoch >= self.config.recipe.epochs:
            self._store.finish(number, self._values(trial))
            self._close(replace(trial, state=TrialState.FINISHED))
            return False
        if last.epoch in self._rungs and not self._goes_on(trial, last.epoch):
            self._store.stop(number)
            self._close(replace(trial, state=TrialState.STOPPED))
            return False
        self.notify()
        return True

    def fail(self, number: int, reason: str) -> None:
        """Tell that a trial cannot be trained, with the reason in one line.

        Raises:
            StudyError: It is the last straw: ``FAILURES_IN_A_ROW``.
        """
        self._store.fail(number, reason)
        self._close(replace(self.trials[number], state=TrialState.FAILED, error=reason))
        if self._failures >= FAILURES_IN_A_ROW:
            raise StudyError(
                f"{self._failures} candidates failed in a row, so study {self.config.name!r} "
                f"stops; the last one, trial {number}: {reason}"
            )

    def retry_alone(self, number: int) -> bool:
        """Train a trial that ran out of memory once more, while no other one runs.

        Returns:
            Whether it will be; it is once alone, and its next failure is its end.
        """
        if number in self._retried:
            return False
        self._retried.add(number)
        self._waiting.append(number)
        self.notify(
            f"trial {number} ran out of memory; it will be trained again by itself", "warning"
        )
        return True

    def is_alone(self, number: int) -> bool:
        """Whether a trial is trained while no other one runs."""
        return number in self._retried and number not in self._waiting and number in self.running

    def _next_alone(self) -> Trial | None:
        """The next trial that wants a machine to itself, once no other one is being trained."""
        idle = {*self._waiting, *(trial.number for trial in self._ready)}
        idle.update(trial.number for trial in self._taken_up)
        if not self._waiting or not idle.issuperset(self.running):
            return None
        return self.trials[self._waiting.popleft()]

    def notify(self, message: str = "", level: Level = "status", /) -> None:
        """Let whoever watches know where the study stands."""
        if message:
            _logger.info(message)
        if self._on_progress is not None:
            self._on_progress(replace(self._progress(), message=message, level=level))

    @property
    def _begun(self) -> int:
        """How many of this search's trials have begun; what failed and is trained again is one."""
        counted = self.trials.keys() - self._superseded
        return sum("confirms" not in self.trials[number].origin for number in counted)

    @property
    def _total(self) -> int:
        """How many of them there will be."""
        return self.config.trials

    def _may_begin(self) -> bool:
        if self._exhausted or self._begun >= self._total:
            return False
        return self._measure is None or not self.running

    def _generation(self) -> list[Trial]:
        """Begin the trials that are next; one, where no latency is to be measured."""
        size = 1
        if self._measure is not None:
            size = len(self._queue) or 2 * self.config.at_once
        generation = []
        for _ in range(min(size, self._total - self._begun)):
            candidate = self._queue.popleft() if self._queue else self._drawn()
            if candidate is None:
                self._exhausted = True
                limits = " within the limits" if self.config.limits else ""
                self.notify(
                    f"every width vector of the space{limits} has been tried: the study ends after "
                    f"{self._begun} of {self._total} trials",
                    "event",
                )
                break
            generation.append(self._begin(candidate))
        return generation

    def _drawn(self) -> Candidate | None:
        """The candidate of greatest expected gain, of all spaces."""
        found: list[tuple[float, int, Candidate]] = []
        known = {name: self._known(name) for name in self._samplers}
        shared = self._shared(known)
        for name, sampler in self._samplers.items():
            seen = [widths for space, widths in self._seen if space == name]
            surrogate, rivals = None, list[Observation]()
            if shared is not None:
                surrogate = shared.of_space(sampler.coordinates)
                rivals = self._rivals(name, shared)
            suggestion = sampler.suggest(known[name], seen=seen, rivals=rivals, surrogate=surrogate)
            if suggestion is not None:
                candidate = Candidate(name, suggestion.widths, {"sampler": "width"})
                found.append((suggestion.improvement, -len(known[name]), candidate))
        return max(found, key=lambda each: each[:2])[2] if found else None

    def _shared(self, known: Mapping[str, Sequence[Observation]]) -> Surrogate | None:
        """One surrogate of several spaces; None of a single space, or before a trial finished."""
        if len(known) == 1 or all(o.accuracy is None for own in known.values() for o in own):
            return None
        return Surrogate.fit_observations(
            *((self._samplers[name].coordinates, own) for name, own in known.items())
        )

    def _rivals(self, space: str, shared: Surrogate) -> list[Observation]:
        """The other spaces' networks, finished or running, with their posterior mean accuracy."""
        live = self._in_state(TrialState.FINISHED, TrialState.RUNNING)
        rivals: list[Observation] = []
        for name, sampler in self._samplers.items():
            own = [trial for trial in live if trial.space == name]
            timed = "latency_ms" in self.config.objectives
            if name == space or not own or (timed and all(t.latency is None for t in own)):
                continue
            vectors = np.array([trial.widths.vector for trial in own])
            mean = shared.of_space(sampler.coordinates).posterior(vectors).mean.tolist()
            ms = self._predicted(name, vectors)[0].tolist() if timed else [math.nan] * len(own)
            for trial, accuracy, predicted_ms in zip(own, mean, ms, strict=True):
                rivals.append(replace(self._observed(trial, predicted_ms), accuracy=accuracy))
        return rivals

    def _predicted(self, space: str, vectors: NDArray[np.int64]) -> tuple[Points, Points]:
        """Predicted latency of a space's networks: from its profile and from what was measured."""
        own = [(t.widths.vector, t.latency) for t in self.trials.values() if t.space == space]
        measured = [(vector, latency) for vector, latency in own if latency is not None]
        count, model = self._latency_models.get(space, (-1, None))
        if model is None or count != len(measured):
            rows = [(v, m.median_ms, m.standard_error_ms) for v, m in measured]
            profile, base_ms = self._profiles.get(space), self._base_ms()
            if profile is not None:  # on the scale of this study's base
                base = np.array([self.spaces[space].base.vector])
                scale = 1.0 if base_ms is None else base_ms / float(profile.predicted(base)[0])
                rows += [
                    (tuple(vector), ms * scale, sd * scale)
                    for vector, ms, sd in zip(
                        profile.vectors.tolist(), profile.ms, profile.sd, strict=True
                    )
                ]
            model = LatencyPredictor.fit(self.spaces[space], *zip(*rows, strict=True))
            self._latency_models[space] = len(measured), model
        return model(vectors)

    def _known(self, space: str) -> list[Observation]:
        """What a space's sampler learns from, by number."""
        return [
            self._observed(trial)
            for trial in self.trials.values()
            if trial.space == space and trial.state != TrialState.FAILED
        ]

    def _observed(self, trial: Trial, predicted_ms: float = math.nan) -> Observation:
        """A trial as the sampler and early stopping see it; a latency not measured is predicted."""
        costs = (
            predicted_ms
            if name == "latency_ms" and trial.latency is None
            else self._value(trial, name, -1)
            for name in self.config.objectives
            if name != "accuracy"
        )
        curve = tuple(result.accuracy for result in trial.curve)
        running = trial.state == TrialState.RUNNING
        return Observation(trial.widths.vector, trial.accuracy, tuple(costs), curve, running)

    def _in_state(self, *states: TrialState) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state in states]

    def _begin(self, candidate: Candidate) -> Trial:
        space = self.spaces[candidate.space]
        trial = self._store.begin(
            space.name,
            space.axes,
            candidate.widths,
            origin=candidate.origin,
            seed=self._seed("trial"),
            cost=space.cost(candidate.widths),
            alone=len(self.spaces) == 1,
        )
        self.trials[trial.number] = trial
        self._seen.add((candidate.space, candidate.widths))
        return trial

    def _seed(self, purpose: str) -> int:
        """A seed for the trial that begins next: of the study's seed and the count of trials."""
        entropy = (self.config.seed, len(self.trials), *purpose.encode())
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _make_ready(self, trials: Sequence[Trial]) -> None:
        """Measure the trials' latency where that is asked for; nothing else of the study runs."""
        for i, trial in enumerate(trials):
            if self._measure is not None and trial.latency is None:
                self.notify(f"measuring the latency of candidate {i + 1} of {len(trials)}")
                try:
                    latency = self._measure(trial, self._base_ms())
                except WidthsearchError:
                    raise  # the device, not the candidate
                except Exception as error:
                    _logger.info("trial %d cannot be measured", trial.number, exc_info=True)
                    self.fail(trial.number, one_line(error))
                    continue
                self._store.record_latency(trial.number, latency)
                trial = self.trials[trial.number] = replace(trial, latency=latency)
            self._ready.append(trial)

    def _base_ms(self) -> float | None:
        """The base model's latency as this study measured it once: all others are on its scale."""
        known = (trial.latency for trial in self.trials.values())
        return next((latency.base_ms for latency in known if latency is not None), None)

    def _values(self, trial: Trial) -> tuple[float, ...]:
        """The value of each objective as a person reads it, with the last epoch's accuracy."""
        return tuple(self._value(trial, name, -1) for name in self.config.objectives)

    def _value(self, trial: Trial, objective: str, index: int) -> float:
        if objective == "accuracy":
            return trial.curve[index].accuracy
        if objective == "latency_ms":
            assert trial.latency is not None
            return trial.latency.median_ms
        return float(getattr(trial.cost, objective))

    def _goes_on(self, trial: Trial, epoch: int) -> bool:
        """Whether a trial may go on after an epoch: never by accuracy alone.

        The bases and the baselines are what the front is compared with, and what confirms a
        network is compared with its first training: they are always trained to the end.
        """
        stopping = self.config.early_stopping
        if stopping is None or not trial.origin.keys().isdisjoint(("base", "baseline", "confirms")):
            return True
        if isinstance(stopping, FrontStopping):
            finished = self._in_state(TrialState.FINISHED)
            if len(finished) < stopping.finished:
                return True
            peers = [self._observed(peer) for peer in finished]
            return not stopping(self._observed(trial), peers)
        return self._passes(trial, epoch, stopping)

    def _passes(self, trial: Trial, epoch: int, stopping: Rungs) -> bool:
        """Whether a rung lets a trial go on.

        Everyone who has reached the epoch is on the rung, whatever became of them; failed ones are
        not.
        """
        rung = [
            peer
            for peer in self.trials.values()
            if peer.state != TrialState.FAILED and len(peer.curve) >= epoch
        ]
        signs = [-1.0 if name == "accuracy" else 1.0 for name in self.config.objectives]
        points = np.array(
            [[self._value(peer, n, epoch - 1) for n in self.config.objectives] for peer in rung]
        )
        return pareto.promoted(points * signs, rung.index(trial), stopping.eta)

    def _close(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        failed = trial.state == TrialState.FAILED
        self._failures = self._failures + 1 if failed else 0
        if failed:
            self.notify(f"trial {trial.number} failed: {trial.error}", "warning")
        else:
            self.notify()

    def _progress(self) -> Progress:
        now, done = time.monotonic(), self._done
        total = len(self.trials)
        if not self._exhausted:
            total += max(0, self._total - self._begun)
        lately = done - self._done_before
        training = now - (self._first_epoch or now)
        return Progress(
            done=done,
            running=len(self.running),
            total=total,
            best_accuracy=self.posterior.best_accuracy,
            front_size=len(self.posterior.front()),
            elapsed=now - self._started,
            remaining=training / lately * (total - done) if lately else None,
        )
