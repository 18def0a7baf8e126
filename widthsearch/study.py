"""A study: from its configuration to its front.

A study lives in one folder: ``study.yaml``, ``study.db`` unless its storage is elsewhere,
``checkpoints/`` of the trials that are being trained, and ``logs/``.
"""

from __future__ import annotations

import difflib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from widthsearch import families, pareto
from widthsearch.config import ProposerConfig, StudyConfig
from widthsearch.data import Task, load_task
from widthsearch.devices import check_device
from widthsearch.errors import StorageError, StudyError
from widthsearch.latency import Latency, LatencyConfig, LatencyMeter
from widthsearch.lease import Lease
from widthsearch.outcomes import Outcome
from widthsearch.proposers import Proposal, Setting
from widthsearch.proposing import Engine, Question, Say, in_turn, proposals
from widthsearch.search import Progress, Search
from widthsearch.space import SearchSpace, load_space
from widthsearch.storage import Store, Trial

_FIXED = ("task", "recipe", "objectives", "latency", "seed")
"""What makes outcomes comparable: it cannot change once a study has begun. The rest may."""


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
        space: SearchSpace | None = None,
        task: Task | None = None,
        *,
        folder: Path | str | None = None,
    ) -> None:
        self.config = config
        self.folder = Path("runs", config.name) if folder is None else Path(folder)
        self.failures: dict[str, str] = {}
        if space is not None:
            self.space = space.under(config.constraints)
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
    def space(self) -> SearchSpace:
        """The space: the one that was given, or what the configuration refers to."""
        if self.config.space is None:
            raise StudyError(
                f"study {self.config.name!r} names no space: add `space:` to its configuration, "
                "or give the object: Study(config, space=...)"
            )
        space = load_space(self.config.space, self.config.input)
        return space.under(self.config.constraints)

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

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Train what is left to train, on Ray; returns when every trial is done.

        Raises:
            WidthsearchError: Something that a user can mend; running again goes on from there.
            KeyboardInterrupt: SIGINT or SIGTERM; running again goes on from there.
        """
        from widthsearch import runner  # below this file: the one engine, imported when it runs

        with (
            runner.Session(self.config, self.folder) as session,
            self.search(on_progress, session.propose) as search,
        ):
            session.train(search, self.task)
        finished = [done for done in search.outcomes.values() if done.state == "finished"]
        if not finished:
            reasons = [done.error for done in search.outcomes.values() if done.error]
            raise StudyError(
                f"study {self.config.name!r} has no finished trial; the last failed: "
                f"{reasons[-1] if reasons else 'none'}"
            )

    def outcomes(self) -> list[Outcome]:
        """Every trial that is done, by number.

        Raises:
            StudyError: The study was never run.
        """
        store = Store.open(self.storage, self.config.name)
        space = store.attribute("space")
        if space is None:
            raise StudyError(f"study {self.config.name!r} has no outcomes yet: run it first")
        return store.outcomes([axis["name"] for axis in space["axes"]])

    def front(self) -> list[Outcome]:
        """The finished outcomes that no other dominates, fewest MACs first."""
        return pareto.front(self.outcomes(), self.config.objectives)

    @contextmanager
    def search(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        engine: Engine = in_turn,
    ) -> Iterator[Search]:
        """Drive the study: claim its storage, make what it lacks, and hand out the loop's state.

        Args:
            on_progress: Is told where the study stands.
            engine: Who asks the proposers.

        Raises:
            StudyError: Another driver holds it, or what is stored does not fit the configuration.
            StorageError: The storage cannot be opened.
        """
        config, space = self.config, self.space
        if tuple(space.input_shape) != tuple(self.task.input_shape):
            raise StudyError(
                f"a space's costs are for one input shape, but {space.name!r} was traced at "
                f"{tuple(space.input_shape)} and the images of {self.task.name!r} are "
                f"{tuple(self.task.input_shape)}: make the space with the task's shape"
            )
        if config.ray_address is None:
            check_device(config.device)
            if "latency_ms" in config.objectives:
                check_device((config.latency or LatencyConfig()).device)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the study's folder {str(self.folder)!r} cannot be made: {error.strerror}"
            ) from None
        store = Store.create(self.storage, config.name, config.objectives)
        with Lease(store) as lease:
            self._claim(store)
            (self.folder / "study.yaml").write_text(config.to_yaml(), encoding="utf-8")
            found = self._proposals(store, engine, self._sayer(store, on_progress))
            yield Search(
                config,
                space,
                store,
                lease,
                candidates=families.candidates(space, found, config.budgets),
                measure=self._meter() if "latency_ms" in config.objectives else None,
                on_progress=on_progress,
            )

    def _claim(self, store: Store) -> None:
        """Write what the study is into its storage, or check that it is what it was."""
        name, space, config = self.config.name, self.space, self.config.to_json()
        stored = store.attribute("space")
        if stored is None:
            store.set_attribute("config", config)
            axes = [
                {key: getattr(axis, key) for key in ("name", "base", "least", "most", "step")}
                for axis in space.axes
            ]
            store.set_attribute(
                "space",
                {
                    "name": space.name,
                    "fingerprint": space.fingerprint,
                    "costs": _costs(space),
                    "axes": axes,
                },
            )
            return
        if stored["fingerprint"] == space.fingerprint and stored["costs"] != _costs(space):
            raise StudyError(
                f"a study keeps its space, but the networks of {space.name!r} cost something else "
                f"now than when {name!r} was begun (base {stored['costs']['macs']:,} MACs then, "
                f"{_costs(space)['macs']:,} now): put the code back, or give the study another name"
            )
        if stored["fingerprint"] != space.fingerprint:
            raise StudyError(
                f"a study keeps its space, but {name!r} was begun with {stored['name']!r} "
                f"({len(stored['axes'])} axes) and is now given {space.name!r} "
                f"({len(space.axes)} axes): put the space back, or give the study another name"
            )
        was = store.attribute("config")
        for key in _FIXED:
            for place, before, now in _differences(key, was.get(key), config[key]):
                raise StudyError(
                    f"a study keeps its {key}, but {name!r} was begun with {place}={before!r} and "
                    f"now has {now!r}: put it back, or give the study another name"
                )
        store.set_attribute("config", config)

    def _proposals(
        self, store: Store, engine: Engine, say: Callable[[str], None]
    ) -> list[Proposal]:
        config = self.config
        setting = Setting(config.seed, config.device, config.recipe, min(config.budgets))
        threads = max(1, int(config.resources.cpu))

        def question(proposer: ProposerConfig) -> Question:
            return Question(proposer.method, proposer.make(), self.space, setting, threads)

        found, self.failures = proposals(
            store, config.proposers, question, self.task.for_search(), engine, say
        )
        return found

    def _sayer(self, store: Store, on_progress: Callable[[Progress], None] | None) -> Say:
        """Tells whoever watches what happens before there is a search."""
        begun = time.monotonic()
        done = store.outcomes(self.space.names)
        accuracies = [outcome.accuracy for outcome in done if outcome.accuracy is not None]

        def say(message: str) -> None:
            if on_progress is not None:
                on_progress(
                    Progress(
                        done=len(done),
                        running=0,
                        total=max(self.config.trials, len(done)),
                        best_accuracy=max(accuracies, default=None),
                        front_size=len(pareto.front(done, self.config.objectives)),
                        elapsed=time.monotonic() - begun,
                        remaining=None,
                        message=message,
                    )
                )

        return say

    def _meter(self) -> Callable[[Trial, float | None], Latency]:
        """Measure a trial's latency beside the base model, which is built when first needed."""
        space, settings = self.space, self.config.latency or LatencyConfig()
        meter: LatencyMeter | None = None

        def measure(trial: Trial, base_ms: float | None) -> Latency:
            nonlocal meter
            if meter is None:
                base = space.build(space.base, seed=self.config.seed)
                meter = LatencyMeter(base, space.input_shape, settings, base_ms)
            return meter.measure(space.build(trial.widths, seed=trial.seed))

        return measure


def _costs(space: SearchSpace) -> dict[str, Any]:
    """What tells networks with the same axes apart: their costs at every width, as a hash."""
    trace = space.trace
    forms = [sorted(p.items()) for p in (trace.macs, trace.params, trace.activations)]
    digest = hashlib.sha256(repr(forms).encode()).hexdigest()[:16]
    return {"macs": space.cost(space.base).macs, "digest": digest}


def _differences(place: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ, down to the leaves of their mappings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in now:
            yield from _differences(f"{place}.{key}", before.get(key), now[key])
    elif before != now:
        yield place, before, now
