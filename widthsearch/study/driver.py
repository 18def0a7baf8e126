"""Drives a study: checks it, claims its storage, prepares its queue, and hands out the loop.

Everything here needs torch; reading a stored study does not come this way.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from widthsearch.data.tasks import Task
from widthsearch.errors import StorageError, StudyError, writing
from widthsearch.latency.config import Latency, LatencyConfig
from widthsearch.latency.meter import LatencyMeter
from widthsearch.latency.predictor import LatencyPredictor
from widthsearch.latency.profiles import load_profile
from widthsearch.proposers import Proposer, Setting, families
from widthsearch.proposers.baselines import baseline_candidates
from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.budget import Budget
from widthsearch.study.checks import check_parts, claim, met_budgets
from widthsearch.study.config import StudyConfig
from widthsearch.study.confirmation import Confirmation
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.earlier import EarlierStudy
from widthsearch.study.front import is_within_limits
from widthsearch.study.job import own_task
from widthsearch.study.loop import Search
from widthsearch.study.posterior import MetricPosterior
from widthsearch.study.progress import Level, Notify, OnProgress, Pace
from widthsearch.study.proposals import (
    Engine,
    ProposalRequest,
    collect_proposals,
    given_candidates,
    proposal_key,
)
from widthsearch.study.queue import given_without_trials, may_be_retried
from widthsearch.study.sections import AnyRecipe
from widthsearch.study.starts import BaseWeights
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial, TrialState, count_begun, unresolved_failures
from widthsearch.training.autotune import probe_concurrency, probe_precision
from widthsearch.training.optimizers import check_optimizer
from widthsearch.training.recipe import Recipe
from widthsearch.utils.devices import cores
from widthsearch.utils.files import write_atomically


@dataclass(eq=False)
class Driver:
    """A study's parts, and the preparation of its search or confirmation.

    Attributes:
        config: The configuration.
        spaces: The spaces by name; what is relative to a base is relative to the first's.
        task: The data of the built-in trainer; None where the study has a trainer of its own.
        folder: The study's folder.
        url: Its storage.
        pickled: Pickles a space, given its name in messages, for a process that measures beside
            this one.
        weights: The weights of the base, for the start ``extract``.
        earlier: The earlier studies that it learns from, unless it has begun with others.
        failures: The reason why a proposer has no proposal, by its label, after :meth:`search`.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from widthsearch.data.tasks import load_task
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 10))
        >>> space = SearchSpace.from_model(net, (1, 8, 8), name="net")
        >>> folder = Path(tempfile.mkdtemp())
        >>> config = StudyConfig(name="mine", trials=4, recipe={"precision": "fp32"})
        >>> url = f"sqlite:///{folder}/study.db"
        >>> spaces, task = {"net": space}, load_task("digits")
        >>> driver = Driver(config, spaces, task, folder, url, lambda *_: b"")
        >>> with driver.search(None, lambda *_: [], retry=False) as search:
        ...     search.ask().origin
        {'base': True}
    """

    config: StudyConfig
    spaces: Mapping[str, SearchSpace]
    task: Task | None
    folder: Path
    url: str
    pickled: Callable[[SearchSpace, str], bytes]
    weights: BaseWeights | None = None
    earlier: Sequence[EarlierStudy] = ()
    failures: dict[str, str] = field(default_factory=dict, init=False)

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
            StudyError: Another driver holds it, a proposer does not take its fields or needs a
                task, or the storage does not fit the configuration; at the end, another driver has
                taken over meanwhile.
            StorageError: The storage cannot be opened.
        """
        proposers = [m.make(f"proposers.{i}") for i, m in enumerate(self.config.proposers)]
        for i, proposer in enumerate(proposers):
            _check_recipes(proposer, f"proposers.{i}")
        task = own_task(self.config) if self.task is None else self.task.for_search()
        for method in self.config.proposers if task is None else ():
            if method.reads_data():
                raise StudyError(
                    f"proposer {method.method!r} reads data, but study {self.config.name!r} has a "
                    "trainer of its own and no loss: add `loss` and `batches`, or use synflow, "
                    "uniform, random or a method of your own"
                )
        given = given_candidates(self.spaces, self.config.widths)
        with self._driving(on_progress) as (driver_lock, config, notify):
            store = driver_lock.store
            share = round(config.baselines * config.trials)
            budgets = met_budgets(config.budgets, self.spaces, notify)
            queue = [Candidate(s.name, s.base, {"base": True}) for s in self.spaces.values()]
            proposed = baseline_candidates(self.spaces, budgets, share, config.seed)
            budget = Budget(config, store)
            trials = store.trials(self.spaces)
            if (
                count_begun(trials) < config.trials and not budget.out_of_time()
            ):  # else none is needed
                asked = self._requests(proposers, config)
                found, self.failures = collect_proposals(store, asked, task, engine, notify)
                budget.record()
                proposed += families.family_candidates(self.spaces, found, budgets, config.families)
            queue += self._within_limits([*given, *proposed], notify)
            if reason := given_without_trials(queue, trials, config, budget.out_of_time()):
                notify(reason, "warning")
            failed = unresolved_failures(trials) if retry else []
            if left := [t.number for t in failed if not may_be_retried(t, config.limits)]:
                numbers = ", ".join(map(str, left))
                notify(f"not trained again, since outside the limits: trials {numbers}", "event")
            yield Search(
                config,
                self.spaces,
                driver_lock,
                candidates=queue,
                measure=self._meter() if "latency_ms" in config.objectives else None,
                profiles=self._profiles,
                retry=retry,
                budget=budget,
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
        with self._driving(on_progress) as (driver_lock, config, _):
            yield Confirmation(config, self.spaces, driver_lock, seeds, on_progress)

    def resolve_recipe(self) -> AnyRecipe:
        """The recipe; of the built-in trainer with the study's precision.

        The precision is probed and stored if no run has decided it.

        Raises:
            StudyError: The study was never run.
        """
        return self._with_precision(Store.open(self.url, self.config.name)).recipe

    @contextmanager
    def _driving(
        self, on_progress: OnProgress | None
    ) -> Iterator[tuple[DriverLock, StudyConfig, Notify]]:
        """Check everything that can be checked, and claim the storage.

        Yields:
            The lock of the storage, the configuration of this run, and a callback for messages.
        """
        config = self.config
        check_parts(config, self.spaces, self.task)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the study's folder {str(self.folder)!r} cannot be made: {error.strerror}"
            ) from None
        store = Store.create(self.url, config.name, config.objectives, config.metric)
        with DriverLock(store) as driver_lock:
            kept = None if self.weights is None else self.weights.to_json()
            claim(store, config, self.spaces, kept, self.earlier)
            text = config.to_yaml().encode()
            with store.fence.held(), writing(self.folder):
                write_atomically(self.folder / "study.yaml", lambda file: file.write(text))
            earlier = store.earlier()
            notify = self._reporter(store, earlier, on_progress)
            for study in earlier:
                notify(f"learning from {study.size} trials of study {study.name!r}", "event")
            if self.task is not None and self.task.loading is not None:
                notify(self.task.loading.reason, "event")
            config = self._with_concurrency(self._with_precision(store), store, notify)
            yield driver_lock, config, notify

    # -- the configuration of this run -------------------------------------------------------

    @property
    def _first(self) -> SearchSpace:
        return next(iter(self.spaces.values()))

    def _with_precision(self, store: Store) -> StudyConfig:
        """The configuration with a precision: on a CPU probed once, for all the study's trials."""
        config, space, recipe = self.config, self._first, self.config.recipe
        if not isinstance(recipe, Recipe) or recipe.precision != "auto" or config.device != "cpu":
            return config
        probe = store.attribute("precision")
        if probe is None:
            model = space.build(space.base, seed=config.seed)
            threads = max(1, int(config.resources.cpu))
            assert self.task is not None
            probe = asdict(probe_precision(model, self.task, recipe, threads=threads))
            store.set_attribute("precision", probe)
        recipe = replace(recipe, precision=probe["precision"])
        return config.model_copy(update={"recipe": recipe})

    def _with_concurrency(self, config: StudyConfig, store: Store, notify: Notify) -> StudyConfig:
        """The configuration with a number of trials at once, probed once for each machine."""
        if config.concurrency != "auto":
            return config
        device, taken = config.device, config.resources
        gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
        most = max(1, int(cores() / taken.cpu))
        machine = [platform.node(), cores(), gpus, device, taken.cpu]
        known = store.attribute("concurrency")
        if known is None or known["machine"] != machine:
            assert isinstance(config.recipe, Recipe) and self.task is not None
            notify("finding out how many candidates train best at once")
            each = max(1, most // max(1, gpus))  # on one GPU, if there are any
            probe = probe_concurrency(
                self.pickled(self._first, f"space {self._first.name!r}"),
                self.task.for_search(),
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
        notify(f"concurrency {best} on each device; base networks an hour: {found}", "event")
        if gpus:
            share = math.floor(1e4 / best) / 1e4  # so many fit one GPU, whatever is rounded
            taken = replace(taken, gpu=min(taken.gpu, share))
        together = best * max(1, gpus)
        return config.model_copy(update={"concurrency": together, "resources": taken})

    # -- the queue ---------------------------------------------------------------------------

    def _within_limits(self, proposed: Sequence[Candidate], notify: Notify) -> list[Candidate]:
        """The candidates whose exact costs are within the limits; a message counts the others."""
        limits = self.config.limits
        costs = [self.spaces[c.space].cost(c.widths) for c in proposed]
        inside = [is_within_limits(cost, limits) for cost in costs]
        left = [c.origin for c, within in zip(proposed, inside, strict=True) if not within]
        bounds = ", ".join(f"{name} [{low:g}, {high:g}]" for name, (low, high) in limits.items())
        reason = f"costs are outside the limits ({bounds})"
        for path in (origin["given"] for origin in left if "given" in origin):
            notify(f"the widths in {path} are left out: their {reason}", "event")
        if left := [origin for origin in left if "given" not in origin]:
            baselines = sum("baseline" in origin for origin in left)
            budgets = ", ".join(sorted({f"{origin['budget']:g}" for origin in left}, key=float))
            notify(
                f"{len(left) - baselines} proposed and {baselines} baseline candidates are left "
                f"out, of budgets {budgets}: their {reason}",
                "event",
            )
        return [c for c, within in zip(proposed, inside, strict=True) if within]

    @cached_property
    def _profiles(self) -> dict[str, LatencyPredictor]:
        """The stored latency profiles of the spaces, for this study's latency configuration."""
        settings = self.config.latency or LatencyConfig()
        if self.config.ray_address is None or "latency_ms" in self.config.objectives:
            found = {name: load_profile(s, settings) for name, s in self.spaces.items()}
            return {name: model for name, model in found.items() if model is not None}
        return {}

    def _requests(
        self, proposers: Sequence[Proposer], config: StudyConfig
    ) -> list[tuple[str, ProposalRequest]]:
        """A request to each proposer for each space, with the key of its proposal."""
        lowest = families.lowest_share(config.budgets, config.families)
        setting = Setting(config.seed, config.device, config.method_recipe, lowest)
        threads = max(1, int(config.resources.cpu))
        asked = []
        for space in self.spaces.values():
            profile = self._profiles.get(space.name)
            own = setting if profile is None else replace(setting, latency=profile.predicted)
            suffix = "" if len(self.spaces) == 1 else f" of {space.name}"
            for method, proposer in zip(config.proposers, proposers, strict=True):
                label = f"{method.method}{suffix}"
                request = ProposalRequest(label, proposer, space, own, threads)
                asked.append((proposal_key(method, space), request))
        return asked

    def _meter(self) -> Callable[[Trial, float | None], Latency]:
        """Measure a trial's latency beside the base model, which is built when first needed."""
        spaces, settings = self.spaces, self.config.latency or LatencyConfig()
        meter: LatencyMeter | None = None

        def measure(trial: Trial, base_ms: float | None) -> Latency:
            nonlocal meter
            if meter is None:
                first = self._first
                base = first.build(first.base, seed=self.config.seed)
                meter = LatencyMeter(base, first.input_shape, settings, base_ms)
            return meter.measure(spaces[trial.space].build(trial.widths, seed=trial.seed))

        return measure

    def _reporter(
        self, store: Store, earlier: Sequence[EarlierStudy], on_progress: OnProgress | None
    ) -> Notify:
        """A callback for messages before there is a search; the trials are those of the storage."""
        config, trials = self.config, store.trials(self.spaces)
        done = sum(trial.state != TrialState.RUNNING for trial in trials)
        posterior = MetricPosterior.of(config, trials, self.spaces, earlier)
        pace = Pace(done)

        def notify(message: str, level: Level = "status", /) -> None:
            if on_progress is not None:
                now = pace.progress(posterior, done, 0, max(config.trials, done))
                on_progress(replace(now, message=message, level=level))

        return notify


def _check_recipes(proposer: Proposer, place: str) -> None:
    """Check the optimizers of a method's own recipes, such as ``pretrain``."""
    made: Any = proposer
    for name in [each.name for each in fields(made)] if is_dataclass(made) else []:
        if isinstance(recipe := getattr(made, name), Recipe):
            check_optimizer(recipe, f"{place}.{name}")
