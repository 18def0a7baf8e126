"""Trials as points of the objectives, and the choice of a front's member."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from widthsearch.errors import StudyError
from widthsearch.space.cost import Cost
from widthsearch.study.front import pick
from widthsearch.study.posterior import MetricPosterior
from widthsearch.study.trial import Trial, TrialState
from widthsearch.training.recipe import EpochResult
from widthsearch.widths import Widths

ALL = ("accuracy", "macs", "latency_ms")


def make(
    number: int, accuracy: float, macs: int, latency_ms: float | None = None, **changes: Any
) -> Trial:
    """A finished trial of a network of its own."""
    latency = None if latency_ms is None else tiny.latency(latency_ms)
    cost = Cost(macs, macs // 10, macs // 5)
    widths = Widths(("conv1",), (number + 1,))
    return tiny.finished(number, widths, accuracy, cost=cost, latency=latency, **changes)


TRIALS = [
    make(0, 98.0, 1000, 1.0),
    make(1, 97.0, 400, 0.8),
    make(2, 96.0, 500, 0.7),
    make(3, 90.0, 100, 0.6),
    make(4, 50.0, 50, 0.1, state=TrialState.STOPPED),
    make(5, 99.0, 10),  # its latency is not measured
    make(6, 97.0, 400, 0.9),
]


def posterior_of(
    trials: Sequence[Trial], objectives: Sequence[str] = ALL, **limits: tuple[float, float]
) -> MetricPosterior:
    """Of so few that each accuracy is its own estimate."""
    return MetricPosterior(trials, {}, objectives, limits)


def front_of(trials: Sequence[Trial], *objectives: str, **limits: tuple[float, float]) -> list[int]:
    """The IDs of a front's members."""
    return [trial.number for trial in posterior_of(trials, objectives, **limits).front()]


def picked(spec: str | int, *objectives: str, others: Sequence[Trial] = ()) -> int:
    """The ID of the trial that is picked from the front of ``TRIALS`` and others."""
    return pick(posterior_of([*TRIALS, *others], objectives or ALL), spec).number


def test_the_front_holds_finished_trials_with_every_objective() -> None:
    """Fewest MACs first; accuracy is to be high, costs are to be low and within the limits."""
    assert front_of(TRIALS, *ALL) == [3, 1, 2, 0]
    assert front_of(TRIALS, *ALL, macs=(0, 450), latency_ms=(0.65, 1)) == [1]
    assert front_of(TRIALS, "accuracy", "macs") == [5]
    assert front_of(TRIALS[:5], "accuracy", "params") == [3, 1, 0]
    assert front_of(TRIALS[1:2] + TRIALS[6:], "accuracy", "macs") == [1, 6]
    assert front_of([], "accuracy", "macs") == []
    assert front_of(TRIALS, "accuracy", "flops") == []


@given(st.permutations(TRIALS))
def test_the_front_is_unchanged_by_order(trials: list[Trial]) -> None:
    """The same list for every order of the trials."""
    assert front_of(trials, *ALL) == front_of(TRIALS, *ALL)


def test_picks() -> None:
    """By ID, best, knee and limits; among those within a limit the most accurate."""
    assert picked("2") == 2
    assert picked(3) == 3
    assert picked("best") == 0
    assert picked("knee") == 2
    assert picked("macs<=4e2") == 1
    assert picked(" latency_ms <= 0.75 ") == 2
    assert picked("params<=10") == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("44", "ID must be a finished trial's, but 44 is none; finished .*on the front 3, 1, 2, 0"),
        ("macs<=99", "'macs<=99' leaves none; the least macs of the front is 100"),
        (
            "fastest",
            "must be best, cheapest, knee, a finished trial's ID, or limits, but was 'fastest'; "
            "limits are such as 'macs<=2e6', on accuracy, macs, latency_ms, params, act",
        ),
        ("chepest", "but was 'chepest'; did you mean 'cheapest'"),
        ("-1", "but was '-1'; limits are such as"),
        ("macs<=many", "must be a number such as 2e6, but 'macs<=many' has 'many'"),
        ("accuracy>=101", "leaves none; the greatest accuracy of the front is"),
        ("gpu_ms<=3", "on accuracy, macs, latency_ms, .* but 'gpu_ms<=3' is on 'gpu_ms'; name"),
        ("latency<=3", "but 'latency<=3' is on 'latency'; did you mean 'latency_ms'"),
        (
            "accuracy>=1, macs<=99",
            "the least macs among those within the other limits is 100",
        ),
        ("macs<3", "must be name<=number or name>=number, .*'macs<3' has 'macs<3'"),
        ("macs=<3", "'macs=<3' has 'macs=<3'"),
        ("macs<=3 params<=2", "has 'macs<=3 params<=2'"),
        ("macs<=3,", "'macs<=3,' has ''"),
    ],
)
def test_picks_that_cannot_be(spec: str, message: str) -> None:
    """Each is refused with the rule, the spec and what there is."""
    with pytest.raises(StudyError, match=message):
        picked(spec)
    with pytest.raises(StudyError, match="run the study first"):
        pick(posterior_of([]), spec)


def test_a_pick_by_id_is_of_any_finished_trial() -> None:
    """A baseline that is not on the front, say; one that failed is refused, and a few are named."""
    assert picked("5") == 5
    failed = make(90, 50.0, 1, state=TrialState.FAILED, error="diverged")
    many = [replace(TRIALS[0], number=number) for number in range(10, 30)]
    message = "but 90 has failed; finished are 0, 1, 2, 3, 5, 6, 10, 11, …, and on the front 3"
    with pytest.raises(StudyError, match=message):
        picked("90", others=[*many, failed])


def test_a_front_without_members_has_picks_by_id_alone() -> None:
    """No trial is within the limits; the error says so, and not that the study was never run."""
    posterior = posterior_of(TRIALS, ("accuracy", "macs"), accuracy=(99.5, math.inf))
    assert pick(posterior, 1).number == 1
    for spec in ("knee", "best", "macs<=400"):
        with pytest.raises(StudyError, match=r"none: no finished .* the limits; change"):
            pick(posterior, spec)


def test_a_limit_on_an_unmeasured_latency() -> None:
    """No member is within it, and the error says why."""
    with pytest.raises(StudyError, match="no member of the front has a latency_ms"):
        picked("latency_ms<=1", "accuracy", "macs")


def test_trials_are_json() -> None:
    """Costs and latency are flat, and an epoch that diverged is null rather than NaN."""
    trial = make(
        7,
        0.0,
        1000,
        0.5,
        state=TrialState.FAILED,
        error="diverged",
        curve=(EpochResult(1, math.inf, math.nan, 0.5),),
    )
    stored = json.loads(json.dumps(trial.to_json(), allow_nan=False))
    assert (stored["id"], stored["widths"]) == (7, {"conv1": 8})
    assert (stored["macs"], stored["params"], stored["activations"]) == (1000, 100, 200)
    assert (stored["latency_ms"], stored["latency"]["pairs"]) == (0.5, 4)
    assert stored["curve"] == [
        {"epoch": 1, "loss": None, "value": None, "seconds": 0.5, "mode": ""}
    ]
    assert (stored["state"], stored["accuracy"], stored["error"]) == ("failed", None, "diverged")
