"""Activation density: the share of active values in the inputs of layers, counted in training.

Notation::

    consumer   a convolution or linear layer that reads the channels of an axis
    rule       the threshold of a consumer: a value x is active if |x| > rule · rms, where rms is
               the root mean square of the consumer's input; with rule 0, if x ≠ 0

For example, after a ReLU a batch of two images with 4×4 positions has 32 values per channel. If 8
of them are not zero, the density of the channel is 8/32 = 0.25. Behind a global average pooling
only the averages reach the consumer, and hardly any average is zero: pooling is looked through, so
that the 32 values before it count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.channels.sums import of_input_channels
from widthsearch.modules.tree import owner_of
from widthsearch.torch_internals import ConvNd

RELATIVE_THRESHOLD = 0.05
"""The rule of consumers whose inputs have no zeros. By it, normally distributed inputs are 96%
dense, so that a layer without activation, such as MobileNetV2's bottleneck, does not look sparse.
"""
_ZEROS = 0.01  # inputs with a smaller share of exact zeros have the relative rule

Rules = dict[str, float]
"""The rule of each consumer by the name of its weight."""


@dataclass(frozen=True, eq=False)
class Counts:
    """The counts of an axis.

    Attributes:
        active: The number of active values of each channel group, shape (groups,).
        total: The number of values of each group.

    Example:
        >>> Counts(active=np.array([3.0, 0.0]), total=np.array([4.0, 0.0])).density().tolist()
        [0.75, 0.0]
    """

    active: NDArray[np.float64]
    total: NDArray[np.float64]

    def density(self) -> NDArray[np.float64]:
        """The density of each group; 0 where nothing was counted."""
        return self.active / np.maximum(self.total, 1)


@dataclass(eq=False)
class _Consumer:
    """A layer that reads axes.

    Attributes:
        dim: The dim of channels of its input.
        axis: The axis of each position along the weight's dim of channels, shape (n,).
        group: The channel group within the axis.
        active: The number of active values of each input channel.
        total: The number of values of each input channel.
    """

    dim: int
    axis: NDArray[np.int64]
    group: NDArray[np.int64]
    active: Tensor | None = None
    total: int = 0


class DensityMeter:
    """Counts the active values in the inputs of consumers, while it is active.

    It counts in the forward passes of training itself. Pooling, averages over positions, dropout
    and flattening in front of a consumer are looked through, since averages have no zeros and
    dropout makes some. The host waits for the device in :meth:`counts` only, and in a consumer's
    first batch if that determines the rule.

    Args:
        graph: The dependency graph of the network.
        model: The network.
        threshold: As in :class:`~widthsearch.proposers.activation_density.ActivationDensity`.
        rules: The rule of each consumer by the name of its weight; missing ones are determined by
            the first batch and added.

    Example:
        >>> from widthsearch.channels.dependency_graph import build_dependency_graph
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> space = SearchSpace.from_model(net, (2,))
        >>> model = space.build(space.base)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.zero_()
        ...     _ = model[0].bias.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
        >>> graph = build_dependency_graph(space.model, space.base)
        >>> with DensityMeter(graph, model, None, {}) as meter:
        ...     _ = model(torch.ones(5, 2))
        >>> meter.counts()[0].density().tolist()
        [1.0, 0.0, 1.0, 0.0]
    """

    def __init__(
        self, graph: DependencyGraph, model: nn.Module, threshold: float | None, rules: Rules
    ) -> None:
        self._graph, self._model, self._threshold, self._rules = graph, model, threshold, rules
        self._through = _LookThrough()
        self._consumers: dict[str, _Consumer] = {}
        self._inputs: list[tuple[str, Tensor]] = []  # of this forward pass, by consumer
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> DensityMeter:
        model, graph = self._model, self._graph
        for key, dim in graph.consumers.items():
            layer = model.get_submodule(owner_of(key.rpartition(".")[0]))
            if isinstance(layer, ConvNd | nn.Linear):
                of_input, where = (-1 if isinstance(layer, nn.Linear) else 1), (key, dim)
                self._consumers[key] = _Consumer(of_input, graph.axis[where], graph.group[where])
                hook = partial(self._note, key)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        self._hooks.append(model.register_forward_pre_hook(self._begin, prepend=True))
        self._hooks.append(model.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def counts(self) -> list[Counts]:
        """The counts per axis of the graph."""
        out = [Counts(np.zeros(n), np.zeros(n)) for n in self._graph.groups]
        seen = [(c, c.active) for c in self._consumers.values() if c.active is not None]
        # One transfer from the device for all consumers.
        counted = torch.cat([sums for _, sums in seen] or [torch.empty(0)]).cpu()
        of_consumers = torch.split(counted, [len(sums) for _, sums in seen])
        for (consumer, _), active in zip(seen, of_consumers, strict=True):
            n = len(active)
            axes, groups = (of_input_channels(of, n) for of in (consumer.axis, consumer.group))
            for a in set(axes.tolist()) - {-1}:
                np.add.at(out[a].active, groups[axes == a], active.numpy()[axes == a])
                np.add.at(out[a].total, groups[axes == a], consumer.total)
        return out

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():  # in training, not in evaluation
            self._through.__enter__()  # type: ignore[no-untyped-call]

    def _note(self, key: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._inputs.append((key, args[0] if args else next(iter(kwargs.values()))))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Count the inputs of a forward pass after its end, outside of the function mode."""
        if not torch.is_grad_enabled():
            return
        self._through.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        done: dict[tuple[int, int, float], Tensor] = {}
        for key, read in self._inputs:
            consumer = self._consumers[key]
            x, dim = self._through.source(read, consumer.dim % read.dim())
            if key not in self._rules:
                self._rules[key] = self._rule(x)
            rule = self._rules[key]
            which = id(x), dim, rule  # several consumers may read the same tensor
            if which not in done:
                done[which] = _active(x.detach(), dim, rule)
            if consumer.active is None:
                consumer.active = torch.zeros_like(done[which], dtype=torch.float64)
            consumer.active += done[which]
            consumer.total += x.numel() // x.shape[dim]
        self._inputs.clear()
        self._through.before.clear()

    def _rule(self, x: Tensor) -> float:
        if self._threshold is not None:
            return self._threshold
        zeros = (x == 0).float().mean().item()
        return 0.0 if zeros >= _ZEROS else RELATIVE_THRESHOLD


