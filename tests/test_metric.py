"""A study of any metric: scores, and an RMSE study from its configuration to its tables."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from widthsearch.api import Study
from widthsearch.bayesopt.early_stopping import front_probability
from widthsearch.bayesopt.kernel import Coordinates
from widthsearch.bayesopt.metric import ACCURACY, Metric
from widthsearch.bayesopt.observation import Observation
from widthsearch.bayesopt.surrogate import Surrogate
from widthsearch.errors import StudyError
from widthsearch.report import forecast, tables
from widthsearch.report.front_plot import draw_front
from widthsearch.report.progress import progress_line
from widthsearch.study.posterior import Estimate
from widthsearch.study.progress import Progress
from widthsearch.study.trial import Trial, TrialState
from widthsearch.widths import Axis

RMSE = Metric("rmse", "minimize")
METRICS = [
    ACCURACY,
    RMSE,
    Metric("error", "minimize", (0, 100)),
    Metric("iou", "maximize", (0, 1)),
    Metric("log_likelihood", "maximize", (None, 0)),
    Metric("reward", "maximize"),
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@given(shares=st.lists(st.floats(0.001, 0.999), min_size=2, max_size=6, unique=True))
def test_better_values_have_higher_scores(metric: Metric, shares: list[float]) -> None:
    """In the order of the goal; scores map back to the values, and slopes are their derivatives."""
    low, high = (end if np.isfinite(end) else None for end in metric.ends)
    low = -50.0 if low is None else low
    values = low + np.sort(shares) * ((50.0 if high is None else high) - low)
    scores = metric.score(values)
    assert (np.diff(scores) * metric.sign >= 0).all()
    np.testing.assert_allclose(metric.value(scores), values, rtol=1e-9, atol=1e-9)
    step = 1e-6
    slopes = metric.sign * (metric.value(scores + step) - metric.value(scores - step)) / (2 * step)
    np.testing.assert_allclose(metric.slope(scores), slopes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@given(score=st.floats(-40, 40), sd=st.floats(0.001, 20))
def test_estimates_and_intervals_stay_in_the_range(metric: Metric, score: float, sd: float) -> None:
    """However uncertain they are."""
    estimate = Estimate(float(metric.value(score)), sd, 1, metric=metric)
    low, high = estimate.interval
    assert metric.ends[0] <= low <= estimate.value <= high <= metric.ends[1]


def test_the_ends_of_a_range_have_finite_scores() -> None:
    """A perfect and a worthless network can be learned from; 50% of accuracy links to 0."""
    for metric in METRICS:
        ends = [end for end in metric.ends if np.isfinite(end)]
        assert np.isfinite([metric.score(ends), metric.link(ends)]).all()
    assert ACCURACY.link(50.0) == 0
    assert ACCURACY.link(100.0) == -ACCURACY.link(0.0) == pytest.approx(np.log(201))


def test_a_limit_counts_in_early_stopping() -> None:
    """A trial with no rival at its cost goes on, unless it hardly keeps the limit."""
    done = [Observation((8,), a, (1e6,), (a + 0.9, a + 0.3, a)) for a in (0.88, 0.9, 0.92)]
    trial = Observation((8,), costs=(5e5,), curve=(1.8, 1.2))
    assert front_probability(trial, done, RMSE) == 1
    near, far = (
        front_probability(trial, done, RMSE, float(RMSE.score(limit))) for limit in (0.95, 0.4)
    )
    assert near > 0.5 > 0.05 > far


def test_intervals_of_an_rmse_are_calibrated() -> None:
    """Real trainings (`benchmarks/metric.py`): coverage at 40 of them, and a log beats no log."""
    table = np.array(json.loads((Path(__file__).parent / "fixtures" / "rmse.json").read_text()))
    axes = [Axis(str(i), 24, 4, 48, 1) for i in range(3)]

    def macs(w: NDArray[np.int64]) -> NDArray[np.int64]:
        return 10 * w[:, 0] + w[:, 0] * w[:, 1] + w[:, 1] * w[:, 2] + w[:, 2]

    coordinates = Coordinates(axes, {"macs": macs, "params": lambda w: macs(w) + w.sum(1) + 1})
    linear, densities = Metric("rmse", "minimize", transform="linear"), []
    for metric in (RMSE, linear):
        left_out, unseen, density = [], [], []
        for draw in range(8):
            rows = table[np.random.default_rng(draw).permutation(len(table))]
            seen = [Observation(tuple(map(int, row[:3])), row[3]) for row in rows[:40]]
            surrogate = Surrogate.fit_observations((coordinates, seen), metric=metric)
            left_out.append(surrogate.coverage(0.9))
            posterior, scores = surrogate.posterior(rows[40:, :3]), metric.score(rows[40:, 3])
            sd = np.hypot(posterior.sd, surrogate.noise)
            z = (scores - posterior.mean) / sd
            unseen.append((np.abs(z) < 1.645).mean())
            density.append((-0.5 * z**2 - np.log(sd * metric.slope(scores))).mean())
        densities.append(np.mean(density))
        assert np.mean(left_out) >= 0.85
        assert np.mean(unseen) >= 0.8
    assert densities[0] > densities[1] + 0.3


def rmse(trial: Trial, epoch: int) -> float:
    """Lower for wider networks and with training, with the noise of a seed."""
    noise = np.random.default_rng(trial.seed).normal(0, 0.03)
    return float(8.0 / sum(trial.widths.vector) ** 0.5 * (1 + 0.5 / epoch) * np.exp(noise))


def rmse_study(folder: Path, **changes: object) -> Study:
    """Twenty trials of the tiny space, trained by a formula."""
    values = {"metric": {"name": "rmse", "goal": "minimize"}, "trials": 20, "proposers": []}
    study = tiny.study(folder, **{**values, **changes})  # type: ignore[arg-type]
    tiny.run(study, rmse)
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One run for the tests that only read."""
    return rmse_study(tmp_path_factory.mktemp("rmse"))


