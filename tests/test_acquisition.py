"""Expected gains, against the exact hypervolume and against sampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.acquisition import Array, HypervolumeImprovement, exceedance

coordinate = st.floats(0, 1, width=16)


def gained(gain: HypervolumeImprovement, accuracy: float, costs: list[float]) -> float:
    """By how much the hypervolume grows, by the definition."""
    high = gain.window[1]
    before = np.column_stack([-gain.scores, np.maximum(gain.costs, gain.window[0])])
    after = np.vstack([before, [-accuracy, *np.maximum(costs, gain.window[0])]])
    reference = [-gain.floor, *high]
    return pareto.hypervolume(after, reference) - pareto.hypervolume(before, reference)


def sure(gain: HypervolumeImprovement, accuracy: float, costs: list[float]) -> float:
    """The expected gain by a network of which nothing is uncertain."""
    at = np.array([costs])
    return float(gain(np.array([accuracy]), np.array([1e-9]), at, np.zeros_like(at))[0])


@pytest.mark.parametrize("level", [-1.0, 0.3, 2.0])
def test_exceedance_is_its_integral(level: float) -> None:
    """E[max(X − level, 0)] by quadrature."""
    mean, sd = 0.4, 0.7
    expected, _ = quad(lambda x: (x - level) * norm.pdf(x, mean, sd), level, mean + 12 * sd)
    got = exceedance(np.array(mean), np.array(sd), np.array(level))
    assert got == pytest.approx(expected, rel=1e-7)


@given(st.lists(st.tuples(coordinate, coordinate), max_size=8), coordinate, coordinate, coordinate)
def test_without_uncertainty_the_gain_over_one_cost_is_exact(
    front: list[tuple[float, float]], accuracy: float, cost: float, low: float
) -> None:
    """The difference of two hypervolumes, for any front and any candidate, in any window."""
    points = np.array(front).reshape(-1, 2)
    gain = HypervolumeImprovement(points[:, 0], points[:, 1:], np.array([[low], [1.0]]), floor=0.2)
    assert sure(gain, accuracy, [cost]) == pytest.approx(gained(gain, accuracy, [cost]), abs=1e-7)


def test_without_costs_the_gain_is_expected_improvement() -> None:
    """Accuracy alone: over the best so far, or the floor."""
    gain = HypervolumeImprovement(
        np.array([0.5, 0.7]), np.empty((2, 0)), np.empty((2, 0)), floor=0.0
    )
    mean, sd = np.array([0.6]), np.array([0.2])
    got = gain(mean, sd, np.empty((1, 0)), np.empty((1, 0)))
    assert got == pytest.approx(exceedance(mean, sd, np.array(0.7)))


def some_front(rng: np.random.Generator) -> HypervolumeImprovement:
    """Twelve networks over two costs."""
    window = np.array([[0.0, 0.0], [1.0, 2.0]])
    return HypervolumeImprovement(rng.random(12), rng.random((12, 2)) * [1, 2], window, floor=0.1)


def test_the_gain_over_two_costs_is_the_hypervolume_s() -> None:
    """Within the error of the quasi-Monte Carlo sum, of a window of volume 2."""
    rng = np.random.default_rng(0)
    gain = some_front(rng)
    for _ in range(20):
        accuracy, costs = float(rng.random()), list(rng.random(2) * [1, 2])
        assert sure(gain, accuracy, costs) == pytest.approx(gained(gain, accuracy, costs), abs=0.02)


def test_what_is_uncertain_is_averaged_over() -> None:
    """Accuracy and one of the costs normal: the mean of exact gains over draws of both."""
    rng = np.random.default_rng(1)
    gain = some_front(rng)
    mean, sd, costs, costs_sd = 0.8, 0.2, np.array([0.3, 0.6]), np.array([0.0, 0.2])
    got = gain(np.array([mean]), np.array([sd]), costs[None], costs_sd[None])
    draws = [gained(gain, a, c) for a, c in drawn(rng, mean, sd, costs, costs_sd)]
    assert got[0] == pytest.approx(
        np.mean(draws), abs=4 * np.std(draws) / np.sqrt(len(draws)) + 0.01
    )


def drawn(
    rng: np.random.Generator, mean: float, sd: float, costs: Array, costs_sd: Array
) -> list[tuple[float, list[float]]]:
    """Draws of accuracy and costs."""
    return [(float(rng.normal(mean, sd)), list(rng.normal(costs, costs_sd))) for _ in range(1500)]


def test_what_lies_outside_the_window_is_no_gain() -> None:
    """Too dear is worth nothing; cheaper than the window is as good as its edge."""
    gain = HypervolumeImprovement(
        np.array([0.5]), np.array([[0.5]]), np.array([[0.2], [0.8]]), floor=0.0
    )
    assert sure(gain, 0.9, [0.85]) == 0
    assert sure(gain, 0.9, [0.05]) == pytest.approx(sure(gain, 0.9, [0.2]))
