"""Confirmation: finalists are trained again with fresh seeds, and nothing else is."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from rich.console import Console

from widthsearch.api import Study
from widthsearch.errors import StudyError
from widthsearch.report import tables
from widthsearch.study.progress import Progress
from widthsearch.study.trial import Trial


def noisy(trial: Trial, epoch: int) -> float:
    """An accuracy of the widths plus noise of the seed."""
    first, second = trial.widths.vector
    noise = np.random.default_rng(trial.seed).standard_normal()
    return min(99.0, 60 + 4 * float(np.log2(first)) + 2 * float(np.log2(second)) + noise)


def make(folder: Path, trials: int = 16) -> Study:
    """A finished study of the tiny space."""
    study = tiny.study(folder, trials=trials)
    tiny.run(study, noisy)
    return study


def test_finalists_are_trained_again(tmp_path: Path) -> None:
    """As often as asked on average, and with fresh seeds."""
    study = make(tmp_path)
    before = study.trials()
    posterior, front = study.posterior(), study.front()
    finalists = {member.number for member in (*front, *posterior.undecided)}
    with study.confirmation(seeds=3) as search:
        asked = tiny.drive(search, noisy)
    assert len(asked) == 2 * len(front)
    after = study.trials()
    assert after[: len(before)] == before
    again = after[len(before) :]
    assert all(o.origin["confirms"] is not None for o in again)
    assert len({o.seed for o in after}) == len(after)
    by_id = {o.number: o for o in after}
    assert all(by_id[int(o.origin["confirms"])].widths == o.widths for o in again)
    assert {int(o.origin["confirms"]) for o in again[:1]} <= finalists
    trained = Counter(o.widths for o in after)
    assert max(trained.values()) > 1
    assert study.posterior()[again[0]].trainings == trained[again[0].widths]


def test_each_network_that_is_trained_again_is_named_and_shown(tmp_path: Path) -> None:
    """Those within the noise of the front too: a line says why, the tables have a row."""
    study = make(tmp_path)
    before = study.posterior()
    front = [member.number for member in before.front()]
    messages: list[Progress] = []
    with study.confirmation(seeds=6, on_progress=messages.append) as search:
        asked = tiny.drive(search, noisy)
    (plan,) = (p.message for p in messages if p.message.startswith("confirming"))
    again = {int(trial.origin["confirms"]) for trial in asked}
    newcomers = [
        int(n) for p in messages for n in re.findall(r"confirming trial (\d+) too", p.message)
    ]
    named = {*front, *(member.number for member in before.undecided)}
    assert {*map(int, re.findall(r"\d+(?=[,)])", plan))} == {*front[:12]} | {*named} - {*front}
    assert again <= named | {*newcomers}
    assert len({*newcomers} - named) == len(newcomers)
    assert f"with {len(asked)} trainings of the front" in plan
    posterior = study.posterior()
    beside = {t.number for t in tables.confirmed_beside(posterior, posterior.front())}
    assert beside == again - {member.number for member in posterior.front()} != set()
    assert "within the noise of it" in plan
    shown = io.StringIO()
    Console(file=shown, width=160).print(tables.front_tables(study, posterior))
    rows = {int(n) for n in re.findall(r"^ *(\d+) +\S+.*\(\d+×\)", shown.getvalue(), re.M)}
    assert again <= rows


def test_networks_outside_the_limits_are_not_confirmed(tmp_path: Path) -> None:
    """Neither members of the front nor undecided ones; the number follows the front inside."""
    study = make(tmp_path)
    macs = sorted(trial.cost.macs for trial in study.trials())
    least, most = macs[6], macs[9]
    assert any(not least <= trial.cost.macs <= most for trial in study.posterior().undecided)
    limited = tiny.study(tmp_path, trials=16, limits={"macs": (least, most)})
    front = limited.front()
    with limited.confirmation(seeds=4) as search:
        confirmed = tiny.drive(search, noisy)
    assert len(confirmed) == 3 * len(front)
    assert all(least <= trial.cost.macs <= most for trial in confirmed)


def test_a_confirmed_study_can_be_continued(tmp_path: Path) -> None:
    """Repeated trainings do not count as the study's own trials."""
    study = make(tmp_path, trials=10)
    with study.confirmation(seeds=2) as search:
        repeats = len(tiny.drive(search, noisy))
    assert repeats > 0
    with tiny.study(tmp_path, trials=12).search() as search:
        assert len(tiny.drive(search, noisy)) == 2


def test_a_killed_confirmation_continues(tmp_path: Path) -> None:
    """The next one trains what is missing; no trial is lost."""
    study = make(tmp_path)
    with study.confirmation(seeds=3) as search:
        total = search._total - search._begun
        tiny.drive(search, noisy, trials=2)
        search.ask()  # begins a trial, which the kill leaves running
    with study.confirmation(seeds=3) as search:
        tiny.drive(search, noisy)
    assert all(o.state == "finished" for o in study.trials())
    assert len(study.trials()) >= 16 + min(total, 3)


def test_a_study_without_a_front_has_nothing_to_confirm(tmp_path: Path) -> None:
    """A study that was not run is refused, and so is a single seed."""
    with pytest.raises(StudyError, match="run it first"), tiny.study(tmp_path).confirmation():
        pass
    study = make(tmp_path / "other", trials=2)
    with pytest.raises(StudyError, match="`seeds >= 2` must hold"), study.confirmation(seeds=1):
        pass
