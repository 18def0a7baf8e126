"""The loop without an engine, driven by a plain loop over invented accuracies."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from widthsearch.errors import DeviceError, StudyError
from widthsearch.latency.config import Latency
from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.loop import FAILURES_IN_A_ROW
from widthsearch.study.posterior import MetricPosterior
from widthsearch.study.progress import Progress
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial, unresolved_failures

OBJECTIVES = ["accuracy", "macs", "latency_ms"]


def test_base_then_families_then_suggestions(tmp_path: Path) -> None:
    """As many as are configured, none twice, each with its origin."""
    with tiny.searching(tmp_path, tiny.config(trials=9)) as search:
        asked = tiny.drive(search)
        assert search.ask() is None
        assert search.done
    assert [trial.number for trial in asked] == list(range(9))
    assert [trial.widths for trial in asked[:5]] == [
        tiny.widths(8, 8),
        *[candidate.widths for candidate in tiny.CANDIDATES],
    ]
    assert [trial.origin for trial in asked[:5]] == [
        {"base": True},
        *[candidate.origin for candidate in tiny.CANDIDATES],
    ]
    assert all(trial.origin["sampler"] == "search" for trial in asked[5:])
    assert len({trial.widths for trial in asked}) == 9
    assert len({trial.seed for trial in asked}) == 9
    assert all(trial.cost == tiny.space().cost(trial.widths) for trial in asked)


def test_a_queue_longer_than_the_study_is_cut(tmp_path: Path) -> None:
    """Three trials: the base model and two candidates."""
    with tiny.searching(tmp_path, tiny.config(trials=3)) as search:
        assert [trial.widths for trial in tiny.drive(search)] == [
            tiny.widths(8, 8),
            tiny.widths(4, 4),
            tiny.widths(2, 8),
        ]


@pytest.mark.parametrize("objectives", [["accuracy", "macs"], OBJECTIVES])
def test_the_worse_of_two_spaces_gets_few_trials(tmp_path: Path, objectives: list[str]) -> None:
    """Same costs, 30 points less; with and without kills in between."""
    spaces = {name: tiny.space(name) for name in ("tiny", "poor")}
    options = {"spaces": spaces, "candidates": []}
    if "latency_ms" in objectives:
        options["measure"] = lambda trial, base_ms: tiny.latency(trial.cost.macs / 1e4)

    def accuracy(trial: Trial, epoch: int) -> float:
        return tiny.wide_is_good(trial, epoch) / 2 + (0 if trial.space == "poor" else 30)

    def asked(folder: Path, pieces: tuple[int, ...]) -> list[tuple[int, str, tuple[int, ...]]]:
        trials = []
        for piece in pieces:
            settings = tiny.config(trials=20, objectives=objectives)
            with tiny.searching(folder, settings, **options) as search:
                trials += tiny.drive(search, accuracy, trials=piece)
        return [(trial.number, trial.space, trial.widths.vector) for trial in trials]

    whole = asked(tmp_path / "whole", (20,))
    assert sum(space == "poor" for _, space, _ in whole) <= 6
    if "latency_ms" not in objectives:
        assert asked(tmp_path / "pieces", (7, 1, 12)) == whole


def test_failed_trials_are_retried_on_request(tmp_path: Path) -> None:
    """First, under new numbers; each counts once, and is a failure only if it fails again."""
    settings = tiny.config(trials=6)

    def run(*, retry: bool, broken: bool) -> list[tuple[int, int]]:
        asked = []
        with tiny.searching(tmp_path, settings, retry=retry) as search:
            while (trial := search.ask()) is not None:
                asked.append((trial.number, trial.widths.vector[0]))
                if broken and trial.widths.vector[0] == 4:
                    search.fail(trial.number, "a bug")
                    continue
                for epoch in range(1, 5):
                    search.report(trial.number, tiny.curve(*[50.0] * epoch))
            after.update(search.trials)
        return asked

    after: dict[int, Trial] = {}
    first = run(retry=False, broken=True)
    assert len(first) == 6
    failed = [number for number, width in first if width == 4]
    assert len(failed) >= 2
    assert [o.number for o in unresolved_failures([*after.values()])] == failed
    assert run(retry=False, broken=False) == []
    assert run(retry=True, broken=False) == [(6 + i, 4) for i in range(len(failed))]
    assert [after[6 + i].widths for i in range(len(failed))] == [
        after[number].widths for number in failed
    ]
    assert unresolved_failures([*after.values()]) == []
    assert run(retry=True, broken=False) == []


def test_failed_trials_outside_the_limits_are_not_retried(tmp_path: Path) -> None:
    """Limits that were narrowed later bind them too, but for the base; a line names them."""
    study = tiny.study(tmp_path)
    with study.search() as search:
        while (trial := search.ask()) is not None:
            search.fail(trial.number, "a bug")
            search._failures = 0
    failed = {trial.number: trial for trial in search.trials.values()}
    macs = sorted(trial.cost.macs for trial in failed.values())
    messages: list[str] = []
    limited = tiny.study(tmp_path, limits={"macs": (0, macs[2])})
    with limited.search(lambda progress: messages.append(progress.message), retry=True) as search:
        again = tiny.drive(search)
    outside = [n for n, trial in failed.items() if trial.cost.macs > macs[2] and n > 0]
    assert outside
    assert {t.widths for t in again} == {t.widths for n, t in failed.items() if n not in outside}
    numbers = ", ".join(map(str, outside))
    assert f"not trained again, since outside the limits: trials {numbers}" in messages


def test_same_seed_same_study(tmp_path: Path) -> None:
    """The same widths, in the same order, with the same seeds; and another seed gives others."""

    def asked(name: str, seed: int) -> list[tuple[tuple[int, ...], int]]:
        with tiny.searching(tmp_path / name, tiny.config(trials=16, seed=seed)) as search:
            return [(trial.widths.vector, trial.seed) for trial in tiny.drive(search)]

    one = asked("one", 0)
    assert asked("two", 0) == one
    assert asked("three", 1) != one


def test_a_search_continues_where_another_one_ended(tmp_path: Path) -> None:
    """After any trial: the others are the same as without the break, none is doubled or lost."""
    with tiny.searching(tmp_path / "whole", tiny.config(trials=14)) as search:
        whole = [(t.number, t.widths, t.origin, t.seed) for t in tiny.drive(search)]
    pieces = []
    for piece in (2, 5, 1, 20):
        with tiny.searching(tmp_path, tiny.config(trials=14)) as search:
            pieces += tiny.drive(search, trials=piece)
    assert [(t.number, t.widths, t.origin, t.seed) for t in pieces] == whole


def test_a_running_trial_continues_under_its_number(tmp_path: Path) -> None:
    """With its curve; and it counts once."""
    with tiny.searching(tmp_path, tiny.config()) as search:
        tiny.drive(search, trials=2)
        left = tiny.ask(search)
        search.report(left.number, tiny.curve(11, 12))
    with tiny.searching(tmp_path, tiny.config()) as search:
        assert search.running == (2,)
        asked = tiny.drive(search)
    assert [trial.number for trial in asked] == [2, 3, 4, 5]
    assert asked[0].curve == tiny.curve(11, 12)
    assert list(search.trials) == list(range(6))


def test_a_finished_study_begins_no_trial(tmp_path: Path) -> None:
    """With a larger number of trials it begins the difference."""
    with tiny.searching(tmp_path, tiny.config(trials=3)) as search:
        tiny.drive(search)
    with tiny.searching(tmp_path, tiny.config(trials=3)) as search:
        assert search.done
        assert search.ask() is None
    with tiny.searching(tmp_path, tiny.config(trials=5)) as search:
        assert [trial.number for trial in tiny.drive(search)] == [3, 4]


def test_an_exhausted_space_ends_the_study(tmp_path: Path) -> None:
    """An 8 × 8 grid has 64 width vectors, and the study is to have 70 trials."""
    progress: list[Progress] = []
    settings = tiny.config(trials=70, recipe={"epochs": 1})
    with tiny.searching(tmp_path, settings, on_progress=progress.append) as search:
        while (trial := search.ask()) is not None:
            search.report(trial.number, tiny.curve(10))
        assert search.done
    assert len({trial.widths for trial in search.trials.values()}) == 64
    assert progress[-1].total == 64
    assert progress[-1].level == "event"
    assert progress[-1].message == (
        "every width vector of the space has been tried: the study ends after 64 of 70 trials"
    )


def test_a_failed_trial_counts_and_the_study_continues(tmp_path: Path) -> None:
    """Its reason is kept; NaN is a failure too, with its curve."""
    with tiny.searching(tmp_path, tiny.config()) as search:
        first, second = tiny.ask(search), tiny.ask(search)
        search.fail(first.number, "RuntimeError: no")
        assert not search.report(second.number, tiny.curve(10, math.nan))
        tiny.drive(search)
    with tiny.searching(tmp_path, tiny.config()) as search:
        trials = search.trials
    assert len(trials) == 6
    assert (trials[0].error or "").startswith("RuntimeError: no; the widths are [")
    assert (trials[1].error or "").startswith("training diverged in epoch 2: its accuracy is nan")
    assert len(trials[1].curve) == 2
    assert [trial.state for trial in trials.values()][2:] == ["finished"] * 4


def test_failures_in_a_row_stop_the_study(tmp_path: Path) -> None:
    """A broken machine must not use up the queue; failures between other trials do not count."""
    with tiny.searching(tmp_path, tiny.config(trials=30)) as search:
        for _ in range(FAILURES_IN_A_ROW - 1):
            trial = tiny.ask(search)
            search.fail(trial.number, "no")
        tiny.drive(search, trials=1)
        for _ in range(FAILURES_IN_A_ROW - 1):
            trial = tiny.ask(search)
            search.fail(trial.number, "no")
        trial = tiny.ask(search)
        with pytest.raises(StudyError) as caught:
            search.fail(trial.number, "RuntimeError: the disk burns")
    assert str(caught.value).startswith(
        "5 candidates failed in a row, so study 'tiny' stops; the last one, trial 9: "
        "RuntimeError: the disk burns; the widths are ["
    )
    with tiny.searching(tmp_path, tiny.config(trials=30)) as search:
        assert len(search.trials) == 10
        assert search.ask() is not None


class Bench:
    """Measures, as if; and sees to it that nothing of the study trains meanwhile."""

    def __init__(self, training: Callable[[], int]) -> None:
        self.training = training
        self.measured: list[int] = []
        self.bases: list[float | None] = []

    def __call__(self, trial: Trial, base_ms: float | None) -> Latency:
        """The fewer channels the faster."""
        assert self.training() == 0
        self.measured.append(trial.number)
        self.bases.append(base_ms)
        return tiny.latency(float(sum(trial.widths.vector)))


def test_a_generation_is_measured_while_nothing_trains(tmp_path: Path) -> None:
    """The queue, then twice as many as train at once; none begins before all have ended."""
    training: set[int] = set()
    bench = Bench(lambda: len(training))
    settings = tiny.config(objectives=OBJECTIVES, trials=11, concurrency=2)
    with tiny.searching(tmp_path, settings, measure=bench) as search:
        generations: list[list[int]] = []
        while not search.done:
            generation = []
            while (trial := search.ask()) is not None:
                assert trial.latency == tiny.latency(float(sum(trial.widths.vector)))
                training.add(trial.number)
                generation.append(trial.number)
            for number in generation:
                assert search.ask() is None
                assert not search.report(number, tiny.curve(1, 2, 3, 4))
                training.discard(number)
            generations.append(generation)
    assert generations == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert bench.measured == list(range(11))
    assert bench.bases == [None] + [1.0] * 10


def test_a_kill_while_measuring_loses_no_measurement(tmp_path: Path) -> None:
    """Measurements are kept, and the missing ones come before anything trains."""
    settings = tiny.config(objectives=OBJECTIVES)
    bench = Bench(lambda: 0)

    def interrupted(trial: Trial, base_ms: float | None) -> Latency:
        if trial.number == 2:
            raise KeyboardInterrupt
        return bench(trial, base_ms)

    with (
        tiny.searching(tmp_path, settings, measure=interrupted) as search,
        pytest.raises(KeyboardInterrupt),
    ):
        search.ask()
    assert bench.measured == [0, 1]
    with tiny.searching(tmp_path, settings, measure=bench) as search:
        assert search.running == (0, 1, 2, 3, 4)
        trial = tiny.ask(search)
        assert trial.number == 0
        assert bench.measured == [0, 1, 2, 3, 4]
        assert bench.bases == [None, 1.0, 1.0, 1.0, 1.0]


def test_a_candidate_that_cannot_be_measured_fails(tmp_path: Path) -> None:
    """A missing device is no candidate's fault: it ends the study with an error."""

    def measure(trial: Trial, base_ms: float | None) -> Latency:
        if trial.number == 1:
            raise RuntimeError("no kernel\nfor this")
        return tiny.latency(1.0)

    def no_device(trial: Trial, base_ms: float | None) -> Latency:
        raise DeviceError("there is no cuda:7")

    settings = tiny.config(objectives=OBJECTIVES)
    with tiny.searching(tmp_path, settings, measure=measure) as search:
        tiny.ask(search)
        assert search.trials[1].error.startswith("RuntimeError: no kernel; the widths are [")
    with (
        tiny.searching(tmp_path / "other", settings, measure=no_device) as search,
        pytest.raises(DeviceError, match="there is no cuda:7"),
    ):
        search.ask()


