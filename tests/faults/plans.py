"""Which faults hit which history, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

SIGNALS = tuple(
    f"{target} {signal}"
    for target in ("driver", "worker", "raylet")
    for signal in ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP")
)
"""A signal to one process. SIGSTOP lasts longer than the time-out of the driver's lock; while a
driver is frozen, another one takes over."""

SESSIONS = ("everything SIGKILL", "everything SIGINT", "everything SIGSTOP")
"""A signal to the driver and all of Ray's processes: a reset, Ctrl-C, a machine that sleeps."""

PLACES = {
    "full disk": "small disk",
    "read-only folder": "folder",
    "PostgreSQL stopped": "PostgreSQL",
    "PostgreSQL killed": "PostgreSQL",
}
"""Faults that need a study in some place."""

KINDS = (*SIGNALS, *SESSIONS, *PLACES)

MOMENTS = ("step", "step", "step", "checkpoint", "printed", "stored", "raylet", "worker")
"""What a fault waits for: a number of training steps, the first write of a checkpoint after these,
a line of progress, a change of the trials in the storage, or a process of Ray's."""

PER_HISTORY = 5

_KILL_WORKERS = ("worker SIGKILL", "worker SIGTERM", "raylet SIGKILL", "raylet SIGTERM")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: One of :data:`KINDS`.
        moment: One of :data:`MOMENTS`.
        steps: The number of training steps to wait for, with ``step`` and ``checkpoint``.
        again: Whether a driver is started while the fault lasts, too, where it lasts.
    """

    kind: str
    moment: str = "step"
    steps: int = 1
    again: bool = False


@dataclass(frozen=True)
class Plan:
    """One history: where its study lies, how many trials train at once, and its faults in order."""

    place: str
    concurrency: int
    faults: tuple[Fault, ...]


def plans(
    seed: int, kinds: Collection[str] = KINDS, places: Collection[str] = ()
) -> Iterator[Plan]:
    """Histories without end; each kind of fault comes once before any comes again.

    Args:
        seed: The seed.
        kinds: The kinds of faults that can be tried.
        places: The places in which a study can lie; ``folder`` always can.
    """
    rng = random.Random(seed)
    deck: list[str] = []
    number = 0
    while True:
        if len(deck) < PER_HISTORY:
            deck += rng.sample(sorted(kinds), len(kinds))
        drawn: list[str] = []
        where = ""
        for kind in list(deck):
            fits = kind not in PLACES or where in ("", PLACES[kind])
            # Three deaths of its worker end a trial, which is right, and no fault.
            deadly = kind in _KILL_WORKERS and sum(k in _KILL_WORKERS for k in drawn) == 2
            if len(drawn) < PER_HISTORY and fits and not deadly:
                deck.remove(kind)
                drawn.append(kind)
                where = PLACES.get(kind, where)
        where = where or rng.choice(sorted({"folder", *places}))
        faults = [
            Fault(kind, rng.choice(MOMENTS), rng.randint(1, 40), rng.random() < 0.5)
            for kind in drawn
        ]
        number += 1
        yield Plan(where, 1 + number % 2, tuple(faults))
