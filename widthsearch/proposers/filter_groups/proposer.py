"""Learned filter groups: channels leave groups of filters, and layers become branches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.data.tasks import Task
from widthsearch.errors import SpaceError, StudyError
from widthsearch.modules.tree import join
from widthsearch.proposers.filter_groups.branched_space import (
    Branch,
    BranchedArchitecture,
    is_depthwise,
    positions,
)
from widthsearch.proposers.filter_groups.learning import find_layers, learn_groups
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.proposers.tuning import train_base
from widthsearch.space.cost import QuadraticForm
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.polynomials import add
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import evaluate
from widthsearch.widths import Widths

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class FilterGroups:
    """Dynamic structure pruning (DSP; Park et al. 2023, arXiv 2303.09736).

    The base network is trained, then trained on while groups of filters are learned (see
    ``learning.py``). Then each group loses the input channels in which it has
    the least energy, as many as add up to less than a share β of its energy, and so do layers whose
    filters nothing else would remove lose whole filters; then what died goes. What is left are
    branched architectures: ``branched`` in the provenance, one for each of ``members`` budgets from
    the base's MACs to ``setting.lowest`` of them, met by bisecting β. The trajectory is their plain
    projection: every layer as wide as the channels that survive in it, snapped to the grid; further
    members are those whose plain MACs meet the same budgets.

    Channels of axes that cannot be told apart, or are pinned by the user, stay; a tied axis is as
    wide as the widest of its axes asks. Residual streams stay wide as long as a layer that is not
    grouped (a stem, a projection) makes each of their channels.

    Attributes:
        groups: Groups of filters in each layer.
        penalty: λ of the group lasso; 2e-3 for ResNet-20 and 5e-4 for ResNet-56 at CIFAR-10 in the
            paper, over 47,000 steps. Fewer steps need more.
        group_lr: Learning rate of the logits.
        temperature: τ of the softmax.
        members: How many budgets.
        pretrain: How the base network is trained first; None for the study's recipe.
        learn: How it is trained while groups are learned; None for the study's recipe.
    """

    groups: int = 4
    penalty: float = 2e-3
    group_lr: float = 1e-3
    temperature: float = 0.5
    members: int = 6
    pretrain: Recipe | None = None
    learn: Recipe | None = None

    def __post_init__(self) -> None:
        for field, least in {"groups": 1, "members": 1}.items():
            if getattr(self, field) < least:
                raise StudyError(
                    f"`{field} >= {least}` must hold, but filter_groups has "
                    f"{field}={getattr(self, field)!r}"
                )
        for field in ("penalty", "group_lr", "temperature"):
            value = getattr(self, field)
            if not (value >= 0 and math.isfinite(value)) or (field == "temperature" and not value):
                rule = "> 0" if field == "temperature" else ">= 0"
                raise StudyError(
                    f"`{field} {rule}` must hold, but filter_groups has {field}={value!r}"
                )

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """Train the base network, learn groups, prune at several budgets.

        Raises:
            SpaceError: No layer can be grouped.
            StudyError: Training diverged.
        """
        model, groups, measured = self.learned(space, task, setting)
        pruning = GroupPruning(space, model, groups, self.groups)
        base = pruning.macs(pruning.pruned(0.0))
        shares = np.geomspace(1, setting.lowest, self.members + 1)[1:].tolist()
        members: dict[Widths, None] = {space.base: None}
        branched = []
        betas = []
        for share in shares:
            beta = pruning.solve(share * base)
            if beta is None:
                continue
            pruned = pruning.pruned(beta)
            branched.append(
                {
                    "budget": share,
                    "beta": beta,
                    "macs": pruning.macs(pruned),
                    "plain": list(pruning.projected(pruned).vector),
                    "architecture": pruning.architecture(pruned).to_json(),
                }
            )
            betas += [beta, pruning.solve(share * base, plain=True)]
        for beta in sorted(b for b in betas if b is not None):
            members[pruning.projected(pruning.pruned(beta))] = None
        return Proposal(
            "filter_groups",
            tuple(members),
            {"seed": setting.seed, **asdict(self), **measured, "branched": branched},
        )

    def learned(
        self, space: SearchSpace, task: Task, setting: Setting
    ) -> tuple[nn.Module, Mapping[str, Tensor], dict[str, float]]:
        """The trained base network, the groups of its filters, and accuracies in percent.

        Groups are one integer a filter, by layer.
        """
        free = space.unconstrained
        layers = find_layers(free)
        if not layers:
            raise SpaceError(
                "filter groups need an ungrouped Conv2d whose inputs and outputs both have free "
                f"widths, but space {space.name!r} has none; use another method (`sensitivity`)"
            )
        pretrain, learn = self.pretrain or setting.recipe, self.learn or setting.recipe
        model = free.build(free.base, seed=setting.seed)
        pretrained = train_base(model, task, pretrain, setting)
        groups = learn_groups(
            model,
            layers,
            task,
            learn,
            groups=self.groups,
            penalty=self.penalty,
            lr=self.group_lr,
            temperature=self.temperature,
            seed=setting.seed + 1,
            device=setting.device,
            report=setting.report,
        )
        accuracy = evaluate(model, task, "validation", setting.device, learn.precision)
        return model, groups, {"pretrained": pretrained, "grouped": accuracy}


# -- pruning -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Layer:
    """A grouped layer.

    Attributes:
        name: Which.
        filters: Per filter, the unit that it makes (of all axes' units, numbered through).
        inputs: Per input channel, the unit that it is.
        group: Per filter, its group, one-hot: (G, F).
        threshold: Per group and input channel, the share of the group's energy in that channel and
            all that have less: (G, C); inf for the one with the most.
        whole: The same per filter, of the layer's energy, where whole filters go; else inf.
        positions: How often the kernel is applied, times its elements.
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
    """What is left.

    Attributes:
        units: Which units of all axes there are.
        filters: Per layer, which of its filters there are: (F,).
        inputs: Per layer, which channels each of its groups reads: (G, C).
    """

    units: Bools
    filters: tuple[Bools, ...]
    inputs: tuple[Bools, ...]


def cumulative_shares(energies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per row, the share of its sum in each entry and all that come before it in ascending order.

    Below β goes what has a share below β: the smallest, while their sum stays below β. The largest
    never goes: its share is inf. Shape (…, n) to the same.
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
    """Prunes a network's groups by a share β of their energy, and removes what dies of it.

    A filter dies when no layer reads the channel that it makes, or it reads none; a channel dies
    when no filter makes it; both until nothing more dies. Whole filters go, at the same β, where
    nothing else would let them die: where other layers make the same channel (the last convolution
    of a residual block), or a layer reads it that is not grouped.

    Args:
        space: The space.
        model: A network at the base of ``space.free``.
        groups: Per grouped layer, the group of each filter.
        count: How many groups there are.
    """

    def __init__(
        self, space: SearchSpace, model: nn.Module, groups: Mapping[str, Tensor], count: int
    ) -> None:
        self._space, self._free = space, space.unconstrained
        self._channels = build_dependency_graph(self._free.model, self._free.base)
        self._offsets = np.concatenate([[0], np.cumsum(self._channels.groups)])
        weights = {k: p.detach().double().cpu().numpy() for k, p in model.named_parameters()}
        self._made, self._read, self._kept = self._surroundings(model, groups.keys())
        self._layers = []
        makers = self._made.astype(np.int64)
        for layer in groups:
            np.add.at(makers, np.unique(self._units(layer, 0)), 1)
        for layer, of in groups.items():
            chosen = np.arange(count)[:, None] == of.cpu().numpy()
            energy = np.square(weights[join(layer, "weight")])
            kernel = energy[0, 0].size
            energy = energy.sum((2, 3))
            filters, inputs = self._units(layer, 0), self._units(layer, 1)
            whole = np.full(len(filters), np.inf)
            if (makers[filters] > 1).any() or self._read[filters].any():
                whole = cumulative_shares(energy.sum(1))
            shares = cumulative_shares(chosen @ energy)
            times = positions(self._free, layer) * kernel
            self._layers.append(_Layer(layer, filters, inputs, chosen, shares, whole, times))

    def _units(self, layer: str, dim: int) -> Ints:
        """The unit at each position of a layer's weight; the one behind the last where unknown."""
        where = join(layer, "weight"), dim
        axis, unit = self._channels.axis[where], self._channels.group[where]
        known: Ints = np.where(axis >= 0, self._offsets[axis] + unit, self._offsets[-1])
        return known

    def _surroundings(self, model: nn.Module, grouped: Any) -> tuple[Bools, Bools, Bools]:
        """Which units layers that are not grouped make and read, and which stay in any case."""
        channels = self._channels
        made, read, kept = (np.zeros(self._offsets[-1] + 1, bool) for _ in range(3))
        seen = np.zeros(len(channels.groups), bool)
        for key, parameter in model.named_parameters():
            layer = key.rpartition(".")[0]
            if parameter.dim() < 2 or is_depthwise(model.get_submodule(layer)):
                continue  # norms, biases and depthwise convolutions go with their channels
            reader = channels.consumers.get(key)
            for dim in range(parameter.dim()):
                axes = channels.axis.get((key, dim))
                if axes is None:
                    continue
                if dim == reader:
                    seen[axes[axes >= 0]] = True
                if layer not in grouped:
                    units = self._offsets[axes] + channels.group[key, dim]
                    (read if dim == reader else made)[units[axes >= 0]] = True
        owned = {name for axis in self._space.axes for name in (axis.name, *axis.tied)}
        for axis, name in enumerate(self._free.names):
            mine = slice(self._offsets[axis], self._offsets[axis + 1])
            if not seen[axis]:  # something else than a weight reads it
                read[mine] = True
            if axis in channels.unknown or name not in owned:
                kept[mine] = True
        for flags in (made, read, kept):
            flags[-1] = True
        return made, read, kept

    @cached_property
    def betas(self) -> NDArray[np.float64]:
        """Every β at which something more goes, ascending; at 1 all goes but the largest."""
        shares = [s.ravel() for layer in self._layers for s in (layer.threshold, layer.whole)]
        found: NDArray[np.float64] = np.unique(np.concatenate([[0.0, 1.0], *shares]))
        return found[np.isfinite(found)]

    def pruned(self, beta: float) -> Pruned:
        """What is left at a β: what has a cumulative share of β or more, and has not died."""
        filters: list[Bools] = [np.asarray(layer.whole >= beta) for layer in self._layers]
        inputs: list[Bools] = [np.asarray(layer.threshold >= beta) for layer in self._layers]
        while True:
            made, read = self._made.copy(), self._read.copy()
            before = sum(int(f.sum()) + int(i.sum()) for f, i in zip(filters, inputs, strict=True))
            for layer, alive, reads in zip(self._layers, filters, inputs, strict=True):
                occupied = layer.group @ alive
                np.logical_and(reads, occupied[:, None], out=reads)
                np.logical_and(alive, reads.any(1) @ layer.group, out=alive)
                made[layer.filters[alive]] = True
                read[layer.inputs[reads.any(0)]] = True
            for layer, alive, reads in zip(self._layers, filters, inputs, strict=True):
                np.logical_and(alive, read[layer.filters], out=alive)
                np.logical_and(reads, made[layer.inputs], out=reads)
            after = sum(int(f.sum()) + int(i.sum()) for f, i in zip(filters, inputs, strict=True))
            if after == before:
                break
        return Pruned((made & read) | self._kept, tuple(filters), tuple(inputs))

    def whole(self, pruned: Pruned) -> bool:
        """Whether every layer has a filter left, and every axis a channel."""
        axes = np.add.reduceat(pruned.units[:-1], self._offsets[:-1], dtype=np.int64)
        return bool(axes.all()) and all(f.any() for f in pruned.filters)

    @cached_property
    def _rest(self) -> QuadraticForm:
        """The MACs of all that is not grouped."""
        poly = self._free.trace.macs
        for layer in self._layers:
            poly = add(poly, self._free.trace.layer_macs[layer.name], -1)
        return QuadraticForm.from_poly(poly, [axis.divisor for axis in self._free.trace.axes])

    def widths(self, pruned: Pruned) -> Widths:
        """The widths of ``space.free``, off its grid: the channels that there are."""
        units = np.add.reduceat(pruned.units[:-1], self._offsets[:-1], dtype=np.int64)
        each = [axis.divisor for axis in self._free.trace.axes]
        return Widths(
            self._free.names, tuple(int(n) * unit for n, unit in zip(units, each, strict=True))
        )

    def grouped_macs(self, pruned: Pruned) -> int:
        """The MACs of the grouped layers."""
        return sum(
            layer.positions * int((layer.group @ alive.astype(np.int64)) @ reads.sum(1))
            for layer, alive, reads in zip(self._layers, pruned.filters, pruned.inputs, strict=True)
        )

    def macs(self, pruned: Pruned) -> int:
        """The MACs of the branched network, exactly."""
        return int(self._rest(self.widths(pruned).vector)) + self.grouped_macs(pruned)

    def projected(self, pruned: Pruned) -> Widths:
        """Plain widths on the space's grid: every axis as wide as its surviving channels."""
        widths = self.widths(pruned)
        shares = {a.name: widths[a.name] / a.base for a in self._free.axes}
        return self._space.nearest(
            [
                axis.base * max(shares[name] for name in (axis.name, *axis.tied))
                for axis in self._space.axes
            ]
        )

    def solve(self, budget: float, *, plain: bool = False) -> float | None:
        """The least β at which the branched network, or its plain projection, meets a budget.

        Args:
            budget: In MACs.
            plain: Whether the projection is to meet it.

        Returns:
            None if a layer or an axis would be empty before.
        """

        def first(holds: Any) -> int:
            low, high = 0, len(self.betas)
            while low < high:
                middle = (low + high) // 2
                if holds(self.pruned(self.betas[middle])):
                    high = middle
                else:
                    low = middle + 1
            return low

        def meets(pruned: Pruned) -> bool:
            if plain:
                return self._space.cost(self.projected(pruned)).macs <= budget
            return self.macs(pruned) <= budget

        found = first(meets)
        if found == len(self.betas) or not self.whole(self.pruned(self.betas[found])):
            return None
        return float(self.betas[found])

    def keep(self, pruned: Pruned) -> dict[str, list[int]]:
        """Per axis of ``space.free``, the channels that there are, as ``space.inherit`` takes."""
        out = {}
        for i, axis in enumerate(self._free.trace.axes):
            units = self._offsets[i] + self._channels.group[axis.maker]
            out[axis.name] = np.flatnonzero(pruned.units[units]).tolist()
        return out

    def architecture(self, pruned: Pruned) -> BranchedArchitecture:
        """The same as a branched architecture; channels are counted as they are left."""
        layers = {}
        for layer, alive, reads in zip(self._layers, pruned.filters, pruned.inputs, strict=True):
            filters, inputs = pruned.units[layer.filters], pruned.units[layer.inputs]
            layers[layer.name] = tuple(
                Branch(_renumbered(mine & alive, filters), _renumbered(channels, inputs))
                for mine, channels in zip(layer.group, reads, strict=True)
                if (mine & alive).any()
            )
        return BranchedArchitecture(self.widths(pruned), layers)


def _renumbered(chosen: Bools, kept: Bools) -> tuple[int, ...]:
    """The numbers of what is chosen, among what is kept."""
    assert not (chosen & ~kept).any()
    return tuple((np.cumsum(kept) - 1)[chosen].tolist())
