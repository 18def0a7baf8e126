"""Greedy removal: from scores of channels to a trajectory of widths.

Notation::

    w       widths, one per axis; s_a the grid step of axis a, in channels
    F(w)    a cost: MACs, parameters, predicted latency in ms, or the number of channels
    L_a     the loss of the next step of axis a: the sum of its s_a lowest scores
    ΔF_a    the saving of that step, F(w) - F(w - s_a e_a)

Each removal narrows the axis with the smallest L_a / ΔF_a by one step. For example, two axes of
four channels with a step of 2 have the scores (1, 2, 3, 4) and (2, 2, 2, 2), and each step saves
the same. The losses are 3 and 4: the first axis loses its two channels of least score. Its next
step would lose 7, so that the second axis goes next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.errors import StudyError
from widthsearch.proposers.protocol import PredictedLatency
from widthsearch.space.search_space import SearchSpace
from widthsearch.torch_internals import NormBase
from widthsearch.widths import Widths

Per = Literal["channel", "macs", "params", "latency"]
"""The cost F that scores are divided by: channels, MACs, parameters or predicted latency."""

CostAt = Literal["recomputed", "fixed"]
"""Whether savings are those at the widths reached so far, or at the base widths."""

NORMS = NormBase | nn.GroupNorm | nn.LayerNorm
"""Normalisation layers."""


def channel_scores(
    space: SearchSpace, graph: DependencyGraph, scores: Sequence[Tensor]
) -> list[NDArray[np.float64]]:
    """Convert scores of channel groups into scores of the channels of a space.

    The channels of a group share its score equally, since they can only be removed together. So do
    all channels of an axis whose groups are unknown (``graph.unknown``).

    Args:
        space: The space.
        graph: The dependency graph of ``space.unconstrained`` at its base.
        scores: Per axis of ``space.unconstrained``, shape (groups,).

    Returns:
        Per axis of the space, shape (base,).

    Raises:
        StudyError: A score is not finite, or all are zero.
    """
    if not all(bool(torch.isfinite(of_groups).all()) for of_groups in scores):
        raise StudyError(
            "the scores of channels must be finite, but are not: see whether the loss is, at the "
            "base network's start"
        )
    if not any(bool(of_groups.any()) for of_groups in scores):
        raise StudyError(
            "some channel must have a score above zero, but none has: the loss does not depend on "
            "the network, or no gradient reaches its layers"
        )
    out = []
    for i, (axis, of_groups) in enumerate(zip(space.unconstrained.trace.axes, scores, strict=True)):
        shared = of_groups.detach().double().cpu().numpy() / axis.divisor
        if i in graph.unknown:
            shared = np.full_like(shared, shared.mean())
        out.append(np.repeat(shared, axis.divisor))
    return space.tie_scores(out)


class GreedyRemoval:
    """Narrows widths from the base, one grid step of one axis at a time.

    Args:
        space: The space.
        per: The cost that losses are divided by.
        cost: Whether savings are recomputed as widths shrink.
        floor: No axis is narrowed below this share of its base, nor below its smallest width.
        latency: Predicted latency, for ``per="latency"``.
        kept: Indices of axes that keep their base width.

    Attributes:
        widths: The widths reached so far, int64, shape (axes,).
        path: The base, then the widths after each removal.
        min_width: The smallest width of each axis, shape (axes,).

    Raises:
        StudyError: The predicted latency is unknown.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 2))
        >>> space = SearchSpace.from_model(net, (4,), step=4)
        >>> removal = GreedyRemoval(space, per="macs")
        >>> removal.remove_lowest([np.ones(8), np.ones(16)])  # per axis, channels removed
        [4, 12]
        >>> [widths.tolist() for widths in removal.path]
        [[8, 16], [4, 16], [4, 12], [4, 8], [4, 4]]
        >>> [widths.vector for widths in removal.trajectory(3)]
        [(8, 16), (4, 8), (4, 4)]
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
        if per == "latency" and latency is None:
            raise StudyError(
                "`per: latency` needs predicted latency, but none is known here; pass "
                "`Setting(latency=...)`, or use `per: macs`"
            )
        self._space, self._per, self._latency = space, per, latency
        self.widths = np.array(space.base.vector, np.int64)
        self.path = [self.widths.copy()]
        self._steps = np.array([axis.step for axis in space.axes], np.int64)
        lowest = np.array([axis.min_width for axis in space.axes])
        above_floor = np.ceil(floor * self.widths / self._steps - 1e-9).astype(np.int64)
        self.min_width = np.maximum(lowest, above_floor * self._steps)
        self.min_width[list(kept)] = self.widths[list(kept)]
        self._fixed = self._savings() if cost == "fixed" else None

    @property
    def possible(self) -> NDArray[np.bool_]:
        """The axes that another step can narrow, shape (axes,)."""
        allowed: NDArray[np.bool_] = self.widths - self._steps >= self.min_width
        return allowed

    def weakest(self, losses: NDArray[np.float64]) -> int | None:
        """The axis whose next step loses least for its saving; None if no axis can be narrowed.

        Args:
            losses: The loss of the next step of each axis, shape (axes,); inf keeps an axis.
        """
        allowed = self.possible & np.isfinite(losses)
        if not allowed.any():
            return None
        savings = self._savings() if self._fixed is None else self._fixed
        return int(np.argmin(np.where(allowed, losses / savings, np.inf)))

    def remove(self, axis: int) -> None:
        """Narrow an axis by one step."""
        self.widths[axis] -= self._steps[axis]
        self.path.append(self.widths.copy())

    def remove_lowest(self, scores: Sequence[NDArray[np.float64]], until: float = 0.0) -> list[int]:
        """Remove channels by score, down to some MACs or until no axis can be narrowed.

        Args:
            scores: Per axis, the score of each channel that is left.
            until: The MACs to reach.

        Returns:
            Per axis, the number of channels removed: those with the lowest scores.
        """
        losses = [
            np.append(np.sort(of_axis).reshape(-1, step).sum(1), np.inf)
            for step, of_axis in zip(self._steps, scores, strict=True)
        ]
        removed = np.zeros(len(losses), np.int64)  # in steps
        upcoming = np.array([loss[0] for loss in losses])
        form = self._space.cost_form("macs")
        while not until or form(self.widths) > until:
            axis = self.weakest(upcoming)
            if axis is None:
                break
            self.remove(axis)
            removed[axis] += 1
            upcoming[axis] = losses[axis][removed[axis]]
        done: list[int] = (removed * self._steps).tolist()
        return done

    def trajectory(self, members: int) -> tuple[Widths, ...]:
        """So many members of the path, evenly spaced in log MACs, with both of its ends."""
        macs = np.log(self._space.macs(np.stack(self.path)))
        wanted = np.linspace(macs[0], macs[-1], members)
        # The first member of the path at or below each of the wanted costs.
        kept = np.minimum(np.searchsorted(-macs, -wanted - 1e-12), len(self.path) - 1)
        return tuple(
            Widths(self._space.names, tuple(self.path[i].tolist()))
            for i in dict.fromkeys(kept.tolist())
        )

    def _savings(self) -> NDArray[np.float64]:
        """ΔF of a step of each axis, exact for MACs and parameters; above 0, shape (axes,)."""
        if self._per == "channel":
            return self._steps.astype(np.float64)
        if self._per == "latency":
            assert self._latency is not None
            now = self.widths.copy()
            narrower = np.where(self.possible, self._steps, 0) * np.eye(len(now), dtype=np.int64)
            predicted = self._latency(np.vstack([now, now - narrower]))
            saved, total = predicted[0] - predicted[1:], predicted[0]
        else:
            form = self._space.cost_form(self._per)
            # F(w) - F(w - s) = F'(w) s - c s² of a quadratic F with the curvature c.
            curvature = np.diag(form.quadratic) / form.units**2
            saved = form.marginal(self.widths) * self._steps - curvature * self._steps**2
            total = np.float64(form(self.widths))
        # Predicted latency has stairs: a step without a saving goes after those that save.
        return np.asarray(np.maximum(saved, 1e-9 * total), np.float64)
