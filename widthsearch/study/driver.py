"""Drives a study: checks it, claims its storage, prepares its queue, and hands out the loop.

Everything here needs torch; reading a stored study does not come this way.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch

from widthsearch.data.tasks import Task
from widthsearch.errors import StorageError
from widthsearch.latency.config import Latency, LatencyConfig
from widthsearch.latency.meter import LatencyMeter
from widthsearch.latency.predictor import LatencyPredictor
from widthsearch.latency.profiles import load_profile
from widthsearch.proposers import Proposal, Proposer, Setting, families
from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.checks import check_parts, claim
from widthsearch.study.config import ProposerConfig, StudyConfig
from widthsearch.study.confirmation import Confirmation
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.loop import Search
from widthsearch.study.posterior import AccuracyPosterior
from widthsearch.study.progress import Level, Notify, Progress
from widthsearch.study.proposals import Engine, ProposalRequest, collect_proposals
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial, TrialState, count_begun
from widthsearch.training.autotune import probe_concurrency, probe_precision
from widthsearch.training.recipe import Recipe
from widthsearch.utils.devices import cores
from widthsearch.utils.files import write_atomically
from widthsearch.widths import Widths

OnProgress = Callable[[Progress], None]


class Driver:
    """A study's parts, and the preparation of its search or confirmation.

    Args:
        config: The configuration.
        spaces: The spaces by name; what is relative to a base is relative to the first's.
        task: The data.
        folder: The study's folder.
        url: Its storage.
        pickled: Pickles a space, given its name in messages, for a process that measures beside
            this one.

    Attributes:
        failures: The reason why a proposer has no proposal, by its label, after :meth:`search`.
    """

    def __init__(
        self,
        config: StudyConfig,
        spaces: Mapping[str, SearchSpace],
        task: Task,
        folder: Path,
        url: str,
        pickled: Callable[[SearchSpace, str], bytes],
    ) -> None:
        self.failures: dict[str, str] = {}
        self._config = config
        self._spaces = spaces
        self._task = task
        self._folder = folder
        self._url = url
        self._pickled = pickled

    @contextmanager
    def search(
        self, on_progress: OnProgress | None, engine: Engine, *, retry: bool
    ) -> Iterator[Search]:
        """The search, while this process drives the study.

        Args:
            on_progress: Called with the progress of the study.
            engine: Asks the proposers.
            retry: Whether to train again the trials that failed.

        Raises:
            StudyError: Another driver holds it, a proposer does not take its fields, or the storage
                does not fit the configuration.
            StorageError: The storage cannot be opened.
        """
        methods = [
            (method, method.make(f"proposers.{i}"))
            for i, method in enumerate(self._config.proposers)
        ]
        with self._driving() as (store, driver_lock):
            say = self._reporter(store, on_progress)
            config = self._with_concurrency(self._with_precision(store), store, say)
            share = round(config.baselines * config.trials)
            budgets = self._budgets(say)
            queue = [Candidate(s.name, s.base, {"base": True}) for s in self._spaces.values()]
            proposed = families.baseline_candidates(self._spaces, budgets, share, config.seed)
            names = {name: space.names for name, space in self._spaces.items()}
            if count_begun(store.trials(names)) < config.trials:  # else no candidate is needed
                found = self._proposals(methods, store, config.recipe, engine, say)
                proposed += families.family_candidates(
                    self._spaces, found, budgets, config.families
                )
            queue += [c for c in proposed if self._is_within_limits(c.space, c.widths)]
            yield Search(
                config,
                self._spaces,
                store,
                driver_lock,
                candidates=queue,
                measure=self._meter() if "latency_ms" in config.objectives else None,
                profiles=self._profiles,
                retry=retry,
                on_progress=on_progress,
            )

    @contextmanager
    def confirmation(self, seeds: int, on_progress: OnProgress | None) -> Iterator[Confirmation]:
        """The confirmation of the front, while this process drives the study.

        Args:
            seeds: The mean number of trainings of the front's members.
            on_progress: Called with the progress of the study.

        Raises:
            StudyError: As :meth:`search`.
            StorageError: As :meth:`search`.
        """
        with self._driving() as (store, driver_lock):
            say = self._reporter(store, on_progress)
            config = self._with_concurrency(self._with_precision(store), store, say)
            yield Confirmation(
                config, self._spaces, store, driver_lock, seeds, on_progress=on_progress
            )

    def resolve_recipe(self) -> Recipe:
        """The recipe with the study's precision, probed and stored if no run has decided it.

        Raises:
            StudyError: The study was never run.
        """
        return self._with_precision(Store.open(self._url, self._config.name)).recipe

    @contextmanager
    def _driving(self) -> Iterator[tuple[Store, DriverLock]]:
        """Check everything that can be checked, and claim the storage."""
        config = self._config
        check_parts(config, self._spaces, self._task)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the study's folder {str(self._folder)!r} cannot be made: {error.strerror}"
            ) from None
        store = Store.create(self._url, config.name, config.objectives)
        with DriverLock(store) as driver_lock:
            claim(store, config, self._spaces)
            text = config.to_yaml().encode()
            write_atomically(self._folder / "study.yaml", lambda file: file.write(text))
            yield store, driver_lock

    # -- the configuration of this run -------------------------------------------------------

    @property
    def _first(self) -> SearchSpace:
        return next(iter(self._spaces.values()))

    def _with_precision(self, store: Store) -> StudyConfig:
        """The configuration with a precision: on a CPU probed once, for all the study's trials."""
        config, space = self._config, self._first
        if config.recipe.precision != "auto" or config.device != "cpu":
            return config
        probe = store.attribute("precision")
        if probe is None:
            model = space.build(space.base, seed=config.seed)
            threads = max(1, int(config.resources.cpu))
            probe = asdict(probe_precision(model, self._task, config.recipe, threads=threads))
            store.set_attribute("precision", probe)
        recipe = replace(config.recipe, precision=probe["precision"])
        return config.model_copy(update={"recipe": recipe})

    def _with_concurrency(self, config: StudyConfig, store: Store, say: Notify) -> StudyConfig:
        """The configuration with a number of trials at once, probed once for each machine."""
        if config.concurrency != "auto":
            return config
        device, taken = config.device, config.resources
        gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
        most = max(1, int(cores() / taken.cpu))
        machine = [platform.node(), cores(), gpus, device, taken.cpu]
        known = store.attribute("concurrency")
        if known is None or known["machine"] != machine:
            say("finding out how many candidates train best at once")
            each = max(1, most // max(1, gpus))  # on one GPU, if there are any
            probe = probe_concurrency(
                self._pickled(self._first, f"space {self._first.name!r}"),
                self._task.for_search(),
                config.recipe,
                device=device,
                threads=max(1, int(taken.cpu)),
                numbers=sorted({min(each, 2**i) for i in range(5)}),
            )
            known = {"machine": machine, **probe.to_json()}
            store.set_attribute("concurrency", known)
        best = int(known["best"])
        rates = known["candidates_per_hour"].items()
        found = ", ".join(f"{rate:.0f} by {number} at once" for number, rate in rates)
        say(f"concurrency {best} on each device; base networks an hour: {found}", "event")
        if gpus:
            share = math.floor(1e4 / best) / 1e4  # so many fit one GPU, whatever is rounded
            taken = replace(taken, gpu=min(taken.gpu, share))
        together = best * max(1, gpus)
        return config.model_copy(update={"concurrency": together, "resources": taken})

    # -- the queue ---------------------------------------------------------------------------

    def _budgets(self, say: Notify) -> tuple[float, ...]:
        """The budgets that some network meets; all of them where none does: that is an error."""
        budgets, base = self._config.budgets, self._first.cost(self._first.base).macs
        spaces = self._spaces.values()
        least = min(s.cost([a.min_width for a in s.axes]).macs for s in spaces) / base
        met = tuple(budget for budget in budgets if budget >= least)
        if not met or len(met) == len(budgets):
            return budgets
        left = ", ".join(f"{budget:g}" for budget in budgets if budget < least)
        say(
            f"budgets {left} are left out: the narrowest network has {least:.3f} of the base's "
            "MACs",
            "event",
        )
        return met

    def _is_within_limits(self, space: str, widths: Widths) -> bool:
        """Whether exact costs are within the study's limits."""
        cost = self._spaces[space].cost(widths)
        return all(
            low <= getattr(cost, name) <= high
            for name, (low, high) in self._config.limits.items()
            if name != "latency_ms"
        )

    @cached_property
    def _profiles(self) -> dict[str, LatencyPredictor]:
        """The stored latency profiles of the spaces, for this study's latency configuration."""
        settings = self._config.latency or LatencyConfig()
        if self._config.ray_address is None or "latency_ms" in self._config.objectives:
            found = {name: load_profile(s, settings) for name, s in self._spaces.items()}
            return {name: model for name, model in found.items() if model is not None}
        return {}

    def _proposals(
        self,
        methods: Sequence[tuple[ProposerConfig, Proposer]],
        store: Store,
        recipe: Recipe,
        engine: Engine,
        say: Notify,
    ) -> dict[str, list[Proposal]]:
        """Each space's proposals."""
        config = self._config
        setting = Setting(config.seed, config.device, recipe, min(config.budgets))
        threads = max(1, int(config.resources.cpu))
        asked = []
        for space in self._spaces.values():
            profile = self._profiles.get(space.name)
            own = setting if profile is None else replace(setting, latency=profile.predicted)
            for method, proposer in methods:
                label = self._label(method, space)
                asked.append((method, ProposalRequest(label, proposer, space, own, threads)))
        found, self.failures = collect_proposals(store, asked, self._task.for_search(), engine, say)
        return found

    def _label(self, proposer: ProposerConfig, space: SearchSpace) -> str:
        if len(self._spaces) == 1:
            return proposer.method
        return f"{proposer.method} of {space.name}"

    def _meter(self) -> Callable[[Trial, float | None], Latency]:
        """Measure a trial's latency beside the base model, which is built when first needed."""
        spaces, settings = self._spaces, self._config.latency or LatencyConfig()
        meter: LatencyMeter | None = None

        def measure(trial: Trial, base_ms: float | None) -> Latency:
            nonlocal meter
            if meter is None:
                first = self._first
                base = first.build(first.base, seed=self._config.seed)
                meter = LatencyMeter(base, first.input_shape, settings, base_ms)
            return meter.measure(spaces[trial.space].build(trial.widths, seed=trial.seed))

        return measure

    def _reporter(self, store: Store, on_progress: OnProgress | None) -> Notify:
        """A callback for messages before there is a search; the trials are those of the storage."""
        config, begun = self._config, time.monotonic()
        trials = store.trials({name: space.names for name, space in self._spaces.items()})
        done = sum(trial.state != TrialState.RUNNING for trial in trials)
        posterior = AccuracyPosterior(trials, self._spaces, config.objectives, config.limits)

        def say(message: str, level: Level = "status", /) -> None:
            if on_progress is not None:
                on_progress(
                    Progress(
                        done=done,
                        running=0,
                        total=max(config.trials, done),
                        best_accuracy=posterior.best_accuracy,
                        front_size=len(posterior.front()),
                        elapsed=time.monotonic() - begun,
                        remaining=None,
                        message=message,
                        level=level,
                    )
                )

        return say
