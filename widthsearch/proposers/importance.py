"""From scores of channels to a trajectory: what loses the least for what it saves goes first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.errors import StudyError
from widthsearch.proposers.protocol import PredictedLatency
from widthsearch.space.search_space import SearchSpace
from widthsearch.torch_internals import NormBase
from widthsearch.widths import Widths

Per = Literal["channel", "macs", "params", "latency"]
"""What a score is divided by: channels, or what they cost in MACs, parameters or predicted ms."""

CostAt = Literal["recomputed", "fixed"]
"""Whether a channel costs what it does at the widths reached so far, or at the base widths."""

NORMS = NormBase | nn.GroupNorm | nn.LayerNorm
"""Layers that normalise."""


def check_counts(proposer: object, *fields: str) -> None:
    """Raise :class:`StudyError` unless these fields are 1 or more."""
    for field in fields:
        if (value := getattr(proposer, field)) < 1:
            called = type(proposer).__name__.lower()
            raise StudyError(f"`{field} >= 1` must hold, but {called} has {field}={value!r}")


def channel_scores(
    space: SearchSpace, channels: DependencyGraph, scores: Sequence[Tensor]
) -> list[NDArray[np.float64]]:
    """Scores of a space's channels from those of the units of :attr:`~SearchSpace.free`.

    A unit's score is shared equally by its channels, since they only go together; so is that of an
    axis whose channels cannot be told apart (``channels.unknown``) by all of its channels.

    Args:
        space: The space.
        channels: Those of ``space.free`` at its base.
        scores: Per axis of ``space.free``, shape (units,).

    Returns:
        Per axis of the space, shape (base,).
    """
    out = []
    for i, (axis, units) in enumerate(zip(space.unconstrained.trace.axes, scores, strict=True)):
        of_unit = units.detach().double().cpu().numpy() / axis.divisor
        if i in channels.unknown:
            of_unit = np.full_like(of_unit, of_unit.mean())
        out.append(np.repeat(of_unit, axis.divisor))
    return space.tie_scores(out)


class Removal:
    """Widths that shrink from the base, one grid step of one axis at a time.

    Args:
        space: The space.
        per: What losses are divided by.
        cost: Whether what a step saves is recomputed as widths shrink.
        floor: No axis goes below this share of its base (nor below its ``least``).
        latency: Predicted latency, for ``per="latency"``.
        kept: Axes, by index, that stay at their base.

    Attributes:
        widths: The widths reached, int64, shape (axes,).
        path: The widths before and after every step so far.
        least: The widths that nothing goes below, shape (axes,).

    Raises:
        StudyError: The floor is no share, or predicted latency is wanted but not known.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        per: Per,
        cost: CostAt = "recomputed",
        floor: float = 0.0,
        latency: PredictedLatency | None = None,
        kept: Collection[int] = (),
    ) -> None:
        if not 0 <= floor <= 1:
            raise StudyError(f"`0 <= floor <= 1` must hold, but floor={floor!r}")
        if per == "latency" and latency is None:
            raise StudyError(
                "`per: latency` needs predicted latency, but none is known here; give the setting "
                "one (`Setting(latency=...)`), or use `per: macs`"
            )
        self._space, self._per, self._latency = space, per, latency
        self.widths = np.array(space.base.vector, np.int64)
        self.path = [self.widths.copy()]
        self._steps = np.array([axis.step for axis in space.axes], np.int64)
        least = np.array([axis.min_width for axis in space.axes])
        above_floor = np.ceil(floor * self.widths / self._steps - 1e-9).astype(np.int64)
        self.min_width = np.maximum(least, above_floor * self._steps)
        self.min_width[list(kept)] = self.widths[list(kept)]
        self._fixed = self._saved() if cost == "fixed" else None

    @property
    def possible(self) -> NDArray[np.bool_]:
        """Which axes may lose a step more."""
        allowed: NDArray[np.bool_] = self.widths - self._steps >= self.min_width
        return allowed

    def weakest(self, losses: NDArray[np.float64]) -> int | None:
        """The axis whose next step loses the least for what it saves; None if none may go.

        Args:
            losses: What the next step of each axis would lose, shape (axes,); inf keeps an axis.
        """
        allowed = self.possible & np.isfinite(losses)
        if not allowed.any():
            return None
        saved = self._saved() if self._fixed is None else self._fixed
        return int(np.argmin(np.where(allowed, losses / saved, np.inf)))

    def remove(self, axis: int) -> None:
        """Let an axis lose a step."""
        self.widths[axis] -= self._steps[axis]
        self.path.append(self.widths.copy())

    def _saved(self) -> NDArray[np.float64]:
        """What a step of each axis saves, exactly: F(w) - F(w - step); above 0, shape (axes,)."""
        if self._per == "channel":
            return self._steps.astype(np.float64)
        if self._per == "latency":
            assert self._latency is not None
            now = self.widths.copy()
            narrower = np.where(self.possible, self._steps, 0) * np.eye(len(now), dtype=np.int64)
            predicted = self._latency(np.vstack([now, now - narrower]))
            saved, whole = predicted[0] - predicted[1:], predicted[0]
        else:
            form = self._space.cost_form(self._per)
            curvature = np.diag(form.quadratic) / form.units**2
            saved = form.marginal(self.widths) * self._steps - curvature * self._steps**2
            whole = np.float64(form(self.widths))
        # A step that saves nothing (predictions have stairs) goes after those that do.
        return np.asarray(np.maximum(saved, 1e-9 * whole), np.float64)


def shrink(
    space: SearchSpace,
    scores: Sequence[NDArray[np.float64]],
    removal: Removal,
    until: float = 0.0,
) -> list[int]:
    """Remove what has the least score for what it saves, until that is met or nothing may go.

    Args:
        space: The space.
        scores: Per axis, the score of each channel that is left.
        removal: Where it stands; it goes on from there.
        until: In MACs.

    Returns:
        Per axis, how many of its channels went: those with the lowest scores.
    """
    # What each next step of an axis would lose: sums over its lowest-scored channels.
    losses = [
        np.append(np.sort(of_axis).reshape(-1, axis.step).sum(1), np.inf)
        for axis, of_axis in zip(space.axes, scores, strict=True)
    ]
    steps = [0] * len(losses)
    upcoming = np.array([loss[0] for loss in losses])
    form = space.cost_form("macs")
    while not until or form(removal.widths) > until:
        axis = removal.weakest(upcoming)
        if axis is None:
            break
        removal.remove(axis)
        steps[axis] += 1
        upcoming[axis] = losses[axis][steps[axis]]
    return [count * axis.step for count, axis in zip(steps, space.axes, strict=True)]


def thinned(
    space: SearchSpace, path: Sequence[NDArray[np.int64]], members: int
) -> tuple[Widths, ...]:
    """So many members of a path, evenly spaced in log MACs, its ends among them."""
    macs = np.log(space.macs(np.stack(path)))
    wanted = np.linspace(macs[0], macs[-1], members)
    # The first member of the path at or below each of the wanted costs.
    kept = np.minimum(np.searchsorted(-macs, -wanted - 1e-12), len(path) - 1)
    return tuple(
        Widths(space.names, tuple(int(w) for w in path[i])) for i in dict.fromkeys(kept.tolist())
    )
