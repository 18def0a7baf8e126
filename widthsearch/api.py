"""A study: from its configuration to its front.

A study lives in one folder: ``study.yaml``, ``study.db`` unless its storage is elsewhere,
``checkpoints/`` of the trials that are being trained, and ``logs/``.
"""

from __future__ import annotations

import difflib
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from widthsearch.data.tasks import Task, load_task
from widthsearch.errors import StorageError, StudyError
from widthsearch.latency.config import Latency, LatencyConfig
from widthsearch.latency.meter import LatencyMeter
from widthsearch.latency.predictor import LatencyModel
from widthsearch.latency.profiles import load_profile
from widthsearch.proposers import Proposal, Setting, families
from widthsearch.proposers.families import Candidate
from widthsearch.space.constraints import default_block
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import ProposerConfig, StudyConfig
from widthsearch.study.confirmation import Confirmation
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.front import pick
from widthsearch.study.loop import Progress, Search
from widthsearch.study.posterior import AccuracyPosterior
from widthsearch.study.proposals import (
    Engine,
    ProgressCallback,
    ProposalRequest,
    in_turn,
    proposals,
)
from widthsearch.study.storage import SpaceRecord, Store
from widthsearch.study.trial import Trial, TrialState
from widthsearch.training.autotune import probe_concurrency, probe_precision
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import check_batch_size, check_model
from widthsearch.utils.devices import check_device, cores
from widthsearch.widths import Widths

_FIXED = ("task", "recipe", "objectives", "latency", "seed")
"""What makes outcomes comparable: it cannot change once a study has begun. The rest may."""

_FOUND_OUT = ("proposal:", "precision", "concurrency")
"""How attributes begin that follow from the configuration."""