STOPPING = {"kind": "rungs", "first_epoch": 1, "eta": 2}


def test_a_rung_keeps_non_dominated_networks(tmp_path: Path) -> None:
    """A small poor network continues, since none is smaller; a large poor one is stopped.

    By accuracy alone the small one would be stopped.
    """
    candidates = [tiny.candidate(w, w, "random", 1.0) for w in (12, 10, 2, 14)]
    settings = tiny.config(early_stopping=STOPPING, trials=5)
    accuracy = {8: 50.0, 12: 60.0, 10: 40.0, 2: 20.0, 14: 30.0}
    with tiny.searching(tmp_path, settings, candidates=candidates) as search:
        tiny.drive(search, lambda trial, epoch: accuracy[trial.widths["first"]])
    states = {o.widths["first"]: (o.state, len(o.curve)) for o in search.trials.values()}
    assert states == {
        8: ("finished", 4),
        12: ("finished", 4),
        10: ("stopped", 1),
        2: ("finished", 4),
        14: ("stopped", 1),
    }
    assert search.trials[2].value is None


def test_base_and_baselines_are_never_stopped(tmp_path: Path) -> None:
    """The front is compared with them, however poor they are."""
    settings = tiny.config(early_stopping=STOPPING, trials=5)
    candidates = [
        tiny.candidate(2, 2, "random", 1.0),
        tiny.candidate(2, 4, "random", 1.0),
        tiny.candidate(12, 12, "uniform", 1.0),
        tiny.candidate(14, 14, "random", 1.0),
    ]
    with tiny.searching(tmp_path, settings, candidates=candidates) as search:
        tiny.drive(search, lambda trial, epoch: 90.0 if trial.number in (1, 2) else 10.0)
    states = [trial.state for trial in search.trials.values()]
    assert states == ["finished", "finished", "finished", "finished", "stopped"]