def test_the_front_of_a_metric_to_minimize(study: Study) -> None:
    """More MACs, lower values; estimates are near the truth, and the intervals hold most values."""
    posterior = study.posterior()
    front = posterior.front()
    values = [posterior.value(t) for t in front]
    assert len(front) > 4
    assert values == sorted(values, reverse=True)
    assert posterior.best_value == values[-1]
    truth = [8.0 / sum(t.widths.vector) ** 0.5 * 1.125 for t in posterior.members]
    inside = [
        posterior[t].interval[0] <= true <= posterior[t].interval[1]
        for t, true in zip(posterior.members, truth, strict=True)
    ]
    assert np.mean(inside) > 0.7
    assert posterior.surrogate.coverage(0.9) >= 0.85
    best = min(t.value for t in posterior.members)
    assert posterior.goodness(study.pick("best")) == -posterior.best_value
    assert posterior.best_value == pytest.approx(best, rel=0.1)


def test_picks_by_the_metric(study: Study) -> None:
    """A limit picks the cheapest that keeps it; several limits hold together."""
    posterior = study.posterior()
    keeping = [t for t in posterior.front() if posterior.value(t) <= 2.5]
    assert 0 < len(keeping) < len(posterior.front())
    assert study.pick("rmse<=2.5") == keeping[0]
    assert study.pick("cheapest") == posterior.front()[0]
    most = keeping[1].cost.macs
    assert study.pick(f"macs<={most}") == keeping[1]
    assert study.pick(f"rmse <= 2.5, macs<={most}") == keeping[0]
    with pytest.raises(StudyError, match="the least rmse of the front is"):
        study.pick("rmse<=0.01")


def test_tables_and_files_name_the_metric(study: Study) -> None:
    """Without percent signs; JSON and CSV hold it under its own name."""
    posterior = study.posterior()
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(tables.front_tables(study, posterior, ["loss", "activations"]))
    text = console.export_text()
    assert "rmse" in text
    assert "accuracy" not in text
    assert "estimated %" not in text
    assert "loss  activations" in text.replace("   ", "  ")
    assert "rmse at equal MACs" in text
    assert "a gain above 0 is a lower value" in text
    content = json.loads(json.dumps(tables.front_json(study, posterior), allow_nan=False))
    assert content["metric"]["name"] == "rmse"
    assert content["front"][0]["rmse"] == posterior.front()[0].value
    assert content["front"][0]["estimated"]["rmse"] == posterior.value(posterior.front()[0])
    assert content["front"][0]["reported"] == {"loss": 1.0}
    assert tables.front_csv(posterior).startswith("id,space,rmse,estimated,")
    line = progress_line(Progress(20, 0, 20, posterior.best_value, 5, 1.0, None, metric=RMSE))
    assert line.startswith(f"20/20 trials, best rmse {posterior.best_value:.3f}, front 5")
    figure = draw_front(study, posterior)
    assert figure.axes[0].get_ylabel() == "validation rmse"
    with pytest.raises(StudyError, match=r"to show must be one of macs, .*loss, but was 'lpips'"):
        tables.front_tables(study, posterior, ["lpips"])


