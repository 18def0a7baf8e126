"""Front-aware early stopping: probabilities, and which trials are never compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import curves
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.early_stopping import FrontStopping, front_probability
from widthsearch.bayesopt.observation import Observation
from widthsearch.errors import StudyError

FINISHED = [curves.finished(60.0 + 2 * i, cost=10.0 * i) for i in range(1, 13)]


def test_a_network_is_compared_with_cheaper_ones_alone() -> None:
    """However bad: with none at its cost its probability is 1; larger networks are no bar."""
    poor = curves.running(70.0, 5.0, 5)
    assert front_probability(poor, FINISHED) == 1
    assert not FrontStopping(chance=0.99)(poor, FINISHED)
    dear = curves.running(66.0, 125.0, 5)
    assert front_probability(dear, FINISHED) < 0.05
    assert FrontStopping()(dear, FINISHED)


def test_every_cost_objective_must_be_no_more() -> None:
    """Fewer MACs but a longer latency is no rival."""
    finished = [replace(peer, costs=(*peer.costs, 2.0)) for peer in FINISHED]
    dear = curves.running(66.0, 125.0, 5)
    assert front_probability(replace(dear, costs=(125.0, 1.9)), finished) == 1
    assert front_probability(replace(dear, costs=(125.0, 2.0)), finished) < 0.05


def test_nothing_stops_before_enough_are_finished_or_too_soon() -> None:
    """The hopeless goes on with 7 finished of 8, and before the first epoch."""
    dear = curves.running(66.0, 125.0, 5)
    assert not FrontStopping(finished=8, chance=0.5)(dear, FINISHED[:7])
    assert FrontStopping(finished=7, chance=0.5)(dear, FINISHED[:7])
    assert not FrontStopping(first_epoch=6, chance=0.5)(dear, FINISHED)


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=3, max_size=12),
    st.floats(0, 100),
    st.floats(0.1, 1e9),
)
def test_probabilities_are_within_0_and_1_for_any_curves(
    finished: list[tuple[float, float]], now: float, cost: float
) -> None:
    """Also with equal curves, accuracies of 0 and 100, and costs far apart."""
    peers = [Observation((8,), c[-1], (1.0 + i,), c) for i, c in enumerate(finished)]
    assert 0 <= front_probability(Observation((8,), costs=(cost,), curve=(now,)), peers) <= 1


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("chance", 0.0, "greater than 0"),
        ("chance", 1.0, "less than 1"),
        ("finished", 2, "greater than or equal to 3"),
        ("first_epoch", 0, "greater than or equal to 1"),
    ],
)
def test_settings_outside_their_range_are_refused(field: str, value: float, rule: str) -> None:
    """The message has the rule and the value."""
    with pytest.raises(StudyError, match=f"early_stopping.{field} must be {rule}, but was {value}"):
        FrontStopping(**{field: value})  # type: ignore[arg-type]


def test_recorded_curves_keep_their_front() -> None:
    """80 networks of the quickstart's space, trained on digits, in three orders of arrival.

    30% of the epochs are saved, and at most 1% of the hypervolume lost in the mean
    (`benchmarks/results/stopping.md` has more orders and studies).
    """
    content = json.loads((Path(__file__).parent / "curves_digits.json").read_text())
    accuracy = np.array([trial["accuracy"] for trial in content["trials"]])
    macs = np.array([trial["macs"] for trial in content["trials"]])
    points = np.column_stack([-accuracy[:, -1], np.log(macs)])
    trials, last = accuracy.shape
    whole = pareto.hypervolume(points, points.max(0))
    saved, lost = [], []
    for seed in range(3):
        finished: list[int] = []
        epochs = 0
        for trial in np.random.default_rng(seed).permutation(trials).tolist():
            peers = [
                Observation((8,), accuracy[p, -1], (macs[p],), tuple(accuracy[p])) for p in finished
            ]
            for epoch in range(1, last + 1):
                epochs += 1
                if epoch == last:
                    finished.append(trial)
                    continue
                curve = tuple(accuracy[trial, :epoch])
                if FrontStopping()(Observation((8,), None, (macs[trial],), curve), peers):
                    break
        saved.append(1 - epochs / (trials * last))
        lost.append(1 - pareto.hypervolume(points[finished], points.max(0)) / whole)
    assert np.mean(saved) > 0.3
    assert np.mean(lost) < 0.01
