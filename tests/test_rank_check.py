"""Whether a short recipe ranks networks as a full one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import tiny
from commands import CommandLine, small
from scipy.stats import kendalltau, spearmanr
from strategies import refused

from widthsearch.api import Study
from widthsearch.bayesopt.metric import Metric
from widthsearch.errors import StudyError
from widthsearch.rank_check import rank_check, spread
from widthsearch.report.console import open_console
from widthsearch.report.rank_tables import rank_tables
from widthsearch.study.rank_correlation import Correlation, RankCheck, kendall, spearman
from widthsearch.training.job import TrainingTrial
from widthsearch.training.recipe import EpochResult

RMSE = Metric("rmse", "minimize")


def scripted(network: Any, trial: TrainingTrial[Any]) -> None:
    """Values of a formula: wide networks are better, and at a low rate narrow ones suffer."""
    (width,) = trial.widths.vector
    trial.resume()
    for epoch in range(trial.epoch, trial.epochs):
        value = width * trial.recipe.get("lr", 1.0) + epoch + trial.seed % 7 / 100
        if not trial.report({"accuracy": value}, dict):
            return


def study_of(folder: Path, **changes: Any) -> Study:
    """A study with a front of five members."""
    study = own.study(folder, trainer=scripted, data=None, trials=8, **changes)
    with study.search() as search:
        tiny.drive(search, lambda trial, epoch: float(trial.widths.vector[0]))
    return study


def text_of(check: RankCheck) -> str:
    """What the command prints."""
    console = open_console()
    with console.capture() as captured:
        console.print(rank_tables("own", check))
    return " ".join(captured.get().split())


def checked(study: Study, **changes: Any) -> tuple[RankCheck, list[str]]:
    """A rank check, and the trainings that it ran, a name an epoch."""
    seen: list[str] = []

    def on_epoch(name: str, result: EpochResult) -> None:
        seen.append(f"{name}: {result.epoch}")

    return rank_check(study, 6, **{"seeds": 2, "on_epoch": on_epoch, **changes}), seen


def test_members_are_trained_by_both_recipes_and_at_three_rates(tmp_path: Path) -> None:
    """Once: the same call reads the results, and more seeds train the new ones alone."""
    study = study_of(tmp_path, recipe={"epochs": 4, "lr": 1.0})
    check, seen = checked(study, members=4)
    widths = np.array([[trial.widths.vector[0]] for trial in check.members])
    assert len(widths) == 4
    assert np.abs(check.short - (widths + 3)).max() < 0.1
    assert np.abs(check.full - (widths + 5)).max() < 0.1
    expected = [widths[[0, 2, 3]] * rate + 3 for rate in (0.5, 1.0, 2.0)]
    assert np.abs(check.rates - expected).max() < 0.1
    assert len(seen) == 4 * 2 * (4 + 6) + 3 * 2 * 2 * 4
    again, seen = checked(study, members=4)
    assert not seen
    assert np.array_equal(again.rates, check.rates)
    _, seen = checked(study, members=4, seeds=3)
    assert all("network 3/3" in line for line in seen)
    assert check.correlation(kendall) == Correlation(1.0, None)
    assert check.chance() == pytest.approx(1 / 24)
    printed = text_of(check)
    assert "Kendall's τ 1.00, Spearman's ρ 1.00; 4 networks are too few for an inter" in printed
    assert "4.17% of all orders agree as well" in printed
    assert "at lr 0.5: Kendall's τ with the order at lr 1 is 1.00 at lr 2" in printed
    assert "of three networks τ without ties can only be -1, -0.33, 0.33 or 1, and one" in printed


def test_an_interrupted_check_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """No epoch is trained twice."""
    study = study_of(tmp_path)

    def interrupt(name: str, result: EpochResult) -> None:
        if result.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked(study, on_epoch=interrupt)
    _, seen = checked(study)
    assert seen[0].endswith("network 1/2: 3")
    assert not list((tmp_path / "rank_check" / "checkpoints").iterdir())


def test_a_recipe_without_a_rate_has_no_report_of_it(tmp_path: Path) -> None:
    """A line of the tables says why."""
    check, _ = checked(study_of(tmp_path))
    assert check.lr is None
    assert not check.rated
    assert "the recipe has no lr, so no other learning rate was tried" in text_of(check)


def test_the_command_needs_epochs(command: CommandLine, tmp_path: Path) -> None:
    """More than the recipe has; without any, it says how many."""
    tiny.run(small(tmp_path, recipe={"epochs": 2, "precision": "fp32"}))
    asked = ("train", "small", "--runs", tmp_path / "runs", "--rank-check")
    missing = command.refusal(*asked)
    assert "--rank-check needs --epochs, those of a full training, more than the 2 of" in missing
    assert missing.endswith(" of the study's recipe: --epochs 8, say\n")
    few = command.refusal(*asked, "--epochs", 2)
    assert "more epochs than the recipe's 2, but was given 2" in few
    alone = command.refusal(*asked, "--pick", "best", "--search-data")
    assert "takes no --pick and no --search-data: leave one of the two out" in alone
    assert "--members is for --rank-check" in command.refusal(*asked[:-1], "--members", 4)


def test_the_statistics_are_those_of_scipy() -> None:
    """With ties; a constant row has none."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (2, 50, 6)).astype(float)
    for ours, theirs in ((kendall, kendalltau), (spearman, spearmanr)):
        expected = [theirs(a, b).statistic for a, b in zip(first, second, strict=True)]
        np.testing.assert_allclose(ours(first, second), expected, atol=1e-12)
    assert np.isnan(kendall(np.ones((1, 3)), np.array([[1.0, 2.0, 3.0]])))[0]