class Study:
    """A configuration, its folder, and what is in its storage.

    Attributes:
        config: The configuration.
        folder: Where the study's files are.
        failures: Why proposers have no proposal, by method, after a run.
    """

    def __init__(
        self,
        config: StudyConfig,
        space: SearchSpace | Sequence[SearchSpace] | None = None,
        task: Task | None = None,
        *,
        folder: Path | str | None = None,
    ) -> None:
        self.config = config
        self.folder = Path("runs", config.name) if folder is None else Path(folder)
        self.failures: dict[str, str] = {}
        given = [space] if isinstance(space, SearchSpace) else space
        self._given: Sequence[SearchSpace] = given or ()
        if task is not None:
            self.task = task

    @classmethod
    def load(cls, reference: str | Path, runs: str | Path = "runs") -> Study:
        """A study by its name, its folder, or its YAML.

        Raises:
            StudyError: There is none, or its configuration breaks a rule.
        """
        path = Path(reference)
        if path.suffix in (".yaml", ".yml"):
            config = StudyConfig.from_yaml(path)
            return cls(config, folder=Path(runs, config.name))
        for folder in (path, Path(runs) / path):
            if (folder / "study.yaml").is_file():
                return cls(StudyConfig.from_yaml(folder / "study.yaml"), folder=folder)
        known = [file.parent.name for file in Path(runs).glob("*/study.yaml")]
        close = difflib.get_close_matches(str(reference), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "give a study's YAML, name or folder"
        raise StudyError(
            f"a study must be a YAML file or have a folder in {str(runs)!r}, but there is no "
            f"{str(reference)!r}; {hint}"
        )

    @cached_property
    def spaces(self) -> dict[str, SearchSpace]:
        """The spaces by name: those that were given, or what the configuration refers to.

        Steps that nobody gave are in whole blocks of the kernels of the device where latency is
        measured, or else where candidates train.
        """
        config = self.config
        spaces = self._given
        if not spaces:
            references = config.spaces or ((config.space,) if config.space else ())
            spaces = [load_space(reference, config.input) for reference in references]
        if not spaces:
            raise StudyError(
                f"study {config.name!r} names no space: add `space:` to its configuration, "
                "or give the object: Study(config, space=...)"
            )
        timed = "latency_ms" in config.objectives
        device = (config.latency or LatencyConfig()).device if timed else config.device
        block = default_block(device)
        named = {space.name: space.with_constraints(config.constraints, block) for space in spaces}
        if len(named) < len(spaces):
            raise StudyError(
                "the spaces of a study must have different names, but are "
                f"{', '.join(space.name for space in spaces)}: give from_model a `name`"
            )
        return named

    @property
    def space(self) -> SearchSpace:
        """The first space; what is relative to a base is relative to its base."""
        return next(iter(self.spaces.values()))

    def reference(self, name: str) -> str | None:
        """What the configuration calls a space; None for one that was given as an object."""
        if self._given:
            return None
        references = self.config.spaces or (self.config.space,)
        return dict(zip(self.spaces, references, strict=True))[name]

    @cached_property
    def task(self) -> Task:
        """The data: the one that was given, or what the configuration refers to."""
        if self.config.task is None:
            raise StudyError(
                f"study {self.config.name!r} names no task: add `task:` to its configuration, "
                "or give the object: Study(config, task=...)"
            )
        return load_task(self.config.task)

    @property
    def storage(self) -> str:
        """The URL of the storage."""
        return self.config.storage or f"sqlite:///{(self.folder / 'study.db').resolve()}"

    def run(
        self, on_progress: Callable[[Progress], None] | None = None, *, retry: bool = False
    ) -> None:
        """Train what is left to train, on Ray; returns when every trial is done.

        Args:
            on_progress: Is told where it stands.
            retry: Whether to train again what failed, say after a mended model.

        Raises:
            WidthsearchError: Something that a user can mend; running again goes on from there.
            KeyboardInterrupt: SIGINT or SIGTERM; running again goes on from there.
        """
        from widthsearch.runner import (
            ray_tune as runner,  # below this file: the one engine, imported when it runs
        )

        with (
            runner.Session(self.config, self.folder) as session,
            self.search(on_progress, session.propose, retry=retry) as search,
        ):
            session.train(search, self.task)
        if all(trial.state != TrialState.FINISHED for trial in search.trials.values()):
            reasons = [trial.error for trial in search.trials.values() if trial.error]
            raise StudyError(
                f"study {self.config.name!r} has no finished trial; the last failed: "
                f"{reasons[-1] if reasons else 'none'}"
            )

    def trials(self) -> list[Trial]:
        """Every trial that has ended, by number.

        Raises:
            StudyError: The study was never run.
        """
        return self._stored()[0]

    def posterior(self) -> AccuracyPosterior:
        """The estimated accuracy of each trained network.

        Raises:
            StudyError: The study was never run.
        """
        return AccuracyPosterior(*self._stored(), self.config.objectives, self.config.limits)

    def front(self) -> list[Trial]:
        """The front by estimated accuracy, within the limits, fewest MACs first.

        Raises:
            StudyError: The study was never run.
        """
        return self.posterior().front()

    def pick(self, spec: str | int = "knee") -> Trial:
        """One of the trained networks: see :func:`~widthsearch.study.front.pick`.

        Args:
            spec: ``knee`` or ``best`` of the front, a limit such as ``macs<=2e6``, or a trial's ID.

        Raises:
            StudyError: The study was never run, the spec is none of these, or nothing fits it.
        """
        posterior, objectives = self.posterior(), self.config.objectives
        return pick(posterior.front(), spec, objectives, posterior.accuracy, trials=self.trials())

    def _stored(self) -> tuple[list[Trial], dict[str, SpaceRecord]]:
        """The trials that have ended and the spaces' records, without the spaces' code."""
        store = Store.open(self.storage, self.config.name)
        stored = store.attribute("spaces")
        if stored is None:
            raise StudyError(f"study {self.config.name!r} has no trials yet: run it first")
        records = {space["name"]: SpaceRecord.from_json(space) for space in stored}
        names = {name: [a.name for a in record.axes] for name, record in records.items()}
        trials = [trial for trial in store.trials(names) if trial.state != TrialState.RUNNING]
        return trials, records

    @contextmanager
    def search(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        engine: Engine = in_turn,
        *,
        retry: bool = False,
    ) -> Iterator[Search]:
        """Drive the study: claim its storage, make what it lacks, and hand out the loop's state.

        Args:
            on_progress: Is told where the study stands.
            engine: Who asks the proposers.
            retry: Whether to train again what failed.

        Raises:
            StudyError: Another driver holds it, or what is stored does not fit the configuration.
            StorageError: The storage cannot be opened.
        """
        with self._driving() as (store, driver_lock):
            say = self._sayer(store, on_progress)
            config = self._concurrent(self._settled(store), store, say)
            share = round(config.baselines * config.trials)
            budgets = self._budgets(say)
            queue = [Candidate(s.name, s.base, {"base": True}) for s in self.spaces.values()]
            queue += families.baselines(self.spaces, budgets, share, config.seed)
            found = self._proposals(store, config.recipe, engine, say)
            proposed = families.candidates(self.spaces, found, budgets, config.families)
            queue += [c for c in proposed if self._within_limits(c.space, c.widths)]
            yield Search(
                config,
                self.spaces,
                store,
                driver_lock,
                candidates=queue,
                measure=self._meter() if "latency_ms" in config.objectives else None,
                profiles=self._profiles,
                retry=retry,
                on_progress=on_progress,
            )

    def confirm(
        self, seeds: int = 3, on_progress: Callable[[Progress], None] | None = None
    ) -> None:
        """Train finalists again with fresh seeds, where the front is undecided, on Ray.

        Args:
            seeds: How many trainings the members of the front are to have in the mean; they go to
                whichever network they decide most about.
            on_progress: Is told where it stands.

        Raises:
            WidthsearchError: Something that a user can mend; running again goes on from there.
            KeyboardInterrupt: SIGINT or SIGTERM; running again goes on from there.
        """
        from widthsearch.runner import ray_tune as runner  # as in `run`

        with (
            runner.Session(self.config, self.folder) as session,
            self.confirmation(seeds, on_progress) as search,
        ):
            session.train(search, self.task)

    @contextmanager
    def confirmation(
        self, seeds: int = 3, on_progress: Callable[[Progress], None] | None = None
    ) -> Iterator[Confirmation]:
        """Drive :meth:`confirm` by another engine."""
        if seeds < 2:
            raise StudyError(f"`seeds >= 2` must hold to confirm anything, but seeds={seeds}")
        if not self.front():
            raise StudyError(f"study {self.config.name!r} has no front to confirm: run it first")
        with self._driving() as (store, driver_lock):
            say = self._sayer(store, on_progress)
            yield Confirmation(
                self._concurrent(self._settled(store), store, say),
                self.spaces,
                store,
                driver_lock,
                seeds,
                on_progress=on_progress,
            )

    def _budgets(self, say: ProgressCallback) -> tuple[float, ...]:
        """The budgets that some network meets; all, where none does, for that is an error."""
        base = self.space.cost(self.space.base).macs
        least = min(s.cost([a.min_width for a in s.axes]).macs for s in self.spaces.values()) / base
        met = tuple(budget for budget in self.config.budgets if budget >= least)
        if not met or len(met) == len(self.config.budgets):
            return self.config.budgets
        left = ", ".join(f"{budget:g}" for budget in self.config.budgets if budget < least)
        say(
            f"budgets {left} are left out: the narrowest network has {least:.3f} of the base's MACs"
        )
        return met

    def _within_limits(self, space: str, widths: Widths | Sequence[int]) -> bool:
        """Whether exact costs are within the study's limits."""
        cost = self.spaces[space].cost(widths)
        return all(
            low <= getattr(cost, name) <= high
            for name, (low, high) in self.config.limits.items()
            if name != "latency_ms"
        )

    @contextmanager
    def _driving(self) -> Iterator[tuple[Store, DriverLock]]:
        """Check what can be checked, and claim the storage."""
        config = self.config
        for space in self.spaces.values():
            if tuple(space.input_shape) != tuple(self.task.input_shape):
                raise StudyError(
                    f"a space's costs are for one input shape, but {space.name!r} was traced at "
                    f"{tuple(space.input_shape)} and the images of {self.task.name!r} are "
                    f"{tuple(self.task.input_shape)}: make the space with the task's shape"
                )
        self._check_limits()
        check_batch_size(config.recipe, self.task)
        if config.ray_address is None:
            device = check_device(config.device)
            for space in self.spaces.values():
                check_model(space.build(space.base, seed=config.seed).to(device), self.task, device)
            if "latency_ms" in config.objectives:
                check_device((config.latency or LatencyConfig()).device)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the study's folder {str(self.folder)!r} cannot be made: {error.strerror}"
            ) from None
        store = Store.create(self.storage, config.name, config.objectives)
        with DriverLock(store) as driver_lock:
            self._claim(store)
            (self.folder / "study.yaml").write_text(config.to_yaml(), encoding="utf-8")
            yield store, driver_lock

    def _check_limits(self) -> None:
        """That exact costs can be within the limits."""
        for name, (low, high) in self.config.limits.items():
            if name == "latency_ms":
                continue
            ends = [
                getattr(space.cost([getattr(axis, end) for axis in space.axes]), name)
                for space in self.spaces.values()
                for end in ("min_width", "max_width")
            ]
            if min(ends) > high or max(ends) < low:
                raise StudyError(
                    f"some network must be within the limits, but limits.{name} is [{low:g}, "
                    f"{high:g}] and networks have {min(ends):,} to {max(ends):,}: change the "
                    "limits or the constraints"
                )

    def _claim(self, store: Store) -> None:
        """Write what the study is into its storage, or check that it is what it was.

        Until a trial has begun only its objectives are kept, which the storage's study has.
        """
        name, config = self.config.name, self.config.to_json()
        stored, was = store.attribute("spaces"), store.attribute("config")
        fixed = _FIXED if store.begun else ("objectives",)
        for key in fixed if stored is not None else ():
            for place, before, after in _differences(key, was.get(key), config[key]):
                raise StudyError(
                    f"a study keeps its {key}, but {name!r} was begun with {place}={before!r} and "
                    f"now has {after!r}: put it back, or give the study another name"
                )
        if stored is None or not store.begun:
            described = [_described(space) for space in self.spaces.values()]
            if stored is not None and (was, stored) != (config, described):
                store.forget(*_FOUND_OUT)
            store.set_attribute("config", config)
            store.set_attribute("spaces", described)
            return
        begun, given = ([s["name"] for s in stored], list(self.spaces))
        if begun != given and len(begun) + len(given) > 2:
            raise StudyError(
                f"a study keeps its spaces, but {name!r} was begun with {', '.join(begun)} and is "
                f"now given {', '.join(given)}: put them back, or give the study another name"
            )
        for was, space in zip(stored, self.spaces.values(), strict=True):
            now = _described(space)
            if was["fingerprint"] != now["fingerprint"]:
                raise StudyError(
                    f"a study keeps its space, but {name!r} was begun with {was['name']!r} "
                    f"({len(was['axes'])} axes, {was['macs']:,} MACs) and is now given "
                    f"{space.name!r} ({len(space.axes)} axes, {now['macs']:,} MACs): put the space "
                    "back, or give the study another name"
                )
        store.set_attribute("config", config)

    @property
    def recipe(self) -> Recipe:
        """How its candidates are trained, in the precision that was decided when it was begun."""
        return self._settled(Store.open(self.storage, self.config.name)).recipe

    def _settled(self, store: Store) -> StudyConfig:
        """The configuration with a precision: on a CPU probed once, for all the study's trials."""
        config, space = self.config, self.space
        if config.recipe.precision != "auto" or config.device != "cpu":
            return config
        probe = store.attribute("precision")
        if probe is None:
            model = space.build(space.base, seed=config.seed)
            threads = max(1, int(config.resources.cpu))
            probe = probe_precision(model, self.task, config.recipe, threads=threads).to_json()
            store.set_attribute("precision", probe)
        recipe = replace(config.recipe, precision=probe["precision"])
        return config.model_copy(update={"recipe": recipe})

    def _concurrent(self, config: StudyConfig, store: Store, say: ProgressCallback) -> StudyConfig:
        """The configuration with a number of trials at once, probed once for each machine."""
        if config.concurrency != "auto":
            return config
        from widthsearch.runner import ray_tune as runner  # as in `run`

        device, taken = config.device, config.resources
        gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
        most = max(1, int(cores() / taken.cpu))
        machine = [platform.node(), cores(), gpus, device, taken.cpu]
        known = store.attribute("concurrency")
        if known is None or known["machine"] != machine:
            say("finding out how many candidates train best at once")
            each = max(1, most // max(1, gpus))  # on one GPU, if there are any
            probe = probe_concurrency(
                runner.pickled(self.space, f"space {self.space.name!r}"),
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
        say(f"concurrency {best} on each device; base networks an hour: {found}")
        if gpus:
            share = math.floor(1e4 / best) / 1e4  # so many fit one GPU, whatever is rounded
            taken = taken.model_copy(update={"gpu": min(taken.gpu, share)})
        together = best * max(1, gpus)
        return config.model_copy(update={"concurrency": together, "resources": taken})

    @cached_property
    def _profiles(self) -> dict[str, LatencyModel]:
        """What `widthsearch profile` measured of the spaces as this study measures latency."""
        settings = self.config.latency or LatencyConfig()
        if self.config.ray_address is None or "latency_ms" in self.config.objectives:
            found = {name: load_profile(s, settings) for name, s in self.spaces.items()}
            return {name: model for name, model in found.items() if model is not None}
        return {}

    def _proposals(
        self, store: Store, recipe: Recipe, engine: Engine, say: ProgressCallback
    ) -> dict[str, list[Proposal]]:
        """Each space's proposals."""
        config = self.config
        setting = Setting(config.seed, config.device, recipe, min(config.budgets))
        threads = max(1, int(config.resources.cpu))
        asked = []
        for space in self.spaces.values():
            profile = self._profiles.get(space.name)
            own = setting if profile is None else replace(setting, latency=profile.predicted)
            for method in config.proposers:
                label = self._label(method, space)
                asked.append((method, ProposalRequest(label, method.make(), space, own, threads)))
        found, self.failures = proposals(store, asked, self.task.for_search(), engine, say)
        return found

    def _label(self, proposer: ProposerConfig, space: SearchSpace) -> str:
        return proposer.method if len(self.spaces) == 1 else f"{proposer.method} of {space.name}"

    def _sayer(
        self, store: Store, on_progress: Callable[[Progress], None] | None
    ) -> ProgressCallback:
        """Tells whoever watches what happens before there is a search."""
        begun = time.monotonic()
        config = self.config
        trials = store.trials({name: space.names for name, space in self.spaces.items()})
        done = sum(trial.state != TrialState.RUNNING for trial in trials)
        posterior = AccuracyPosterior(trials, self.spaces, config.objectives, config.limits)

        def say(message: str) -> None:
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
                    )
                )

        return say

    def _meter(self) -> Callable[[Trial, float | None], Latency]:
        """Measure a trial's latency beside the base model, which is built when first needed."""
        spaces, settings = self.spaces, self.config.latency or LatencyConfig()
        meter: LatencyMeter | None = None

        def measure(trial: Trial, base_ms: float | None) -> Latency:
            nonlocal meter
            if meter is None:
                first = self.space
                base = first.build(first.base, seed=self.config.seed)
                meter = LatencyMeter(base, first.input_shape, settings, base_ms)
            return meter.measure(spaces[trial.space].build(trial.widths, seed=trial.seed))

        return measure


def _described(space: SearchSpace) -> dict[str, Any]:
    """What a storage keeps of a space."""
    return {
        **SpaceRecord.of(space).to_json(),
        "fingerprint": space.fingerprint,
        "macs": space.cost(space.base).macs,
    }


def _differences(place: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ, down to the leaves of their mappings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in now.keys() & before.keys():  # what is new since then has its default
            yield from _differences(f"{place}.{key}", before[key], now[key])
    elif before != now:
        yield place, before, now
