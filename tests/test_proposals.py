"""Proposers of a study: each runs once, failures are survived, a user's own go by reference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from refusals import refusals
from strategies import refused

from widthsearch.api import Study
from widthsearch.errors import StudyError
from widthsearch.proposers import Proposal, Setting
from widthsearch.study.proposals import (
    Failure,
    ProposalRequest,
    propose,
    propose_at_budget,
    stream_proposal,
)
from widthsearch.study.sections import ProposerConfig

OWN = '''
import os
from dataclasses import dataclass

from widthsearch.proposers import Proposal


def halves(space, task, setting, times=2):
    """A half, a quarter, ..."""
    setting.report(f"seed {setting.seed}")
    path = [space.widths(0.5**i) for i in range(times + 1)]
    return Proposal("halves", tuple(path), {"times": times})


@dataclass(frozen=True)
class Bottle:
    """Narrow at one end."""

    width: int = 4

    def __call__(self, space, task, setting):
        return Proposal("bottle", (space.base, space.widths({"second": self.width})), {})


@dataclass(frozen=True)
class Reader(Bottle):
    """Says that it reads data."""

    reads_data = True


@dataclass(frozen=True)
class Mute:
    """Cannot be called."""


class Plain:
    """Has no fields."""

    def __call__(self, space, task, setting):
        return Proposal("plain", (space.base,), {})


def counts(space, task, setting):
    return task.classes


def broken(space, task, setting):
    raise RuntimeError("out of ideas\\nreally")


def leaves(space, task, setting):
    raise SystemExit("no data here")


def dies(space, task, setting):
    os._exit(1)
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file with a user's proposers."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return str(file)


def study(folder: Path, *proposers: Any, trials: int = 4, **changes: Any) -> Study:
    """A study with these proposers."""
    return tiny.study(folder / "study", proposers=proposers, trials=trials, **changes)


def origins(of: Study) -> list[str]:
    """The proposer of each trial; empty for a baseline."""
    return [str(o.origin.get("proposer", "")) for o in of.trials()]


def drive(of: Study) -> list[str]:
    """Run it by the plain loop; returns the messages."""
    return [progress.message for progress in tiny.run(of)]


def test_a_users_own_proposer_is_a_function_or_a_dataclass(tmp_path: Path, own: str) -> None:
    """It is named by a reference, with its arguments beside it."""
    halves, bottle = f"{own}:halves", f"{own}:Bottle"
    made = study(tmp_path, {"method": halves, "times": 1}, {"method": bottle, "width": 2})
    messages = drive(made)
    assert made.failures == {}
    assert {"halves", "bottle"} <= set(origins(made))
    assert f"{own}:halves: seed 0" in messages
    assert any(m.startswith(f"proposer {own}:halves finished after") for m in messages)


@refusals("reference")
def test_a_wrong_reference_is_named(
    values: dict[str, Any], message: str, tmp_path: Path, own: str
) -> None:
    """Before anything is trained."""
    method = values["method"]
    proposer = {**values, "method": method if ":" in method else f"{own}:{method}"}
    with refused(StudyError, message, whole=False):
        drive(study(tmp_path, proposer))


def test_a_proposer_that_failed_runs_again(tmp_path: Path, own: str) -> None:
    """The study continues with the others; its next run runs the failed one, and only that."""
    made = study(tmp_path, f"{own}:broken", "uniform")
    messages = drive(made)
    line = next(i for i, code in enumerate(OWN.splitlines(), 1) if "out of ideas" in code)
    reason = f"RuntimeError: out of ideas ({own}:{line})"
    assert made.failures == {f"{own}:broken": reason}
    assert f"proposer {own}:broken failed: {reason}" in messages
    assert "uniform" in origins(made)
    mended = "\n\ndef broken(*given):\n    return Bottle()(*given)\n"
    Path(own).write_text(OWN + mended)
    again = study(tmp_path, f"{own}:broken", "uniform", trials=6)
    messages = drive(again)
    assert again.failures == {}
    assert "bottle" in origins(again)
    assert not any("proposer uniform" in m for m in messages)


def test_a_finished_study_runs_no_proposer(tmp_path: Path, own: str) -> None:
    """Neither a failed one nor a new one, until the study is given more trials."""
    drive(study(tmp_path, f"{own}:broken"))
    finished = study(tmp_path, f"{own}:broken", f"{own}:halves")
    assert not any("proposer" in message for message in drive(finished))
    assert finished.failures == {}
    more = study(tmp_path, f"{own}:broken", f"{own}:halves", trials=5)
    drive(more)
    assert set(more.failures) == {f"{own}:broken"}
    assert "halves" in origins(more)


def test_a_smaller_budget_runs_a_proposer_again(tmp_path: Path) -> None:
    """A proposal down to one half may lack the networks of one fifth."""
    for trials, budget, asked in [(3, 0.5, True), (4, 0.6, False), (5, 0.2, True)]:
        messages = drive(study(tmp_path, "uniform", budgets=[budget], trials=trials))
        assert any("proposer uniform" in message for message in messages) is asked


def test_a_users_own_needs_no_task(own: str) -> None:
    """It gets None; built-in methods that read data, and a user's own that say so, need one."""
    space, half = tiny.space(), tiny.space().cost(tiny.space().base).macs / 2
    widths, _ = propose_at_budget(ProposerConfig(method=f"{own}:halves"), space, half)
    assert space.cost(widths).macs <= half
    with pytest.raises(StudyError, match=":Reader' reads data, but no task was given"):
        propose_at_budget(ProposerConfig(method=f"{own}:Reader"), space, half)
    with pytest.raises(StudyError, match=r"failed: AttributeError: .*; it was given no task"):
        propose_at_budget(ProposerConfig(method=f"{own}:counts"), space, half)
    with pytest.raises(StudyError, match="'sensitivity' reads data, but no task was given"):
        propose_at_budget(ProposerConfig(method="sensitivity"), space, half)


