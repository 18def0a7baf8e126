"""The forecast of each proposal at every size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from widthsearch.api import Study
from widthsearch.errors import StudyError
from widthsearch.proposers import Setting
from widthsearch.proposers.families import scale_proposal
from widthsearch.proposers.uniform import Uniform
from widthsearch.report import tables as report
from widthsearch.report.forecast import forecast


def study(folder: Path, trials: int, **changes: object) -> Study:
    """A study of the tiny space, run by the plain loop: wide is good."""
    made = tiny.study(folder, trials=trials, **changes)
    tiny.run(made)
    return made


def test_every_proposal_has_a_forecast_at_every_budget(tmp_path: Path) -> None:
    """Its family's member, narrower and wider than the base, with cost and estimate."""
    done = study(tmp_path, 16, proposers=["sensitivity"])
    found = forecast(done, done.posterior(), (0.25, 1.0, 2.0))
    of = {(each.origin["proposer"], each.origin["budget"]) for each in found}
    assert of >= {("sensitivity", 0.25), ("sensitivity", 1.0), ("sensitivity", 2.0)}
    assert ("uniform", 0.25) in of  # at 1 and 2 it has the widths of the other one
    assert len({each.widths for each in found}) == len(found)
    space = tiny.space()
    base = space.cost(space.base).macs
    uniform = Uniform()(space, tiny.task(), Setting())
    for each in found:
        assert each.cost == space.cost(each.widths)
        if each.origin["proposer"] == "uniform":
            assert each.widths == scale_proposal(space, uniform, each.origin["budget"] * base)
        truth = 2.0 * sum(each.widths.vector) + 4  # after four epochs
        sd = each.estimate.sd
        assert sd is not None
        assert abs(each.estimate.value - truth) < 4 * sd + 0.5
    trained = {trial.widths for trial in done.trials()}
    assert all(each.trained == (each.widths in trained) for each in found)


def test_chances_and_gains_by_hand(tmp_path: Path) -> None:
    """Against the best trained network within the MACs, by the normal distribution."""
    done = study(tmp_path, 12, proposers=["sensitivity"])
    posterior = done.posterior()
    for each in forecast(done, done.posterior(), (0.25, 0.5, 1.5)):
        best = max(posterior.value(o) for o in posterior.members if o.cost.macs <= each.cost.macs)
        sd = each.estimate.sd
        assert sd is not None
        z = (each.estimate.value - best) / sd
        chance = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        assert each.beats_front == pytest.approx(chance)
        assert each.gain == pytest.approx(sd * (density + z * chance), abs=1e-9)


def test_the_next_training_is_the_greatest_gain_within_the_trained_sizes(tmp_path: Path) -> None:
    """It is named with its widths; trained and extrapolated members are marked, and not named."""
    done = study(tmp_path, 12)
    found = forecast(done, done.posterior())
    open_ = [each for each in found if not (each.trained or each.extrapolated)]
    best = max(open_, key=lambda each: each.gain)
    table, *lines = report.forecast_table(found).renderables
    assert str(dict(best.widths)) in str(lines[-1])
    assert table.row_count == len(found)
    (note,) = report.forecast_table([e for e in found if e.trained]).renderables[1:]
    assert str(note).startswith("P(beats front): ")


def test_beyond_the_trained_sizes_a_forecast_is_extrapolated(tmp_path: Path) -> None:
    """MACs outside of those of the finished trials, or a width more than a step outside."""
    done = study(tmp_path, 9, budgets=[0.25, 0.5], limits={"macs": [0, 4500]}, baselines=0.5)
    found = forecast(done, done.posterior(), (0.05, 0.1, 0.25, 0.4, 0.75, 1.0, 1.5, 2.0))
    members = done.posterior().members
    macs = [member.cost.macs for member in members]
    ends = [
        (min(widths) - 2, max(widths) + 2)
        for widths in zip(*(member.widths.vector for member in members), strict=True)
    ]
    for each in found:
        within = [low <= w <= high for w, (low, high) in zip(each.widths.vector, ends, strict=True)]
        inside = all(within) and min(macs) <= each.cost.macs <= max(macs)
        assert each.extrapolated == (not inside)
        assert each.within_limits == (each.cost.macs <= 4500)
    assert {each.extrapolated for each in found if not each.trained} == {False, True}
    widest = max(found, key=lambda each: each.cost.macs)
    assert widest.extrapolated
    assert widest.gain == max(each.gain for each in found)
    table, _, note, limited, advice = report.forecast_table(found).renderables
    assert str(limited).startswith("†: outside the study's limits")
    assert sum(str(cell).endswith(" *") for cell in table.columns[2].cells) == sum(
        each.extrapolated for each in found
    )
    assert str(note).startswith("*: extrapolated")
    assert str(dict(widest.widths)) not in str(advice)
    advice_less = report.forecast_table([each for each in found if each.extrapolated]).renderables
    assert len(advice_less) == 4


def test_the_advice_is_within_the_limits_and_names_its_space(tmp_path: Path) -> None:
    """A member above the limits has a mark, and the greatest gain of the others is advised."""
    done = study(tmp_path, 12)
    found = [replace(each, extrapolated=False) for each in forecast(done, done.posterior())]
    open_ = [each for each in found if not each.trained]
    best, second = sorted(open_, key=lambda each: -each.gain)[:2]
    limited = [replace(e, within_limits=e is not best) for e in found]
    limited.append(replace(second, space="other", gain=second.gain + 0.01))
    table, *lines = report.forecast_table(limited).renderables
    assert sum("†" in str(cell) for cell in table.columns[3].cells) == 1
    assert f"×0.1 of other, {dict(second.widths)}, expected gain" in str(lines[-1])


def test_a_forecast_stays_within_the_range_of_the_accuracy(tmp_path: Path) -> None:
    """Also where noise and trend lead above 100%; the gain ends there too."""
    made = tiny.study(tmp_path, trials=12)
    tiny.run(made, lambda trial, _: 98.0 + trial.number % 3)
    found = forecast(made, made.posterior())
    assert max(each.estimate.value + 1.645 * (each.estimate.sd or 0.0) for each in found) > 100
    for each in found:
        content = each.to_json()["estimated"]
        low, high = content["interval"]
        assert 0 <= low <= content["accuracy"] <= high <= 100


def test_too_few_trainings_give_no_forecast(tmp_path: Path) -> None:
    """The error names the number that is needed."""
    done = study(tmp_path, 4)
    with pytest.raises(
        StudyError, match=r"needs 8 finished trials, but .* has 4: run it with more `trials`"
    ):
        forecast(done, done.posterior())