def test_rungs_are_rebuilt_from_the_storage(tmp_path: Path) -> None:
    """A search made anew at every trial decides like one without a break."""
    settings = tiny.config(early_stopping=STOPPING, trials=20, recipe={"epochs": 6})

    def accuracy(trial: Trial, epoch: int) -> float:
        return (trial.number * 37 % 50) + epoch

    with tiny.searching(tmp_path / "whole", settings) as search:
        tiny.drive(search, accuracy)
        whole = list(search.trials.values())
    for _ in range(20):
        with tiny.searching(tmp_path, settings) as search:
            tiny.drive(search, accuracy, trials=1)
    with tiny.searching(tmp_path, settings) as search:
        assert list(search.trials.values()) == whole
    assert {trial.state for trial in whole} == {"finished", "stopped"}
    assert {len(o.curve) for o in whole if o.state == "stopped"} <= {1, 2, 4}


def test_an_epoch_may_be_reported_again(tmp_path: Path) -> None:
    """After a restart a worker repeats its last epoch, or begins again; the last curve counts."""
    with tiny.searching(tmp_path, tiny.config()) as search:
        trial = tiny.ask(search)
        for curve in (tiny.curve(1, 2), tiny.curve(1, 2), tiny.curve(5), tiny.curve(5, 6, 7, 8)):
            search.report(trial.number, curve)
    assert search.trials[0].curve == tiny.curve(5, 6, 7, 8)


