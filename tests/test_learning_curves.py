"""Learning curves: what finished ones say of how another one ends, and how surely."""

from __future__ import annotations

from dataclasses import replace

import curves
import numpy as np
import pytest

from widthsearch.bayesopt.learning_curves import CurveRegression, FinalValue
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation

FINISHED = [curves.finished(60.0 + 2 * i, cost=10.0 * i) for i in range(1, 13)]


def predicted(
    trial: Observation, finished: list[Observation], use_costs: bool = True
) -> FinalValue:
    """The final accuracy of a trial."""
    regression = CurveRegression.fit(finished, len(trial.curve), use_costs=use_costs)
    assert regression is not None
    return regression.predict(trial)


def test_a_probability_is_a_student_t_s() -> None:
    """Half at the location; with one degree of freedom (Cauchy) a quarter a scale above it."""
    prediction = FinalValue(ACCURACY, float(ACCURACY.link(80.0)), scale=1.0, dof=1.0)
    assert prediction.probability_above(prediction.location) == pytest.approx(0.5)
    one = FinalValue(ACCURACY, location=-1.0, scale=1.0, dof=1.0)
    assert one.probability_above(float(ACCURACY.link(50.0))) == pytest.approx(0.25)


def test_moments_are_those_of_draws() -> None:
    """In percent, against 200,000 draws of the Student t; the scale is small."""
    prediction = FinalValue(ACCURACY, float(ACCURACY.link(85.0)), scale=0.05, dof=10.0)
    draws = prediction.location + 0.05 * np.random.default_rng(0).standard_t(10.0, 200_000)
    accuracy = 101 / (1 + np.exp(-draws)) - 0.5
    mean, variance = prediction.moments()
    assert mean == pytest.approx(85.0) == pytest.approx(accuracy.mean(), abs=0.05)
    assert variance == pytest.approx(accuracy.var(), rel=0.05)


@pytest.mark.parametrize("use_costs", [True, False])
def test_finished_curves_foretell_how_a_curve_ends(use_costs: bool) -> None:
    """Twelve curves of one kind: the 13th is foreseen halfway, with and without costs."""
    for epoch in (3, 6):
        prediction = predicted(curves.running(73.0, 65.0, epoch), FINISHED, use_costs)
        error = abs(prediction.location - float(ACCURACY.link(73.0)))
        assert error < 2 * prediction.scale
        assert error < 0.05


def test_few_finished_curves_give_wide_predictions() -> None:
    """The scale shrinks as more are finished, to the noise that no curve foretells."""
    rng = np.random.default_rng(0)
    finished = [curves.finished(60.0 + 2 * (i % 12), cost=10.0 + i) for i in range(60)]
    noisy = [replace(o, value=(o.value or 0) + rng.normal(0, 1)) for o in finished]
    trial = curves.running(73.0, 65.0, 4)
    scales = [predicted(trial, noisy[:n]).scale for n in (4, 12, 60)]
    assert scales == sorted(scales, reverse=True)
    assert 0.03 < scales[-1] < 0.08  # a point is 0.05 at 73%


def test_a_curve_says_less_the_fewer_epochs_and_the_farther_off() -> None:
    """The variance grows with both."""
    rng = np.random.default_rng(0)
    finished = [
        Observation((8,), a, (), (a - 10 + rng.normal(0, 3), a - 2 + rng.normal(0, 0.5), a))
        for a in rng.uniform(70, 90, 40).tolist()
    ]
    early, late, far = (
        predicted(Observation((8,), curve=curve), finished, use_costs=False)
        for curve in ((70.0,), (70.0, 78.0), (20.0, 28.0))
    )
    assert late.scale < early.scale
    assert late.scale < far.scale
    assert late.moments()[0] == pytest.approx(80, abs=0.5)


@pytest.mark.parametrize(
    "metric",
    [
        Metric("rmse", "minimize"),
        Metric("iou", "maximize", (0, 1)),
        Metric("reward", "maximize"),
    ],
)
def test_curves_of_any_metric_foretell_their_end(metric: Metric) -> None:
    """Curves that halve their distance in scores; the last one is foreseen from its third epoch."""
    rng = np.random.default_rng(0)
    finished = []
    for end in rng.uniform(0.3, 0.9, 13):
        final = float(metric.link(end))
        scores = final - 2.0 ** -np.arange(6) + rng.normal(0, 0.01, 6)
        values = [float(v) for v in (metric.value(scores))]
        finished.append(Observation((8,), values[-1], (), tuple(values)))
    last = finished.pop()
    regression = CurveRegression.fit(finished, 3, metric, use_costs=False)
    assert regression is not None
    mean, variance = regression.predict(replace(last, value=None, curve=last.curve[:3])).moments()
    assert abs(mean - float(metric.score(last.value))) < 3 * np.sqrt(variance) < 0.3


def test_too_few_curves_make_no_regression() -> None:
    """Fewer than three that are finished and as long, or no epoch."""
    short = [Observation((8,), 60.0, (), (50.0, 60.0))] * 5
    running = [Observation((8,), curve=(50.0, 60.0))] * 5
    assert CurveRegression.fit(short[:2] + running, 1, use_costs=False) is None
    assert CurveRegression.fit(short, 3, use_costs=False) is None
    assert CurveRegression.fit(short, 0, use_costs=False) is None
    assert CurveRegression.fit(short, 2, use_costs=False) is not None
