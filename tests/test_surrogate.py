"""The surrogate: closed forms against refits, calibration, repeats, curves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from widthsearch.bayesopt.candidates import Grid
from widthsearch.bayesopt.surrogate import (
    Array,
    Coordinates,
    Features,
    Surrogate,
    Training,
    extrapolated,
    factor,
)
from widthsearch.proposers.families import LinearFamily
from widthsearch.widths import Axis

AXES = [Axis(str(i), 32, 8, 64, 8) for i in range(5)]
COORDINATES = Coordinates(AXES, {"macs": lambda w: (w[:, 1:] * w[:, :-1]).sum(axis=1)})
GRID = Grid(AXES)
FAMILY = LinearFamily(tiny.space(), tiny.widths(4, 8))


def truth(widths: NDArray[np.int64]) -> Array:
    """Percent: four axes that saturate, one that does not matter, and an interaction."""
    u = COORDINATES.units(widths)
    return 70 + 8 * (1 - np.exp(-2 * u[:, :4])).sum(axis=1) + 2 * u[:, 0] * u[:, 1]


def trained(
    count: int, noise: float = 0.5, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Random networks and what their training gave."""
    rng = np.random.default_rng(seed)
    widths = GRID.random(rng, count)
    return widths, truth(widths) + rng.normal(0, noise, count)


def fitted(count: int, noise: float = 0.5, seed: int = 0) -> Surrogate:
    """A surrogate of random networks."""
    return Surrogate.fit(COORDINATES, *trained(count, noise, seed))


def test_a_left_out_outcome_is_predicted_as_if_it_had_never_been() -> None:
    """The closed form, against a posterior without the row at the same amplitudes."""
    widths, accuracy = trained(12)
    whole = Surrogate.fit(COORDINATES, widths, accuracy)
    left = whole.loo_posterior()
    for i in (0, 5, 11):
        others = np.delete(np.arange(12), i)
        seen = Features.of(COORDINATES, widths[others])
        lower = factor(whole.amplitudes, seen, np.zeros(11))
        without = replace(whole, _seen=seen, _y=whole._y[others], _lower=lower)
        estimate = without.posterior(widths[i : i + 1])
        assert left.mean[i] == pytest.approx(estimate.mean[0], rel=1e-6)
        assert left.sd[i] == pytest.approx(np.hypot(estimate.sd[0], whole.noise), rel=1e-6)


@pytest.mark.parametrize("count", [50, 100])
def test_its_intervals_are_calibrated(count: int) -> None:
    """Of outcomes left out, and of networks that were never trained."""
    coverage, unseen = [], []
    for seed in range(4):
        surrogate = fitted(count, seed=seed)
        coverage.append(surrogate.coverage(0.9))
        fresh = GRID.random(np.random.default_rng(99 + seed), 300)
        estimate = surrogate.posterior(fresh)
        unseen.append((np.abs(truth(fresh) - estimate.mean) < 1.645 * estimate.sd).mean())
    assert 0.8 < np.mean(coverage) < 0.97
    assert 0.8 < np.mean(unseen) <= 1.0


