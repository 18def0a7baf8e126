"""Trainings that make no report: when they are reported, and when they have hung."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import own
import pytest
import tiny
from torch import nn

from widthsearch.study.hangs import HangWatch
from widthsearch.study.trial import Trial, TrialState
from widthsearch.training.job import TrainingTrial
from widthsearch.training.recipe import EpochResult


class Clock:
    """A clock that tests set."""

    now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def trials(*seconds: float) -> dict[int, Trial]:
    """Two trials, 0 and 1; the first one has epochs of these lengths."""
    curve = tuple(EpochResult(i, 1.0, 50.0, s) for i, s in enumerate(seconds, 1))
    first = tiny.finished(0, tiny.widths(4, 6), 50.0)
    first = replace(first, curve=curve, state=TrialState.RUNNING)
    return {0: first, 1: replace(first, number=1, widths=tiny.widths(8, 2), curve=())}


def silence(watch: HangWatch, clock: Clock, seconds: int, known: dict[int, Trial]) -> list[str]:
    """The warnings in so many seconds, in which the driver checks each second."""
    found = []
    for _ in range(seconds):
        clock.now += 1.0
        found += watch.check(known)
    return found


@pytest.mark.parametrize(
    ("epochs", "after", "times"),
    [((12.0, 10.0, 500.0), 120, 10), ((0.5, 0.5), 60, 120), ((0.0,), 60, 60_000)],
)
def test_a_silent_training_is_reported_once(
    epochs: tuple[float, ...], after: int, times: int
) -> None:
    """After ten median epochs and a minute, with its widths; not before, and not again."""
    clock, known = Clock(), trials(*epochs)
    watch = HangWatch(clock=clock)
    watch.start(1)
    assert silence(watch, clock, after - 1, known) == []
    (warning,) = silence(watch, clock, 2 * after, known)
    assert warning.startswith(
        f"trial 1 with widths [8, 2] has made no report for {after} s, {times} times the median "
    )
    assert watch.hung() == []


def test_a_report_begins_the_count_anew() -> None:
    """A training that reports is not silent; nor is one that has ended."""
    clock, known = Clock(), trials(1.0)
    watch = HangWatch(timeout=90.0, clock=clock)
    watch.start(0)
    watch.start(1)
    assert silence(watch, clock, 59, known) == []
    watch.start(0)
    watch.stop(1)
    assert silence(watch, clock, 59, known) == []
    assert len(silence(watch, clock, 1, known)) == 1
    assert silence(watch, clock, 30, known) == []
    assert watch.hung() == []
    clock.now += 1
    watch.check(known)
    assert watch.hung() == [0]


def test_without_an_epoch_only_the_time_out_counts() -> None:
    """There is no median to compare with."""
    clock, known = Clock(), trials()
    watch = HangWatch(timeout=1000.0, clock=clock)
    watch.start(1)
    assert silence(watch, clock, 1001, known) == []
    assert watch.hung() == [1]


def test_a_driver_that_stands_still_blames_no_training() -> None:
    """Frozen for an hour, it has not read the reports that wait for it."""
    clock, known = Clock(), trials(1.0)
    watch = HangWatch(timeout=30.0, clock=clock)
    watch.start(1)
    clock.now += 3600
    assert watch.check(known) == []
    assert watch.hung() == []


@pytest.mark.ray
def test_a_hung_training_is_ended_by_the_timeout(shared_ray: None, tmp_path: Path) -> None:
    """It fails once, without a retry; the others train on, and its worker process is replaced."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        with (tmp_path / "begun").open("a") as file:
            file.write(f"{trial.widths.vector[0]} ")
        while trial.report({"accuracy": 50.0}):
            if trial.widths.vector == hangs:
                threading.Event().wait()

    hangs = (4,)
    messages: list[str] = []
    study = own.study(tmp_path / "study", trainer=train, timeout=3)
    study.run(lambda progress: messages.append(progress.message))
    hung = [trial for trial in study.trials() if trial.widths.vector == hangs]
    reason = "it made no report within its timeout of 3 s; the widths are [4]"
    assert [trial.error for trial in hung] == [reason]
    assert {t.state for t in study.trials() if t not in hung} == {"finished"}
    assert messages.count(f"trial {hung[0].number} failed: {reason}") == 1
    assert not any("process died" in message for message in messages)
    assert sorted(map(int, (tmp_path / "begun").read_text().split())) == sorted(
        trial.widths.vector[0] for trial in study.trials()
    )
