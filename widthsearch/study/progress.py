"""How far a study is, as plain values for a live view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Level = Literal["status", "event", "warning"]
"""The importance of a message: ``status`` is replaced by the next one, ``event`` stays on the
screen, ``warning`` stays and is highlighted."""


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        done: Trials that have ended, in whatever state.
        running: Trials that have begun and not ended.
        total: Trials that there will be.
        best_accuracy: The estimated accuracy of the front's most accurate member, in percent; None
            while the front is empty.
        front_size: Members of the front.
        elapsed: Seconds since this run began.
        remaining: Seconds to go at the pace since the first epoch of this run; None before a trial
            has ended in it.
        message: What just happened; may be empty.
        level: The importance of the message.
    """

    done: int
    running: int
    total: int
    best_accuracy: float | None
    front_size: int
    elapsed: float
    remaining: float | None
    message: str = ""
    level: Level = "status"


class Notify(Protocol):
    """Called with a message about a study and its importance."""

    def __call__(self, message: str, level: Level = "status", /) -> None:
        """Show the message."""
        ...
