"""The search: new widths on the grid, where an improvement of the front is expected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tiny

from widthsearch.bayesopt.candidates import Batch
from widthsearch.bayesopt.kernel import Array, Coordinates
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.search import INITIAL_TRIALS, BayesianSearch, Suggestion
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.widths import Axis

AXES = tuple(Axis(name, 64, 16, 128, 16) for name in "abcdef")
SPACE = tiny.space()


def macs(widths: Batch) -> Batch:
    """A chain of six layers."""
    return (widths[:, 1:] * widths[:, :-1]).sum(axis=1)


COORDINATES = Coordinates(AXES, {"macs": macs})


def accuracy(widths: Sequence[int]) -> float:
    """Only the first two axes matter, with saturation; no noise."""
    return float(90 - 400 / widths[0] - 400 / widths[1])


def ms(widths: Batch) -> Array:
    """Latency that does not follow MACs: the last axis takes the time."""
    return 0.1 + widths[:, -1] / 100


def finished(
    count: int, objectives: Sequence[str] = ("accuracy", "macs"), seed: int = 0
) -> list[Observation]:
    """Random finished trials."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        vector = tuple(int(rng.choice(axis.grid)) for axis in AXES)
        at = np.array([vector])
        cost = {"macs": float(macs(at)[0]), "latency_ms": float(ms(at)[0])}
        costs = tuple(cost[name] for name in objectives if name != "accuracy")
        out.append(Observation(vector, accuracy(vector), costs))
    return out


def search(objectives: Sequence[str] = ("accuracy", "macs"), **options: object) -> BayesianSearch:
    """Over the six axes."""
    return BayesianSearch(COORDINATES, objectives, **options)  # type: ignore[arg-type]


def batch(chosen: BayesianSearch, trials: Sequence[Observation], count: int) -> list[Suggestion]:
    """Suggestions one after another, each with those before it running."""
    running, out = list(trials), []
    while len(out) < count:
        suggestion = chosen.suggest(running)
        assert suggestion is not None
        out.append(suggestion)
        running.append(Observation(suggestion.widths.vector, running=True))
    return out


def vectors(suggestions: Sequence[Suggestion]) -> list[tuple[int, ...]]:
    """The widths alone."""
    return [suggestion.widths.vector for suggestion in suggestions]


def improvement(chosen: BayesianSearch, trials: Sequence[Observation], **options: object) -> float:
    """That of the next suggestion."""
    suggestion = chosen.suggest(trials, **options)  # type: ignore[arg-type]
    assert suggestion is not None
    return suggestion.improvement


def test_objectives_and_limits_must_have_costs() -> None:
    """Each error names the name that is wrong."""
    for name in ("flops", "latency_ms"):
        with pytest.raises(ValueError, match=f"limits are of {name}"):
            search(limits={name: (0.0, 1.0)})
    with pytest.raises(ValueError, match="must hold accuracy"):
        search(["macs"])
    with pytest.raises(ValueError, match=r"metric must be a Metric, .* but was 'rmse'"):
        search(["rmse", "macs"], metric="rmse")


def test_it_finds_the_axes_that_matter() -> None:
    """After 40 networks it suggests wide first axes and narrow others."""
    suggested = np.array(vectors(batch(search(), finished(40), 6)))
    assert suggested[:, 2:].mean() < 40
    assert suggested[:, :2].mean() > suggested[:, 2:].mean()


def test_suggestions_are_distinct_and_their_improvements_fall() -> None:
    """Each counts the ones before it as running."""
    suggested = batch(search(), finished(30), 8)
    assert len(set(vectors(suggested))) == 8
    assert suggested[0].improvement > suggested[-1].improvement > 0


def test_a_running_network_is_no_longer_an_improvement() -> None:
    """The next best is suggested, and it improves less."""
    best, after = batch(search(), finished(30), 2)
    assert after.widths != best.widths
    assert after.improvement < best.improvement * 1.05


def test_widths_that_were_seen_are_not_suggested() -> None:
    """Such as those of failed trials, which are no observations."""
    trials = finished(30)
    best = search().suggest(trials)
    assert best is not None
    second = search().suggest(trials, seen=[best.widths])
    assert second is not None
    assert second.widths != best.widths
    assert second.improvement <= best.improvement