def test_the_interval_covers_the_noise_of_seeds() -> None:
    """Networks that seeds cannot tell apart have a wide interval, distinct ones a narrow one."""
    rng = np.random.default_rng(1)
    truth = np.arange(6.0)[:, None]
    clear = Correlation.of(
        kendall, truth + 0.01 * rng.normal(size=(6, 3)), truth + np.zeros((6, 3))
    )
    noisy = Correlation.of(
        kendall, truth + 9 * rng.normal(size=(6, 3)), truth + 9 * rng.normal(size=(6, 3))
    )
    assert clear.value == 1 and clear.interval is not None and clear.interval[0] > 0.9
    assert noisy.interval is not None and noisy.interval[1] - noisy.interval[0] > 0.5
    assert re.fullmatch(r"0\.\d\d \(90% interval -?\d\.\d\d to \d\.\d\d\)", str(noisy))


@pytest.mark.parametrize("networks", [3, 4, 5])
def test_few_networks_have_no_interval(networks: int) -> None:
    """However well they agree: of three networks each sixth order does so by chance."""
    values = np.arange(float(networks))[:, None]
    found = Correlation.of(kendall, values, values)
    assert found == Correlation(1.0, (1.0, 1.0) if networks == 5 else None)


def test_what_diverged_is_last_and_lower_errors_are_better() -> None:
    """In the order of the networks."""
    members = tuple(tiny.finished(i, tiny.widths(2 * i + 2, 2), 50.0) for i in range(3))
    short = np.array([[3.0], [2.0], [np.nan]])
    check = RankCheck(
        members, short, np.array([[2.0], [1.0], [9.0]]), (1, 2), (), np.array([]), None, RMSE
    )
    assert check.correlation(kendall).value == 1.0


def test_members_are_spread_by_size() -> None:
    """The ends are among them."""
    front = [
        tiny.finished(i, tiny.widths(2, 2), 1.0, cost=tiny.space().cost([w, w]))
        for i, w in enumerate((2, 4, 6, 8, 10, 12, 14, 16))
    ]
    assert [trial.number for trial in spread(front, 3)] == [0, 2, 7]
    assert spread(front[:2], 3) == front[:2]


def test_too_little_is_refused(tmp_path: Path) -> None:
    """Epochs, members, seeds, a front."""
    study = study_of(tmp_path)
    with refused(StudyError, "more epochs than the recipe's 4, but was given 4", whole=False):
        rank_check(study, 4)
    with refused(StudyError, "seeds >= 1 and members >= 3, but was given seeds=1", whole=False):
        rank_check(study, 9, seeds=1, members=2)
    alone = own.study(tmp_path / "alone", trials=1)
    with alone.search() as search:
        tiny.drive(search)
    with refused(StudyError, "needs 3 members of the front, but study 'own' has 1", whole=False):
        rank_check(alone, 9)
