"""The sampler: in any Optuna study, new widths on the grid, where the gain is expected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
import pytest
import tiny
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from widthsearch.bayesopt.candidates import Batch
from widthsearch.bayesopt.sampler import FIRST, Known, WidthSampler
from widthsearch.bayesopt.surrogate import Array, Coordinates, Surrogate
from widthsearch.widths import Axis, Widths

AXES = tuple(Axis(name, 64, 16, 128, 16) for name in "abcdef")
NAMES = tuple(axis.name for axis in AXES)
SPACE = tiny.space()


def macs(widths: Batch) -> Batch:
    """A chain of six layers."""
    return (widths[:, 1:] * widths[:, :-1]).sum(axis=1)


COSTS = {"macs": macs}


def accuracy(widths: Sequence[int]) -> float:
    """Only the first two axes matter, with saturation; no noise."""
    return float(90 - 400 / widths[0] - 400 / widths[1])


def ms(widths: Batch) -> Array:
    """Latency that MACs do not tell: the last axis takes the time."""
    return 0.1 + widths[:, -1] / 100


def known(
    count: int, objectives: Sequence[str] = ("accuracy", "macs"), seed: int = 0
) -> list[Known]:
    """Random finished trials."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        vector = tuple(int(rng.choice(axis.grid)) for axis in AXES)
        at = np.array([vector])
        value = {"accuracy": accuracy(vector), "macs": float(macs(at)[0]), "latency_ms": ms(at)[0]}
        out.append(Known(Widths(NAMES, vector), tuple(float(value[name]) for name in objectives)))
    return out


def sampler(objectives: Sequence[str] = ("accuracy", "macs"), **options: object) -> WidthSampler:
    """Over the six axes."""
    return WidthSampler(AXES, COSTS, objectives, **options)  # type: ignore[arg-type]


def vectors(proposed: Sequence[object]) -> list[tuple[int, ...]]:
    """The widths alone."""
    return [p.widths.vector for p in proposed]  # type: ignore[attr-defined]


# -- in an Optuna study ----------------------------------------------------------------------


def tiny_study(seed: int = 0, **options: object) -> optuna.Study:
    """A study over the tiny space."""
    chosen = WidthSampler.of(SPACE, seed=seed, **options)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=chosen)


def score(trial: optuna.Trial) -> tuple[float, float]:
    """A user's own objective, which names its parameters itself."""
    vector = [
        trial.suggest_int(axis.name, axis.min_width, axis.max_width, step=axis.step)
        for axis in SPACE.axes
    ]
    return 50 + 2 * vector[0] + vector[1], float(SPACE.macs(np.array(vector)))


def test_it_drives_a_plain_optimize() -> None:
    """Every network is new and on the grid; the narrowest and the widest come first."""
    study = tiny_study()
    study.optimize(score, n_trials=24)
    asked = [tuple(trial.params.values()) for trial in study.trials]
    assert len(set(asked)) == 24
    assert asked[:2] == [(2, 2), (16, 16)]
    assert all(w in axis.grid for row in asked for w, axis in zip(row, SPACE.axes, strict=True))


def test_the_same_seed_asks_the_same() -> None:
    """And another seed other widths; a study that is read back goes on as it would have."""
    runs = []
    for seed in (0, 0, 1):
        study = tiny_study(seed)
        study.optimize(score, n_trials=14)
        runs.append([trial.params for trial in study.trials])
    assert runs[0] == runs[1] != runs[2]
    resumed = tiny_study(0)
    first = tiny_study(0)
    first.optimize(score, n_trials=10)
    resumed.add_trials(first.trials)
    resumed.optimize(score, n_trials=4)
    assert [trial.params for trial in resumed.trials] == runs[0]


def test_every_width_vector_is_asked_for_once_and_then_it_says_so() -> None:
    """64 networks; with repeats it goes on."""
    study = tiny_study()
    study.optimize(score, n_trials=64)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 64
    with pytest.raises(ValueError, match="no widths are left"):
        study.ask(study.sampler.distributions)  # type: ignore[attr-defined]
    study.sampler = WidthSampler.of(SPACE, repeats=True)
    study.optimize(score, n_trials=1)