def test_progress_after_each_trial(tmp_path: Path) -> None:
    """Counts, the front, and the time left at this run's pace."""
    progress: list[Progress] = []
    with tiny.searching(tmp_path, tiny.config(trials=4), on_progress=progress.append) as search:
        tiny.drive(search, trials=2)
        assert (progress[-1].done, progress[-1].running, progress[-1].total) == (2, 0, 4)
        assert progress[-1].best_value == 36.0  # the base model: 2 × 16 channels + 4 epochs
        assert progress[-1].front_size == 2
        assert progress[0].remaining is None
        assert progress[-1].remaining is not None
        search.ask()
        search.fail(2, "no")
    assert progress[-1].message.startswith("trial 2 failed: no; the widths are [")
    assert progress[-1].level == "warning"


def test_the_posterior_on_display_lags_by_half_a_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact below 200 trials and at the end; the property stands for it, as its trials' number."""
    monkeypatch.setattr(MetricPosterior, "best_value", property(lambda p: len(p.trials)))
    monkeypatch.setattr(MetricPosterior, "front", lambda p: [])
    fine = SearchSpace.from_model(tiny.Net, (1, 4, 4), name="tiny", max_width=2.0, step=1)
    grid = [Candidate("tiny", tiny.widths(a, b), {}) for a in range(2, 17) for b in range(2, 17)]
    shown: dict[int, Progress] = {}
    options = {"spaces": {"tiny": fine}, "candidates": grid}
    settings = tiny.config(trials=206, recipe={"epochs": 1})
    with tiny.searching(
        tmp_path, settings, on_progress=lambda p: shown.update({p.done: p}), **options
    ) as search:
        tiny.drive(search)
    lags = [done - (progress.best_value or 0) for done, progress in shown.items()]
    assert lags == [0] * 199 + [1, 0, 1, 0, 1, 0, 0]


