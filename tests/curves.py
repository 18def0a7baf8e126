"""Learning curves by a formula."""

from __future__ import annotations

from widthsearch.bayesopt.observation import Observation

EPOCHS = 10


def finished(final: float, cost: float = 1.0) -> Observation:
    """A finished trial whose distance from its final accuracy halves with every epoch."""
    rises = [final - (final - 10) * 0.5**epoch for epoch in range(1, EPOCHS)]
    return Observation((8,), final, (cost,), (*rises, final))


def running(final: float, cost: float, epochs: int) -> Observation:
    """The same trial after so many epochs."""
    return Observation((8,), None, (cost,), finished(final).curve[:epochs], running=True)
