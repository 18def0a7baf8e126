"""MACs and output elements of layers, at widths that a device computes in whole blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from widthsearch.space.cost import QuadraticForm
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.polynomials import Poly, as_constant, divide, multiply

Array = NDArray[np.float64]


class BlockLayers:
    """MACs and output elements of a space's layers, at widths rounded up to whole blocks.

    A layer's MACs are its weight's dims times the number of positions that the weight is applied
    to, so rounding the two free dims rounds the MACs. The MACs of other layers, such as attention,
    are not rounded.

    Args:
        space: The space.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 6))
        >>> layers = BlockLayers(SearchSpace.from_model(net, (3, 8, 8)))
        >>> macs, elements, off = layers([9], block=8)
        >>> float(macs.sum()), off  # as 16 channels, one width of each layer incomplete
        (1.0, array([[1., 1.]]))
    """

    def __init__(self, space: SearchSpace) -> None:
        trace, units = space.trace, [axis.divisor for axis in space.trace.axes]
        one: Poly = {(): 1}
        self._units = np.array(units, np.float64)
        self._whole: list[QuadraticForm] = []  # MACs that are no product of a weight's dims
        # Of each other layer: the positions of the output, the MACs over the product of the free
        # dims of its weight, the channels of the output, and the two free dims.
        layers: list[tuple[int, int, Poly, Poly, Poly]] = []
        for layer, macs in trace.layer_macs.items():
            shape = trace.shapes.get(f"{layer}.weight", ())
            product = functools.reduce(multiply, shape, one)
            places = as_constant(divide(macs, product) or {}) if shape and product else None
            free = [dim for dim in shape if as_constant(dim) is None]
            affine = all(len(monomial) < 2 for dim in free for monomial in dim)
            if not places or not affine or len(free) > 2:
                self._whole.append(QuadraticForm.from_poly(macs, units))
                continue
            first, second = [*free, one, one][:2]
            factor = places * math.prod(as_constant(dim) or 1 for dim in shape)
            layers.append((places, factor, shape[0], first, second))
        positions, factors, *dims = zip(*layers, strict=True) if layers else ((),) * 5
        self._positions, self._factors = np.array([positions, factors], np.float64)
        self._out, self._first, self._second = (_affine(polys, len(units)) for polys in dims)
        shares, elements, _ = self._raw(np.array([space.base.vector], np.float64), 1)
        self._scale = float(shares.sum()), float(elements.sum()) or 1.0

    def __call__(self, vectors: ArrayLike, block: int) -> tuple[Array, Array, Array]:
        """M and A, and the number of each layer's widths that are not whole blocks; (N, layers)."""
        macs, elements, off = self._raw(np.atleast_2d(np.asarray(vectors, np.float64)), block)
        return macs / self._scale[0], elements / self._scale[1], off

    def _raw(self, vectors: Array, block: int) -> tuple[Array, Array, Array]:
        x = vectors / self._units
        first, off_first = _aligned(x, self._first, block)
        second, off_second = _aligned(x, self._second, block)
        out, _ = _aligned(x, self._out, block)
        macs = self._factors * first * second
        elements = self._positions * out
        if self._whole:
            others = np.stack([form(vectors.astype(np.int64)) for form in self._whole], 1)
            macs = np.concatenate([macs, others], 1)
            elements = np.pad(elements, ((0, 0), (0, len(self._whole))))
        off = np.zeros_like(macs)
        off[:, : len(self._positions)] = off_first + off_second
        return macs, elements, off


def _affine(polys: Sequence[Poly], axes: int) -> tuple[Array, Array]:
    """The coefficients of each affine polynomial, (axes, N), and its constant, (N,)."""
    rows = np.zeros((axes + 1, len(polys)))
    for column, poly in enumerate(polys):
        for monomial, coefficient in poly.items():
            rows[monomial[0] if monomial else axes, column] = coefficient
    return rows[:-1], rows[-1]


def _aligned(x: Array, form: tuple[Array, Array], block: int) -> tuple[Array, Array]:
    """Values of affine forms rounded up to whole blocks, and whether rounding changed them.

    Constant forms are not rounded: no width can change them.
    """
    matrix, constant = form
    value = x @ matrix + constant
    blocks = np.ceil(value / block) * block
    free = (matrix != 0).any(0)
    rounded = np.where(free, blocks, value)
    return rounded, (rounded != value).astype(np.float64)
