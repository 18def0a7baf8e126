"""What a study would train, how long that takes, and the memory it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import own
import pytest
import tiny
from commands import CommandLine, study_file

from widthsearch.api import dry_run
from widthsearch.errors import StudyError
from widthsearch.report.console import open_console
from widthsearch.report.dry_run_tables import dry_run_tables
from widthsearch.runner import dry_run as runner
from widthsearch.runner.one_epoch import EpochRequest, train_for_an_epoch
from widthsearch.space.cost import Cost


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EpochRequest]]:
    """Train without another process; the networks that were trained."""
    seen: list[EpochRequest] = []

    def train(request: EpochRequest, folder: Path) -> dict[str, Any]:
        seen.append(request)
        return train_for_an_epoch(request, folder)

    monkeypatch.setattr(runner, "_in_a_process", train)
    yield seen


def test_the_command_keeps_nothing(command: CommandLine, tmp_path: Path) -> None:
    """It prints JSON on request."""
    bounds = {"min": 0.5}
    file = study_file(
        tmp_path, proposers=["uniform", "slimming"], constraints=bounds, budgets=[0.5]
    )
    content = command.json("run", file, "--runs", tmp_path / "runs", "--dry-run")
    assert content["skipped"] == {"slimming": "it trains networks"}
    assert [each["name"] for each in content["measured"]] == ["base", "narrowest"]
    assert all(each["seconds"] > 0 and each["memory"] > 10**7 for each in content["measured"])
    assert content["hours"] > 0
    assert content["planned"][0]["origin"] == {"base": True}
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_study_that_has_begun_leaves_it_as_it_is(
    tmp_path: Path, in_this_process: list[EpochRequest]
) -> None:
    """Only the trials that are left count; another driver may run."""
    objectives = ["accuracy", "macs", "latency_ms"]
    study = tiny.study(tmp_path, trials=9, concurrency=2, objectives=["accuracy", "macs"])
    with study.search() as search:
        tiny.drive(search, trials=4)
        assert dry_run(study).trials == 5
    in_this_process.clear()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".db-shm"]
    before = {path: path.read_bytes() for path in files}  # of SQLite's index, reading changes bytes
    dry = dry_run(study)
    assert {path: path.read_bytes() for path in before} == before
    assert (dry.trials, dry.epochs, dry.at_once) == (5, 4, 2)
    assert [request.vector for request in in_this_process] == [(8, 8), (2, 2)]
    base, narrowest = dry.measured
    assert base.cost == tiny.space().cost(1.0)
    assert narrowest.cost == tiny.space().cost([2, 2])
    timed = dry_run(tiny.study(tmp_path / "timed", objectives=objectives))
    assert timed.planned[0].latency is None


def test_hours_are_linear_in_macs() -> None:
    """Between the narrowest network and the base, and never less than one of them where wider."""
    dry = runner.DryRun(
        (),
        {},
        (
            runner.MeasuredEpoch("base", tiny.space().cost(1.0), 10.0, 0, None),
            runner.MeasuredEpoch("narrowest", tiny.space().cost(0.25), 4.0, 0, None),
        ),
        trials=36,
        epochs=10,
        at_once=2,
        limit=None,
    )
    trials = [
        tiny.finished(i, tiny.space().base, 1.0, cost=tiny.space().cost(share))
        for i, share in enumerate((0.25, 1.0))
    ]
    assert replace(dry, planned=tuple(trials)).hours == pytest.approx(36 * 10 * 7 / 2 / 3600)


def test_the_longer_trainings_of_scratch_b_count() -> None:
    """A third of the trials, of 10 + 20 · 4 epochs for a quarter of the base's MACs."""
    macs = tiny.space().cost(1.0).macs
    network = tiny.finished(0, tiny.space().base, 1.0, cost=Cost(macs // 4, 9, 9))
    dry = runner.DryRun(
        (network,),
        {},
        (
            runner.MeasuredEpoch("base", Cost(macs // 4 * 4, 9, 9), 10.0, 0, None),
            runner.MeasuredEpoch("narrowest", Cost(1, 9, 9), 10.0, 0, None),
        ),
        trials=36,
        epochs=10,
        at_once=1,
        limit=None,
        starts=("scratch", "extract", "scratch_b"),
        base_epochs=20,
    )
    assert dry.mean_epochs == pytest.approx((10 + 10 + 90) / 3)
    assert dry.hours == pytest.approx(12 * (10 + 10 + 90) * 10 / 3600)
    console = open_console()
    with console.capture() as captured:
        console.print(dry_run_tables("longer", dry))
    assert "3.7 hours for 36 trials of 10 epochs (36.7 in the mean, with scratch_b)" in " ".join(
        captured.get().split()
    )
    short = replace(dry, starts=("scratch", "extract"))
    assert short.mean_epochs == 10


def test_a_metric_that_the_trainer_does_not_report_is_refused_first(
    tmp_path: Path, in_this_process: list[EpochRequest]
) -> None:
    """With the message of a run, before anything is trained."""
    study = tiny.study(tmp_path, metric={"name": "rmse", "goal": "minimize"})
    with pytest.raises(StudyError, match="the built-in trainer reports accuracy and loss for task"):
        dry_run(study)
    assert in_this_process == []


def test_an_own_trainer_is_measured(tmp_path: Path, in_this_process: list[EpochRequest]) -> None:
    """Own methods are run where they say that they train nothing."""
    proposers = ["uniform", "own:small"]
    study = own.study(tmp_path / "own", proposers=proposers, recipe={"epochs": 1}, hours=1e-9)
    dry = dry_run(study)
    assert dry.skipped == {"own:small": "it does not say that it trains nothing"}
    assert [each.name for each in dry.measured] == ["base", "narrowest"]
    assert not (tmp_path / "own").exists()
    console = open_console()
    with console.capture() as captured:
        console.print(dry_run_tables("own", dry))
    printed = " ".join(captured.get().split())
    assert "own: trained before any network is suggested" in printed
    assert "not run: proposer own:small: it does not say that it trains nothing" in printed
    assert " s for 5 trials of 1 epochs, 1 at once" in printed
    assert "about 0 of the 5 trials fit into 1e-09 hours" in printed


def test_a_network_that_cannot_be_trained_is_one_line(
    tmp_path: Path, in_this_process: list[EpochRequest]
) -> None:
    """With the trainer's own fault."""

    def broken(network: Any, trial: Any) -> None:
        raise RuntimeError("no such layer")

    with pytest.raises(StudyError, match="for an epoch, but cannot: RuntimeError: no such layer"):
        dry_run(own.study(tmp_path / "own", trainer=broken))


def test_reports_that_would_fail_every_trial_are_seen(
    tmp_path: Path, in_this_process: list[EpochRequest]
) -> None:
    """A value outside the metric's range, a diverged one, an objective that is not reported."""

    def reporting(value: float) -> Any:
        def train(network: Any, trial: Any) -> None:
            while trial.report({"accuracy": value}):
                pass

        return train

    for value, message in ((120.0, r"must be in its range"), (float("nan"), "diverged")):
        with pytest.raises(StudyError, match=f"for an epoch, but cannot: .*{message}"):
            dry_run(own.study(tmp_path / "own", trainer=reporting(value)))
    objectives = ["accuracy", "macs", "steps"]
    settings = {"trainer": reporting(50.0), "objectives": objectives}
    dry = dry_run(own.study(tmp_path / "own", recipe={"epochs": 3}, **settings))
    assert dry.unreported == ("steps",)
    console = open_console()
    with console.capture() as captured:
        console.print(dry_run_tables("own", dry))
    assert "objective steps was not reported yet" in captured.get()
    with pytest.raises(StudyError, match="objective 'steps' must be reported"):
        dry_run(own.study(tmp_path / "own", recipe={"epochs": 1}, **settings))


def test_a_process_that_dies_is_one_line(tmp_path: Path) -> None:
    """As a trial's process that dies."""

    def fatal(network: Any, trial: Any) -> None:
        os._exit(3)

    with pytest.raises(StudyError, match="its process ended with 3: no message"):
        dry_run(own.study(tmp_path / "own", trainer=fatal))
