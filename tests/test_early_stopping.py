"""Early stopping that knows the front: extrapolation, chances, what is never compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.early_stopping import (
    Curve,
    FrontStopping,
    Prediction,
    chance_of_front,
    extrapolate,
    logit,
)
from widthsearch.errors import StudyError

EPOCHS = 10


def curve(final: float, cost: float = 1.0, epochs: int = EPOCHS) -> Curve:
    """A curve whose error halves the gap to its end with every epoch."""
    error = 100 - final
    rises = [100 - error - (90 - error) * 0.5**epoch for epoch in range(1, EPOCHS + 1)]
    return Curve((*rises[:-1], final)[:epochs], (cost,))


FINISHED = [curve(60.0 + 2 * i, cost=10.0 * i) for i in range(1, 13)]


def test_logits_of_all_accuracies_are_finite() -> None:
    """50% is 0, 0% and 100% are each other's opposites."""
    assert logit(50.0) == 0
    assert logit(100.0) == -logit(0.0) == pytest.approx(np.log(201))


def test_a_chance_is_a_student_t() -> None:
    """Half at the mean; with one degree of freedom a quarter above mean + scale (Cauchy)."""
    prediction = Prediction(mean=float(logit(80.0)), scale=1.0, freedom=1.0)
    assert prediction.chance_above(80.0) == pytest.approx(0.5)
    one = Prediction(mean=-1.0, scale=1.0, freedom=1.0)
    assert one.chance_above(50.0) == pytest.approx(0.25)


def test_finished_curves_tell_how_a_curve_ends() -> None:
    """Twelve curves of one kind: the 13th is foreseen halfway, and surer later than sooner."""
    missed = []
    for epoch in (3, 6):
        prediction = extrapolate(curve(73.0, cost=65.0, epochs=epoch), FINISHED)
        missed.append(abs(prediction.mean - float(logit(73.0))))
        assert missed[-1] < 2 * prediction.scale
    assert max(missed) < 0.05


def test_few_finished_curves_give_wide_predictions() -> None:
    """The scale shrinks as more are finished, to that of what no curve foretells."""
    rng = np.random.default_rng(0)
    finished = [curve(60.0 + 2 * (i % 12), cost=10.0 + i) for i in range(60)]
    finished = [
        Curve((*peer.accuracy[:-1], peer.accuracy[-1] + rng.normal(0, 1)), peer.costs)
        for peer in finished
    ]
    trial = curve(73.0, cost=65.0, epochs=4)
    scales = [extrapolate(trial, finished[:n]).scale for n in (4, 12, 60)]
    assert scales == sorted(scales, reverse=True)
    assert 0.03 < scales[-1] < 0.08  # a point is 0.05 at 73%


def test_a_network_is_compared_with_cheaper_ones_alone() -> None:
    """However bad: with nobody at its cost its chance is 1; larger networks are no bar."""
    poor = curve(70.0, cost=5.0, epochs=5)
    assert chance_of_front(poor, FINISHED) == 1
    assert not FrontStopping(chance=0.99)(poor, FINISHED)
    dear = curve(66.0, cost=125.0, epochs=5)
    assert chance_of_front(dear, FINISHED) < 0.05
    assert FrontStopping()(dear, FINISHED)


def test_every_cost_objective_must_be_no_more() -> None:
    """Fewer MACs but a longer latency is no rival."""
    finished = [Curve(peer.accuracy, (peer.costs[0], 2.0)) for peer in FINISHED]
    dear = curve(66.0, cost=125.0, epochs=5).accuracy
    assert chance_of_front(Curve(dear, (125.0, 1.9)), finished) == 1
    assert chance_of_front(Curve(dear, (125.0, 2.0)), finished) < 0.05


def test_nothing_stops_before_enough_are_finished_or_too_soon() -> None:
    """The hopeless goes on with 7 finished of 8, and before the first epoch."""
    dear = curve(66.0, cost=125.0, epochs=5)
    assert not FrontStopping(finished=8, chance=0.5)(dear, FINISHED[:7])
    assert FrontStopping(finished=7, chance=0.5)(dear, FINISHED[:7])
    assert not FrontStopping(first_epoch=6, chance=0.5)(dear, FINISHED)


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=3, max_size=12),
    st.floats(0, 100),
    st.floats(0.1, 1e9),
)
def test_chances_are_probabilities_for_any_curves(
    finished: list[tuple[float, float]], now: float, cost: float
) -> None:
    """Also with equal curves, accuracies of 0 and 100, and costs far apart."""
    peers = [Curve(accuracy, (1.0 + i,)) for i, accuracy in enumerate(finished)]
    assert 0 <= chance_of_front(Curve((now,), (cost,)), peers) <= 1


@pytest.mark.parametrize(
    ("field", "value"), [("chance", 0.0), ("chance", 1.0), ("finished", 2), ("first_epoch", 0)]
)
def test_settings_that_make_no_sense_are_refused(field: str, value: float) -> None:
    """The message has the rule and the value."""
    with pytest.raises(StudyError, match=f"must hold, but early_stopping has {field}={value}"):
        FrontStopping(**{field: value})


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
            peers = [Curve(tuple(accuracy[p]), (macs[p],)) for p in finished]
            for epoch in range(1, last + 1):
                epochs += 1
                if epoch == last:
                    finished.append(trial)
                elif FrontStopping()(Curve(tuple(accuracy[trial, :epoch]), (macs[trial],)), peers):
                    break
        saved.append(1 - epochs / (trials * last))
        lost.append(1 - pareto.hypervolume(points[finished], points.max(0)) / whole)
    assert np.mean(saved) > 0.3
    assert np.mean(lost) < 0.01
