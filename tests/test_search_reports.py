"""What a loop of the user's own may report to a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from widthsearch.errors import StudyError
from widthsearch.training.recipe import EpochResult


def epoch(number: int, value: Any = 50.0, **others: Any) -> EpochResult:
    """The result of an epoch."""
    return EpochResult(number, None, value, 1.0, **others)


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        ([], "must have all epochs so far, from 1 to at most 2, but has none"),
        ([epoch(2)], "but has 2"),
        ([epoch(0)], "but has 0"),
        ([epoch(1), epoch(1)], "but has 1, 1"),
        ([epoch(1), epoch(2), epoch(3)], "from 1 to at most 2, but has 1, 2, 3"),
        ([0.3], "but has None"),
        (0.3, "but has none"),
        ([epoch(1, "0.3")], "must have numbers, but: '0.3' is a text"),
        ([epoch(1, torch.ones(2))], "must have numbers, but: "),
        ([epoch(1, metrics={"f1": None})], "must have numbers, but: "),
    ],
)
def test_a_curve_that_is_none_is_refused(tmp_path: Path, curve: Any, message: str) -> None:
    """Before anything is stored: the right curve is recorded afterwards."""
    settings = tiny.config(trials=1, recipe={"epochs": 2, "batch_size": 32})
    with tiny.searching(tmp_path, settings) as search:
        trial = search.ask()
        assert trial is not None
        with pytest.raises(StudyError) as caught:
            search.report(trial.number, curve)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert search.trials[trial.number].curve == ()
        assert search.report(trial.number, [epoch(1)])
        assert not search.report(trial.number, [epoch(1), epoch(2)])


def test_tensors_and_numpy_numbers_are_recorded(tmp_path: Path) -> None:
    """As plain numbers."""
    with tiny.searching(tmp_path, tiny.config(trials=1)) as search:
        trial = search.ask()
        assert trial is not None
        value, f1 = torch.tensor(61.5), np.float32(0.5)
        search.report(trial.number, [epoch(1, value, metrics={"f1": f1})])
        (recorded,) = search.trials[trial.number].curve
    assert (recorded.value, recorded.metrics) == (61.5, {"f1": 0.5})


def test_only_running_trials_are_reported(tmp_path: Path) -> None:
    """By number, within the search."""
    with tiny.searching(tmp_path, tiny.config(trials=2)) as search:
        (first,) = tiny.drive(search, trials=1)
        second = search.ask()
        assert second is not None
        wrong: Any
        for wrong, shown in ((99, "of 99;"), (second, "of a Trial;"), (0, "of 0, which has fin")):
            with pytest.raises(StudyError, match="number of a running trial") as caught:
                search.report(wrong, [epoch(1)])
            assert shown in str(caught.value)
            assert f"running are {second.number}" in str(caught.value)
        with pytest.raises(StudyError, match="of 0, which has finished"):
            search.fail(first.number, "out of patience")
    with pytest.raises(StudyError, match="but that has ended"):
        search.report(second.number, [epoch(1)])
    with pytest.raises(StudyError, match="but that has ended"):
        search.ask()


def test_a_search_that_is_not_entered_says_so(tmp_path: Path) -> None:
    """In one line; nothing has begun, and the study can be driven."""
    study = tiny.study(tmp_path, trials=2)
    search: Any = study.search()
    for use in (lambda: search.ask(), lambda: search.report(0, []), lambda: search.trials):
        with pytest.raises(
            StudyError, match=r"`search` must be entered, `with .*search\(\) as"
        ) as e:
            use()
        assert "\n" not in str(e.value)
    with pytest.raises(StudyError, match="`confirmation` must be entered"):
        study.confirmation().ask()  # type: ignore[attr-defined]
    with search as entered:
        assert entered.ask() is not None
