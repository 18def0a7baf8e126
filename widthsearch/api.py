"""The facade: a study, from its configuration to its front.

A study lives in one folder: ``study.yaml``, ``study.db`` unless its storage is elsewhere,
``checkpoints/`` of the trials that are being trained, and ``logs/``.

Reading a stored study (:meth:`Study.load`, :meth:`~Study.trials`, :meth:`~Study.posterior`,
:meth:`~Study.front`, :meth:`~Study.pick`) imports neither torch nor Ray; its spaces, its task and
its driver are imported where they are first needed.

Example:
    >>> study = Study(StudyConfig(name="mine", trials=8), folder="runs/mine")
    >>> study.front()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    widthsearch.errors.StudyError: study 'mine' has no trials yet: run it first, or ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widthsearch.errors import StudyError, WidthsearchError, did_you_mean
from widthsearch.study.config import StudyConfig
from widthsearch.study.earlier import EarlierStudy, check_distinct
from widthsearch.study.front import pick
from widthsearch.study.posterior import MetricPosterior
from widthsearch.study.trial import Trial, TrialState, check_finished
from widthsearch.utils.blocks import block
from widthsearch.utils.safe_yaml import read_yaml

if TYPE_CHECKING:
    from widthsearch.data.tasks import Task
    from widthsearch.runner.dry_run import DryRun
    from widthsearch.runner.ray_tune import Session
    from widthsearch.space.search_space import SearchSpace
    from widthsearch.study.confirmation import Confirmation
    from widthsearch.study.driver import Driver
    from widthsearch.study.loop import Search
    from widthsearch.study.progress import OnProgress
    from widthsearch.study.proposals import Engine, ProposalRequest, ProposalResult
    from widthsearch.study.starts import BaseWeights
    from widthsearch.study.storage import SpaceRecord
    from widthsearch.training.recipe import OwnRecipe, Recipe


class Study:
    """A study: its configuration, its folder and its storage.

    Args:
        config: The configuration.
        space: The space, or several of one study; None for those that the configuration names.
        task: The data; None for the task, or the trainer's data, that the configuration names.
        folder: The folder of the study's files; by default ``runs/<name>``.

    Attributes:
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
        given = space if isinstance(space, Sequence) or space is None else [space]
        self._given: Sequence[SearchSpace] = given or ()
        if task is not None and config.trainer is not None:
            raise StudyError(
                f"a study has a task or a trainer, but {config.name!r} was given both: a trainer "
                "has its `data`"
            )
        if task is not None:
            self.task = task

    @classmethod
    def load(cls, reference: str | Path, runs: str | Path = "runs") -> Study:
        """A study by its name (a bare text is one first), its folder, or its YAML.

        Raises:
            StudyError: There is none, its configuration breaks a rule, or it was run by another
                version.
        """
        path = Path(reference)
        if path.suffix in (".yaml", ".yml"):
            config = StudyConfig.from_yaml(path)
            return cls(config, folder=Path(runs, config.name))
        folders = (path, Path(runs) / path)  # a bare text is a name before a folder of the user's
        for folder in folders[:: -1 if reference == path.name else 1]:
            if os.path.isfile(folder / "study.yaml"):  # noqa: PTH113  of any text, such as a long one
                return cls(_stored_config(folder), folder=folder)
        known = [file.parent.name for file in Path(runs).glob("*/study.yaml")]
        way = "give a study's YAML, name or folder, or the folder of the runs, --runs"
        raise StudyError(
            f"a study must be a YAML file or have a folder in {str(Path(runs).resolve())!r}, but "
            f"there is no {str(reference)!r}; {did_you_mean(str(reference), known, way)}"
        )

    @cached_property
    def spaces(self) -> dict[str, SearchSpace]:
        """The spaces by name: those that were given, or those that the configuration names.

        Axes without a given step take whole blocks of the kernels of the device where latency is
        measured, or else where candidates train.

        Raises:
            StudyError: There is none, or two have one name.
            SpaceError: A space cannot be loaded, or a constraint does not fit it.
        """
        from widthsearch.latency.config import LatencyConfig
        from widthsearch.space.constraints import default_block
        from widthsearch.space.loading import load_space

        config = self.config
        spaces = self._given
        if not spaces:
            references = config.spaces or ((config.space,) if config.space else ())
            # Only a torchvision model takes its classes from the task, whose data is then read.
            sized = any(reference.startswith("torchvision:") for reference in references)
            known = config.task is not None or "task" in vars(self)
            classes = self.task.classes if sized and known else None
            spaces = [load_space(reference, config.input, classes) for reference in references]
        if not spaces:
            raise StudyError(
                f"study {config.name!r} names no space: add `space: torchvision:NAME` or `space: "
                "path/to/file.py:function` to its configuration, or give the object: "
                "Study(config, space=...)"
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
        """The first space; budgets are shares of its base."""
        return next(iter(self.spaces.values()))

    def reference(self, name: str) -> str | None:
        """A space's reference in the configuration; None if it was given as an object."""
        if self._given:
            return None
        return dict(zip(self.spaces, self.config.spaces or (self.config.space,), strict=True))[name]

    @cached_property
    def task(self) -> Task:
        """The task that was given or configured; images in files are not read, see :meth:`data`.

        Raises:
            StudyError: There is none.
            DataError: It cannot be loaded.
        """
        from widthsearch.data.tasks import open_task

        if self.config.task is None:
            raise StudyError(
                f"study {self.config.name!r} names no task: add `task: digits` or "
                "`task: {name: image_folder, folder: path}` to its configuration, or give the "
                "object: Study(config, task=...); for other data and losses see `trainer`"
            )
        return open_task(self.config.task, self.config.device, self.config.resources.gpu or 1.0)

    def data(self, *, final: bool = False, report: Callable[[str], object] = str) -> Any:
        """The data of the study's trainer: its task, or what its own ``data`` function returns.

        Args:
            final: Whether it is for final trainings: on all images but those of the test split,
                which is there as well; or of ``final_data``.
            report: Called with a bar, while images in files are read into memory.

        Raises:
            StudyError: There is none.
            DataError: It cannot be loaded.
        """
        if self.config.trainer is None:
            task = self.task.for_final_training() if final else self.task.for_search()
            return task.read(report)
        from widthsearch.study.job import load_data

        return load_data(self.config, final=final)

    @cached_property
    def base_weights(self) -> BaseWeights | None:
        """The weights of the base that ``start: extract`` cuts; None where nothing starts so."""
        from widthsearch.study.starts import load_start

        return load_start(self.config, self.spaces, lambda: self.task.for_search())

    @property
    def storage(self) -> str:
        """The storage's URL."""
        return _storage(self.folder, self.config.storage)

    def run(
        self, on_progress: OnProgress | None = None, *, retry: bool = False, quiet: bool = False
    ) -> None:
        """Train what is left to train, on Ray; returns when every trial is done.

        Args:
            on_progress: Called with the progress of the study; by default standard error shows it:
                a live table in a terminal, a line for each ended trial elsewhere.
            retry: Whether to train again the trials that failed, say after the model was repaired.
            quiet: Whether to show nothing.

        Raises:
            WidthsearchError, KeyboardInterrupt: An error that the user can correct, SIGINT or
                SIGTERM; running again goes on from there.
        """
        with _on_ray(self, on_progress, quiet=quiet) as (shown, session):
            propose, data = _loading_first(lambda: _unread(self), session.propose)
            with self.search(shown, propose, retry=retry) as search:
                session.train(search, data, self.base_weights)
                ended = search.ended
        check_finished(self.config.name, search.trials.values(), ended)

    def trials(self) -> list[Trial]:
        """Every trial that has ended, by number.

        Raises:
            StudyError: The study was never run.
        """
        return _stored(self)[0]

    def posterior(self) -> MetricPosterior:
        """The estimated value of the metric for each trained network.

        Raises:
            StudyError: The study was never run.
        """
        return MetricPosterior.of(self.config, *_stored(self))

    def front(self) -> list[Trial]:
        """The front by the estimated metric, within the limits, fewest MACs first."""
        return self.posterior().front()

    def pick(self, spec: str | int = "knee") -> Trial:
        """One of the trained networks: see :func:`~widthsearch.study.front.pick`.

        Args:
            spec: ``knee``, ``best`` or ``cheapest`` of the front, limits such as ``macs<=2e6`` or
                ``miou>=65``, or a trial's ID.

        Raises:
            StudyError: The study was never run, the spec is none of these, or nothing fits it.
        """
        return pick(self.posterior(), spec)

    @cached_property
    def earlier(self) -> list[EarlierStudy]:
        """The earlier studies that it learns from, as they are now, or were when it began.

        Raises:
            StudyError: An earlier study is not there or was never run, has another metric or other
                axes, or no finished trial; or it is this study, or named twice.
        """
        return _earlier(self) if self.config.prior else []

    def confirm(
        self, seeds: int = 3, on_progress: OnProgress | None = None, *, quiet: bool = False
    ) -> None:
        """Train finalists again with fresh seeds, where the front is undecided, on Ray.

        Args:
            seeds: The mean number of trainings that the front's members are to have; each next one
                goes to the network on which it decides most.
            on_progress, quiet: As in :meth:`run`.

        Raises:
            WidthsearchError, KeyboardInterrupt: As :meth:`run`.
        """
        with (
            _on_ray(self, on_progress, quiet=quiet) as (shown, session),
            self.confirmation(seeds, shown) as search,
        ):
            session.train(search, lambda: _unread(self), self.base_weights)

    @block
    def search(
        self,
        on_progress: OnProgress | None = None,
        engine: Engine | None = None,
        *,
        retry: bool = False,
    ) -> Iterator[Search]:
        """Drive the study by any engine: :meth:`run` without Ray.

        Args:
            on_progress: Called with the progress of the study.
            engine: Asks the proposers; by default one after the other in this process.
            retry: Whether to train again the trials that failed.

        Yields:
            The search, to ask for trials and to report their epochs to.

        Raises:
            StudyError: Another driver holds the study, or its storage does not fit the
                configuration; at the end, another driver has taken over meanwhile.
            StorageError: The storage cannot be opened.
        """
        from widthsearch.study.proposals import run_sequentially

        driver = _driver(self)
        with driver.search(on_progress, engine or run_sequentially, retry=retry) as search:
            self.failures = driver.failures
            yield search

    @block
    def confirmation(
        self, seeds: int = 3, on_progress: OnProgress | None = None
    ) -> Iterator[Confirmation]:
        """Drive :meth:`confirm` by any engine; arguments and errors as there."""
        if seeds < 2:
            raise StudyError(f"`seeds >= 2` must hold to confirm anything, but seeds={seeds}")
        if not self.front():
            raise StudyError(f"study {self.config.name!r} has no front to confirm: run it first")
        with _driver(self).confirmation(seeds, on_progress) as search:
            yield search

    def resolve_recipe(self) -> Recipe | OwnRecipe:
        """The recipe with the study's precision; a CPU is probed, and the result stored, once.

        Raises:
            StudyError: The study was never run.
        """
        return _driver(self).resolve_recipe()


def _earlier(study: Study) -> list[EarlierStudy]:
    from widthsearch.study.storage import Store

    with suppress(StudyError):  # it was never run
        store = Store.open(study.storage, study.config.name)
        if store.begun:
            return store.earlier()
    prior = study.config.prior
    others = [Study.load(reference, study.folder.parent) for reference in prior]
    check_distinct(prior, [(each.storage, each.config.name) for each in (study, *others)])
    found = ((other.config, *_stored(other)[:2]) for other in others)
    return [EarlierStudy.of(*each, study.config, study.spaces) for each in found]


def _stored(study: Study) -> tuple[list[Trial], dict[str, SpaceRecord], list[EarlierStudy]]:
    """The trials that have ended, the spaces' records without their code, and the prior."""
    from widthsearch.study.storage import Store

    store = Store.open(study.storage, study.config.name)
    if (records := store.records()) is None:
        raise StudyError(f"study {study.config.name!r} has no trials yet: run it first")
    trials = [trial for trial in store.trials(records) if trial.state != TrialState.RUNNING]
    return trials, records, store.earlier()


def _driver(study: Study) -> Driver:
    from widthsearch.study.driver import Driver

    own = study.config.trainer is not None
    parts = study.spaces, None if own else study.task, study.folder, study.storage
    return Driver(study.config, *parts, _pickled, study.base_weights, study.earlier)


def _loading_first(load: Callable[[], Any], propose: Engine) -> tuple[Engine, Callable[[], Any]]:
    """An engine that loads the data before methods run, and a function that returns the data.

    So a fault of an own ``data`` function is seen at once, and not after methods that train.
    """
    loaded: list[Any] = []

    def engine(
        requests: Sequence[ProposalRequest], *given: Any
    ) -> Iterator[tuple[int, ProposalResult]]:
        if requests:
            loaded.append(load())
        yield from propose(requests, *given)

    return engine, lambda: loaded.pop() if loaded else load()


def dry_run(study: Study, on_progress: OnProgress | None = None) -> DryRun:
    """What :meth:`Study.run` would train, how long it would take, and how much memory.

    The base and the narrowest network are trained for an epoch or two each, one after the
    other, in a process of their own. Proposers that train are not run. All that is written is
    removed again.

    Args:
        study: The study.
        on_progress: Called with the progress of the dry run.

    Raises:
        WidthsearchError: The study cannot be run.
    """
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from widthsearch.runner.dry_run import measure
    from widthsearch.study.proposals import run_sequentially
    from widthsearch.study.trial import count_begun

    _check_reported(study)
    begun, weights = 0, study.base_weights
    with suppress(StudyError):  # it was never run
        begun = count_begun(_stored(study)[0])
    config, skipped = study.config, dict[str, str]()
    trained = [method for method in config.proposers if method.trains() is not False]
    for method in trained:
        may = "trains networks" if method.trains() else "does not say that it trains nothing"
        skipped[method.method] = f"it {may}"
    changes = {
        "proposers": tuple(m for m in config.proposers if m not in trained),
        "objectives": tuple(name for name in config.objectives if name != "latency_ms"),
        "hours": None,
        "limits": {k: v for k, v in config.limits.items() if k != "latency_ms"},
    }
    with TemporaryDirectory() as scratch:
        driver = _driver(study)
        url = _storage(Path(scratch), None)
        config = config.model_copy(update=changes)
        driver = replace(driver, config=config, folder=Path(scratch), url=url)
        with driver.search(on_progress, run_sequentially, retry=False) as search:
            skipped |= {name: f"it failed: {why}" for name, why in driver.failures.items()}
            return measure(
                search,
                study.data(),
                Path(scratch),
                begun=begun,
                hours=study.config.hours,
                base_epochs=None if weights is None else weights.epochs,
                skipped=skipped,
                report=search.notify,
            )


def _stored_config(folder: Path) -> StudyConfig:
    """The configuration in a study's folder, which another version may have written."""
    try:
        return StudyConfig.from_yaml(folder / "study.yaml")
    except StudyError as error:
        from widthsearch.study.storage import SchemaError, Store

        values = read_yaml(folder / "study.yaml")
        try:
            Store.open(_storage(folder, str(values.get("storage") or "")), str(values.get("name")))
        except SchemaError as cause:  # it explains the other one
            raise cause from None
        except WidthsearchError:
            pass
        raise error


@contextmanager
def _on_ray(
    study: Study, on_progress: OnProgress | None, *, quiet: bool
) -> Iterator[tuple[OnProgress | None, Session]]:
    """A session of Ray, and a function that shows its progress."""
    from widthsearch.report.progress import showing
    from widthsearch.runner import ray_tune as runner

    _check_reported(study)
    with (
        showing(study.config.name, on_progress, quiet=quiet) as shown,
        runner.Session(study.config, study.folder) as session,
    ):
        yield shown, session


def _check_reported(study: Study) -> None:
    """Check what the built-in trainer reports; a loop of one's own reports what it likes."""
    from widthsearch.study.checks import check_reported

    if study.spaces and study.config.trainer is None:
        check_reported(study.config, study.task)


def _unread(study: Study) -> Any:
    """The data for trainings on Ray, where images in files are read."""
    return study.task.for_search() if study.config.trainer is None else study.data()


def _storage(folder: Path, url: str | None) -> str:
    return url or f"sqlite:///{(folder / 'study.db').resolve()}"


def _pickled(space: SearchSpace, label: str) -> bytes:
    from widthsearch.runner.pickling import pickle_by_value

    return pickle_by_value(space, label)
