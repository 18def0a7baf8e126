"""What a person sees."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import tiny
from rich.console import Console, RenderableType

from widthsearch.report import tables as report
from widthsearch.report.console import print_line, print_tables, short
from widthsearch.report.progress import LiveView
from widthsearch.report.space_tables import space_tables
from widthsearch.space.cost import Cost
from widthsearch.study.posterior import AccuracyPosterior
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


def test_members_whose_latency_is_not_shown_to_fall_are_named() -> None:
    """Fewer MACs, no faster beyond two standard errors: said; faster, or with more MACs: not."""
    base = trial(0, 1000, 90.0, 1.0)
    slower = trial(1, 500, 89.0, 1.2)
    same = trial(2, 400, 88.0, 0.995)
    faster = trial(3, 300, 87.0, 0.8)
    wider = trial(4, 2000, 91.0, 1.5)
    said = report.remarks([faster, same, slower, base, wider], base)
    assert said == [  # two standard errors of four pairs: 2 × 1.858 × 0.01 / √4
        "Latency is not shown to fall, though MACs do, on none (id, share of the base's MACs: of "
        "its latency ± two standard errors): 2 (0.40: 0.99 ± 0.02), 1 (0.50: 1.20 ± 0.02)."
    ]
    assert slower.latency is not None
    elsewhere = replace(slower, latency=replace(slower.latency, hardware="another"))
    assert len(report.remarks([same, elsewhere], base)) == 2
    assert report.remarks([faster, wider], base) == []


def test_the_front_volume_by_hand() -> None:
    """A box from (80%, 100) to (90%, 200): two corners, and one member in the middle."""
    low, high = trial(1, 100, 80.0, 1.0), trial(2, 200, 90.0, 1.0)
    middle = trial(3, 150, 88.0, 1.0)
    every = [low, high, middle]
    posterior = AccuracyPosterior(
        every, {"tiny": SpaceRecord.of(tiny.space())}, ("accuracy", "macs")
    )
    assert report.front_volume([low, high], posterior) == pytest.approx(0.0)
    assert report.front_volume([low, middle, high], posterior) == pytest.approx(0.8 * 0.5)
    assert report.front_volume([], posterior) == 0.0


def test_the_front_is_compared_with_baselines_at_equal_cost() -> None:
    """By hand: at 100 MACs 80% against 78%, at 200 MACs 90% against 92%; a loss is a loss."""
    mine = [trial(1, 100, 80.0, 1.0), trial(2, 200, 90.0, 1.0)]
    uniform = {"proposer": "uniform", "family": "linear", "budget": 0.5, "baseline": True}
    rivals = [
        replace(trial(3, 100, 78.0, 1.0), origin=uniform),
        replace(trial(4, 200, 92.0, 1.0), origin=uniform),
        replace(trial(5, 50, 70.0, 1.0), origin=uniform),
    ]
    every = [*mine, *rivals]
    posterior = AccuracyPosterior(
        every, {"tiny": SpaceRecord.of(tiny.space())}, ("accuracy", "macs")
    )
    (line,) = report.comparisons(posterior, every)
    gains = "+0.00 points at equal MACs (-2.00 to +2.00; only 2 can be compared)"
    assert line.startswith(  # nobody else has 50 MACs
        f"Beside uniform widths (3 of them) the best of the other networks have {gains}"
    )
    (line,) = report.comparisons(posterior, every[:3])
    assert "+2.00 points at equal MACs (only 1 can be compared)" in line


def shown(tables: RenderableType, width: int) -> str:
    """What a terminal of so many columns shows."""
    stream = io.StringIO()
    print_tables(Console(file=stream, force_terminal=True, no_color=True, width=width), tables)
    return re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue())


def test_a_narrow_terminal_cuts_no_number() -> None:
    """IDs, accuracies, costs and the names of axes are whole; origins and layers give way."""
    every = [trial(i, 10**i, 70.0 + i, 1.0 / (i + 1)) for i in range(12)]
    posterior = AccuracyPosterior(
        every, {"tiny": SpaceRecord.of(tiny.space())}, ("accuracy", "macs")
    )
    table = report._trial_table("front", every, every[0], posterior)
    for width in (50, 65, 80):
        lines = shown(table, width)
        assert "…" not in lines
        for o in every:
            cells = [str(o.number), f"{o.accuracy:.2f}", f"{posterior.accuracy(o):.2f}"]
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


@pytest.mark.parametrize(
    ("value", "text"), [(1814073344, "1.81G"), (76320, "76.3k"), (2.5e6, "2.5M"), (412, "412")]
)
def test_counts_are_shortened(value: float, text: str) -> None:
    """With the field's suffixes."""
    assert short(value) == text


STAND = Progress(
    done=3, running=2, total=10, best_accuracy=91.25, front_size=2, elapsed=75.0, remaining=3700.0
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
