"""Studies that end before they have all their trials: by their hours, or by their patience."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny

from widthsearch.study.budget import Budget
from widthsearch.study.config import StudyConfig
from widthsearch.study.loop import Search
from widthsearch.study.progress import Progress
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial

HOUR = 3600.0


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        """The time."""
        return self.now


@contextmanager
def searching(
    folder: Path, settings: StudyConfig, clock: Clock, **options: Any
) -> Iterator[tuple[Search, list[Progress]]]:
    """A search with its budget by a clock, and its progress."""
    folder.mkdir(exist_ok=True)
    url, progress = f"sqlite:///{folder / 'study.db'}", list[Progress]()
    store = Store.create(url, settings.name, settings.objectives)
    budget = Budget(settings, store, clock)
    options |= {"budget": budget, "on_progress": progress.append}
    with tiny.searching(folder, settings, **options) as search:
        yield search, progress


def train_for(search: Search, clock: Clock, hours: float, trials: int = 99) -> list[int]:
    """Train trials of so many hours each, one after the other; returns their numbers."""
    numbers: list[int] = []
    while len(numbers) < trials and (trial := search.ask()) is not None:
        numbers.append(trial.number)
        for epoch in range(len(trial.curve) + 1, 5):
            clock.now += hours * HOUR / 4
            search.report(trial.number, tiny.curve(*[50.0] * epoch))
    return numbers


def messages(progress: list[Progress]) -> list[str]:
    """The messages that stay on the screen."""
    return [each.message for each in progress if each.level == "event"]


def test_no_trial_begins_after_the_hours(tmp_path: Path) -> None:
    """The one that runs then is trained to its end; the study says why it ends."""
    clock = Clock()
    with searching(tmp_path, tiny.config(hours=2.5), clock) as (search, progress):
        assert train_for(search, clock, 1.0) == [0, 1, 2]
        assert search.done
        assert search.ended == "its 2.5 hours are over"
    assert messages(progress) == ["its 2.5 hours are over: the study ends after 3 of 6 trials"]
    assert progress[-1].total == 3


def test_hours_count_over_all_runs_without_the_pauses(tmp_path: Path) -> None:
    """A run goes on with the time that is left; more hours are more trials."""
    clock = Clock()

    def run(hours: float, trials: int = 99) -> tuple[list[int], list[str]]:
        clock.now += 100 * HOUR
        with searching(tmp_path, tiny.config(hours=hours), clock) as (search, progress):
            return train_for(search, clock, 1.0, trials), messages(progress)

    assert run(3.5, trials=2)[0] == [0, 1]
    assert run(3.5) == ([2, 3], ["its 3.5 hours are over: the study ends after 4 of 6 trials"])
    assert run(3.5) == ([], ["its 3.5 hours are over: the study ends after 4 of 6 trials"])
    assert run(5) == ([4], ["its 5 hours are over: the study ends after 5 of 6 trials"])
    assert run(100) == ([5], [])


def test_a_trial_that_was_interrupted_is_trained_to_its_end_after_the_hours(tmp_path: Path) -> None:
    """Under its number; a kill forgets a minute at most."""
    clock = Clock()
    with searching(tmp_path, tiny.config(hours=1), clock) as (search, _):
        trial = tiny.ask(search)
        clock.now += 2 * HOUR
        search.report(trial.number, tiny.curve(11, 12))
    with searching(tmp_path, tiny.config(hours=1), clock) as (search, progress):
        assert not search.done
        assert train_for(search, clock, 1.0) == [0]
        assert search.done
    assert messages(progress) == ["its 1 hours are over: the study ends after 1 of 6 trials"]


def test_a_generation_whose_hours_are_over_waits(tmp_path: Path) -> None:
    """What was measured and has not begun to train is trained once there are more hours."""
    clock, settings = Clock(), {"objectives": ["accuracy", "macs", "latency_ms"]}
    measured: list[int] = []

    def measure(trial: Trial, base_ms: float | None) -> Any:
        measured.append(trial.number)
        return tiny.latency(1.0)

    with searching(tmp_path, tiny.config(hours=1.5, **settings), clock, measure=measure) as (
        search,
        progress,
    ):
        assert train_for(search, clock, 1.0) == [0, 1]
        assert search.running == (2, 3, 4)
        assert search.done
    assert messages(progress) == ["its 1.5 hours are over: the study ends after 2 of 6 trials"]
    for hours, numbers in ((1.5, []), (4.5, [2, 3, 4]), (9, [5])):
        more = tiny.config(hours=hours, **settings)
        with searching(tmp_path, more, clock, measure=measure) as (search, _):
            assert train_for(search, clock, 1.0) == numbers
            assert search.done
    assert measured == [0, 1, 2, 3, 4, 5]


def test_the_time_left_is_at_most_that_of_the_hours(tmp_path: Path) -> None:
    """In the live view."""
    clock = Clock()
    with searching(tmp_path, tiny.config(hours=1, trials=60), clock) as (search, progress):
        train_for(search, clock, 0.0, trials=3)
        clock.now += 3599.99
        search.notify()
    assert progress[-1].remaining == pytest.approx(0.01, abs=1e-3)


def test_a_study_without_patience_for_small_gains_ends(tmp_path: Path) -> None:
    """After so many suggestions in a row below the share; not before, and not by the first ones."""
    settings = tiny.config(trials=60, patience={"suggestions": 4, "gain": 0.01})
    with searching(tmp_path, settings, Clock()) as (search, progress):
        tiny.drive(search)
    gains = [trial.origin.get("gain", 1.0) for trial in search.trials.values()]
    assert len(gains) < 40
    assert max(gains[-4:]) < 0.01 <= gains[-5]
    assert all(max(gains[i : i + 4]) >= 0.01 for i in range(len(gains) - 4))
    assert messages(progress) == [
        "each of the last 4 suggestions was expected to add less than 1% to the front's "
        f"hypervolume: the study ends after {len(gains)} of 60 trials"
    ]


def test_patience_goes_on_where_another_run_ended(tmp_path: Path) -> None:
    """A study in pieces ends at the same trial; more patience is more trials."""

    def run(folder: Path, trials: int | None = None, patience: Any = 4) -> list[tuple[int, ...]]:
        settings = tiny.config(trials=60, patience=patience)
        with searching(folder, settings, Clock()) as (search, _):
            tiny.drive(search, trials=trials)
            return [trial.widths.vector for trial in search.trials.values()]

    whole = run(tmp_path / "whole")
    for piece in (7, 5, 1):
        run(tmp_path / "pieces", piece)
    assert run(tmp_path / "pieces") == whole == run(tmp_path / "pieces")
    longer = run(tmp_path / "pieces", patience=8)
    assert longer[: len(whole)] == whole
    assert len(longer) >= len(whole) + 4


def test_patience_does_not_keep_given_networks_from_training(tmp_path: Path) -> None:
    """Nor failed ones that are trained again: it is about suggestions."""
    settings = tiny.config(trials=60, patience=1)
    with searching(tmp_path, settings, Clock()) as (search, _):
        tiny.drive(search)
    done = len(search.trials)
    unseen = next(
        tiny.candidate(a, b, "sensitivity", 0.5)
        for a in range(2, 18, 2)
        for b in range(2, 18, 2)
        if all(trial.widths.vector != (a, b) for trial in search.trials.values())
    )
    candidates = [*tiny.CANDIDATES, unseen]
    with searching(tmp_path, settings, Clock(), candidates=candidates) as (search, _):
        assert [trial.number for trial in tiny.drive(search)] == [done]


def test_the_shorthand_and_the_driver(tmp_path: Path) -> None:
    """``patience: 3``; the time of a study is in its storage."""
    study = tiny.study(tmp_path, patience=3, hours=9, trials=40)
    assert study.config.patience is not None
    assert study.config.patience.suggestions == 3
    progress = tiny.run(study)
    assert "each of the last 3 suggestions" in "\n".join(messages(progress))
    spent = Store.open(study.storage, "tiny").attribute("seconds")
    assert 0 < spent < HOUR