def test_a_forecast_stays_in_the_range(study: Study) -> None:
    """A positive metric, with the better networks wider."""
    found = forecast.forecast(study, study.posterior())
    assert all(0 < each.estimate.interval[0] < each.estimate.interval[1] for each in found)
    assert all(0 <= each.gain <= each.estimate.value + 10 for each in found)
    wide = max(found, key=lambda each: each.cost.macs)
    assert wide.estimate.value == min(each.estimate.value for each in found)


def test_a_limit_of_the_metric_cuts_the_front(tmp_path: Path, study: Study) -> None:
    """The front holds those that keep it; more of them than without, since only they count."""
    limited = rmse_study(tmp_path, limits={"rmse": [None, 1.9], "macs": [None, 1e9]})
    front = limited.front()
    assert front
    assert all(limited.posterior().value(t) <= 1.9 for t in front)
    with limited.confirmation(2) as search:
        again = search.trials[tiny.ask(search).origin["confirms"]]
        assert limited.posterior()[again].interval[0] <= 1.9
    without = [t for t in study.trials() if (t.value or 9.0) <= 1.9]
    assert sum((t.value or 9.0) <= 1.9 for t in limited.trials()) > len(without)


def test_a_report_outside_the_range_is_an_error(tmp_path: Path) -> None:
    """Of that trial, in one line with the way out; a diverged one fails as ever."""
    study = tiny.study(tmp_path, metric={"name": "iou", "goal": "maximize", "range": [0, 1]})
    with study.search() as search:
        first, second = tiny.ask(search), tiny.ask(search)
        search.report(first.number, tiny.curve(71.2))
        search.report(second.number, tiny.curve(float("nan")))
    first, second = (search.trials[t.number] for t in (first, second))
    assert first.state == second.state == TrialState.FAILED
    assert str(first.error).startswith(
        "iou must be in its range [0, 1], but was 71.2 in epoch 1: change metric.range, or the "
        "report"
    )
    assert str(second.error).startswith("training diverged in epoch 1: its iou is nan")


def test_the_built_in_trainer_reports_accuracy_alone(tmp_path: Path) -> None:
    """A study of another metric is refused before Ray starts."""
    study = tiny.study(tmp_path, metric={"name": "rmse", "goal": "minimize"})
    with pytest.raises(StudyError, match="but the study needs rmse"):
        study.run()
    study = tiny.study(tmp_path, objectives=["accuracy", "macs", "loss", "flops"])
    with pytest.raises(StudyError, match="study needs flops: change `metric` or"):
        study.run()


def test_numbers_that_are_reported_are_objectives(tmp_path: Path) -> None:
    """The front is over the loss too; a trial that does not report an objective fails."""
    study = rmse_study(tmp_path / "loss", objectives=["rmse", "macs", "loss"])
    assert all(np.isfinite(study.posterior().points(study.front())).ravel())
    study = tiny.study(tmp_path / "none", objectives=["accuracy", "macs", "lpips"], proposers=[])
    with study.search() as search:
        trial = tiny.ask(search)
        search.report(trial.number, tiny.curve(1.0, 2.0, 3.0, 4.0))
    assert str(search.trials[trial.number].error).startswith(
        "objective 'lpips' must be reported, above 0, but was nan in epoch 4, which reported "
        "accuracy, loss"
    )


def test_activations_are_an_objective_and_a_limit(tmp_path: Path) -> None:
    """The search and the front keep within them."""
    study = rmse_study(
        tmp_path, objectives=["rmse", "activations"], limits={"activations": [None, 300]}
    )
    trained = [t for t in study.trials() if not t.origin.get("base")]
    assert len(trained) > 8
    assert all(t.cost.activations <= 300 for t in (*trained, *study.front()))
