"""The posterior of accuracies, and the front that it implies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from widthsearch.latency.config import Latency
from widthsearch.study.posterior import MetricPosterior, _best_at_costs
from widthsearch.study.storage import SpaceRecord
from widthsearch.study.trial import Trial, TrialState

RECORDS = {"tiny": SpaceRecord.of(tiny.space())}
OBJECTIVES = ("accuracy", "macs")


def trial(number: int, first: int, second: int, accuracy: float, **changes: object) -> Trial:
    """A finished training of a tiny network, at its exact cost."""
    widths = tiny.widths(first, second)
    changes = {"cost": tiny.space().cost(widths), **changes}
    return tiny.finished(number, widths, accuracy, **changes)


def noisy(count: int, noise: float, seed: int = 0) -> list[Trial]:
    """Trainings whose true accuracy grows with the logs of both widths."""
    rng = np.random.default_rng(seed)
    grid = [(a, b) for a in range(2, 17, 2) for b in range(2, 17, 2)]
    chosen = rng.permutation(len(grid))[:count]
    made = []
    for number, i in enumerate(chosen):
        first, second = grid[i]
        accuracy = truth(first, second) + noise * rng.standard_normal()
        made.append(trial(number, first, second, float(accuracy)))
    return made


def accuracies(trials: list[Trial]) -> list[float]:
    """The accuracy that each training came to."""
    return [trial.value for trial in trials if trial.value is not None]


def truth(first: int, second: int) -> float:
    """The expected accuracy of a tiny network, as if."""
    return 60 + 4 * float(np.log2(first)) + 2 * float(np.log2(second))


def test_a_record_survives_json() -> None:
    """It has the costs of the space."""
    again = SpaceRecord.from_json(RECORDS["tiny"].to_json())
    assert [axis.name for axis in again.axes] == list(tiny.space().names)
    assert int(again.macs([4, 6])) == tiny.space().cost([4, 6]).macs
    assert int(again.params([4, 6])) == tiny.space().cost([4, 6]).params


def test_with_few_trainings_means_are_the_estimates() -> None:
    """No interval and no probability; repeated trainings are averaged and are one member."""
    seen = [trial(0, 4, 4, 80.0), trial(1, 8, 8, 90.0), trial(2, 4, 4, 84.0)]
    posterior = MetricPosterior(seen, RECORDS, OBJECTIVES)
    estimate = posterior[seen[2]]
    assert (estimate.value, estimate.sd, estimate.trainings) == (82.0, None, 2)
    assert estimate.dominated is None
    assert [member.number for member in posterior.front()] == [0, 1]
    assert posterior.undecided == []
    assert posterior.surrogate is None


def test_a_lucky_training_is_shrunk() -> None:
    """The estimate of one far too lucky network is drawn towards its neighbours."""
    seen = noisy(30, 0.5)
    lucky = replace(seen[5], curve=tiny.curve(accuracies(seen)[5] + 4.0))
    posterior = MetricPosterior([*seen[:5], lucky, *seen[6:]], RECORDS, OBJECTIVES)
    true = truth(*lucky.widths.vector)
    assert abs(posterior[lucky].value - true) < 0.5 * abs(accuracies([lucky])[0] - true)
    assert posterior[lucky].sd is not None


def test_estimates_are_nearer_to_the_truth_than_trainings() -> None:
    """In the mean over the members, at noise as large as the differences."""
    seen = noisy(40, 1.0)
    posterior = MetricPosterior(seen, RECORDS, OBJECTIVES)
    off = [posterior[o].value - truth(*o.widths.vector) for o in seen]
    raw = np.array(accuracies(seen)) - [truth(*o.widths.vector) for o in seen]
    assert np.square(off).mean() < 0.5 * np.square(raw).mean()
    assert posterior.surrogate is not None
    assert 0.75 <= posterior.surrogate.coverage(0.9) <= 1.0
    assert posterior.surrogate.size == 40


def test_the_front_follows_the_estimates() -> None:
    """Probabilities agree with it: they are lower on the front, and 0 for the narrowest."""
    seen = noisy(40, 1.0)
    posterior = MetricPosterior(seen, RECORDS, OBJECTIVES)
    front = posterior.front()
    values = [(o.cost.macs, posterior.value(o)) for o in front]
    assert values == sorted(values)
    assert [a for _, a in values] == sorted(a for _, a in values)
    assert front[0].cost.macs == min(o.cost.macs for o in seen)
    assert posterior[front[0]].dominated == 0.0
    poor = [o for o in seen if o not in front]
    mean = np.mean([posterior[o].dominated or 0.0 for o in poor])
    assert mean > np.mean([posterior[o].dominated or 0.0 for o in front])
    assert all(0.05 <= (posterior[o].dominated or 0.0) <= 0.95 for o in posterior.undecided)


def test_stopped_trials_count_by_their_curves() -> None:
    """The surrogate learns from a stopped training, which is no member."""
    seen = noisy(20, 0.3)
    seen = [
        replace(o, curve=tiny.curve(final - 5, final))
        for o, final in zip(seen, accuracies(seen), strict=True)
    ]
    stopped = replace(seen[-1], number=99, state=TrialState.STOPPED, curve=seen[-1].curve[:1])
    posterior = MetricPosterior([*seen[:-1], stopped], RECORDS, OBJECTIVES)
    assert posterior.surrogate is not None and posterior.surrogate.size == 20
    assert stopped not in posterior.members


def test_estimates_are_at_most_100_percent() -> None:
    """A trend that goes on beyond 100% ends there."""
    seen = [
        replace(o, curve=tiny.curve(min(100.0, 60 + o.widths.vector[0] * 2.8)))
        for o in noisy(20, 0.3)
    ]
    posterior = MetricPosterior(seen, RECORDS, OBJECTIVES)
    assert max(posterior.value(o) for o in posterior.members) <= 100.0


def test_a_trial_without_an_objective_is_no_member() -> None:
    """Its latency is not measured."""
    latency: Latency = tiny.latency(1.0)
    seen = [trial(0, 4, 4, 80.0, latency=latency), trial(1, 8, 8, 90.0)]
    posterior = MetricPosterior(seen, RECORDS, ("accuracy", "latency_ms"))
    assert [member.number for member in posterior.front()] == [0]
    assert posterior.value(seen[1]) == pytest.approx(90.0)


@given(
    st.integers(1, 3).flatmap(
        lambda d: st.lists(
            st.tuples(st.lists(st.integers(0, 3), min_size=d, max_size=d), st.booleans()),
            min_size=1,
            max_size=12,
        )
    )
)
def test_the_best_draw_at_the_costs_of_a_network(networks: list[tuple[list[int], bool]]) -> None:
    """Against a search through all networks; costs may be equal, and some are out of the limits."""
    costs = np.array([cost for cost, _ in networks], float)
    draws = np.random.default_rng(0).standard_normal((len(networks), 5))
    draws[[not within for _, within in networks]] = -np.inf
    rivals = (costs[:, None] >= costs).all(axis=2)
    expected = [draws[rivals[i]].max(axis=0) for i in range(len(networks))]
    np.testing.assert_array_equal(_best_at_costs(costs, draws), expected)