def request(proposer: Any) -> ProposalRequest:
    """A request for the tiny space."""
    return ProposalRequest("it", proposer, tiny.space(), Setting(seed=3))


def test_a_result_that_is_no_proposal_of_the_space_is_refused() -> None:
    """Another type, another space's axes, widths off the grid, provenance that is no JSON."""
    space, task = tiny.space(), tiny.task()

    def reason_for(value: object) -> str:
        failure = propose(request(lambda *_: value), task, print)
        assert isinstance(failure, Failure)
        return failure.reason

    assert reason_for(None).startswith(
        "StudyError: a proposer must return a Proposal, but returned"
    )
    other = Proposal("it", (type(space.base)(("a", "b"), (8, 8)),), {})
    assert "a proposal's axes must be the space's" in reason_for(other)
    off = Proposal("it", (tiny.widths(7, 8),), {})
    assert "first" in reason_for(off)
    assert reason_for(Proposal("it", (space.base,), {"x": object()})).startswith("TypeError")


def test_reports_come_before_the_result() -> None:
    """As they are made, in order."""

    def reporting(space: Any, task: Any, setting: Setting) -> Proposal:
        setting.report("one")
        setting.report("two")
        return Proposal("it", (space.base,), {"seed": setting.seed})

    messages: Iterator[Any] = stream_proposal(request(reporting), tiny.task())
    assert [next(messages), next(messages)] == ["one", "two"]
    assert next(messages).provenance == {"seed": 3}
    assert list(messages) == []


class Unprintable(Exception):  # noqa: N818  a user's own
    """An exception whose own text cannot be made."""

    def __str__(self) -> str:
        """Fail as well."""
        raise RuntimeError("no text")


