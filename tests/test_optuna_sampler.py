"""The Optuna sampler: in any Optuna study, new widths on the grid."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
import tiny
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from widthsearch import WidthSampler
from widthsearch.bayesopt.search import INITIAL_TRIALS

SPACE = tiny.space()


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


def test_a_plain_optimize_samples_new_networks_on_the_grid() -> None:
    """Every network is new and on the grid; the narrowest and the widest come first."""
    study = tiny_study()
    study.optimize(score, n_trials=24)
    asked = [tuple(trial.params.values()) for trial in study.trials]
    assert len(set(asked)) == 24
    assert asked[:2] == [(2, 2), (16, 16)]
    assert all(w in axis.grid for row in asked for w, axis in zip(row, SPACE.axes, strict=True))


def test_the_same_seed_samples_the_same() -> None:
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


def test_every_width_vector_is_sampled_once_and_then_none_is_left() -> None:
    """64 networks, then an error."""
    study = tiny_study()
    study.optimize(score, n_trials=64)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 64
    with pytest.raises(ValueError, match="no widths are left"):
        study.ask(study.sampler.distributions)  # type: ignore[attr-defined]


def test_running_trials_are_not_sampled_again() -> None:
    """Several at once, before and after the surrogate is used; failed ones are forgotten."""
    study = tiny_study()
    study.optimize(score, n_trials=INITIAL_TRIALS)
    ranges = study.sampler.distributions  # type: ignore[attr-defined]
    open_trials = [study.ask(ranges) for _ in range(6)]
    assert len({tuple(trial.params.values()) for trial in study.trials}) == INITIAL_TRIALS + 6
    study.tell(open_trials[0], state=TrialState.FAIL)
    study.tell(open_trials[1], state=TrialState.PRUNED)
    study.ask(ranges)


def test_diverged_trials_are_forgotten_as_failed_ones_are() -> None:
    """Optuna takes infinity as a value; and a pruned trial's curve may have ended in NaN."""
    asked = []
    for diverged in (False, True):
        study = tiny_study()
        study.optimize(score, n_trials=INITIAL_TRIALS)
        ranges = study.sampler.distributions  # type: ignore[attr-defined]
        lost, pruned = study.ask(ranges), study.ask(ranges)
        pruned.set_user_attr("curve", [{"accuracy": 50.0}, {"accuracy": float("nan")}])
        if diverged:
            study.tell(lost, [float("-inf"), 64.0])
            study.tell(pruned, state=TrialState.PRUNED)
        else:
            study.tell(lost, state=TrialState.FAIL)
            study.tell(pruned, state=TrialState.FAIL)
        asked.append(study.ask(ranges).params)
    assert asked[0] == asked[1]


def test_parameters_and_directions_must_be_those_of_the_sampler() -> None:
    """Each error names what is wrong."""
    study = tiny_study()
    with pytest.raises(ValueError, match="'depth'"):
        study.ask({**study.sampler.distributions, "depth": IntDistribution(1, 3)})  # type: ignore[attr-defined]
    wrong = optuna.create_study(directions=["minimize", "minimize"], sampler=WidthSampler.of(SPACE))
    with pytest.raises(ValueError, match=r"\['maximize', 'minimize'\], but"):
        wrong.ask(WidthSampler.of(SPACE).distributions)


def test_curves_of_pruned_trials_inform_the_surrogate() -> None:
    """Epochs in the user attribute `curve`; without them a pruned trial does not count."""
    study = tiny_study()
    distributions = study.sampler.distributions  # type: ignore[attr-defined]
    for width in (2, 4, 8, 16):
        values = [60.0 + width, 1000.0 * width]
        finished = {"curve": [{"accuracy": values[0] - gap} for gap in (20, 9, 0)]}
        params = {"first": width, "second": width}
        study.add_trial(
            optuna.create_trial(
                params=params, distributions=distributions, values=values, user_attrs=finished
            )
        )
    for attributes, size in (({}, 4), ({"curve": [{"accuracy": 30.0}]}, 5)):
        study.add_trial(
            optuna.create_trial(
                state=TrialState.PRUNED,
                params={"first": 2, "second": 16},
                distributions=distributions,
                user_attrs=attributes,
            )
        )
        surrogate = study.sampler.surrogate(study)  # type: ignore[attr-defined]
        assert surrogate.size == size
    assert surrogate.posterior([[2, 16]]).mean[0] < 60
