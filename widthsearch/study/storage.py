"""A study's storage: the one source of truth, in any Optuna database.

The study's user attributes are its configuration, its spaces' records, the proposals, the results
of probes and the version of this schema. A trial's parameters are its widths by
axis name (``space/axis`` in a study of several spaces); its user attributes are its space, origin,
seed, cost, latency, per-epoch curve and error. It is inserted *with* all its widths in one
transaction, so a kill at any moment leaves whole trials: finished ones, and running ones that the
next driver continues under their own numbers. Curves are no intermediate values, because Optuna's
samplers raise on those under several objectives.

Only the driver writes. It holds the lock of ``driver_lock.py``, and each of its writes checks that
it still does (``database.py``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial
from pydantic import TypeAdapter

from widthsearch.bayesopt.kernel import CostedSpace
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.optuna_sampler import directions, distributions
from widthsearch.errors import StudyError
from widthsearch.latency.config import Latency
from widthsearch.space.cost import Cost, QuadraticForm
from widthsearch.study import attributes
from widthsearch.study.database import (
    Fence,
    database_errors,
    lacks_tables,
    open_database,
    reaching,
    without_password,
    written_here,
)
from widthsearch.study.earlier import EarlierStudy
from widthsearch.study.trial import Trial, TrialState
from widthsearch.training.recipe import EpochResult
from widthsearch.widths import Axis, Widths

if TYPE_CHECKING:
    from widthsearch.proposers.families import Candidate
    from widthsearch.space.search_space import SearchSpace

_TABLES = models.TrialModel, models.TrialParamModel, models.TrialUserAttributeModel

SCHEMA = 2
"""The version of what is stored. Version 1 is that of 0.1.0, which did not store it."""

_STATES = {
    OptunaState.RUNNING: TrialState.RUNNING,
    OptunaState.COMPLETE: TrialState.FINISHED,
    OptunaState.PRUNED: TrialState.STOPPED,
    OptunaState.FAIL: TrialState.FAILED,
}


class SchemaError(StudyError):
    """A study of another version's schema."""


Spaces = Mapping[str, CostedSpace]
"""The spaces of a study, or their records, by name."""


