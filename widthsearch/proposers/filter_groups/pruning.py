"""Pruning by filter groups: channels leave groups of filters, then dead structure is removed.

Notation::

    channel   the smallest set of channels that can be removed together (a group of the dependency
              graph), numbered over all axes; here *group* means a group of filters
    F, C, G   filters, input channels and groups of a layer
    E_gc      the energy of group g in input c: Σ W² over the group's filters and the kernel
    β         the share of energy that is pruned

At β, each group loses the inputs with the smallest E_gc whose sum stays below β Σ_c E_gc. For
example, energies of 1, 4, 3 and 2 have the cumulative shares 0.1, 1, 0.6 and 0.3: at β = 0.31 the
inputs with 1 and 2 are pruned. If no other group reads the channel of a pruned input, the filters
that make it are dead, and so on through the network.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.modules.tree import is_depthwise, join
from widthsearch.proposers.filter_groups.architecture import (
    Branch,
    BranchedArchitecture,
)
from widthsearch.proposers.filter_groups.branched_space import positions
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.polynomials import evaluate
from widthsearch.widths import Widths

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A grouped layer.

    Attributes:
        name: The layer.
        filters: The channel that each filter makes, (F,).
        inputs: The channel that each input of the layer is, (C,).
        group: The group of each filter, one-hot, (G, F).
        threshold: Per group and input, the cumulative share of the group's energy, (G, C), see
            :func:`cumulative_shares`.
        whole: The same per filter of the layer, (F,), if whole filters are pruned; else inf.
        positions: The number of positions of the kernel, times its elements.
    """

    name: str
    filters: Ints
    inputs: Ints
    group: Bools
    threshold: NDArray[np.float64]
    whole: NDArray[np.float64]
    positions: int


@dataclass(frozen=True, eq=False)
class Pruned:
    """The part of a network that is left at some β.

    Attributes:
        channels: The channels that are left.
        filters: Per layer, the filters that are left, (F,).
        inputs: Per layer, the inputs that each group reads, (G, C).

    Example:
        >>> one_of_two = Pruned(
        ...     channels=np.array([True, False]),
        ...     filters=(np.array([True, False]),),
        ...     inputs=(np.array([[True, True], [False, True]]),),
        ... )
        >>> int(one_of_two.channels.sum())
        1
    """

    channels: Bools
    filters: tuple[Bools, ...]
    inputs: tuple[Bools, ...]