def test_limits_are_kept() -> None:
    """From the first network on, in large spaces and small, also where few networks are inside."""
    for low, high in [(20_000, 30_000), (1_500, 2_600), (50_000, 53_000)]:
        chosen = search(limits={"macs": (low, high)})
        for trials in (finished(0), finished(2), finished(30)):
            suggested = vectors(batch(chosen, trials, 3))
            assert all(low <= macs(np.array([v]))[0] <= high for v in suggested)
    assert search(limits={"macs": (1, 10)}).suggest(finished(30)) is None


def test_latency_is_predicted_until_it_is_measured() -> None:
    """Networks that a learned or a given model predicts to be slow are not suggested."""
    objectives = ("accuracy", "macs", "latency_ms")
    trials = finished(40, objectives)
    given_model = lambda widths: (ms(widths), 0.01 * ms(widths))  # noqa: E731
    for model in (None, given_model):
        suggested = batch(search(objectives, latency=model), trials, 4)
        assert np.mean([vector[-1] for vector in vectors(suggested)]) <= 48
    limited = search(latency=given_model, limits={"latency_ms": (0.0, 0.45)})
    assert all(vector[-1] <= 48 for vector in vectors(batch(limited, finished(40), 4)))


def test_the_front_of_other_spaces_leaves_less_to_improve() -> None:
    """What a rival dominates is no improvement."""
    trials = finished(30)
    rivals = [(89.0, (2000.0,)), (99.0, (20_000.0,))]
    alone = improvement(search(), trials)
    beside = improvement(search(), trials, rivals=rivals)
    assert 0 <= beside < alone


def test_spaces_that_are_searched_together_learn_from_one_another() -> None:
    """Two trials of a space are enough for the surrogate where another space has thirty."""
    here, there = Coordinates.together([COORDINATES, Coordinates(SPACE.axes, {"macs": SPACE.macs})])
    chosen = BayesianSearch(here)
    few = finished(2)
    many = [
        Observation((2 + 2 * (i % 8), 2 + 2 * (i // 8)), 50.0 + i, (1000.0 + i,)) for i in range(30)
    ]
    shared = Surrogate.fit_observations((here, few), (there, many))
    assert improvement(chosen, few, surrogate=shared.of_space(here)) < np.inf
    assert improvement(chosen, few[:1], surrogate=shared.of_space(here)) == np.inf
    assert improvement(search(), few) == np.inf


def test_only_what_is_allowed_is_suggested() -> None:
    """Few width vectors, and many."""
    rng = np.random.default_rng(0)
    for count in (60, 6000):
        allowed = np.stack([rng.choice(axis.grid, count) for axis in AXES], axis=1)
        rows = {tuple(row) for row in allowed.tolist()}
        chosen = search(allowed=allowed)
        for trials in (finished(0), finished(30)):
            assert set(vectors(batch(chosen, trials, 3))) <= rows


@pytest.mark.parametrize("count", [0, 1, INITIAL_TRIALS - 1, INITIAL_TRIALS, 14])
def test_any_number_of_trials_will_do(count: int) -> None:
    """From none on; also where all are equal."""
    chosen = BayesianSearch(Coordinates.of(SPACE))
    trials = [
        Observation((2 + 2 * (i % 8), 2 + 2 * (i // 8)), 50.0, (1000.0,)) for i in range(count)
    ]
    suggested = batch(chosen, trials, 2)
    assert len(set(vectors(suggested))) == 2
    assert suggested == batch(chosen, trials, 2)


def test_an_earlier_study_tells_where_to_look() -> None:
    """Two trials are enough then, and its axes that matter are wide in what is suggested."""
    before = [Observation(o.widths, (o.value or 0.0) - 10, o.costs) for o in finished(40, seed=1)]
    trials = batch(search(), [], 2)
    seen = [
        Observation(s.widths.vector, accuracy(s.widths.vector), (float(macs(row)[0]),))
        for s in trials
        for row in [np.array([s.widths.vector])]
    ]
    assert improvement(search(), seen) == np.inf
    assert improvement(search(earlier=[before[:4]]), seen) == np.inf
    suggested = np.array(vectors(batch(search(earlier=[before]), seen, 4)))
    assert improvement(search(earlier=[before]), seen) < np.inf
    assert suggested[:, :2].mean() > 1.5 * suggested[:, 2:].mean()


def test_trials_of_other_bounds_are_learned_from() -> None:
    """They are off today's grid, and every suggestion is on it."""
    wider = [Observation((8, 200, 40, 40, 40, 40), 85.0, (20_000.0,)) for _ in range(3)]
    suggested = vectors(batch(search(), [*finished(12), *wider], 4))
    assert all(w in axis.grid for row in suggested for w, axis in zip(row, AXES, strict=True))
