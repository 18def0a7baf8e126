"""Tables, the lines below them, and the live view."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import tiny
from rich.console import Console, RenderableType

from widthsearch.report import tables as report
from widthsearch.report.console import print_line, print_tables, short
from widthsearch.report.progress import LiveView
from widthsearch.report.space_tables import space_tables
from widthsearch.space.cost import Cost
from widthsearch.study.earlier import EarlierStudy
from widthsearch.study.front import equal_cost_pairs, pick
from widthsearch.study.gains import Gain, baselines, best_baselines, gains
from widthsearch.study.posterior import Estimate, MetricPosterior
from widthsearch.study.progress import Progress
from widthsearch.study.storage import SpaceRecord
from widthsearch.study.trial import Trial


def trial(number: int, macs: int, accuracy: float, milliseconds: float) -> Trial:
    """A finished trial."""
    return tiny.finished(
        number,
        tiny.widths(number + 2, 8),
        accuracy,
        origin={"base": True} if number == 0 else {"sampler": "tpe"},
        cost=Cost(macs, 10, 5),
        latency=tiny.latency(milliseconds),
    )


UNIFORM = {"proposer": "uniform", "family": "linear", "budget": 0.5, "baseline": True}


def posterior_of(trials: Sequence[Trial], *earlier: EarlierStudy) -> MetricPosterior:
    """The posterior of a study of accuracy and MACs with these trials."""
    spaces = {"tiny": SpaceRecord.of(tiny.space())}
    return MetricPosterior(trials, spaces, ("accuracy", "macs"), earlier=earlier)


def test_members_whose_latency_is_not_shown_to_fall_are_named() -> None:
    """Those with fewer MACs that are not faster by more than two standard errors."""
    base = trial(0, 1000, 90.0, 1.0)
    slower = trial(1, 500, 89.0, 1.2)
    same = trial(2, 400, 88.0, 0.995)
    faster = trial(3, 300, 87.0, 0.8)
    wider = trial(4, 2000, 91.0, 1.5)
    remarks = report.latency_remarks([faster, same, slower, base, wider], base)
    assert remarks == [  # two standard errors of four pairs: 2 × 1.858 × 0.01 / √4
        "Fewer MACs, but no significantly lower latency on none (id, MACs/base: ms/base ± two "
        "standard errors): 2 (0.40: 0.99 ± 0.02), 1 (0.50: 1.20 ± 0.02)."
    ]
    assert slower.latency is not None
    elsewhere = replace(slower, latency=replace(slower.latency, hardware="another"))
    assert len(report.latency_remarks([same, elsewhere], base)) == 2
    assert report.latency_remarks([faster, wider], base) == []


def test_the_front_volume_by_hand() -> None:
    """A box from (80%, 100) to (90%, 200): two corners, and one member in the middle."""
    low, high = trial(1, 100, 80.0, 1.0), trial(2, 200, 90.0, 1.0)
    middle = trial(3, 150, 88.0, 1.0)
    every = [low, high, middle]
    posterior = posterior_of(every)
    assert report.front_volume([low, high], posterior) == pytest.approx(0.0)
    assert report.front_volume([low, middle, high], posterior) == pytest.approx(0.8 * 0.5)
    assert report.front_volume([], posterior) == 0.0


def test_rivals_are_paired_with_the_most_accurate_network_that_costs_no_more() -> None:
    """By hand: one at 100 MACs, one at 200 MACs, and a rival that none can be compared with."""
    small, large = trial(1, 100, 80.0, 1.0), trial(2, 200, 90.0, 1.0)
    rivals = [trial(3, 150, 78.0, 1.0), trial(4, 200, 92.0, 1.0), trial(5, 50, 70.0, 1.0)]
    goodness = posterior_of([small, large]).goodness
    assert equal_cost_pairs([small, large], rivals, "macs", goodness) == [
        (small, rivals[0]),
        (large, rivals[1]),
    ]


def test_a_gain_is_a_mean_with_its_90_percent_interval() -> None:
    """Of paired differences under the joint posterior; there is none without a surrogate."""
    found = [trial(i, 10 * i, 80.0 + i + 0.3 * (-1) ** i, 1.0) for i in range(1, 7)]
    rivals = [
        replace(
            tiny.finished(10 + i, tiny.widths(2 + 2 * i, 4), 78.0 + 2 * i, origin=UNIFORM),
            cost=Cost(5 + 30 * i, 10, 5),
        )
        for i in range(3)
    ]
    posterior = posterior_of([*found, *rivals])
    surrogate = posterior.surrogate
    assert surrogate is not None
    pairs = [(found[2], rivals[1]), (found[5], rivals[2])]  # no other network has 5 MACs
    vectors = [t.widths.vector for pair in pairs for t in pair]
    mean, covariance = surrogate.joint_posterior(vectors)
    weights = np.array([0.5, -0.5, 0.5, -0.5])
    gain, half = weights @ mean, 1.645 * math.sqrt(weights @ covariance @ weights)
    (line,) = report.gain_lines(posterior)
    assert line == (
        f"Gain over the best of uniform widths: {gain:+.2f} ±{half:.2f} points at equal MACs (mean "
        "over 2 of 3); ± is its 90% interval."
    )
    assert report.gain_lines(posterior_of([*found[2:], *rivals])) == []  # seven trainings


def test_the_rivals_are_the_best_of_all_baselines() -> None:
    """By hand: of three kinds, those that no other baseline beats at no more MACs."""

    def rival(number: int, proposer: str, macs: int, accuracy: float) -> Trial:
        origin = {**UNIFORM, "proposer": proposer}
        made = tiny.finished(number, tiny.widths(2 * (number - 19), 4), accuracy, origin=origin)
        return replace(made, cost=Cost(macs, 10, 5))

    rivals = [
        rival(20, "uniform", 20, 70.0),
        rival(21, "balanced", 20, 78.0),
        rival(22, "uniform", 40, 82.0),
        rival(23, "random", 50, 72.0),
        rival(24, "taper", 60, 90.0),
    ]
    found = [trial(i, 8 * i, 75.0 + 2 * i, 1.0) for i in range(1, 7)]
    posterior = posterior_of([*rivals, *found])
    best = best_baselines(posterior, "macs")
    goodness = posterior.goodness
    assert best == [
        t
        for t in rivals
        if not any(goodness(o) > goodness(t) and o.cost.macs <= t.cost.macs for o in rivals)
    ]
    assert rivals[1] in best
    assert rivals[0] not in best
    assert [t.number for t in baselines(posterior)] == [20, 21, 22, 23, 24]
    (gain,) = gains(posterior)
    pairs = equal_cost_pairs(found, best, "macs", goodness)
    mean, sd = posterior.mean_difference(pairs)
    assert gain == Gain("macs", mean, sd, len(best), len(best))
    low, high = gain.to_json()["interval"]
    assert (low, high) == pytest.approx((mean - 1.645 * sd, mean + 1.645 * sd))
    (line,) = report.gain_lines(posterior)
    assert line.startswith("Gain over the best of uniform, balanced, taper and random widths: ")


def test_networks_outside_the_limits_are_in_no_comparison() -> None:
    """A base above the limits is no rival, widens no box and is no baseline."""
    found = [trial(i, 10 * i, 80.0 + i + 0.3 * (-1) ** i, 1.0) for i in range(1, 8)]
    uniform = tiny.finished(10, tiny.widths(2, 4), 78.0, origin=UNIFORM, cost=Cost(40, 10, 5))
    every = [trial(0, 500, 95.0, 1.0), *found, uniform]
    records = {"tiny": SpaceRecord.of(tiny.space())}
    inside = MetricPosterior(every, records, ("accuracy", "macs"), {"macs": (0, 100)})
    free = posterior_of(every)
    assert [t.number for t in baselines(inside)] == [10]
    assert [t.number for t in baselines(free)] == [10, 0]
    (line,) = report.gain_lines(inside)
    assert line.startswith("Gain over the best of uniform widths: ")
    assert "(mean over 1 of 1)" in line
    (line,) = report.gain_lines(free)
    assert line.startswith("Gain over the best of uniform widths and the base: ")
    assert "(mean over 2 of 2)" in line
    without = MetricPosterior(every[1:], records, ("accuracy", "macs"), {"macs": (0, 100)})
    span = np.ptp(inside.points(inside.members_within_limits), axis=0)
    assert span[1] == np.ptp(without.points(without.members), axis=0)[1] == 60
    assert report.front_volume(free.front(), free) != report.front_volume(found, inside)


def test_intervals_stay_within_the_range_of_the_accuracy() -> None:
    """Nothing above 100% or below 0%, in tables and in JSON values."""
    posterior = posterior_of([trial(i, 10 * i, min(100.0, 98.5 + 0.3 * i), 1.0) for i in range(10)])
    cut = 0
    for t in posterior.members:
        content = posterior[t].to_json()
        low, high = content["interval"]
        assert 0 <= low < content["accuracy"] <= high <= 100
        text = report.estimate_text(posterior[t])
        if "±" in text:
            assert content["accuracy"] + float(text.split("±")[1]) <= 100.0051
        else:
            cut += 1
            assert high == 100
            assert content["accuracy"] + float(text.split("+")[1]) <= 100.0101
    assert 0 < cut < 10
    assert Estimate(1.0, 2.0, 1).interval == (0.0, pytest.approx(4.29))


def test_footnotes_explain_every_mark() -> None:
    """Columns, intervals, marks and repeated trainings; what is not shown is not explained."""
    trials = [trial(i, 10 * i, 80.0 + i, 1.0) for i in range(1, 9)]
    worse = trial(9, 500, 70.0, 1.0)
    again = replace(worse, number=10, origin={"confirms": 9})
    posterior = posterior_of([*trials, worse, again])
    table = shown(report.trial_table("front", [*trials, worse], None, posterior), 100)
    assert "estimated %" in table
    assert "±" in table
    assert re.search(r" ±\d\.\d\d \(2×\) \? +500", table)
    notes = " ".join(report.footnotes([*trials, worse], posterior))
    assert "± is its 90% interval" in notes
    assert "(n×): the network was trained n times" in notes
    assert "?: P(dominated) is above one half" in notes
    assert ", 9). widthsearch confirm" in notes
    few = " ".join(report.footnotes(trials[:3], posterior_of(trials[:3])))
    assert "intervals need 8 finished trainings" in few
    assert "±" not in few
    assert "P(dominated)" not in few
    learning = posterior_of(trials[:3], EarlierStudy("cheap", {}))
    few = " ".join(report.footnotes(trials[:3], learning))
    assert "intervals and what earlier studies tell need 8" in few


def test_a_limit_on_the_metric_stands_beside_the_interval() -> None:
    """A pick goes by the estimate; other limits are exact, and need no word."""
    posterior = posterior_of([trial(i, 10 * i, 80.0 + i, 1.0) for i in range(1, 10)])
    best = pick(posterior, "best")
    low, _ = posterior[best].interval or (0.0, 0.0)
    value = posterior.value(best)
    (close,) = report.limit_lines(posterior, best, f"accuracy>={value - 0.001}, macs<=1e6")
    assert close.startswith(f"accuracy>={value - 0.001:g}: by the estimate, {value:.2f} ")
    assert close.endswith("reaches beyond the limit.")
    (far,) = report.limit_lines(posterior, best, f"accuracy>={low - 1}")
    assert far.endswith("is within the limit.")
    few = posterior_of([trial(1, 10, 80.0, 1.0)])
    (plain,) = report.limit_lines(few, few.trials[0], "accuracy>=79")
    assert plain == "accuracy>=79: by the estimate, 80.00%."
    for spec in ("best", "1", "macs<=1e6", ""):
        assert report.limit_lines(posterior, best, spec) == []


def shown(tables: RenderableType, width: int) -> str:
    """What a terminal of so many columns shows."""
    stream = io.StringIO()
    print_tables(Console(file=stream, force_terminal=True, no_color=True, width=width), tables)
    return re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue())


def test_a_narrow_terminal_cuts_no_number() -> None:
    """IDs, accuracies, costs and the names of axes are whole; origins and layers give way."""
    every = [trial(i, 10**i, 70.0 + i, 1.0 / (i + 1)) for i in range(12)]
    posterior = posterior_of(every)
    table = report.trial_table("front", every, every[0], posterior)
    for width in (50, 65, 80):
        lines = shown(table, width)
        assert "…" not in lines
        for o in every:
            cells = [str(o.number), f"{o.value:.2f}", f"{posterior.value(o):.2f}"]
            row = next(line.split() for line in lines.splitlines() if cells[1] in line.split())
            assert row[0] == cells[0]
            assert cells[2] in row
            assert short(o.cost.macs) in row
    space = tiny.space()
    lines = shown(space_tables(space), 50)
    assert all(name in lines for name in space.names)


def test_lines_are_said_as_they_are() -> None:
    """Whole, and what looks like markup stays."""
    stream = io.StringIO()
    line = "failed: trial 3: ValueError: [bold] must not be [accuracy, macs] " + "x" * 100
    print_line(Console(file=stream, width=40), line)
    assert stream.getvalue() == line + "\n"


STAND = Progress(
    done=3, running=2, total=10, best_value=91.25, front_size=2, elapsed=75.0, remaining=3700.0
)


def test_a_terminal_shows_one_live_table() -> None:
    """Trials, running, best, front, times."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with LiveView("mine", console) as view:
        view(replace(STAND, message="measuring"))
    shown = stream.getvalue()
    for text in ("mine", "3/10", "91.25", "1:15", "1:01:40", "measuring"):
        assert text in shown