def test_a_driver_that_lost_its_lock_stops(tmp_path: Path) -> None:
    """It neither begins a trial nor records an epoch, and ends with the error."""
    took_over = "process 7 on elsewhere took over 'tiny'"
    searching = tiny.searching(tmp_path, tiny.config())
    with pytest.raises(StudyError, match=took_over), searching as search:
        trial = tiny.ask(search)
        fence = Store.open(search._store.url, "tiny").fence
        assert fence.take(fence.read(), 0, {"host": "elsewhere", "pid": 7})
        for step in (search.ask, lambda: search.report(trial.number, tiny.curve(1))):
            with pytest.raises(StudyError, match=took_over):
                step()
    assert Store.open(search._store.url, "tiny").trials({"tiny": tiny.space()}) == [trial]


def test_front_aware_stopping(tmp_path: Path) -> None:
    """A network far below others that are no larger is stopped; good ones are not.

    Nothing is stopped before some are finished, and never the base and the baselines.
    """
    settings = tiny.config(
        early_stopping={"kind": "front", "finished": 3}, trials=7, recipe={"epochs": 8}
    )
    candidates = [
        tiny.candidate(4, 4, "random", 0.2),
        tiny.candidate(6, 6, "random", 0.4),
        tiny.candidate(10, 10, "random", 1.4),
        tiny.candidate(8, 10, "random", 1.2),
        tiny.candidate(12, 12, "uniform", 2.0),
        tiny.candidate(12, 10, "random", 1.8),
    ]
    final = {(8, 10): 45.0, (12, 12): 45.0, (12, 10): 92.0}

    def accuracy(trial: Trial, epoch: int) -> float:
        ours = 3.0 * sum(trial.widths.vector) + 30.0
        return final.get(trial.widths.vector, ours) - 20.0 * 0.6**epoch

    with tiny.searching(tmp_path, settings, candidates=candidates) as search:
        tiny.drive(search, accuracy)
    states = {o.widths.vector: (o.state, len(o.curve) < 8) for o in search.trials.values()}
    assert states.pop((8, 10)) == ("stopped", True)
    assert set(states.values()) == {("finished", False)}


def test_a_trial_out_of_memory_is_trained_again_alone(tmp_path: Path) -> None:
    """It waits for the others, nothing begins beside it, and then the study continues."""
    progress: list[Progress] = []
    with tiny.searching(tmp_path, tiny.config(trials=4), on_progress=progress.append) as search:
        first, second, third = (tiny.ask(search).number for _ in range(3))
        assert search.retry_alone(first)
        assert progress[-1].message == (
            "trial 0 ran out of memory; it will be trained again by itself"
        )
        assert search.retry_alone(third)
        assert search.ask() is None  # the second one is being trained
        search.report(second, tiny.curve(1, 2, 3, 4))
        again = tiny.ask(search)
        assert again.number == first
        assert search.is_alone(first)
        assert search.ask() is None
        assert not search.retry_alone(first)  # once
        search.fail(first, "no memory")
        last = tiny.ask(search)
        assert last.number == third
        assert search.ask() is None
        search.report(third, tiny.curve(1, 2, 3, 4))
        new = tiny.ask(search)
        assert new.number == 3
        assert not search.is_alone(3)
    states = {number: trial.state for number, trial in search.trials.items()}
    assert states == {0: "failed", 1: "finished", 2: "finished", 3: "running"}
