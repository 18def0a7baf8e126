"""One trial as the search sees it: the same shape for sampler, surrogate and early stopping."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """One trial, as far as it has come.

    A finished trial has a value; a stopped one has a curve at best; a running one is marked, so
    that its widths are not suggested again.

    Attributes:
        widths: One width an axis, in channels, in the order of the space's axes.
        value: The metric after the last epoch, in its own unit; None unless the trial is finished.
        costs: The value of each objective but the metric, in the order of the objectives, all above
            0; may be empty or NaN unless the trial is finished.
        curve: The metric after each epoch so far; may be empty.
        running: Whether it is being trained.

    Example:
        >>> finished = Observation((16, 32), value=91.5, costs=(2.0e6,), curve=(80.0, 91.5))
        >>> running = Observation((8, 32), curve=(70.0,), running=True)
    """

    widths: tuple[int, ...]
    value: float | None = None
    costs: tuple[float, ...] = ()
    curve: tuple[float, ...] = ()
    running: bool = False
