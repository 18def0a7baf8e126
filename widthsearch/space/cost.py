"""The cost of width vectors: exact quadratic forms, for many vectors at once.

Notation: A axes, N width vectors.

- w_NA: widths in channels; d_A: channels per group of each axis; x_NA = w // d: whole groups.
- cost(w) = c + Σ_i b_i x_i + Σ_{i≤j} Q_ij x_i x_j, with a constant c, linear b_A and an upper
  triangular quadratic Q_AA, all integers.

A convolution or a linear layer multiplies two widths, so MACs, parameters and activation elements
of a network are polynomials of degree two.

Example: ``Conv2d(3, w_0, 3)`` and ``Conv2d(w_0, w_1, 1)`` on 8×8 pixels without padding make
6×6 outputs, so the MACs are 36·27·w_0 + 36·w_0·w_1: c = 0, b = (972, 0), Q_01 = 36. At (8, 16)
that is 7,776 + 4,608 = 12,384.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from widthsearch.errors import SpaceError

_BLOCK = 4096
EXACT = 2**53
"""Every integer up to this is a float64, whose matrix products are faster."""


def _too_large(cost: int) -> SpaceError:
    return SpaceError(
        f"costs must be below 2^63, but are up to {cost:.1e}: lower the widths, the axes' "
        "max_width or the input shape"
    )


@dataclass(frozen=True)
class Cost:
    """The cost of one architecture.

    Attributes:
        macs: Multiply-accumulates of one sample's forward pass; FLOPs are twice that.
        params: Parameters.
        activations: Output elements of all convolutions and matrix products, for one sample.
        weight_bytes: Bytes of all parameters and buffers, by their dtypes; None where unknown, of
            trials from before it was stored.

    Example:
        >>> cost = Cost(macs=12_384, params=352, activations=864)
        >>> f"{2 * cost.macs:,} FLOPs"
        '24,768 FLOPs'
    """

    macs: int
    params: int
    activations: int
    weight_bytes: int | None = None


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """An integer-valued polynomial of degree two in the widths.

    Attributes:
        constant: c.
        linear: b, shape (axes,), int64.
        quadratic: A, upper triangular, shape (axes, axes), int64.
        units: d, channels per group of each axis, shape (axes,): the form is evaluated at
            ``widths // units``, which loses nothing on a space's grid.

    Example:
        >>> form = QuadraticForm.from_poly({(0,): 972, (0, 1): 36}, units=[1, 1])
        >>> form([[8, 16], [4, 16]])
        array([12384,  6192])
        >>> form.marginal([8, 16])  # MACs per channel of each axis
        array([1548.,  288.])
    """

    constant: int
    linear: NDArray[np.int64]
    quadratic: NDArray[np.int64]
    units: NDArray[np.int64]

    @classmethod
    def from_poly(cls, poly: Mapping[tuple[int, ...], int], units: Sequence[int]) -> QuadraticForm:
        """The form of a polynomial whose monomials are tuples of at most two axis indices."""
        n, largest = len(units), max(map(abs, poly.values()), default=0)
        if largest >= 2**63:
            raise _too_large(largest)
        linear = np.zeros(n, np.int64)
        quadratic = np.zeros((n, n), np.int64)
        for monomial, coefficient in poly.items():
            if len(monomial) == 1:
                linear[monomial[0]] = coefficient
            elif len(monomial) == 2:
                quadratic[min(monomial), max(monomial)] = coefficient
            else:
                assert not monomial, "at most quadratic"
        return cls(poly.get((), 0), linear, quadratic, np.asarray(units, np.int64))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` reads them back."""
        rows, columns = np.nonzero(self.quadratic)
        values = self.quadratic[rows, columns]
        return {
            "constant": self.constant,
            "linear": self.linear.tolist(),
            "quadratic": np.stack([rows, columns, values], axis=1).tolist(),
            "units": self.units.tolist(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> QuadraticForm:
        """The form behind :meth:`to_json`'s values."""
        poly: dict[tuple[int, ...], int] = {(): content["constant"]}
        poly |= {(i,): value for i, value in enumerate(content["linear"])}
        poly |= {(i, j): value for i, j, value in content["quadratic"]}
        return cls.from_poly(poly, content["units"])

    def __call__(self, widths: ArrayLike) -> NDArray[np.int64]:
        """The exact value at each width vector.

        Args:
            widths: Integers, shape (N, axes) or (axes,), in channels.

        Returns:
            int64, shape (N,) or ().

        Raises:
            SpaceError: A value may not fit in 63 bits.
        """
        w = np.asarray(widths)
        batch = np.atleast_2d(w)
        out = np.empty(len(batch), np.int64)
        largest = int(batch.max(initial=1))
        bound = abs(self.constant) + int(np.abs(self.linear).sum()) * largest
        bound += int(np.abs(self.quadratic).sum()) * largest**2
        if bound >= 2**63:
            raise _too_large(bound)
        exact: type[np.float64] | type[np.int64] = np.float64 if bound < EXACT else np.int64
        a, b = self.quadratic.astype(exact), self.linear.astype(exact)
        grouped = bool((self.units != 1).any())
        for start in range(0, len(batch), _BLOCK):
            block = batch[start : start + _BLOCK]
            x: NDArray[Any] = (block // self.units if grouped else block).astype(exact)
            out[start : start + _BLOCK] = np.einsum("ij,ij->i", x @ a + b, x)
        out += self.constant
        return out.reshape(w.shape[:-1])

    def marginal(self, widths: ArrayLike) -> NDArray[np.float64]:
        """The gradient: the cost of one more channel of each axis, in makers and consumers.

        Args:
            widths: Shape (N, axes) or (axes,), in channels; need not lie on the grid.

        Returns:
            float64 of the same shape, cost per channel.
        """
        x = np.asarray(widths, np.float64) / self.units
        symmetric = (self.quadratic + self.quadratic.T).astype(np.float64)
        gradient: NDArray[np.float64] = (x @ symmetric + self.linear) / self.units
        return gradient

    def share(self, widths: ArrayLike) -> NDArray[np.float64]:
        """The share of the cost at one width vector that vanishes if an axis is removed.

        Args:
            widths: Shape (axes,).

        Returns:
            float64, shape (axes,). Shares overlap: a layer's cost depends on both its widths.
        """
        w = np.asarray(widths, np.float64)
        squares = np.diag(self.quadratic) * (w / self.units) ** 2
        with_axis: NDArray[np.float64] = w * self.marginal(w) - squares
        total = float(self(widths))
        return with_axis / total if total else with_axis
