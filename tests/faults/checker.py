"""Checks what a history has left: independent of the product, from which it imports nothing.

It reads the storage by SQL, the witness log that the training itself appends to, and the record
that the harness kept. A trial's *outcome* is its state, widths, seed, values and curve.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = tuple[str, tuple[tuple[str, float], ...], int, tuple[float, ...], tuple[Any, ...]]
"""State, widths by axis, seed, values by objective, and (epoch, loss, metric) of each epoch."""

Outcomes = Mapping[int, Outcome]

FINAL = ("COMPLETE", "PRUNED", "FAIL")


@dataclass(frozen=True)
class Complaint:
    """A broken promise.

    Attributes:
        kind: ``lost``, ``doubled``, ``changed`` (an outcome is another one), ``left`` (something is
            left over) or ``end`` (a driver ended in another way than it should).
        text: The promise, and the values that break it.
    """

    kind: Literal["lost", "doubled", "changed", "left", "end"]
    text: str


@dataclass
class Record:
    """What the harness saw during a history; times are those of the machine's monotonic clock.

    Attributes:
        seen: The outcomes in the storage at some moments, in the order of time.
        printed: The number of done trials that a driver had printed, and the outcomes that the
            storage had right after that.
        hits: How often a fault hit while a network was being trained, by its widths.
        replaced: The sessions of the drivers that were frozen and replaced, with the time of that.
        ends: How each driver ended: the exit codes that were expected, its exit code, its output.
        unwritable: The sessions of the drivers that ended while nothing could be written.
        left: Processes and shared memory that are there after the end, in words.
    """

    seen: list[tuple[float, dict[int, Outcome]]] = field(default_factory=list)
    printed: list[tuple[int, int]] = field(default_factory=list)
    hits: Counter[tuple[int, ...]] = field(default_factory=Counter)
    replaced: dict[int, float] = field(default_factory=dict)
    ends: list[tuple[tuple[int, ...], int, str]] = field(default_factory=list)
    unwritable: set[int] = field(default_factory=set)
    left: list[str] = field(default_factory=list)


@contextmanager
def connected(url: str) -> Iterator[Any]:
    """A connection to a study's database: a SQLite file, or PostgreSQL."""
    if url.startswith("sqlite:///"):
        connection: Any = sqlite3.connect(f"file:{url[10:]}?mode=ro", uri=True)
    else:
        import psycopg

        connection = psycopg.connect(url.replace("+psycopg", ""))
    try:
        yield connection
    finally:
        connection.close()


def trials(connection: Any) -> dict[int, Outcome]:
    """Every trial by number, running ones too."""

    def rows(query: str) -> Sequence[Any]:
        cursor = connection.cursor()
        cursor.execute(query)
        return cursor.fetchall()

    # One statement, so that a trial is read as of one moment.
    query = """
        SELECT trials.number, trials.state, 'param', param_name, param_value, ''
        FROM trials JOIN trial_params ON trial_params.trial_id = trials.trial_id
        UNION ALL
        SELECT trials.number, trials.state, 'value', '', value, CAST(objective AS VARCHAR)
        FROM trials JOIN trial_values ON trial_values.trial_id = trials.trial_id
        UNION ALL
        SELECT trials.number, trials.state, 'attribute', key, 0, value_json
        FROM trials JOIN trial_user_attributes AS attribute ON attribute.trial_id = trials.trial_id
        UNION ALL
        SELECT trials.number, trials.state, 'trial', '', trials.trial_id, '' FROM trials
        ORDER BY 1, 3, 4, 6
    """
    found: dict[int, Any] = {}
    for number, state, kind, name, value, text in rows(query):
        parts = found.setdefault(number, (state, [], [], {}, []))
        if kind == "param":
            parts[1].append((name, value))
        elif kind == "value":
            parts[2].append(value)
        elif kind == "attribute":
            parts[3][name] = json.loads(text)
        else:
            parts[4].append(value)
    return {
        number: (
            state if len(keys) == 1 else f"{len(keys)} times",
            tuple(widths),
            attributes.get("seed", -1),
            tuple(values),
            tuple((e["epoch"], e["loss"], e["value"]) for e in attributes.get("curve") or ()),
        )
        for number, (state, widths, values, attributes, keys) in found.items()
    }


def holders(connection: Any) -> list[dict[str, Any]]:
    """The drivers that hold the lock of a study."""
    cursor = connection.cursor()
    cursor.execute("SELECT holder FROM widthsearch_driver WHERE holder <> 'null'")
    return [json.loads(row[0]) for row in cursor.fetchall()]


def done(found: Outcomes) -> dict[int, Outcome]:
    """The trials that have ended."""
    return {number: outcome for number, outcome in found.items() if outcome[0] in FINAL}


def architecture(outcome: Outcome) -> tuple[int, ...]:
    """The widths of a trial, in the order of the axes' names."""
    return tuple(int(width) for _, width in outcome[1])