def test_trials_that_run_are_not_asked_for_again() -> None:
    """Several at once, before and after the surrogate is there; failed ones are forgotten."""
    study = tiny_study()
    study.optimize(score, n_trials=FIRST)
    ranges = study.sampler.distributions  # type: ignore[attr-defined]
    open_trials = [study.ask(ranges) for _ in range(6)]
    assert len({tuple(trial.params.values()) for trial in study.trials}) == FIRST + 6
    study.tell(open_trials[0], state=TrialState.FAIL)
    study.tell(open_trials[1], state=TrialState.PRUNED)
    study.ask(ranges)


def test_the_front_is_of_finished_trials_by_posterior_mean() -> None:
    """A lucky network in the middle of a straight trend is not believed."""
    study = tiny_study()
    rng = np.random.default_rng(0)
    for width in range(2, 17, 2):
        for other in (2, 8, 16):
            luck = 6.0 if (width, other) == (4, 8) else 0.0
            study.add_trial(
                optuna.create_trial(
                    params={"first": width, "second": other},
                    distributions=study.sampler.distributions,  # type: ignore[attr-defined]
                    values=[
                        60 + width + other / 2 + luck + rng.normal(0, 0.3),
                        float(SPACE.macs((width, other))),
                    ],
                )
            )
    lucky = next(t for t in study.trials if t.params == {"first": 4, "second": 8})
    chosen = study.sampler.front(study)  # type: ignore[attr-defined]
    costs = [trial.values[1] for trial in chosen]
    assert costs == sorted(costs)
    assert all(trial.state == TrialState.COMPLETE for trial in chosen)
    estimated = study.sampler.surrogate(study).posterior([[4, 8], [2, 2]])  # type: ignore[attr-defined]
    assert estimated.mean[0] < lucky.values[0] - 1.5


def test_parameters_and_directions_must_be_the_sampler_s() -> None:
    """Each error names what is wrong."""
    study = tiny_study()
    with pytest.raises(ValueError, match="'depth'"):
        study.ask({**study.sampler.distributions, "depth": IntDistribution(1, 3)})  # type: ignore[attr-defined]
    wrong = optuna.create_study(directions=["minimize", "minimize"], sampler=WidthSampler.of(SPACE))
    with pytest.raises(ValueError, match="maximises accuracy"):
        wrong.ask(WidthSampler.of(SPACE).distributions)
    with pytest.raises(ValueError, match="flops"):
        sampler(["accuracy", "flops"])
    with pytest.raises(ValueError, match="limits of latency_ms"):
        sampler(limits={"latency_ms": (0.0, 1.0)})
    with pytest.raises(ValueError, match="must hold accuracy"):
        sampler(["macs"])


# -- what it asks for ------------------------------------------------------------------------


def test_it_finds_the_axes_that_matter() -> None:
    """After 40 networks it asks for wide first axes and narrow others."""
    asked = np.array(vectors(sampler().propose(known(40), 6)))
    assert asked[:, 2:].mean() < 40
    assert asked[:, :2].mean() > asked[:, 2:].mean()


def test_a_batch_is_distinct_and_gains_fall() -> None:
    """Each takes the ones before it to be in training."""
    batch = sampler().propose(known(30), 8)
    assert len(set(vectors(batch))) == 8
    assert batch[0].gain > batch[-1].gain > 0


def test_what_is_in_training_is_no_longer_a_gain() -> None:
    """The next best is asked for, and it gains less."""
    trials = known(30)
    best = sampler().propose(trials)[0]
    after = sampler().propose([*trials, Known(best.widths, running=True)])[0]
    assert after.widths != best.widths
    assert after.gain < best.gain * 1.05


def test_limits_are_kept() -> None:
    """From the first network on, in large spaces and small, also where few networks are inside."""
    for low, high in [(20_000, 30_000), (1_500, 2_600), (50_000, 53_000)]:
        chosen = sampler(limits={"macs": (low, high)})
        for trials in (known(0), known(2), known(30)):
            batch = chosen.propose(trials, 3)
            assert len(batch) == 3
            assert all(low <= macs(np.array([v]))[0] <= high for v in vectors(batch))
    assert sampler(limits={"macs": (1, 10)}).propose(known(30)) == []


