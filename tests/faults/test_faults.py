"""Real histories: the product keeps its promises, and a product that breaks one is caught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .history import ROOT, play
from .plans import KINDS, PER_HISTORY, Fault, Plan, plans

FAULTS = (
    Fault("driver SIGKILL", "stored"),
    Fault("worker SIGKILL", "checkpoint", 10),
    Fault("driver SIGSTOP", "step", 10),
    Fault("read-only folder", "step", 10),
    Fault("everything SIGKILL", "printed"),
)
"""They include those of the mutations below."""


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_keeps_its_promises() -> None:
    """Faults of five kinds; ``python -m tests.faults`` plays all kinds."""
    undisturbed = play(Plan("folder", 1, ()))
    assert undisturbed.complaints == ()
    played = play(Plan("folder", 1, FAULTS), undisturbed.outcomes)
    assert played.complaints == ()
    assert len(played.injected) >= 3


MUTATIONS = {
    "a trial is inserted in two transactions": (
        Fault("driver SIGKILL", "stored"),
        "study/storage.py",
        [
            (
                "key = self._storage.create_new_trial(self._study, template_trial=template)",
                "key = self._storage.create_new_trial(self._study)\n"
                "        __import__('time').sleep(0.3)\n"
                "        self._storage.set_trial_user_attr(key, 'space', space)",
            )
        ],
        "lost",
    ),
    "an outcome is printed before it is stored": (
        None,
        "study/loop.py",
        [
            (
                "self._store.finish(number, [*_objectives(trial, self.config).values()])\n"
                "            self._close(trial)",
                "self._close(trial)\n            __import__('time').sleep(0.3)\n"
                "            self._store.finish(number, "
                "[*_objectives(trial, self.config).values()])",
            )
        ],
        "lost",
    ),
    "a replaced driver goes on": (
        Fault("driver SIGSTOP", "step", 10),
        "study/database.py",
        [
            ("if row.token != self.token:", "if False:"),
            ("if not connection.execute(locking, execution_options=_UNFENCED).rowcount:", "if 0:"),
            (
                'if not self._update(self.token, holder="null"):',
                'if self._update(self.token, holder="null") is None:',
            ),
        ],
        "end",
    ),
    "a replaced driver notices at its end": (
        Fault("driver SIGSTOP", "step", 10),
        "study/database.py",
        [
            ("if row.token != self.token:", "if False:"),
            ("if not connection.execute(locking, execution_options=_UNFENCED).rowcount:", "if 0:"),
        ],
        "doubled",
    ),
    "a checkpoint is written in place": (
        Fault("worker SIGKILL", "checkpoint", 10),
        "utils/files.py",
        [
            (
                'with temporary.open("wb") as file:\n',
                "__import__('time').sleep(0.1)\n        temporary = path\n"
                '        with path.open("wb") as file:\n'
                "            __import__('time').sleep(0.3)\n",
            )
        ],
        "doubled",
    ),
}
"""A fault, a file of the package, replacements in it, and the complaint that they cause."""


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_changes_the_product(mutation: str) -> None:
    """The code that it replaces is there, once: the slow tests below are not run often."""
    _, file, replacements, _ = MUTATIONS[mutation]
    text = (ROOT / "widthsearch" / file).read_text(encoding="utf-8")
    assert [text.count(old) for old, _ in replacements] == [1] * len(replacements)
    for old, new in replacements:
        text = text.replace(old, new)
    compile(text, file, "exec")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_caught(mutation: str, tmp_path: Path) -> None:
    """The same fault costs the product itself nothing, by the test above."""
    fault, file, replacements, kind = MUTATIONS[mutation]
    package = tmp_path / "widthsearch"
    shutil.copytree(ROOT / "widthsearch", package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text(encoding="utf-8")
    for old, new in replacements:
        text = text.replace(old, new)
    (package / file).write_text(text, encoding="utf-8")
    played = play(Plan("folder", 1, () if fault is None else (fault,)), product=tmp_path)
    assert played.injected == (() if fault is None else (fault,))
    assert kind in {complaint.kind for complaint in played.complaints}


def test_plans_are_those_of_the_seed() -> None:
    """Each kind of fault comes once before any comes again, in a place where it can hit."""
    some = [plan for plan, _ in zip(plans(3), range(8), strict=False)]
    assert some == [plan for plan, _ in zip(plans(3), range(8), strict=False)]
    assert some != [plan for plan, _ in zip(plans(4), range(8), strict=False)]
    kinds = [fault.kind for plan in some for fault in plan.faults]
    assert set(kinds[: len(KINDS) + PER_HISTORY]) == set(KINDS)
    assert all(1 <= len(plan.faults) <= PER_HISTORY for plan in some)