@dataclass(frozen=True)
class Checker:
    """The promises of one study.

    Attributes:
        trials: The number of trials of its YAML.
        epochs: The epochs of its recipe.
        steps: The training steps of an epoch.
        reference: The outcomes of an undisturbed run, which these must equal; None where trials run
            beside each other, so that their order is free.
    """

    trials: int
    epochs: int
    steps: int
    reference: Outcomes | None = None

    def check(self, url: str, folder: Path, witness: Path, record: Record) -> list[Complaint]:
        """Every broken promise of a history that has ended.

        Args:
            url: The storage.
            folder: The study's folder.
            witness: The witness log.
            record: What the harness saw.
        """
        with connected(url) as connection:
            found, drivers = trials(connection), holders(connection)
        lines = [line.split() for line in witness.read_text(encoding="ascii").splitlines()]
        steps = [(float(t), int(session), tuple(map(int, w))) for t, _, session, *w in lines]
        return [
            *self._outcomes(found),
            *self._acknowledged(found, record),
            *self._trained(found, steps, record),
            *self._ends(record),
            *(
                Complaint("left", f"a driver's lock: {holder}")
                for holder in drivers
                if holder.get("pid") not in record.unwritable
            ),
            *(Complaint("left", text) for text in record.left),
            *_files(folder),
        ]

    def _outcomes(self, found: Outcomes) -> Iterator[Complaint]:
        if sorted(found) != list(range(self.trials)):
            kind: Any = "lost" if len(found) < self.trials else "doubled"
            yield Complaint(
                kind, f"{self.trials} trials in the YAML, but there are {sorted(found)}"
            )
        for widths, count in Counter(map(architecture, found.values())).items():
            if count > 1:
                yield Complaint("doubled", f"one trial a network, but {widths} has {count}")
        for number, (state, _, _, values, curve) in found.items():
            epochs = [epoch for epoch, _, _ in curve]
            whole = epochs == list(range(1, len(epochs) + 1))
            if state == "COMPLETE":
                whole = whole and len(epochs) == self.epochs and len(values) == 2
                whole = whole and values[0] == curve[-1][2]
            elif state == "PRUNED":
                whole = whole and 0 < len(epochs) < self.epochs
            else:
                whole = False
            if not whole:
                text = f"whole outcomes, but trial {number} is {state}: {values}, {curve}"
                yield Complaint("lost", text)
        for number, outcome in (self.reference or {}).items():
            if number in found and found[number] != outcome:
                text = f"the outcomes of an undisturbed run, but trial {number} is "
                yield Complaint("changed", f"{text}{found[number]} and was {outcome}")

    def _acknowledged(self, found: Outcomes, record: Record) -> Iterator[Complaint]:
        for printed, stored in record.printed:
            if stored < printed:
                yield Complaint("lost", f"{printed} done trials were printed, {stored} were stored")
        for _, outcomes in record.seen:
            for number, outcome in done(outcomes).items():
                if found.get(number) != outcome:
                    text = f"trial {number} had {outcome} and has {found.get(number)}"
                    yield Complaint("lost" if number not in found else "changed", text)

    def _trained(
        self,
        found: Outcomes,
        steps: Sequence[tuple[float, int, tuple[int, ...]]],
        record: Record,
    ) -> Iterator[Complaint]:
        """An epoch is repeated only where a fault hit it, and none after the outcome."""
        trained = Counter(widths for _, _, widths in steps)
        for widths in trained.keys() - {architecture(outcome) for outcome in found.values()}:
            yield Complaint("lost", f"networks that were trained have trials, but not {widths}")
        for number, outcome in found.items():
            widths, epochs = architecture(outcome), len(outcome[4])
            most = (epochs + record.hits[widths]) * self.steps
            if trained[widths] < epochs * self.steps:
                text = (
                    f"trial {number} has {epochs} epochs, but {trained[widths]} steps were trained"
                )
                yield Complaint("lost", text)
            elif trained[widths] > most:
                text = (
                    f"trial {number} has {epochs} epochs and was hit {record.hits[widths]} times, "
                )
                yield Complaint("doubled", f"{text}but {trained[widths]} steps were trained")
        ended: dict[tuple[int, ...], float] = {}
        for moment, outcomes in record.seen:
            for outcome in done(outcomes).values():
                ended.setdefault(architecture(outcome), moment)
        after = Counter(
            (widths, session)
            for moment, session, widths in steps
            if moment > ended.get(widths, moment)
        )
        for (widths, session), count in after.items():
            # A worker that was frozen ends its epoch when it wakes; its report is not taken.
            if session not in record.replaced or count > self.steps:
                text = f"{count} steps of {widths} were trained after its outcome"
                yield Complaint("doubled", text)

    def _ends(self, record: Record) -> Iterator[Complaint]:
        for expected, code, output in record.ends:
            if code not in expected:
                text = f"exit code {' or '.join(map(str, expected))}, but it was {code}: "
                yield Complaint("end", text + output[-2000:])
            elif "Traceback" in output:
                yield Complaint("end", f"no traceback, but a driver printed {output[-2000:]}")
            elif code == 2 and output.count("error: ") != 1:
                yield Complaint("end", f"one line of error, but a driver printed {output[-2000:]}")


def _files(folder: Path) -> Iterator[Complaint]:
    """Temporary files, locks and checkpoints that are left in a study's folder."""
    for path in sorted(folder.rglob("*")):
        beginning = path.relative_to(folder).parts[0]
        temporary = path.name.endswith((".tmp", ".lock", "-journal"))
        if temporary or (beginning == "checkpoints" and path.name != "checkpoints"):
            yield Complaint("left", f"the file {path.relative_to(folder)}")