def test_more_outcomes_make_it_right_and_the_noise_is_learned() -> None:
    """The error falls below the noise of one training, a tenth of what the widths decide."""
    fresh = GRID.random(np.random.default_rng(7), 300)
    errors = [np.std(fitted(n).posterior(fresh).mean - truth(fresh)) for n in (10, 40, 160)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5
    assert fitted(160).noise == pytest.approx(0.5, rel=0.25)


def test_repeats_are_evidence_of_noise_and_of_the_mean() -> None:
    """Ten trainings of the same widths tell more of them than one."""
    widths, accuracy = trained(20)
    again = np.concatenate([widths, np.repeat(widths[:1], 9, axis=0)])
    more = np.concatenate([accuracy, truth(widths[:1]) + np.tile([-0.5, 0.5, 0.0], 3)])
    once = Surrogate.fit(COORDINATES, widths, accuracy).posterior(widths[:1])
    often = Surrogate.fit(COORDINATES, again, more).posterior(widths[:1])
    assert often.sd[0] < 0.7 * once.sd[0]
    assert often.mean[0] == pytest.approx(truth(widths[:1])[0], abs=0.4)


def test_a_doubtful_outcome_counts_for_less() -> None:
    """One that is far off: with a variance of its own, the others are believed."""
    widths, accuracy = trained(30)
    accuracy[0] -= 15
    variance = np.zeros(30)
    variance[0] = 15.0**2
    plain = Surrogate.fit(COORDINATES, widths, accuracy).posterior(widths)
    doubted = Surrogate.fit(COORDINATES, widths, accuracy, variance).posterior(widths)
    assert np.std(doubted.mean - truth(widths)) < np.std(plain.mean - truth(widths))


def test_the_unit_of_accuracy_does_not_matter() -> None:
    """Shares of one instead of percent."""
    widths, accuracy = trained(25)
    percent = Surrogate.fit(COORDINATES, widths, accuracy)
    share = Surrogate.fit(COORDINATES, widths, accuracy / 100)
    for of_share, of_percent in [
        (share.posterior(widths).mean, percent.posterior(widths).mean),
        (share.posterior(widths).sd, percent.posterior(widths).sd),
    ]:
        assert 100 * of_share == pytest.approx(of_percent, rel=1e-5)


def test_what_is_expected_to_come_narrows_but_does_not_move_beliefs() -> None:
    """Means stay everywhere, and no belief widens; those of the expected narrow most."""
    surrogate = fitted(15)
    fresh = GRID.random(np.random.default_rng(3), 50)
    later = surrogate.condition_on(fresh[:2])
    before, after = surrogate.posterior(fresh), later.posterior(fresh)
    assert after.mean == pytest.approx(before.mean, abs=1e-6)
    assert (after.sd <= before.sd + 1e-9).all()
    assert (after.sd[:2] < before.sd[:2]).all()


def test_one_outcome_is_enough_and_so_are_equal_ones() -> None:
    """Beliefs stay finite: the level that was seen, and much doubt elsewhere."""
    for accuracy in ([93.0], [93.0, 93.0, 93.0]):
        widths = GRID.random(np.random.default_rng(0), len(accuracy))
        estimate = Surrogate.fit(COORDINATES, widths, accuracy).posterior(GRID.whole()[::4096])
        assert np.isfinite(estimate.mean).all()
        assert (estimate.sd > 0).all()


def test_a_family_is_predicted_at_all_its_budgets() -> None:
    """From the narrowest member to the widest, wider than the base."""
    space = tiny.space()
    surrogate = Surrogate.fit(
        Coordinates(space.axes, {"macs": space.macs, "params": space.params}),
        [[2, 2], [8, 8], [16, 16], [4, 12]],
        [50.0, 70.0, 80.0, 69.0],
    )
    curve = surrogate.along(FAMILY)
    assert len(curve.mean) == len(FAMILY.members)
    assert curve.mean[0] < curve.mean[-1]


def test_constant_gaps_are_foretold_exactly() -> None:
    """Each training gained 5 points after its second epoch."""
    finished = [(a - 9.0, a - 5.0, a) for a in (60.0, 70.0, 75.0, 90.0)]
    foretold = extrapolated((40.0, 50.0), finished)
    assert foretold is not None
    assert foretold == pytest.approx((55.0, 0.0), abs=1e-9)


def test_a_curve_says_less_the_fewer_epochs_and_the_farther_off() -> None:
    """The variance grows with both."""
    rng = np.random.default_rng(0)
    finals = rng.uniform(70, 90, 40)
    finished = [(f - 10 + rng.normal(0, 3), f - 2 + rng.normal(0, 0.5), f) for f in finals]
    early, late = extrapolated((70.0,), finished), extrapolated((70.0, 78.0), finished)
    far = extrapolated((20.0, 28.0), finished)
    assert early is not None
    assert late is not None
    assert far is not None
    assert late[1] < early[1]
    assert late[1] < far[1]
    assert late[0] == pytest.approx(80, abs=0.5)


def test_little_is_learned_from_few_trainings() -> None:
    """Fewer than three, none as long, or no curve at all: no guess."""
    assert extrapolated((50.0,), [(50.0, 60.0)] * 2) is None
    assert extrapolated((50.0, 51.0, 52.0), [(50.0, 60.0)] * 5) is None
    assert extrapolated((), [(50.0, 60.0)] * 5) is None


DEEP = Coordinates(
    [Axis(str(i), 48, 8, 96, 8) for i in range(7)],
    {"macs": lambda w: (w[:, 1:] * w[:, :-1]).sum(axis=1)},
)


def by_capacity(coordinates: Coordinates, widths: NDArray[np.int64], level: float) -> Array:
    """Percent: a trend in MACs that spaces share, a level of its own, a tilt of the first axis."""
    return (
        level
        + 4 * coordinates.log_cost("macs", widths)
        + 3 * coordinates.units(widths)[:, 0]
        - coordinates.units(widths).var(axis=1)
    )


def trainings(
    coordinates: Coordinates, level: float, count: int, noise: float = 0.3
) -> list[Training]:
    """Random networks of a space."""
    rng = np.random.default_rng(count)
    widths = Grid(coordinates.axes).random(rng, count)
    accuracy = by_capacity(coordinates, widths, level) + rng.normal(0, noise, count)
    return [Training(tuple(w), a) for w, a in zip(widths.tolist(), accuracy.tolist(), strict=True)]


def test_a_space_learns_from_another_one() -> None:
    """Four networks of a deeper space: beside 30 of the other, half the error and a third."""
    flat, deep = Coordinates.together([COORDINATES, DEEP])
    few = trainings(DEEP, 52.0, 4)
    fresh = Grid(DEEP.axes).random(np.random.default_rng(9), 300)
    true = by_capacity(DEEP, fresh, 52.0)
    alone = Surrogate.of_trainings((DEEP, few)).posterior(fresh)
    shared = Surrogate.of_trainings((flat, trainings(COORDINATES, 50.0, 30)), (deep, few))
    estimate = shared.of_space(deep).posterior(fresh)
    assert np.abs(estimate.mean - true).mean() < 0.5 * np.abs(alone.mean - true).mean()
    assert (np.abs(estimate.mean - true) < 1.645 * estimate.sd).mean() > 0.8
    assert shared.size == 34


def test_spaces_keep_what_is_their_own() -> None:
    """With many networks of each, a level of one is no level of the other, whoever comes first."""
    placed = Coordinates.together([COORDINATES, DEEP])
    seen = [trainings(COORDINATES, 50.0, 40), trainings(DEEP, 58.0, 40)]
    pairs = list(zip(placed, seen, strict=True))
    for surrogate in (Surrogate.of_trainings(*pairs), Surrogate.of_trainings(*reversed(pairs))):
        for own, level in zip(placed, (50.0, 58.0), strict=True):
            fresh = Grid(own.axes).random(np.random.default_rng(9), 200)
            estimate = surrogate.of_space(own).posterior(fresh)
            assert np.abs(estimate.mean - by_capacity(own, fresh, level)).mean() < 0.5


def test_a_single_space_is_together_with_nobody() -> None:
    """The same coordinates, and no part of the covariance more."""
    (alone,) = Coordinates.together([COORDINATES])
    assert alone is COORDINATES
    widths, accuracy = trained(12)
    parts = Features.of(alone, widths).covariances(Features.of(alone, widths))
    assert len(Surrogate.fit(alone, widths, accuracy).amplitudes) == len(parts) + 1 == 6


def test_joint_beliefs_over_spaces_agree_with_each_alone() -> None:
    """Means and variances are those of predictions; networks of two spaces are correlated."""
    flat, deep = Coordinates.together([COORDINATES, DEEP])
    shared = Surrogate.of_trainings(
        (flat, trainings(COORDINATES, 50.0, 12)), (deep, trainings(DEEP, 52.0, 3))
    )
    widths = [Grid(own.axes).random(np.random.default_rng(1), 5) for own in (flat, deep)]
    every = Features.of(flat, widths[0]).and_(Features.of(deep, widths[1]))
    mean, covariance = shared.joint(every)
    each = [shared.of_space(own).posterior(w) for own, w in zip((flat, deep), widths, strict=True)]
    assert mean == pytest.approx(np.concatenate([estimate.mean for estimate in each]))
    sd = np.concatenate([estimate.sd for estimate in each])
    assert np.sqrt(np.diag(covariance)) == pytest.approx(sd, rel=1e-4)
    assert np.abs(covariance[:5, 5:]).max() > 0.01 * sd.min() ** 2