@dataclass(frozen=True, eq=False)
class SpaceRecord:
    """A space in a storage: its axes and the costs that they determine.

    Attributes:
        name: The space's name.
        axes: Its axes, without their layers.
        macs: Its MACs.
        params: Its parameters.

    Example:
        >>> from torch import nn
        >>> from widthsearch.space.search_space import SearchSpace
        >>> space = SearchSpace.from_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (4,))
        >>> record = SpaceRecord.from_json(SpaceRecord.of(space).to_json())
        >>> record.macs([[8], [4]]).tolist()
        [48, 24]
    """

    name: str
    axes: tuple[Axis, ...]
    macs: QuadraticForm
    params: QuadraticForm

    @classmethod
    def of(cls, space: SearchSpace) -> SpaceRecord:
        """The record of a space."""
        axes = tuple(replace(axis, layers=(), tied=()) for axis in space.axes)
        return cls(space.name, axes, space.cost_form("macs"), space.cost_form("params"))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` reads them back."""
        fields = ("name", "base", "min_width", "max_width", "step")
        return {
            "name": self.name,
            "axes": [{f: getattr(axis, f) for f in fields} for axis in self.axes],
            "forms": {"macs": self.macs.to_json(), "params": self.params.to_json()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SpaceRecord:
        """The record behind a study's attribute."""
        forms = content["forms"]
        return cls(
            content["name"],
            tuple(Axis(**axis) for axis in content["axes"]),
            QuadraticForm.from_json(forms["macs"]),
            QuadraticForm.from_json(forms["params"]),
        )


class Store:
    """One study in a storage.

    Attributes:
        url: The storage, as any Optuna URL.
        name: The study's name in it.
        fence: The fence of its writes; those of a driver that was replaced raise StudyError.

    Example:
        >>> import tempfile
        >>> url = f"sqlite:///{tempfile.mkdtemp()}/study.db"
        >>> Store.create(url, "mine", ["accuracy", "macs"]).set_attribute("note", {"by": "me"})
        >>> Store.open(url, "mine").attribute("note")
        {'by': 'me'}
    """

    def __init__(self, url: str, name: str, storage: RDBStorage) -> None:
        self.url = url
        self.name = name
        self._storage = storage
        with reaching(url):
            self._study = storage.get_study_id_from_name(name)
        self._keys: dict[int, int] = {}
        self.fence = Fence(url, storage.engine, self._study, name)

    @classmethod
    def create(
        cls, url: str, name: str, objectives: Sequence[str], metric: Metric = ACCURACY
    ) -> Store:
        """Open the study; create it where it does not exist yet.

        Raises:
            StorageError: The storage cannot be opened.
            StudyError: It has another program's study of that name, or one of another schema.
        """
        storage, ways = open_database(url, make_tables=True), directions(objectives, metric)
        with reaching(url):
            study = optuna.create_study(
                storage=storage, study_name=name, directions=ways, load_if_exists=True
            )
            found = study.directions
        store = cls(url, name, storage)
        store._check_schema()
        if store.attribute("spaces") is not None:
            return store
        if found != ways:
            raise StudyError(
                f"the storage already has an Optuna study {name!r} that is not of widthsearch: "
                "give the study another name"
            )
        with warnings.catch_warnings(), reaching(url):
            # Marked experimental; it only labels what optuna-dashboard shows.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(objectives))
        store.set_attribute("schema", SCHEMA)
        return store

    @classmethod
    def open(cls, url: str, name: str) -> Store:
        """Open a study that exists.

        Raises:
            StudyError: There is no such study in the storage, or it is of another schema.
            StorageError: The storage cannot be opened.
        """
        missing = StudyError(
            f"study {name!r} has no trials yet: run it first, or name the folder of the runs with "
            f"it, --runs FOLDER (looked in {without_password(url)})"
        )
        if url.startswith("sqlite:///"):
            file = sqlalchemy.engine.make_url(url).database
            if file and not Path(file).exists():  # opening would make an empty one
                raise missing
        if lacks_tables(url):
            raise missing
        try:
            store = cls(url, name, open_database(url, make_tables=False))
        except KeyError:
            raise missing from None
        store._check_schema()
        return store

    def _check_schema(self) -> None:
        version = self.attribute("schema")
        if version is None and self.attribute("config") is not None:
            raise SchemaError(
                f"a study must be of this version's schema ({SCHEMA}), but {self.name!r} is of "
                "widthsearch 0.1.0: give the study another name and train it again, or check out "
                "commit 08b2ed8 of the repository to read it"
            )
        if version is not None and (not isinstance(version, int) or version > SCHEMA):
            raise SchemaError(
                f"a study must be of this version's schema ({SCHEMA}) or an older one, but "
                f"{self.name!r} has schema {version}: upgrade widthsearch"
            )

    @database_errors
    def attribute(self, key: str) -> Any:
        """A JSON value of the study; None where it was never set."""
        with written_here(self.name):
            return attributes.read(key, self._storage.get_study_user_attrs(self._study))

    @database_errors
    def set_attribute(self, key: str, value: Any) -> None:
        """Store a JSON value of the study, of any length; a kill leaves the old one or the new."""
        attributes.write(
            key,
            value,
            partial(self._storage.get_study_user_attrs, self._study),
            partial(self._storage.set_study_user_attr, self._study),
        )

    def records(self) -> dict[str, SpaceRecord] | None:
        """The records of the study's spaces by name; None before a driver has written them.

        Raises:
            StorageError: Something else has written them.
        """
        stored = self.attribute("spaces")
        with written_here(self.name):
            records = [SpaceRecord.from_json(space) for space in stored or ()]
            found = {record.name: record for record in records}
        return None if stored is None else found

    def earlier(self) -> list[EarlierStudy]:
        """The earlier studies that the study learns from.

        Raises:
            StorageError: Something else has written them.
        """
        stored = self.attribute("prior") or ()
        with written_here(self.name):
            return [EarlierStudy.from_json(content) for content in stored]

    @database_errors
    def forget(self, *beginnings: str) -> None:
        """Unset the study's values whose keys begin so."""
        for key in self._storage.get_study_user_attrs(self._study):
            if key.startswith(beginnings):
                self._storage.set_study_user_attr(self._study, key, None)

    @property
    @database_errors
    def begun(self) -> bool:
        """Whether a trial has begun."""
        return self._storage.get_n_trials(self._study) > 0

    @database_errors
    def begin(self, spaces: Mapping[str, SearchSpace], candidate: Candidate, seed: int) -> Trial:
        """Insert a running trial, whole or not at all.

        Args:
            spaces: The spaces of the study by name.
            candidate: The architecture, and where it came from.
            seed: The trial's seed.
        """
        space, widths, origin = candidate.space, candidate.widths, dict(candidate.origin)
        cost, keys = spaces[space].cost(widths), _parameters(space, spaces)
        # Widths that the user gives may be off the grid.
        grids = distributions([_including(a, widths[a.name]) for a in spaces[space].axes])
        template = create_trial(
            state=OptunaState.RUNNING,
            params={keys[name]: width for name, width in widths.items()},
            distributions={keys[name]: grid for name, grid in grids.items()},
            user_attrs={"origin": origin, "seed": seed, "cost": asdict(cost), "space": space},
        )
        key = self._storage.create_new_trial(self._study, template_trial=template)
        number = self._storage.get_trial_number_from_id(key)
        return Trial(number, space, widths, origin, seed, cost)

    @database_errors
    def record_latency(self, number: int, latency: Latency) -> None:
        """Store a running trial's measured latency."""
        self._set_trial_attribute(self._key(number), "latency", latency.to_json())

    @database_errors
    def record_curve(self, number: int, curve: Sequence[EpochResult]) -> None:
        """Store a running trial's curve so far."""
        rows = [asdict(result) for result in curve]
        self._set_trial_attribute(self._key(number), "curve", rows)

    @database_errors
    def finish(self, number: int, values: Sequence[float]) -> None:
        """Close a trial after its last epoch, with the value of each objective."""
        self._storage.set_trial_state_values(self._key(number), OptunaState.COMPLETE, values)

    @database_errors
    def stop(self, number: int) -> None:
        """Close a trial that a rung stopped; it has no values, so it is never on a front."""
        self._storage.set_trial_state_values(self._key(number), OptunaState.PRUNED)

    @database_errors
    def fail(self, number: int, reason: str) -> None:
        """Close a trial that cannot be trained."""
        key = self._key(number)
        self._set_trial_attribute(key, "error", reason)
        self._storage.set_trial_state_values(key, OptunaState.FAIL)

    @database_errors
    def trials(self, spaces: Spaces) -> list[Trial]:
        """Every trial, by number.

        A trial without all its widths is another program's (a study may be asked by hand): it is
        left out.
        """
        with written_here(self.name):
            return [
                _trial(stored, spaces)
                for stored in self._stored(*_STATES)
                if _is_whole(stored, spaces)
            ]

    @database_errors
    def running(self) -> set[int]:
        """The numbers of the trials that have not ended, whichever driver trains them."""
        return {trial.number for trial in self._stored(OptunaState.RUNNING)}

    @database_errors
    def fail_partial(self, spaces: Spaces) -> None:
        """Close the running trials that :meth:`trials` leaves out, so that none runs for ever."""
        for stored in self._stored(OptunaState.RUNNING):
            if not _is_whole(stored, spaces):
                self._storage.set_trial_state_values(self._key(stored.number), OptunaState.FAIL)

    def _set_trial_attribute(self, trial: int, key: str, value: Any) -> None:
        attributes.write(
            key,
            value,
            lambda: self._storage.get_trial(trial).user_attrs,
            partial(self._storage.set_trial_user_attr, trial),
        )

    def _stored(self, *states: OptunaState) -> list[_StoredTrial]:
        """The trials in some states, by number.

        Three plain queries: Optuna's own reader makes objects of every width of every trial, which
        takes some ten times as long.
        """
        trial, param, attribute = _TABLES
        query, own = sqlalchemy.select, trial.study_id == self._study
        numbers = query(trial.trial_id, trial.number, trial.state).where(own).order_by(trial.number)
        params = query(param.trial_id, param.param_name, param.param_value).join(trial).where(own)
        texts = query(attribute.trial_id, attribute.key, attribute.value_json).join(trial)
        with self._storage.engine.connect() as connection:
            found = {
                key: _StoredTrial(number, state)
                for key, number, state in connection.execute(numbers)
                if state in states
            }
            for key, name, value in connection.execute(params):
                if key in found:
                    found[key].params[name] = value
            for key, name, text in connection.execute(texts.where(own)):
                if key in found:
                    found[key].user_attrs[name] = json.loads(text)
        return list(found.values())

    def _key(self, number: int) -> int:
        if number not in self._keys:
            found = self._storage.get_trial_id_from_study_id_trial_number(self._study, number)
            self._keys[number] = found
        return self._keys[number]


def _parameters(space: str, spaces: Spaces) -> dict[str, str]:
    """What Optuna calls the axes of a space, by their own names, in order."""
    prefix = "" if len(spaces) == 1 else f"{space}/"
    return {axis.name: f"{prefix}{axis.name}" for axis in spaces[space].axes}


def _including(axis: Axis, width: int) -> Axis:
    """The axis with a grid that has the width."""
    if width in axis.grid:
        return axis
    low, high = min(width, axis.min_width), max(width, axis.max_width)
    return replace(axis, min_width=low, max_width=high, step=1)


@dataclass(frozen=True)
class _StoredTrial:
    """A trial's rows in Optuna's tables."""

    number: int
    state: OptunaState
    params: dict[str, float] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)


def _is_whole(trial: _StoredTrial, spaces: Spaces) -> bool:
    space = trial.user_attrs.get("space", "")
    if "cost" not in trial.user_attrs or space not in spaces:
        return False
    return set(_parameters(space, spaces).values()) <= trial.params.keys()


_COST, _CURVE = TypeAdapter(Cost), TypeAdapter(tuple[EpochResult, ...])


@dataclass(frozen=True)
class _Origin:
    """The values of a trial's origin that the package reads."""

    base: bool = False
    baseline: bool = False
    confirms: int | None = None
    compares: int | None = None
    start: str = "scratch"
    epochs: int | None = None
    sampler: str | None = None
    given: str = ""
    proposer: str = ""
    family: str = ""
    budget: float = 0.0


_ORIGIN = TypeAdapter(_Origin)


def _epoch(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """An epoch; before there were other metrics its value was stored as ``accuracy``."""
    return {"value" if key == "accuracy" else key: value for key, value in row.items()}


def _trial(trial: _StoredTrial, spaces: Spaces) -> Trial:
    stored = trial.user_attrs
    origin = _ORIGIN.validate_python(stored["origin"])
    if origin.proposer and "budget" not in stored["origin"]:
        raise KeyError("budget")
    latency = stored.get("latency")
    keys = _parameters(stored["space"], spaces)
    return Trial(
        number=trial.number,
        space=stored["space"],
        widths=Widths(tuple(keys), tuple(int(trial.params[key]) for key in keys.values())),
        origin=stored["origin"],
        seed=int(stored["seed"]),
        cost=_COST.validate_python(stored["cost"]),
        latency=None if latency is None else Latency.from_json(latency),
        curve=_CURVE.validate_python([*map(_epoch, attributes.read("curve", stored) or ())]),
        state=_STATES[trial.state],
        error=attributes.read("error", stored),
    )