def _active(x: Tensor, dim: int, rule: float) -> Tensor:
    """The number of active values at each position of a dim, float32 of shape (n,)."""
    active = torch.empty_like(x, dtype=torch.float32)
    if rule:
        rms = torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel())
        torch.gt(x.abs(), rule * rms, out=active)
    else:
        torch.ne(x, 0, out=active)
    return active.sum([d for d in range(x.dim()) if d != dim])


class _LookThrough(TorchFunctionMode):
    """Maps tensors to their source before pooling, averaging, dropout and flattening.

    Attributes:
        before: The source by the resulting tensor; holds the sources until it is cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

    def source(self, read: Tensor, dim: int) -> tuple[Tensor, int]:
        """The source of a consumer's input, and the dim of channels there."""
        before = self.before.get(read)
        if before is None:
            return read, dim
        at = dim if before.dim() == read.dim() else 1
        return (before, at) if read.shape[dim] % before.shape[at] == 0 else (read, dim)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not _looked_through(name, x, args[1:], kwargs):
            return func(*args, **kwargs)
        before = self.before.get(x)
        if before is None and name not in _RESHAPES:
            in_place = name.endswith("_") or True in args[3:] or kwargs.get("inplace")
            before = x.detach().clone() if in_place and "dropout" in name else x
        out = func(*args, **kwargs)
        if before is not None and isinstance(out, Tensor) and len(out) == len(x):
            self.before[out] = before
        return out


_RESHAPES = ("flatten", "view", "reshape", "squeeze")
_POOLS = ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")


def _looked_through(name: str, x: Tensor, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch is looked through: it keeps the order of channels."""
    if name == "mean":
        dims = rest[0] if rest else kwargs.get("dim")
        return x.dim() == 4 and isinstance(dims, Sequence) and {d % 4 for d in dims} == {2, 3}
    return name in _RESHAPES or name.startswith(_POOLS) or "dropout" in name