def cumulative_shares(energies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per row, the share of the row's sum in each entry and all smaller entries.

    Entries with a share below β are pruned: the smallest ones, as long as their sum stays below β
    of the whole. The largest entry is never pruned: its share is inf.

    Args:
        energies: Shape (…, n).

    Returns:
        Shares of the same shape.

    Example:
        >>> cumulative_shares(np.array([1.0, 4.0, 3.0, 2.0])).tolist()
        [0.1, inf, 0.6, 0.3]
    """
    order = np.argsort(energies, -1, kind="stable")
    ascending = np.take_along_axis(energies, order, -1)
    total = ascending.sum(-1, keepdims=True)
    shares = ascending.cumsum(-1) / np.where(total == 0, 1, total)
    shares[..., -1] = np.inf
    out = np.empty_like(shares)
    np.put_along_axis(out, order, shares, -1)
    return out


class GroupPruning:
    """Prunes the inputs of filter groups by a share β of their energy, and dead structure after.

    A filter is dead if no layer reads its channel, or if it reads none; a channel is dead if no
    filter makes it. Dead structure is removed until a fixed point. Whole filters are pruned at the
    same β in layers whose filters would otherwise never die: other layers make the same channels
    (the last convolution of a residual block), or a layer that is not grouped reads them.

    Args:
        space: The space.
        model: A network at the base of ``space.unconstrained``.
        groups: Per grouped layer, the group of each filter.
        count: The number of groups.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        >>> space = SearchSpace.from_model(net, (3, 8, 8))
        >>> model = space.build(space.base, seed=0)
        >>> _ = nn.init.ones_(model[1].weight)
        >>> _ = nn.init.zeros_(model[1].weight[:, 0])  # no filter reads channel 0
        >>> pruning = GroupPruning(space, model, {"1": torch.tensor([0, 0, 1, 1])}, 2)
        >>> pruned = pruning.pruned(1e-6)
        >>> pruning.widths(pruned).vector
        (3, 4)
        >>> [branch.inputs for branch in pruning.architecture(pruned).layers["1"]]
        [(0, 1, 2), (0, 1, 2)]
    """

    def __init__(
        self, space: SearchSpace, model: nn.Module, groups: Mapping[str, Tensor], count: int
    ) -> None:
        self._space, self._plain = space, space.unconstrained
        self._graph = build_dependency_graph(self._plain.model, self._plain.base)
        self._offsets = np.concatenate([[0], np.cumsum(self._graph.groups)])
        weights = {k: p.detach().double().cpu().numpy() for k, p in model.named_parameters()}
        self._made, self._read, self._kept = self._surroundings(model, groups.keys())
        self._layers = []
        makers = self._made.astype(np.int64)
        for layer in groups:
            np.add.at(makers, np.unique(self._channels(layer, 0)), 1)
        for layer, of in groups.items():
            chosen = np.arange(count)[:, None] == of.cpu().numpy()
            energy = np.square(weights[join(layer, "weight")])
            kernel = energy[0, 0].size
            energy = energy.sum((2, 3))
            filters, inputs = self._channels(layer, 0), self._channels(layer, 1)
            whole = np.full(len(filters), np.inf)
            if (makers[filters] > 1).any() or self._read[filters].any():
                whole = cumulative_shares(energy.sum(1))
            shares = cumulative_shares(chosen @ energy)
            times = positions(self._plain, layer) * kernel
            self._layers.append(_Layer(layer, filters, inputs, chosen, shares, whole, times))

    def _channels(self, layer: str, dim: int) -> Ints:
        """The channel at each position of a layer's weight; an extra last one if unknown."""
        where = join(layer, "weight"), dim
        axis, group = self._graph.axis[where], self._graph.group[where]
        known: Ints = np.where(axis >= 0, self._offsets[axis] + group, self._offsets[-1])
        return known

    def _surroundings(self, model: nn.Module, grouped: Any) -> tuple[Bools, Bools, Bools]:
        """The channels that other layers make, those they read, and those that are always kept."""
        graph = self._graph
        made, read, kept = (np.zeros(self._offsets[-1] + 1, bool) for _ in range(3))
        seen = np.zeros(len(graph.groups), bool)
        for key, parameter in model.named_parameters():
            layer = key.rpartition(".")[0]
            if parameter.dim() < 2 or is_depthwise(model.get_submodule(layer)):
                continue  # norms, biases and depthwise convolutions go with their channels
            consumed = graph.consumers.get(key)
            for dim in range(parameter.dim()):
                axes = graph.axis.get((key, dim))
                if axes is None:
                    continue
                if dim == consumed:
                    seen[axes[axes >= 0]] = True
                if layer not in grouped:
                    channels = self._offsets[axes] + graph.group[key, dim]
                    (read if dim == consumed else made)[channels[axes >= 0]] = True
        owned = {name for axis in self._space.axes for name in (axis.name, *axis.tied)}
        for axis, name in enumerate(self._plain.names):
            mine = slice(self._offsets[axis], self._offsets[axis + 1])
            if not seen[axis]:  # it is consumed without a weight
                read[mine] = True
            if axis in graph.unknown or name not in owned:
                kept[mine] = True
        for flags in (made, read, kept):
            flags[-1] = True
        return made, read, kept

    @cached_property
    def betas(self) -> NDArray[np.float64]:
        """Every β at which more is pruned, ascending; at 1 all but the largest entries are."""
        shares = [s.ravel() for layer in self._layers for s in (layer.threshold, layer.whole)]
        found: NDArray[np.float64] = np.unique(np.concatenate([[0.0, 1.0], *shares]))
        return found[np.isfinite(found)]

    def pruned(self, beta: float) -> Pruned:
        """Prune at β: entries with a cumulative share below β, and then dead structure."""
        filters: list[Bools] = [np.asarray(layer.whole >= beta) for layer in self._layers]
        inputs: list[Bools] = [np.asarray(layer.threshold >= beta) for layer in self._layers]
        while True:
            made, read = self._made.copy(), self._read.copy()
            before = sum(int(left.sum()) for left in (*filters, *inputs))
            for layer, alive, reads in zip(self._layers, filters, inputs, strict=True):
                occupied = layer.group @ alive
                np.logical_and(reads, occupied[:, None], out=reads)
                np.logical_and(alive, reads.any(1) @ layer.group, out=alive)
                made[layer.filters[alive]] = True
                read[layer.inputs[reads.any(0)]] = True
            for layer, alive, reads in zip(self._layers, filters, inputs, strict=True):
                np.logical_and(alive, read[layer.filters], out=alive)
                np.logical_and(reads, made[layer.inputs], out=reads)
            if before == sum(int(left.sum()) for left in (*filters, *inputs)):
                break
        return Pruned((made & read) | self._kept, tuple(filters), tuple(inputs))

    def is_connected(self, pruned: Pruned) -> bool:
        """Whether every layer has a filter left, and every axis a channel."""
        return bool(self._counts(pruned).all()) and all(f.any() for f in pruned.filters)

    def _counts(self, pruned: Pruned) -> Ints:
        """The number of channels left per axis."""
        counts: Ints = np.add.reduceat(pruned.channels[:-1], self._offsets[:-1], dtype=np.int64)
        return counts

    def widths(self, pruned: Pruned) -> Widths:
        """The widths that are left, of ``space.unconstrained`` and possibly off its grid."""
        counts = self._counts(pruned).tolist()
        pairs = zip(counts, self._plain.trace.axes, strict=True)
        return Widths(self._plain.names, tuple(n * axis.divisor for n, axis in pairs))

    def grouped_macs(self, pruned: Pruned) -> int:
        """The MACs of the grouped layers."""
        return sum(
            layer.positions * int((layer.group @ alive.astype(np.int64)) @ reads.sum(1))
            for layer, alive, reads in zip(self._layers, pruned.filters, pruned.inputs, strict=True)
        )

    def macs(self, pruned: Pruned) -> int:
        """The MACs of the branched network, exactly."""
        trace, x = self._plain.trace, self._counts(pruned).tolist()
        dense = sum(evaluate(trace.layer_macs[layer.name], x) for layer in self._layers)
        return evaluate(trace.macs, x) - dense + self.grouped_macs(pruned)

    def projected(self, pruned: Pruned) -> Widths:
        """The plain projection on the space's grid: every axis as wide as the channels left."""
        widths = self.widths(pruned)
        shares = {a.name: widths[a.name] / a.base for a in self._plain.axes}
        owners = ((axis, (axis.name, *axis.tied)) for axis in self._space.axes)
        return self._space.nearest(
            [axis.base * max(shares[name] for name in names) for axis, names in owners]
        )

    def solve(self, budget: float, *, plain: bool = False) -> float | None:
        """The smallest β at which the branched network, or its plain projection, meets a budget.

        Args:
            budget: The most MACs.
            plain: Whether the plain projection is to meet the budget.

        Returns:
            None if that leaves a layer or an axis empty.
        """

        def meets(beta: float) -> bool:
            pruned = self.pruned(beta)
            if plain:
                return self._space.cost(self.projected(pruned)).macs <= budget
            return self.macs(pruned) <= budget

        found = bisect.bisect_left(self.betas.tolist(), True, key=meets)
        if found == len(self.betas) or not self.is_connected(self.pruned(self.betas[found])):
            return None
        return float(self.betas[found])

    def keep(self, pruned: Pruned) -> dict[str, list[int]]:
        """Per axis of ``space.unconstrained``, the channels left, for ``SearchSpace.extract``."""
        out = {}
        for i, axis in enumerate(self._plain.trace.axes):
            channels = self._offsets[i] + self._graph.channels[i]
            out[axis.name] = np.flatnonzero(pruned.channels[channels]).tolist()
        return out

    def architecture(self, pruned: Pruned) -> BranchedArchitecture:
        """The branched architecture that is left, with its channels renumbered."""
        layers = {}
        for layer, alive, reads in zip(self._layers, pruned.filters, pruned.inputs, strict=True):
            filters, inputs = pruned.channels[layer.filters], pruned.channels[layer.inputs]
            layers[layer.name] = tuple(
                Branch(_renumbered(mine & alive, filters), _renumbered(channels, inputs))
                for mine, channels in zip(layer.group, reads, strict=True)
                if (mine & alive).any()
            )
        return BranchedArchitecture(self.widths(pruned), layers)


def _renumbered(chosen: Bools, kept: Bools) -> tuple[int, ...]:
    """The numbers of the chosen entries among the kept ones."""
    assert not (chosen & ~kept).any()
    return tuple((np.cumsum(kept) - 1)[chosen].tolist())
