"""Activation density: how much of what a network's layers read is active, counted in training."""

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
from widthsearch.modules.tree import owner_of
from widthsearch.torch_internals import ConvNd

RELATIVE_THRESHOLD = 0.05
"""Of the root mean square. Normally distributed activations count as 96% dense by it: a layer that
is merely linear, such as MobileNetV2's bottleneck, is not taken for a sparse one."""
_ZEROS = 0.01  # the share of exact zeros from which on they are the measure


@dataclass(frozen=True, eq=False)
class Counts:
    """What was counted of an axis.

    Attributes:
        active: Per unit, how many values were active, shape (units,).
        total: Per unit, how many there were.
    """

    active: NDArray[np.float64]
    total: NDArray[np.float64]

    def density(self) -> NDArray[np.float64]:
        """Of each unit; 0 where nothing was counted."""
        return self.active / np.maximum(self.total, 1)


@dataclass(eq=False)
class _Reader:
    """A layer that reads axes.

    Attributes:
        dim: The dim of its input along which the channels lie.
        axis: The axis of each of the weight's positions, shape (n,).
        unit: The unit within it.
        active: Per channel of what was counted, how many values were active.
        each: How many values a channel had.
    """

    dim: int
    axis: NDArray[np.int64]
    unit: NDArray[np.int64]
    active: Tensor | None = None
    each: int = 0


class DensityMeter:
    """While it lasts, counts the active values that a network's layers read in training.

    Counted is the input of every convolution and linear layer that reads an axis, in the forward
    passes of training itself. Pooling, averages over positions, dropout and flattening on the way
    are looked through: what left the activation is counted, since averages have no zeros and
    dropout makes some. Nothing waits for the device until :meth:`counts`, but for a reader's first
    batch where that decides its rule.

    Args:
        channels: Where the units lie in ``model``.
        model: The network.
        threshold: As in :class:`~widthsearch.proposers.ActivationDensity`.
        rules: The threshold of each reader by its weight's name; those missing are decided by the
            first batch and put there.
    """

    def __init__(
        self,
        channels: DependencyGraph,
        model: nn.Module,
        threshold: float | None,
        rules: dict[str, float],
    ) -> None:
        self._channels, self._threshold, self._rules = channels, threshold, rules
        self._model = model
        self._through = _LookThrough()
        self._readers: dict[str, _Reader] = {}
        self._read: list[tuple[str, Tensor]] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> DensityMeter:
        model = self._model
        layers = dict(model.named_modules())
        for key, dim in self._channels.consumers.items():
            layer = layers[owner_of(key.rpartition(".")[0])]
            convolution = isinstance(layer, ConvNd)
            if convolution and (key, dim) not in self._channels.axis and layer.weight.shape[1] == 1:
                dim = 0  # depthwise: the filter is the channel
            axis, unit = (of.get((key, dim)) for of in (self._channels.axis, self._channels.group))
            if (convolution or isinstance(layer, nn.Linear)) and axis is not None:
                assert unit is not None
                self._readers[key] = _Reader(1 if convolution else -1, axis, unit)
                hook = partial(self._note, key)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        self._hooks.append(model.register_forward_pre_hook(self._begin, prepend=True))
        self._hooks.append(model.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def counts(self) -> list[Counts]:
        """What was counted, per axis of the space that the channels are of."""
        out = [Counts(np.zeros(n), np.zeros(n)) for n in self._channels.groups]
        seen = [(r, r.active) for r in self._readers.values() if r.active is not None]
        counted = torch.cat([active for _, active in seen] or [torch.empty(0)]).cpu().numpy()
        start = 0
        for reader, sums in seen:
            n = len(sums)
            active, start = counted[start : start + n], start + n
            axes, units = (_spread(values, n) for values in (reader.axis, reader.unit))
            for a in set(axes.tolist()) - {-1}:
                np.add.at(out[a].active, units[axes == a], active[axes == a])
                np.add.at(out[a].total, units[axes == a], reader.each)
        return out

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():  # in training, that is
            self._through.__enter__()  # type: ignore[no-untyped-call]

    def _note(self, key: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._read.append((key, args[0] if args else next(iter(kwargs.values()))))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Count what was read, once what is looked through costs nothing any more."""
        if not torch.is_grad_enabled():
            return
        self._through.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        done: dict[tuple[int, int, float], Tensor] = {}
        for key, read in self._read:
            reader = self._readers[key]
            x, dim = self._through.source(read, reader.dim % read.dim())
            if key not in self._rules:
                self._rules[key] = self._rule(x)
            rule = self._rules[key]
            which = id(x), dim, rule  # several layers may read the same
            if which not in done:
                done[which] = _active(x.detach(), dim, rule)
            if reader.active is None:
                reader.active = torch.zeros_like(done[which], dtype=torch.float64)
            reader.active += done[which]
            reader.each += x.numel() // x.shape[dim]
        self._read.clear()
        self._through.before.clear()

    def _rule(self, x: Tensor) -> float:
        if self._threshold is not None:
            return self._threshold
        zeros = (x == 0).float().mean().item()
        return 0.0 if zeros >= _ZEROS else RELATIVE_THRESHOLD


def _active(x: Tensor, dim: int, rule: float) -> Tensor:
    """How many values along each position of a dim are active, float32 of shape (n,)."""
    active = torch.empty_like(x, dtype=torch.float32)
    if rule:
        rms = torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel())
        torch.abs(x, out=active).gt_(rule * rms)
    else:
        torch.ne(x, 0, out=active)
    return active.sum([d for d in range(x.dim()) if d != dim])


class _LookThrough(TorchFunctionMode):
    """Remembers what tensors were before they were pooled, averaged, dropped or flattened.

    Attributes:
        before: By the tensor that came of it. Strong references, until it is cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

    def source(self, read: Tensor, dim: int) -> tuple[Tensor, int]:
        """What a tensor was, and the dim along which its channels then were."""
        before = self.before.get(read)
        if before is None:
            return read, dim
        at = dim if before.dim() == read.dim() else 1
        return (before, at) if read.shape[dim] % before.shape[at] == 0 else (read, dim)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
    """Whether a function of torch leaves channels and zeros what they were, as far as we count."""
    if name == "mean":
        dims = rest[0] if rest else kwargs.get("dim")
        return x.dim() == 4 and isinstance(dims, Sequence) and {d % 4 for d in dims} == {2, 3}
    return name in _RESHAPES or name.startswith(_POOLS) or "dropout" in name


def _spread(values: NDArray[np.int64], channels: int) -> NDArray[np.int64]:
    """Values of a weight's positions as values of so many channels that it reads.

    A channel may be several positions in a row (flattened; a depthwise filter each), and a position
    a channel of each group.
    """
    if channels >= len(values):
        return np.tile(values, channels // len(values))
    return values[:: len(values) // channels]