def test_an_estimate_is_named_as_one() -> None:
    """The best accuracy may fall when the surrogate's estimate replaces a mean of trainings."""
    for terminal, text in ((True, "estimated best %"), (False, "estimated best 91.25%")):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=120)
        with LiveView("mine", console) as view:
            view(replace(STAND, estimated=True))
        assert text in stream.getvalue()


def test_a_log_shows_one_line_per_finished_trial() -> None:
    """Not one per epoch."""
    stream = io.StringIO()
    with LiveView("mine", Console(file=stream, width=80)) as view:
        for done in (3, 3, 3, 4):
            view(replace(STAND, done=done))
    assert stream.getvalue().splitlines() == [
        "3/10 trials, best 91.25%, front 2, 1:15 elapsed, 1:01:40 left",
        "4/10 trials, best 91.25%, front 2, 1:15 elapsed, 1:01:40 left",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_events_and_warnings_stay_on_the_screen(terminal: bool) -> None:
    """Once each, whatever they begin with; a status is replaced by the next one."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80)
    with LiveView("mine", console) as view:
        for level in ("event", "warning", "status"):
            view(replace(STAND, message=f"a message of level {level}", level=level))
        view(replace(STAND, message="the next status"))
    text = stream.getvalue()
    shown = text.rpartition("mine")[0] if terminal else text
    assert text.count("a message of level event") == 1
    assert text.count("a message of level warning") == 1
    assert ("\x1b[33ma message of level warning" in text) == terminal
    assert text.count("a message of level status") == int(terminal)
    assert "a message of level event" in shown
