"""Earlier studies that a study learns from: their finished trials, for its surrogate.

They are of the same axes, under another recipe or resolution, or of other data. A study keeps them
in its own storage once it begins, so that it resumes as it was begun, whatever becomes of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from widthsearch.bayesopt.kernel import Coordinates, CostedSpace
from widthsearch.bayesopt.observation import Observation
from widthsearch.errors import StudyError
from widthsearch.study.config import StudyConfig
from widthsearch.study.trial import Trial


@dataclass(frozen=True)
class EarlierStudy:
    """The finished trials of an earlier study.

    Attributes:
        name: Its name.
        trials: Its trials by the name of the space, of the study that learns, with the same axes.

    Example:
        >>> earlier = EarlierStudy("cheap", {"net": (Observation((8, 16), value=71.5),)})
        >>> earlier.size, EarlierStudy.from_json(earlier.to_json()) == earlier
        (1, True)
    """

    name: str
    trials: Mapping[str, tuple[Observation, ...]]

    @classmethod
    def of(
        cls,
        config: StudyConfig,
        trials: Collection[Trial],
        records: Mapping[str, CostedSpace],
        learner: StudyConfig,
        spaces: Mapping[str, CostedSpace],
    ) -> EarlierStudy:
        """The trials of a study that are of the spaces of another.

        Args:
            config: The earlier study's configuration.
            trials: Its trials.
            records: Its spaces, or their records, by name.
            learner: The configuration of the study that learns.
            spaces: Its spaces by name.

        Raises:
            StudyError: They are of different metrics, no space has the axes of another, no such
                trial has finished, or one has a value outside the range of the metric.
        """
        name, metric, own_metric = config.name, config.metric, learner.metric
        if (metric.name, metric.goal) != (own_metric.name, own_metric.goal):
            raise StudyError(
                f"a prior study must have the metric of this one, but {name!r} has {metric.name} "
                f"to {metric.goal}, not {own_metric.name} to {own_metric.goal}: leave it out of "
                "`prior`"
            )
        found: dict[str, list[Observation]] = {}
        for record in sorted(records, key=lambda record: record not in spaces):  # namesakes first
            free = sorted(spaces.keys() - found, key=lambda own: (own != record, own))
            same = (own for own in free if _axes(spaces[own]) == _axes(records[record]))
            if (space := next(same, None)) is not None:
                found[space] = [
                    Observation(trial.widths.vector, trial.value)
                    for trial in trials
                    if trial.space == record and not trial.is_comparison
                    if trial.value is not None
                ]
        if not found:
            own, other = next(iter(spaces.values())), next(iter(records.values()))
            raise StudyError(
                f"a prior study must have the axes of this one, but {name!r} has another "
                f"{_first_difference(_axes(other), _axes(own))}: leave it out of `prior`"
            )
        if not any(found.values()):
            raise StudyError(
                f"a prior study must have finished trials, but {name!r} has none: run it first, or "
                "leave it out of `prior`"
            )
        for value in (o.value for some in found.values() for o in some if o.value is not None):
            if not own_metric.contains(value):
                low, high = own_metric.ends
                raise StudyError(
                    f"a prior study must have values within metric.range, [{low:g}, {high:g}], "
                    f"but {name!r} has {metric.name} {value:g}: change metric.range, or leave it "
                    "out of `prior`"
                )
        return cls(name, {space: tuple(some) for space, some in found.items() if some})

    def placed(
        self, coordinates: Mapping[str, Coordinates]
    ) -> list[tuple[Coordinates, tuple[Observation, ...]]]:
        """The trials of some spaces, with the coordinates of each, as the surrogate takes them."""
        return [(coordinates[s], own) for s, own in self.trials.items() if s in coordinates]

    @property
    def size(self) -> int:
        """The number of its trials."""
        return sum(map(len, self.trials.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` reads them back."""
        trials = {
            space: [[list(trial.widths), trial.value] for trial in own]
            for space, own in self.trials.items()
        }
        return {"study": self.name, "trials": trials}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EarlierStudy:
        """An earlier study as a storage keeps it."""
        trials = {
            space: tuple(Observation(tuple(widths), value) for widths, value in own)
            for space, own in content["trials"].items()
        }
        return cls(content["study"], trials)


def check_distinct(references: Sequence[str], places: Sequence[tuple[str, str]]) -> None:
    """Check that a study's `prior` names other studies, and each of them once.

    Args:
        references: The earlier studies as it names them.
        places: The storage and the name of the study itself, then of each of those.

    Raises:
        StudyError: It does not.
    """
    known = ["this one", *(f"{reference!r} once more" for reference in references)]
    for i, reference in enumerate(references, 1):
        if (first := places.index(places[i])) < i:
            raise StudyError(
                f"prior must name other studies, each once, but {reference!r} is {known[first]}: "
                "leave it out"
            )


def _axes(space: CostedSpace) -> list[tuple[str, int]]:
    """What makes width vectors comparable: names and base widths, in order."""
    return [(axis.name, axis.base) for axis in space.axes]


def _first_difference(found: Sequence[tuple[str, int]], own: Sequence[tuple[str, int]]) -> str:
    """The first axis that differs, or the numbers of axes."""
    if len(found) != len(own):
        return f"number of axes ({len(found)}, not {len(own)})"
    (name, base), (own_name, own_base) = next(
        (a, b) for a, b in zip(found, own, strict=True) if a != b
    )
    if name != own_name:
        return f"axis ({name!r}, not {own_name!r})"
    return f"base width of axis {name!r} ({base}, not {own_base})"
