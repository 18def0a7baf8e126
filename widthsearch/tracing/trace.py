"""The result of one symbolic run as plain values: axes, shapes and costs, also as JSON.

Notation: axis ``i`` has the width ``w_i`` in channels and ``divisor_i`` channels per group.
Polynomials are over ``x_i = w_i / divisor_i``, a whole number at every width of the axis. Keys of a
polynomial are monomials, tuples of axis indices: ``{(): 5, (0,): 2, (0, 1): 3}`` is
``5 + 2·x_0 + 3·x_0·x_1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from widthsearch.tracing.polynomials import Poly, evaluate

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TracedAxis:
    """A free width.

    Attributes:
        name: The first layer that produces the width.
        base: The width in the model as given, in channels.
        divisor: Channels per group (of a grouped convolution, or per attention head); every width
            of the axis is a multiple of it.
        layers: Every layer with a tensor whose shape depends on the axis.
        maker: The tensor and the dim that the axis is named after.

    Example:
        >>> axis = TracedAxis("conv1", 64, 4, layers=("conv1", "conv2"), maker=("conv1.weight", 0))
        >>> axis.base // axis.divisor  # groups
        16
    """

    name: str
    base: int
    divisor: int
    layers: tuple[str, ...]
    maker: tuple[str, int]


@dataclass(frozen=True)
class Pinned:
    """A width that is not free.

    Attributes:
        name: The first layer with this width.
        size: Its value, in channels.
        reason: The line of code, or the rule, that fixes it.
        layers: Every layer whose shape depends on it.
        places: The tensors and dims with this width, or a multiple of it.

    Example:
        >>> stem = Pinned("conv1", 3, "input of the model", ("conv1",), (("conv1.weight", 1),))
        >>> f"{stem.name} has {stem.size} channels: {stem.reason}"
        'conv1 has 3 channels: input of the model'
    """

    name: str
    size: int
    reason: str
    layers: tuple[str, ...]
    places: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Trace:
    """Everything that one symbolic run finds out about a model.

    Attributes:
        axes: The free widths.
        pinned: The widths that are not free, each with its reason.
        shapes: Per parameter and buffer, its sizes as polynomials.
        attributes: Per module and integer attribute that follows an axis, its value.
        macs: Multiply-accumulates of one sample's forward pass in eval mode (half of the FLOPs
            that ``FlopCounterMode`` counts).
        params: Number of parameters.
        activations: Output elements of every convolution and matrix product for one sample;
            "activations" of Radosavovic et al. 2020 (RegNet, section 2).
        layer_macs: The MACs of each layer.

    Example:
        >>> from torch import nn
        >>> from widthsearch.tracing.tracer import trace
        >>> traced = trace(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), (5,))
        >>> [(axis.name, axis.base) for axis in traced.axes]
        [('0', 8)]
        >>> traced.macs  # 5·w inputs of the first layer, w·3 of the second
        {(0,): 8}
        >>> [(pin.name, pin.size, pin.reason) for pin in traced.pinned]
        [('0', 5, 'input of the model'), ('2', 3, 'output of the model')]
    """

    axes: tuple[TracedAxis, ...]
    pinned: tuple[Pinned, ...]
    shapes: Mapping[str, tuple[Poly, ...]]
    attributes: Mapping[tuple[str, str], Poly]
    macs: Poly
    params: Poly
    activations: Poly
    layer_macs: Mapping[str, Poly]

    @property
    def base(self) -> list[int]:
        """The widths of the model as given, in channels."""
        return [axis.base for axis in self.axes]

    def variables(self, widths: Sequence[int]) -> list[int]:
        """The values of the polynomials' variables at these widths (in channels)."""
        return [width // axis.divisor for width, axis in zip(widths, self.axes, strict=True)]

    def pinned_shares(self) -> list[float]:
        """Per pinned width, the share of the base's MACs in the layers whose shape depends on it.

        Shares overlap, since most layers have two widths.
        """
        x = self.variables(self.base)
        macs = {layer: evaluate(poly, x) for layer, poly in self.layer_macs.items()}
        total = max(1, sum(macs.values()))
        return [sum(macs.get(at, 0) for at in set(pin.layers)) / total for pin in self.pinned]

    def difference(self, model: nn.Module) -> str | None:
        """The first tensor of a model with another name or shape than in this trace, if any."""
        x = self.variables(self.base)
        traced = {key: tuple(evaluate(n, x) for n in shape) for key, shape in self.shapes.items()}
        from widthsearch.modules.tree import join, tensors_of  # here: plain values need no torch

        found = {join(layer, name): tuple(t.shape) for _, layer, name, t in tensors_of(model)}
        for key in (*traced, *found):
            if traced.get(key) != found.get(key):
                shapes = (
                    f"shape {of[key]}" if key in of else "no tensor" for of in (traced, found)
                )
                return "its tensor {!r} has {} in the trace and {} in the model".format(
                    key, *shapes
                )
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` reads them back."""
        return {
            "axes": [astuple(axis) for axis in self.axes],
            "pinned": [astuple(pin) for pin in self.pinned],
            "shapes": [[name, *map(_terms, shape)] for name, shape in self.shapes.items()],
            "attributes": [[*where, _terms(poly)] for where, poly in self.attributes.items()],
            "macs": _terms(self.macs),
            "params": _terms(self.params),
            "activations": _terms(self.activations),
            "layer_macs": [[layer, _terms(poly)] for layer, poly in self.layer_macs.items()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Trace:
        """The trace behind :meth:`to_json`'s values."""
        return cls(
            axes=tuple(TracedAxis(*row) for row in _in_tuples(content["axes"])),
            pinned=tuple(Pinned(*row) for row in _in_tuples(content["pinned"])),
            shapes={name: tuple(map(_poly, shape)) for name, *shape in content["shapes"]},
            attributes={(layer, name): _poly(p) for layer, name, p in content["attributes"]},
            macs=_poly(content["macs"]),
            params=_poly(content["params"]),
            activations=_poly(content["activations"]),
            layer_macs={layer: _poly(terms) for layer, terms in content["layer_macs"]},
        )


def _terms(poly: Poly) -> list[list[int]]:
    return [[coefficient, *monomial] for monomial, coefficient in poly.items()]


def _poly(terms: Iterable[list[int]]) -> Poly:
    return {tuple(monomial): coefficient for coefficient, *monomial in terms}


def _in_tuples(value: Any) -> Any:
    return tuple(map(_in_tuples, value)) if isinstance(value, list) else value
