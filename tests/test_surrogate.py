"""The surrogate: closed forms against refits, calibration, repeats, curves, several spaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits

from widthsearch.bayesopt import surrogate as surrogates
from widthsearch.bayesopt.candidates import Grid
from widthsearch.bayesopt.hyperparameters import factor
from widthsearch.bayesopt.kernel import Array, Coordinates, Features, weighted_sum
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.proposers.families import LinearFamily
from widthsearch.widths import Axis

AXES = [Axis(str(i), 32, 8, 64, 8) for i in range(5)]
COORDINATES = Coordinates(AXES, {"macs": lambda w: (w[:, 1:] * w[:, :-1]).sum(axis=1)})
GRID = Grid(AXES)
FAMILY = LinearFamily(tiny.space(), tiny.widths(4, 8))


def truth(widths: NDArray[np.int64]) -> Array:
    """Percent: four axes that saturate, one that does not matter, and an interaction."""
    u = COORDINATES.unit_widths(widths)
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


def test_a_left_out_training_is_predicted_as_if_it_had_never_been() -> None:
    """The closed form, against a posterior without the row at the same hyperparameters."""
    widths, accuracy = trained(12)
    whole = Surrogate.fit(COORDINATES, widths, accuracy)
    left = whole.loo_posterior()
    for i in (0, 5, 11):
        others = np.delete(np.arange(12), i)
        seen = Features.of(COORDINATES, widths[others])
        same = whole.fitted
        seen = seen.weighted(same.relevances)
        covariance = weighted_sum(same.amplitudes, seen.covariances(seen))
        lower = factor(covariance, np.full(11, same.noises[0] ** 2))
        own = np.zeros(11, np.intp)
        without = replace(whole, _seen=seen, _study=own, _y=whole._y[others], _lower=lower)
        estimate = without.posterior(widths[i : i + 1], widen=False)
        assert left.mean[i] == pytest.approx(estimate.mean[0], rel=1e-6)
        assert left.sd[i] == pytest.approx(np.hypot(estimate.sd[0], whole.noise), rel=1e-6)


def test_means_alone_are_those_of_the_posterior() -> None:
    """To the last bit, of networks seen and unseen."""
    surrogate = fitted(30)
    widths = np.concatenate([trained(30)[0], trained(20, seed=1)[0]])
    np.testing.assert_array_equal(surrogate.mean(widths), surrogate.posterior(widths).mean)


@pytest.mark.parametrize("count", [50, 100])
def test_its_intervals_are_calibrated(count: int) -> None:
    """Of trainings left out, and of networks that were never trained."""
    coverage, unseen = [], []
    for seed in range(4):
        surrogate = fitted(count, seed=seed)
        coverage.append(surrogate.coverage(0.9))
        fresh = GRID.random(np.random.default_rng(99 + seed), 300)
        estimate = surrogate.posterior(fresh)
        unseen.append((np.abs(truth(fresh) - estimate.mean) < 1.645 * estimate.sd).mean())
    assert 0.8 < np.mean(coverage) < 0.97
    assert 0.8 < np.mean(unseen) <= 1.0


def test_intervals_hold_where_a_search_does_not_train() -> None:
    """Sixty of the best networks and eight random ones, of a score with steps: d is too small."""

    def stepped(widths: NDArray[np.int64]) -> Array:
        u = COORDINATES.unit_widths(widths)
        bottleneck = np.minimum(u[:, 1], u[:, 3]) < 0.3
        return truth(widths) + 3 * (u[:, 0] > 0.6) * (u[:, 2] < 0.7) - 3 * bottleneck

    fresh = GRID.random(np.random.default_rng(99), 500)
    narrow, wide = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        pool = GRID.random(rng, 3000)
        size, scores = COORDINATES.unit_widths(pool).mean(axis=1), stepped(pool)
        over = scores - np.polyval(np.polyfit(size, scores, 2), size) + rng.normal(0, 2, 3000)
        widths = np.concatenate([pool[np.argsort(-over)[:60]], GRID.random(rng, 8)])
        surrogate = Surrogate.fit(COORDINATES, widths, stepped(widths) + rng.normal(0, 0.4, 68))
        for covered, widen in ((narrow, False), (wide, True)):
            estimate = surrogate.posterior(fresh, widen=widen)
            covered.append((np.abs(stepped(fresh) - estimate.mean) < 1.645 * estimate.sd).mean())
    assert np.mean(narrow) < 0.75
    assert 0.85 < np.mean(wide) < 0.95


def widening(surrogate: Surrogate, at: NDArray[np.int64]) -> Array:
    """By how much the intervals of networks are widened, (M,)."""
    return surrogate.posterior(at).sd / surrogate.posterior(at, widen=False).sd


def test_intervals_are_wider_where_the_surrogate_errs() -> None:
    """Bad networks whose scores scatter, good ones that do not."""
    rng = np.random.default_rng(0)
    widths, fresh = GRID.random(rng, 80), GRID.random(rng, 400)
    size = COORDINATES.unit_widths(widths).mean(axis=1)
    scores = 20 * size + rng.normal(0, 1, 80) * np.where(size < 0.5, 3, 0.2)
    surrogate = Surrogate.fit(COORDINATES, widths, scores)
    bad, good = np.array_split(fresh[np.argsort(surrogate.mean(fresh))], 2)
    assert widening(surrogate, bad).mean() > 1.5 * widening(surrogate, good).mean()


def test_trained_networks_are_widened_the_least() -> None:
    """What the other trainings tell of them matters little."""
    surrogate, far = fitted(60), GRID.random(np.random.default_rng(9), 400)
    assert widening(surrogate, far).mean() > 1.5 * widening(surrogate, trained(60)[0]).mean()


def test_more_trainings_reduce_the_error_and_the_noise_is_learned() -> None:
    """The error falls below the noise of one training, a tenth of what the widths decide."""
    fresh = GRID.random(np.random.default_rng(7), 300)
    errors = [np.std(fitted(n).posterior(fresh).mean - truth(fresh)) for n in (10, 40, 160)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5
    assert fitted(160).noise == pytest.approx(0.5, rel=0.25)


def test_repeats_are_evidence_of_noise_and_of_the_mean() -> None:
    """Ten trainings of the same widths narrow their posterior more than one."""
    widths, accuracy = trained(20)
    again = np.concatenate([widths, np.repeat(widths[:1], 9, axis=0)])
    more = np.concatenate([accuracy, truth(widths[:1]) + np.tile([-0.5, 0.5, 0.0], 3)])
    once = Surrogate.fit(COORDINATES, widths, accuracy).posterior(widths[:1])
    often = Surrogate.fit(COORDINATES, again, more).posterior(widths[:1])
    assert often.sd[0] < 0.7 * once.sd[0]
    assert often.mean[0] == pytest.approx(truth(widths[:1])[0], abs=0.4)


def test_an_uncertain_training_counts_for_less() -> None:
    """One that is far off: with a variance of its own, the posterior follows the others."""
    widths, accuracy = trained(30)
    accuracy[0] -= 15
    variance = np.zeros(30)
    variance[0] = 15.0**2
    plain = Surrogate.fit(COORDINATES, widths, accuracy).posterior(widths)
    uncertain = Surrogate.fit(COORDINATES, widths, accuracy, variance).posterior(widths)
    assert np.std(uncertain.mean - truth(widths)) < np.std(plain.mean - truth(widths))


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


def test_conditioning_on_networks_narrows_but_does_not_move_the_posterior() -> None:
    """Means stay everywhere, no interval widens, and those of the networks shrink."""
    surrogate = fitted(15)
    fresh = GRID.random(np.random.default_rng(3), 50)
    later = surrogate.condition_on(fresh[:2])
    before, after = surrogate.posterior(fresh), later.posterior(fresh)
    assert after.mean == pytest.approx(before.mean, abs=1e-6)
    assert (after.sd <= before.sd + 1e-9).all()
    assert (after.sd[:2] < before.sd[:2]).all()


def test_one_training_is_enough_and_so_are_equal_ones() -> None:
    """The posterior stays finite, at the level that was seen."""
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
    posterior = surrogate.posterior(FAMILY.members)
    assert len(posterior.mean) == len(FAMILY.members)
    assert posterior.mean[0] < posterior.mean[-1]


def test_curves_of_stopped_trials_inform_the_surrogate() -> None:
    """Of networks with a wide third axis only beginnings are known, and they are bad."""
    rng = np.random.default_rng(0)
    widths, accuracy = trained(25, noise=0.1)
    done = [
        Observation(tuple(w), a, curve=(a - 10 + rng.normal(0, 0.5), a))
        for w, a in zip(widths.tolist(), accuracy.tolist(), strict=True)
    ]
    stopped = [Observation((32, 32, 64, 8 * i, 32), curve=(40.0,)) for i in range(1, 9)]
    at = [[32, 32, 64, 32, 32]]
    without = Surrogate.fit_observations((COORDINATES, done)).posterior(at)
    informed = Surrogate.fit_observations((COORDINATES, [*done, *stopped]))
    assert informed.posterior(at).mean[0] < without.mean[0] - 5
    assert informed.size == 33
    with pytest.raises(ValueError, match="must have a finished trial"):
        Surrogate.fit_observations((COORDINATES, stopped))


DEEP = Coordinates(
    [Axis(str(i), 48, 8, 96, 8) for i in range(7)],
    {"macs": lambda w: (w[:, 1:] * w[:, :-1]).sum(axis=1)},
)


def by_capacity(coordinates: Coordinates, widths: NDArray[np.int64], level: float) -> Array:
    """Percent: a trend in MACs that spaces share, a level of its own, a tilt of the first axis."""
    return (
        level
        + 4 * coordinates.log_cost("macs", widths)
        + 3 * coordinates.unit_widths(widths)[:, 0]
        - coordinates.unit_widths(widths).var(axis=1)
    )


def trainings(
    coordinates: Coordinates, level: float, count: int, noise: float = 0.3
) -> list[Observation]:
    """Random networks of a space."""
    rng = np.random.default_rng(count)
    widths = Grid(coordinates.axes).random(rng, count)
    accuracy = by_capacity(coordinates, widths, level) + rng.normal(0, noise, count)
    return [
        Observation(tuple(w), a) for w, a in zip(widths.tolist(), accuracy.tolist(), strict=True)
    ]


def test_a_space_learns_from_another_one() -> None:
    """Four networks of a deeper space: beside 30 of the other, half the error and a third."""
    flat, deep = Coordinates.together([COORDINATES, DEEP])
    few = trainings(DEEP, 52.0, 4)
    fresh = Grid(DEEP.axes).random(np.random.default_rng(9), 300)
    true = by_capacity(DEEP, fresh, 52.0)
    alone = Surrogate.fit_observations((DEEP, few)).posterior(fresh)
    shared = Surrogate.fit_observations((flat, trainings(COORDINATES, 50.0, 30)), (deep, few))
    estimate = shared.of_space(deep).posterior(fresh)
    assert np.abs(estimate.mean - true).mean() < 0.5 * np.abs(alone.mean - true).mean()
    assert (np.abs(estimate.mean - true) < 1.645 * estimate.sd).mean() > 0.8
    assert shared.size == 34


def test_spaces_keep_what_is_their_own() -> None:
    """With many networks of each, both levels are learned, whichever space comes first."""
    placed = Coordinates.together([COORDINATES, DEEP])
    seen = [trainings(COORDINATES, 50.0, 40), trainings(DEEP, 58.0, 40)]
    pairs = list(zip(placed, seen, strict=True))
    for surrogate in (
        Surrogate.fit_observations(*pairs),
        Surrogate.fit_observations(*reversed(pairs)),
    ):
        for own, level in zip(placed, (50.0, 58.0), strict=True):
            fresh = Grid(own.axes).random(np.random.default_rng(9), 200)
            estimate = surrogate.of_space(own).posterior(fresh)
            assert np.abs(estimate.mean - by_capacity(own, fresh, level)).mean() < 0.5


def test_a_single_space_has_no_part_of_its_own() -> None:
    """The same coordinates, and no part of the covariance more."""
    (alone,) = Coordinates.together([COORDINATES])
    assert alone is COORDINATES
    widths, accuracy = trained(12)
    parts = Features.of(alone, widths).covariances(Features.of(alone, widths))
    assert len(Surrogate.fit(alone, widths, accuracy).fitted.amplitudes) == len(parts) == 5


def test_the_gradient_by_relevances_is_that_of_differences() -> None:
    """Of any function of the covariance, over two spaces, in every part that has relevances."""
    flat, deep = Coordinates.together([COORDINATES, DEEP])
    rng = np.random.default_rng(0)
    networks = Features.concatenate(
        [Features.of(own, Grid(own.axes).random(rng, 6)) for own in (flat, deep)]
    )
    amplitudes, by = rng.uniform(0.5, 2, 6), rng.normal(size=(12, 12))
    logs = rng.normal(0, 0.5, networks.linear.shape[1])

    def value(logs: Array) -> float:
        at = networks.weighted(np.exp(logs))
        return float(((by + by.T) * weighted_sum(amplitudes, at.covariances(at))).sum())

    at = networks.weighted(np.exp(logs))
    found = at.relevance_gradient(by + by.T, amplitudes, at.covariances(at))
    steps = 1e-5 * np.eye(len(logs))
    expected = [(value(logs + step) - value(logs - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_few_trainings_tell_which_axes_matter() -> None:
    """Of five axes, one with half of all effects and one without any, from 25 networks."""
    widths = GRID.random(np.random.default_rng(0), 25)
    u = COORDINATES.unit_widths(widths)
    noise = np.random.default_rng(1).normal(0, 0.1, 25)
    scores = 70 + u @ np.array([1.0, 1.0, 6.0, 1.0, 0.0]) + noise
    relevances = Surrogate.fit(COORDINATES, widths, scores).fitted.relevances
    assert relevances.argmax() == 2 and relevances[2] > 2 * relevances[4]


def test_a_joint_posterior_over_spaces_agrees_with_each_alone() -> None:
    """Means and variances are those of each network; networks of two spaces are correlated."""
    flat, deep = Coordinates.together([COORDINATES, DEEP])
    shared = Surrogate.fit_observations(
        (flat, trainings(COORDINATES, 50.0, 12)), (deep, trainings(DEEP, 52.0, 3))
    )
    widths = [Grid(own.axes).random(np.random.default_rng(1), 5) for own in (flat, deep)]
    every = Features.concatenate([Features.of(flat, widths[0]), Features.of(deep, widths[1])])
    mean, covariance = shared.joint_posterior(every)
    each = [shared.of_space(own).posterior(w) for own, w in zip((flat, deep), widths, strict=True)]
    assert mean == pytest.approx(np.concatenate([estimate.mean for estimate in each]))
    sd = np.concatenate([estimate.sd for estimate in each])
    assert np.sqrt(np.diag(covariance)) == pytest.approx(sd, rel=1e-4)
    assert np.abs(covariance[:5, 5:]).max() > 0.01 * sd.min() ** 2


def other_recipe(widths: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """The scores of an earlier study: less accurate, twice the spread, a tilt and noise."""
    tilt = COORDINATES.unit_widths(widths)[:, 3]
    return 2 * truth(widths) - 100 + tilt + rng.normal(0, 1.0, len(widths))


def test_an_earlier_study_halves_the_error() -> None:
    """Ten networks beside 60 of another recipe; the intervals hold; its own size is ten."""
    errors, covered = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        widths, scores = trained(10, seed=seed)
        before = GRID.random(rng, 60)
        earlier = [(before, other_recipe(before, rng))]
        alone = Surrogate.fit(COORDINATES, widths, scores)
        informed = Surrogate.fit(COORDINATES, widths, scores, earlier=earlier)
        fresh = GRID.random(np.random.default_rng(99), 300)
        estimates = [s.posterior(fresh) for s in (alone, informed)]
        errors.append([np.abs(e.mean - truth(fresh)).mean() for e in estimates])
        covered.append((np.abs(estimates[1].mean - truth(fresh)) < 1.645 * estimates[1].sd).mean())
        assert informed.fitted.loadings[1] > 0.8
        assert informed.size == len(informed.loo_posterior().mean) == 10
    without, with_it = np.mean(errors, axis=0)
    assert with_it < 0.5 * without
    assert np.mean(covered) > 0.8


@pytest.mark.parametrize("kind", ["shuffled", "negated"])
def test_a_misleading_study_does_little_harm(kind: str) -> None:
    """Shuffled scores are taken as noise; negated ones are as good as the others."""
    errors = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        widths, scores = trained(16, seed=seed)
        before = GRID.random(rng, 60)
        earlier = other_recipe(before, rng)
        earlier = rng.permutation(earlier) if kind == "shuffled" else -earlier
        alone = Surrogate.fit(COORDINATES, widths, scores)
        misled = Surrogate.fit(COORDINATES, widths, scores, earlier=[(before, earlier)])
        fresh = GRID.random(np.random.default_rng(99), 300)
        errors.append([np.abs(s.mean(fresh) - truth(fresh)).mean() for s in (alone, misled)])
    without, with_it = np.mean(errors, axis=0)
    assert with_it < 1.15 * without


def test_the_unit_of_an_earlier_study_does_not_matter() -> None:
    """Nor does the order of several; without finished trials it is as if there were none."""
    widths, scores = trained(12)
    rng = np.random.default_rng(0)
    first, second = GRID.random(rng, 20), GRID.random(rng, 30)
    earlier = [(first, other_recipe(first, rng)), (second, truth(second))]
    fresh = GRID.random(rng, 50)
    mean = Surrogate.fit(COORDINATES, widths, scores, earlier=earlier).mean(fresh)
    scaled = [(second, truth(second)), (first, 7 * earlier[0][1] + 3)]
    again = Surrogate.fit(COORDINATES, widths, scores, earlier=scaled).mean(fresh)
    np.testing.assert_allclose(again, mean, atol=0.02)
    own = [Observation(tuple(w), a) for w, a in zip(widths.tolist(), scores.tolist(), strict=True)]
    unfinished = [[(COORDINATES, [Observation(tuple(widths[0].tolist()), running=True)])]]
    alone = Surrogate.fit_observations((COORDINATES, own))
    same = Surrogate.fit_observations((COORDINATES, own), earlier=unfinished)
    np.testing.assert_array_equal(same.mean(fresh), alone.mean(fresh))


def test_a_bottleneck_is_learned_from_few_networks() -> None:
    """A score that falls with unevenness: 20 networks foretell it in shapes that they lack."""
    rng = np.random.default_rng(0)
    errors = []
    for widths in (GRID.random(rng, 20), GRID.families(np.array([[a.base for a in AXES]]), 40)):
        u = COORDINATES.unit_widths(widths)
        errors.append((widths, 90 + 4 * u.mean(axis=1) - 10 * u.std(axis=1)))
    (seen, scores), (even, best) = errors
    estimate = Surrogate.fit(COORDINATES, seen, scores + rng.normal(0, 0.2, 20)).mean(even)
    assert np.abs(estimate - best).mean() < 0.5


def test_a_fit_takes_one_blas_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several would wait for the cores that train; the number is as before after it."""
    seen = []
    factored = surrogates.factor

    def factor(*arguments: Any) -> Any:
        seen.append({pool["num_threads"] for pool in blas()})
        return factored(*arguments)

    def blas() -> list[Any]:
        return [pool for pool in threadpool_info() if pool["user_api"] == "blas"]

    monkeypatch.setattr(surrogates, "factor", factor)
    before = blas()
    assert before
    with threadpool_limits(2, user_api="blas"):
        fitted(4)
    assert seen
    assert all(threads == {1} for threads in seen)
    assert blas() == before