def ends_by(error: BaseException) -> Any:
    """A proposer that raises this."""

    def proposer(space: Any, task: Any, setting: Setting) -> Proposal:
        raise error

    return proposer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit("no data here\nreally"), "SystemExit: no data here"),
        (SystemExit(3), "SystemExit: 3"),
        (GeneratorExit(), "GeneratorExit"),
        (Unprintable(), "Unprintable"),
    ],
)
def test_every_exception_of_a_proposer_is_its_failure(error: BaseException, reason: str) -> None:
    """In this process and in a task's thread, which would never end without a result."""
    (streamed,) = stream_proposal(request(ends_by(error)), tiny.task())
    for failure in (propose(request(ends_by(error)), tiny.task(), print), streamed):
        assert isinstance(failure, Failure)
        assert failure.reason.startswith(reason)
        assert failure.traceback.startswith("Traceback")


def test_ctrl_c_ends_the_study_but_not_a_task() -> None:
    """In the main thread KeyboardInterrupt is the user's, in a task's thread the proposer's."""
    interrupted = request(ends_by(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        propose(interrupted, tiny.task(), print)
    results = list(stream_proposal(interrupted, tiny.task()))
    (reason,) = (getattr(result, "reason", "") for result in results)
    assert reason.startswith("KeyboardInterrupt")


def test_a_report_that_is_no_text_is_a_message() -> None:
    """It is not taken for the result."""

    def counting(space: Any, task: Any, setting: Setting) -> Proposal:
        setting.report(5)  # type: ignore[arg-type]
        return Proposal("it", (space.base,), {})

    message, result = stream_proposal(request(counting), tiny.task())
    assert message == "5"
    assert isinstance(result, Proposal)


@pytest.mark.ray
def test_ray_runs_proposers_in_parallel(shared_ray: None, tmp_path: Path, own: str) -> None:
    """The user's own modules are sent along; a proposer that kills its process is survived."""
    names = ("dies", "halves", "broken", "leaves")
    made = study(tmp_path, *(f"{own}:{name}" for name in names), "sensitivity", trials=3)
    messages: list[str] = []
    made.run(lambda progress: messages.append(progress.message))
    assert made.failures[f"{own}:broken"].startswith("RuntimeError: out of ideas (")
    assert made.failures[f"{own}:dies"].startswith("its worker process died")
    assert made.failures[f"{own}:leaves"].startswith("SystemExit: no data here (")
    assert set(made.failures) == {f"{own}:{name}" for name in ("broken", "dies", "leaves")}
    assert f"{own}:halves: seed 0" in messages
    assert [o.state for o in made.trials()] == ["finished"] * 3
    assert {"halves", "sensitivity"} & set(origins(made))


def test_budgets_above_every_network_are_named(tmp_path: Path) -> None:
    """Percentages, say: one line where some are meant so, and an error where all are."""
    study = tiny.study(tmp_path, budgets=[0.5, 10, 30])
    messages = [progress.message for progress in tiny.run(study, trials=1)]
    (above,) = (message for message in messages if message.startswith("budgets"))
    assert above.startswith("budgets 10, 30 are above the widest network, which has 3.77 of the ba")
    assert above.endswith("budgets are shares of the base's MACs, so that 0.1 means 10%")
    with pytest.raises(StudyError, match=r"but budgets are 10, 30, 60 and networks have 0.0838 to"):
        tiny.run(tiny.study(tmp_path / "other", budgets=[10, 30, 60]))


def test_a_score_that_is_not_finite_is_null() -> None:
    """JSON has no infinity: browsers and other languages do not read it."""
    scores = {"scores": [[-math.inf, 1.5], (math.nan, 2.0)], "seed": 0}
    proposal = Proposal("naswot", (tiny.widths(8, 8),), scores)
    text = json.dumps(proposal.to_json(), allow_nan=False)
    assert json.loads(text)["provenance"] == {"scores": [[None, 1.5], [None, 2.0]], "seed": 0}