def test_latency_is_predicted_until_it_is_measured() -> None:
    """Networks that a learned or a given model takes for slow are not asked for."""
    objectives = ("accuracy", "macs", "latency_ms")
    trials = known(40, objectives)
    given_model = lambda widths: (ms(widths), 0.01 * ms(widths))  # noqa: E731
    for model in (None, given_model):
        batch = sampler(objectives, latency=model).propose(trials, 4)
        assert np.mean([vector[-1] for vector in vectors(batch)]) <= 48
        limited = sampler(latency=given_model, limits={"latency_ms": (0.0, 0.45)})
        assert all(vector[-1] <= 48 for vector in vectors(limited.propose(known(40), 4)))


def test_the_front_of_other_spaces_leaves_less_to_gain() -> None:
    """What a rival dominates is worth nothing."""
    trials = known(30)
    alone = sampler().propose(trials)[0]
    beside = sampler().propose(trials, rivals=[(89.0, 2000.0), (99.0, 20_000.0)])[0]
    assert 0 <= beside.gain < alone.gain


def test_spaces_that_are_searched_together_learn_from_one_another() -> None:
    """Two trials of a space are enough to be asked by belief where another one has thirty."""
    plain = [Coordinates(AXES, COSTS), Coordinates(SPACE.axes, {"macs": SPACE.macs})]
    here, there = Coordinates.together(plain)
    chosen, other = sampler(coordinates=here), WidthSampler.of(SPACE, coordinates=there)
    few = known(2)
    many = [
        Known(tiny.widths(2 + 2 * (i % 8), 2 + 2 * (i // 8)), (50.0 + i, 1000.0 + i))
        for i in range(30)
    ]
    shared = Surrogate.of_trainings((here, chosen.trainings(few)), (there, other.trainings(many)))
    assert chosen.propose(few, surrogate=shared.of_space(here))[0].gain < np.inf
    assert chosen.propose(few[:1], surrogate=shared.of_space(here))[0].gain == np.inf
    assert sampler().propose(few)[0].gain == np.inf


def test_only_what_is_allowed_is_asked_for() -> None:
    """Few width vectors, and many."""
    rng = np.random.default_rng(0)
    for count in (60, 6000):
        allowed = np.stack([rng.choice(axis.grid, count) for axis in AXES], axis=1)
        rows = {tuple(row) for row in allowed.tolist()}
        chosen = sampler(allowed=allowed)
        assert (
            set(vectors(chosen.propose(known(0), 3)) + vectors(chosen.propose(known(30), 3)))
            <= rows
        )


def test_curves_of_stopped_trials_are_learned_from() -> None:
    """Of networks with a wide third axis only beginnings are known, and they are bad."""
    rng = np.random.default_rng(0)
    finished = [
        Known(t.widths, t.values, curve=((t.values or (0,))[0] - 10, (t.values or (0,))[0]))
        for t in known(25)
    ]
    stopped = []
    for _ in range(15):
        vector = (*[int(rng.choice(axis.grid)) for axis in AXES[:2]], 128, 128, 16, 16)
        stopped.append(Known(Widths(NAMES, vector), curve=(accuracy(vector) - 30,)))
    at = [[64, 64, 128, 128, 16, 16]]
    without = sampler().fit_surrogate(finished).posterior(at)
    with_curves = sampler().fit_surrogate([*finished, *stopped]).posterior(at)
    assert with_curves.mean[0] < without.mean[0] - 5


@pytest.mark.parametrize("count", [0, 1, FIRST - 1, FIRST, 14])
def test_any_number_of_outcomes_will_do(count: int) -> None:
    """From none on; also where all are equal."""
    chosen = WidthSampler.of(SPACE)
    trials = [
        Known(tiny.widths(2 + 2 * (i % 8), 2 + 2 * (i // 8)), (50.0, 1000.0)) for i in range(count)
    ]
    batch = chosen.propose(trials, 2)
    assert len(set(vectors(batch))) == 2
    assert batch == chosen.propose(trials, 2)


def test_outcomes_of_other_bounds_are_learned_from() -> None:
    """They are off today's grid, and what is asked for is on it."""
    wider = [Known(Widths(NAMES, (8, 200, 40, 40, 40, 40)), (85.0, 20_000.0)) for _ in range(3)]
    asked = vectors(sampler().propose([*known(12), *wider], 4))
    assert all(w in axis.grid for row in asked for w, axis in zip(row, AXES, strict=True))
