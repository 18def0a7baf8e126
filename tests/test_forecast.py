"""What proposals promise at every size."""

from __future__ import annotations

import math
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
    made = Study(tiny.config(trials=trials, **changes), tiny.space(), tiny.task(), folder=folder)
    with made.search() as search:
        tiny.drive(search)
    return made


def test_every_proposal_is_foretold_at_every_budget(tmp_path: Path) -> None:
    """Its family's member, narrower and wider than the base, with cost and belief."""
    done = study(tmp_path, 16, proposers=["sensitivity"])
    found = forecast(done, (0.25, 1.0, 2.0))
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
        assert abs(each.accuracy - truth) < 4 * each.sd + 0.5
    trained = {trial.widths for trial in done.trials()}
    assert all(each.trained == (each.widths in trained) for each in found)


def test_chances_and_gains_by_hand(tmp_path: Path) -> None:
    """Against the best trained network within the MACs, by the normal distribution."""
    done = study(tmp_path, 12, proposers=["sensitivity"])
    posterior = done.posterior()
    for each in forecast(done, (0.25, 0.5, 1.5)):
        best = max(
            posterior.accuracy(o) for o in posterior.members if o.cost.macs <= each.cost.macs
        )
        z = (each.accuracy - best) / each.sd
        chance = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        assert each.beats_front == pytest.approx(chance)
        assert each.gain == pytest.approx(each.sd * (density + z * chance), abs=1e-9)


def test_the_next_training_is_the_greatest_gain_of_what_is_open(tmp_path: Path) -> None:
    """It is named with its widths; what is trained says so."""
    done = study(tmp_path, 12)
    found = forecast(done)
    open_ = [each for each in found if not each.trained]
    best = max(open_, key=lambda each: each.gain)
    table, line = report.forecast_table(found).renderables
    assert str(dict(best.widths)) in str(line)
    assert table.row_count == len(found)
    assert report.forecast_table([e for e in found if e.trained]).renderables[1:] == []


def test_too_few_trainings_foretell_nothing(tmp_path: Path) -> None:
    """And the error says what to do."""
    with pytest.raises(StudyError, match="too few finished trainings to foretell others: run it"):
        forecast(study(tmp_path, 4))
