"""The checker: a sound history has no complaint, and each broken promise has one."""

from __future__ import annotations

import ast
import json
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import checker
from .checker import Checker, Record, connected, trials

TABLES = """
CREATE TABLE trials (trial_id INTEGER, number INTEGER, state TEXT);
CREATE TABLE trial_params (trial_id INTEGER, param_name TEXT, param_value REAL);
CREATE TABLE trial_values (trial_id INTEGER, objective INTEGER, value REAL);
CREATE TABLE trial_user_attributes (trial_id INTEGER, key TEXT, value_json TEXT);
CREATE TABLE widthsearch_driver (study_id INTEGER, holder TEXT);
INSERT INTO widthsearch_driver VALUES (1, 'null');
"""

EPOCHS, STEPS = 2, 3

FIRST_TRAINED = 10.0
"""Trial i is trained from this time + 10 i on, a step a second, and seen 7 seconds later."""


class Sound:
    """Three trials of which the last was stopped, in files; tests damage them.

    Attributes:
        folder: The study's folder.
        record: What a harness has seen.
        lines: Those of the witness log.
        reference: The outcomes of an undisturbed run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "study"
        (self.folder / "checkpoints").mkdir(parents=True)
        self.url = f"sqlite:///{self.folder / 'study.db'}"
        self.record = Record()
        self.lines: list[str] = []
        self.sql(TABLES)
        for number, epochs in enumerate((2, 2, 1)):
            self.add(number, number, epochs)
            begun = FIRST_TRAINED + 10 * number
            self.lines += [f"{begun + i} 7 5 {number} 4" for i in range(STEPS * epochs)]
            with connected(self.url) as connection:
                self.record.seen.append((begun + 7, trials(connection)))
            self.record.printed.append((number + 1, number + 1))
        self.record.ends.append(((0,), 0, "3/3 trials\n"))
        self.reference = self.record.seen[-1][1]

    def add(self, key: int, number: int, epochs: int, width: int | None = None) -> None:
        """Add a trial with so many epochs."""
        state = "COMPLETE" if epochs == EPOCHS else "PRUNED"
        curve = [{"epoch": e, "loss": 1.0, "value": 50.0} for e in range(1, epochs + 1)]
        attributes = {"seed": 3, "curve": curve}
        width = number if width is None else width
        statements = [
            f"INSERT INTO trials VALUES ({key}, {number}, '{state}')",
            f"INSERT INTO trial_params VALUES ({key}, 'first', {width}), ({key}, 'second', 4)",
            *(
                f"INSERT INTO trial_user_attributes VALUES ({key}, '{k}', '{json.dumps(v)}')"
                for k, v in attributes.items()
            ),
        ]
        if state == "COMPLETE":
            statements.append(f"INSERT INTO trial_values VALUES ({key}, 0, 50), ({key}, 1, 9)")
        self.sql(";".join(statements))

    def sql(self, script: str) -> None:
        """Change the storage."""
        connection = sqlite3.connect(self.folder / "study.db")
        connection.executescript(script)
        connection.close()

    def complaints(self, reference: bool = True) -> list[str]:
        """The kinds of the complaints."""
        witness = self.folder.parent / "witness"
        witness.write_text("\n".join(self.lines) + "\n")
        promises = Checker(3, EPOCHS, STEPS, self.reference if reference else None)
        return [each.kind for each in promises.check(self.url, self.folder, witness, self.record)]


def test_it_shares_no_code_with_the_product() -> None:
    """It imports the standard library, and the driver of a database."""
    source = Path(checker.__file__).read_text(encoding="utf-8")
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").partition(".")[0])
    assert found - sys.stdlib_module_names == {"psycopg"}


def test_a_sound_history_has_no_complaint(tmp_path: Path) -> None:
    """Nor has one in which a fault hit an epoch, which was trained again."""
    sound = Sound(tmp_path)
    assert sound.complaints() == []
    sound.record.hits[0, 4] += 1
    sound.lines += [f"{FIRST_TRAINED + 3 + i} 8 6 0 4" for i in range(STEPS)]
    assert sound.complaints() == []


def test_a_woken_worker_may_end_its_epoch(tmp_path: Path) -> None:
    """But no more, and only one whose driver was replaced while it was frozen."""
    sound = Sound(tmp_path)
    sound.record.hits[0, 4] += 2
    sound.lines += [f"{90 + i} 7 5 0 4" for i in range(STEPS)]
    assert sound.complaints() == ["doubled"]
    sound.record.replaced[5] = 80.0
    assert sound.complaints() == []
    sound.lines.append("95 7 5 0 4")
    assert sound.complaints() == ["doubled"]


Damage = Callable[[Sound], Any]

DAMAGES: dict[str, tuple[str, Damage]] = {
    "a trial is missing": ("lost", lambda s: s.sql("DELETE FROM trials WHERE number = 1")),
    "a trial is running": ("lost", lambda s: s.sql("UPDATE trials SET state = 'RUNNING'")),
    "a trial has failed": ("lost", lambda s: s.sql("UPDATE trials SET state = 'FAIL'")),
    "a trial too many": ("doubled", lambda s: s.add(9, 3, 2)),
    "a network twice": ("doubled", lambda s: s.add(9, 3, 2, width=0)),
    "a number twice": ("lost", lambda s: s.add(9, 0, 2)),
    "a value is missing": ("lost", lambda s: s.sql("DELETE FROM trial_values WHERE objective = 1")),
    "an epoch is missing": (
        "lost",
        lambda s: s.sql("UPDATE trial_user_attributes SET value_json = '[]' WHERE key = 'curve'"),
    ),
    "another value": ("changed", lambda s: s.sql("UPDATE trial_values SET value = 8")),
    "another seed": (
        "changed",
        lambda s: s.sql("UPDATE trial_user_attributes SET value_json = '4' WHERE key = 'seed'"),
    ),
    "printed before it was stored": ("lost", lambda s: s.record.printed.append((3, 2))),
    "too few steps": ("lost", lambda s: s.lines.pop()),
    "an epoch again": ("doubled", lambda s: s.lines.extend(["12 7 5 0 4"] * STEPS)),
    "a step after the outcome": ("doubled", lambda s: s.lines.append("90 7 5 0 4")),
    "a network without a trial": ("lost", lambda s: s.lines.append("90 7 5 8 8")),
    "another exit code": ("end", lambda s: s.record.ends.append(((0,), 1, ""))),
    "a traceback": ("end", lambda s: s.record.ends.append(((0,), 0, "Traceback (most recent"))),
    "no line of error": ("end", lambda s: s.record.ends.append(((2,), 2, ""))),
    "a process is left": ("left", lambda s: s.record.left.append("process 9")),
    "a lock is left": ("left", lambda s: s.sql("UPDATE widthsearch_driver SET holder = '{}'")),
    "a checkpoint is left": ("left", lambda s: (s.folder / "checkpoints" / "0").mkdir()),
    "a temporary file is left": ("left", lambda s: (s.folder / "study.yaml.1.tmp").touch()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_has_a_complaint(damage: str, tmp_path: Path) -> None:
    """Of the kind that it is."""
    kind, apply = DAMAGES[damage]
    sound = Sound(tmp_path)
    apply(sound)
    assert kind in sound.complaints()


def test_another_run_may_differ_only_beside_others(tmp_path: Path) -> None:
    """With trials beside each other there is no reference."""
    sound = Sound(tmp_path)
    sound.record.seen.clear()
    sound.sql("UPDATE trial_params SET param_value = 5 WHERE param_name = 'second'")
    sound.lines = [line[:-1] + "5" for line in sound.lines]
    assert set(sound.complaints()) == {"changed"}
    assert sound.complaints(reference=False) == []
