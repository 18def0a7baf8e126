"""What a person sees."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import tiny
from rich.console import Console

from widthsearch import report
from widthsearch.beliefs import Beliefs
from widthsearch.cost import Cost
from widthsearch.outcomes import Outcome
from widthsearch.search import Progress
from widthsearch.storage import SpaceRecord


def outcome(number: int, macs: int, accuracy: float, milliseconds: float) -> Outcome:
    """A finished outcome."""
    return Outcome(
        id=number,
        space="tiny",
        widths=tiny.widths(number + 2, 8),
        state="finished",
        origin={"base": True} if number == 0 else {"sampler": "tpe"},
        seed=0,
        cost=Cost(macs, 10, 5),
        latency=tiny.latency(milliseconds),
        accuracy=accuracy,
        curve=tiny.curve(accuracy),
    )


def test_members_whose_latency_did_not_fall_are_named() -> None:
    """Fewer MACs, no faster beyond the spread: said; faster, or with more MACs: not."""
    base = outcome(0, 1000, 90.0, 1.0)
    slower = outcome(1, 500, 89.0, 1.2)
    same = outcome(2, 400, 88.0, 0.995)
    faster = outcome(3, 300, 87.0, 0.8)
    wider = outcome(4, 2000, 91.0, 1.5)
    said = report.remarks([faster, same, slower, base, wider], base)
    assert [line.split(":")[0] for line in said] == ["2", "1"]
    assert said[1] == (
        "1: 50% fewer MACs than the base, but latency did not fall: 1.20 ± 0.01 of the base's on "
        "none."
    )


def test_the_front_volume_by_hand() -> None:
    """A box from (80%, 100) to (90%, 200): two corners, and one member in the middle."""
    low, high = outcome(1, 100, 80.0, 1.0), outcome(2, 200, 90.0, 1.0)
    middle = outcome(3, 150, 88.0, 1.0)
    every = [low, high, middle]
    beliefs = Beliefs(every, {"tiny": SpaceRecord.of(tiny.space())}, ("accuracy", "macs"))
    assert report.front_volume([low, high], beliefs) == pytest.approx(0.0)
    assert report.front_volume([low, middle, high], beliefs) == pytest.approx(0.8 * 0.5)
    assert report.front_volume([], beliefs) == 0.0


def test_the_front_is_compared_with_baselines_at_equal_cost() -> None:
    """By hand: at 100 MACs 80% against 78%, at 200 MACs 90% against 92%; a loss is a loss."""
    mine = [outcome(1, 100, 80.0, 1.0), outcome(2, 200, 90.0, 1.0)]
    uniform = {"proposer": "uniform", "family": "linear", "budget": 0.5, "baseline": True}
    rivals = [
        replace(outcome(3, 100, 78.0, 1.0), origin=uniform),
        replace(outcome(4, 200, 92.0, 1.0), origin=uniform),
        replace(outcome(5, 50, 70.0, 1.0), origin=uniform),
    ]
    every = [*mine, *rivals]
    beliefs = Beliefs(every, {"tiny": SpaceRecord.of(tiny.space())}, ("accuracy", "macs"))
    (line,) = report.comparisons(beliefs, every)
    gains = "+0.00 points at equal MACs (-2.00 to +2.00)"  # nobody else has 50 MACs
    assert line.startswith(
        f"Beside uniform widths (3 of them) the best of the other networks have {gains}"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(1814073344, "1.81G"), (76320, "76.3k"), (2.5e6, "2.5M"), (412, "412")]
)
def test_counts_are_shortened(value: float, text: str) -> None:
    """With the field's suffixes."""
    assert report.short(value) == text


STAND = Progress(
    done=3, running=2, total=10, best_accuracy=91.25, front_size=2, elapsed=75.0, remaining=3700.0
)


def test_a_terminal_shows_one_live_table() -> None:
    """Trials, running, best, front, times."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with report.LiveView("mine", console) as view:
        view(replace(STAND, message="measuring"))
    shown = stream.getvalue()
    for text in ("mine", "3/10", "91.25", "1:15", "1:01:40", "measuring"):
        assert text in shown


def test_a_log_shows_one_line_per_finished_trial() -> None:
    """Not one per epoch."""
    stream = io.StringIO()
    with report.LiveView("mine", Console(file=stream, width=80)) as view:
        for done in (3, 3, 3, 4):
            view(replace(STAND, done=done))
    assert stream.getvalue().splitlines() == [
        "3/10 trials, best 91.25%, front 2, 1:15 elapsed, 1:01:40 left",
        "4/10 trials, best 91.25%, front 2, 1:15 elapsed, 1:01:40 left",
    ]
