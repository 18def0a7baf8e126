"""Propagates elements through one run of a model.

Notation as in ``elements.py``: each tensor of the run has *fields*, which name the elements that
its entries depend on. The rule of an operator (``rules.py``) computes the fields of its output and
*unites* the elements that can only be removed together. In a masked network the entries of removed
channels are undefined, so every operation must be one of:

- *local*: each entry of the output depends on entries of the same channels (pointwise operators,
  views, pooling). Undefined entries give undefined entries.
- a *read*: it combines entries of several channels (convolutions, products, sums, norms). Masks
  take the removed channels out of its operands, so that it computes what it would without them.
- anything else: the axes of the elements that it combines are *lost*, with the line as the reason.

A *consumer* is a weight in a read of activations. A *seam* is a position at which a dim is cut into
parts of other sizes at other widths (``seams.py``).

Example: ``x`` with the field ``[0, 1]`` along its channels enters a convolution. Its weight has the
elements ``[2, 3, 4]`` along dim 0 and ``[5, 6]`` along dim 1. The rule unites 0 with 5 and 1 with
6, reads both, records the weight as a consumer along dim 1, and the output has ``[2, 3, 4]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.call_sites import CallSites, Site
from widthsearch.channels.elements import Elements, Field, compressed, hinted, shape_of, varies
from widthsearch.channels.local_rules import moved, pad, view
from widthsearch.channels.rules import keeps_zeros, rule_of
from widthsearch.channels.seams import Seam
from widthsearch.torch_internals import (
    TorchDispatchMode,
    schema_of,
    tree_leaves,
    tree_map,
    tree_map_only,
    without_modes,
)
from widthsearch.tracing.interpreter import BATCH_NORMS, running_line
from widthsearch.tracing.polynomials import Poly, as_constant, symbols_of
from widthsearch.tracing.symbolic_ints import poly_of

FILLS: dict[str, Any] = {
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp", "logcumsumexp"), -torch.inf),
    **dict.fromkeys(("amax", "max", "cummax"), -torch.inf),
    **dict.fromkeys(("amin", "min", "cummin"), torch.inf),
    **dict.fromkeys(("prod", "cumprod", "all"), 1),
    **dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean"), "statistics"),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm", "batch_norm"), "statistics"),
}
"""By name of a torch function, the value that takes masked entries out of it; 0 for other reads.

``statistics`` are computed over the entries that are kept (``masking.py``)."""


@dataclass
class Call:
    """A call of an operator, with its outputs.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> call = Call(torch.ops.aten.sum.dim_IntList, (x, [1]), {}, x.sum(1))
        >>> call.named["dim"], call.named["keepdim"], [tuple(o.shape) for o in call.outputs]
        ([1], False, [(2,)])
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments by name, defaults included."""
        names = schema_of(self.func).arguments
        defaults = {a.name: a.default_value for a in names if a.has_default_value()}
        given = {a.name: value for a, value in zip(names, self.args, strict=False)}
        return defaults | given | self.kwargs

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors among the outputs."""
        return [t for t in tree_leaves(self.out) if isinstance(t, Tensor)]


@dataclass
class SiteRecord:
    """What the operators within one call of a torch function do with elements.

    Attributes:
        name: The function.
        reads: Fields that are combined along some dims.
        consumed: The fields of weights among them.
        filled: By id, tensors whose masked entries are filled: operands and what keeps the value.
        operands: The fields of the call's operands by place, if it reads or consumes any.

    Example:
        >>> x, other = torch.zeros(2), torch.zeros(2)
        >>> record = SiteRecord("sum", filled={id(x): x})
        >>> record.fills(x), record.fills(other)
        (True, False)
    """

    name: str
    reads: list[tuple[Field, set[int]]] = field(default_factory=list)
    consumed: list[Field] = field(default_factory=list)
    operands: dict[int, list[Field]] = field(default_factory=dict)
    filled: dict[int, Tensor] = field(default_factory=dict)

    def fills(self, tensor: Tensor) -> bool:
        """Whether the masked entries of a tensor have the value that fills the operands."""
        return id(tensor) in self.filled


class Propagation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes the fields of every operation's outputs and unites the elements that it combines.

    Attributes:
        elements: The elements of the model's parameters and buffers.
        starts: The first element of each dim that has elements.
        places: The parameter and the dim of each of them; None for a buffer.
        parameters: The name of each parameter, by the id of its meta tensor.
        consumers: Per parameter that multiplies channels, the dim along which it does.
        sites: The calls that read elements.
        seams: Where dims are cut.
        parts: What is taken out of dims of several axes, or added to them: its size and elements.
        lost: Elements that an operator without a rule combines, each with the reason.
        lost_axes: Axes of sizes that such an operator makes, each with the reason.
        on_use: By id of a tensor that was not read yet, what happens once it is.
        views: By id, the tensor that a view is a view of, and the operator that makes it.

    Example:
        >>> elements, x = Elements(), torch.zeros(1, 2, device="meta")
        >>> run = Propagation(elements, [x])
        >>> run.set_fields(x, [torch.from_numpy(elements.new(2)).reshape(1, 2)])
        >>> with run:
        ...     y = torch.relu(x)  # local: the output depends on the same elements
        >>> run.field_along(y, 1).tolist()
        [0, 1]
    """

    def __init__(self, elements: Elements, activations: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements
        elements.reason = self._reason
        self.starts: list[int] = []
        self.places: list[tuple[str | None, int]] = []
        self.consumers: dict[str, int] = {}
        self.parameters: dict[int, str] = {}
        self.sites: dict[Site, SiteRecord] = {}
        self.seams: dict[Seam, None] = {}  # in order
        self.parts: list[tuple[Poly, NDArray[np.int64]]] = []
        self.on_use: dict[int, list[Callable[[], Any]]] = {}
        self.lost: list[tuple[NDArray[np.int64], str]] = []
        self.lost_axes: dict[int, str] = {}
        self.views: dict[int, tuple[Tensor, Call, int]] = {}
        self.site: SiteRecord | None = None
        self._fields: dict[int, list[Field]] = {}
        self._activations = {id(x) for x in activations}
        self._alive: list[Any] = [*activations]  # ids are only unique among objects that live

    def add_place(self, made: NDArray[np.int64], parameter: str | None, dim: int) -> None:
        """Name the parameter and the dim of new elements."""
        self.starts.append(int(made[0]))
        self.places.append((parameter, dim))

    def new_part(self, size: Poly, count: int) -> Field:
        """Make elements of positions that stand in no parameter, shape (count,)."""
        made = self.elements.new(count)
        self.add_place(made, None, 0)
        self.parts.append((size, made))
        return torch.from_numpy(made)

    def set_fields(self, tensor: Tensor, fields: Iterable[Field]) -> None:
        """Set the fields of a tensor; those that vary along no dim are left out."""
        found = [f for f in fields if varies(f)]
        if found:
            self._fields[id(tensor)] = found
            self._alive.append(tensor)
        else:
            self._fields.pop(id(tensor), None)

    def fields_of(self, tensor: Any) -> list[Field]:
        """The fields of a tensor; an empty list for anything else."""
        return self._fields.get(id(tensor), []) if isinstance(tensor, Tensor) else []

    def field_along(self, tensor: Tensor, dim: int) -> Field | None:
        """The field of a tensor that varies along this dim alone, shape (n,), if there is one."""
        for f in self.fields_of(tensor):
            if varies(f) == {dim % tensor.dim()}:
                return f.reshape(-1)
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(a, Tensor) and a.device.type != "meta" for a in args):
            args = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        if func.overloadpacket in BATCH_NORMS:
            nothing = torch.empty((0,), device="meta")
            out: Any = (torch.empty_like(args[0]), *[nothing] * (len(schema_of(func).returns) - 1))
        else:
            try:
                out = func(*args, **kwargs)
            except (NotImplementedError, RuntimeError, TypeError, ValueError):
                with without_modes():
                    out = _on_zeros(func, args, kwargs)
        self.call = Call(func, args, kwargs, out)
        with without_modes():  # elements are tensors of this package, on the CPU
            self._follow(self.call)
        return out

    def _follow(self, call: Call) -> None:
        """Give the outputs of a call their fields."""
        inputs = [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
        known = {id(t) for t in inputs}
        for action in (a for i in known for a in self.on_use.pop(i, ())):
            action()
        active = not self._activations.isdisjoint(known)
        for o in call.outputs:
            if active:
                self._activations.add(id(o))
                self._alive.append(o)
            elif id(o) not in known:
                self._activations.discard(id(o))
            if id(o) not in known:
                self._fields.pop(id(o), None)
                self.views.pop(id(o), None)
                self.on_use.pop(id(o), None)
        if self.site is not None and keeps_zeros(call, self.site.fills):
            self.site.filled.update((id(o), o) for o in call.outputs)
        rule = rule_of(call.func)
        if rule is None:
            self._lose_all(inputs)
        elif rule in (view, pad) or (call.outputs and any(id(t) in self._fields for t in inputs)):
            rule(self, call)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on parameters and constants alone."""
        return id(tensor) not in self._activations

    def read(self, f: Field, dims: Iterable[int], fill: Any, *factors: Tensor) -> None:
        """Record that the call combines a field's entries along some dims.

        Args:
            f: The field of an operand.
            dims: The dims.
            fill: The value that takes entries out of the operator, as in :data:`FILLS`.
            factors: The tensors of which one must have that value; default: the first operand.
        """
        along = varies(f) & set(dims)
        if not along:
            return
        site, factors = self.site, factors or self.call.args[:1]
        if site is None or FILLS.get(site.name, 0) != fill or not any(map(site.fills, factors)):
            self.lose(f)
            return
        site.reads.append((f, along))
        for o in self.call.outputs[1:]:
            if o.dtype == torch.int64:  # positions of the largest entries differ after a cut
                self.when_used(o, partial(self.lose, f))

    def consume(self, weight: Tensor, f: Field | None, x: Tensor) -> None:
        """Record a weight's field as multiplied with the channels of ``x``."""
        if not self.is_weight(weight) or self.is_weight(x):
            return
        if f is None:  # a single channel has no field
            if id(weight) in self.parameters and self.fields_of(x):
                self.consumers[self.parameters[id(weight)]] = 1
            return
        if self.site is not None:
            self.site.consumed.append(f)
        elements = f.numpy()
        for place in np.unique(np.searchsorted(self.starts, elements[elements >= 0], "right")):
            key, own = self.places[place - 1]
            if key is not None:
                self.consumers[key] = own

    def contract(
        self, f: Field, dim: int, x: Tensor, other: Tensor, of_other: int, followed: bool
    ) -> None:
        """Record that a call sums products of the entries of two tensors along a dim.

        Args:
            f: A field of ``x`` along the dim.
            dim: The dim.
            x: One tensor.
            other: The other one. If it is an activation, its channels must be known.
            of_other: The dim in ``other``.
            followed: Whether it has a field along the dim.
        """
        self.read(f, (dim,), 0, x, other)
        self.consume(x, f, other)
        known = followed or self.is_weight(other)
        if not known and as_constant(poly_of(other.shape[of_other])) is None:
            self.lose(f)

    def _reason(self) -> str:
        return f"{self.call.func}: {running_line()}"

    def lose(self, f: Field) -> None:
        """Give up on the axes of a field's elements."""
        reason = f"{self.call.func} mixes its channels: {running_line()}"
        self.lost.append((np.unique(f.reshape(-1).numpy()), reason))

    def _lose_all(self, inputs: Iterable[Tensor]) -> None:
        """Give up on the axes of an operator without a rule, and of the sizes that it makes."""
        for f in (f for t in inputs for f in self.fields_of(t)):
            self.lose(f)
        reason = f"{self.call.func} has no rule for its channels: {running_line()}"
        for s in {s for t in self.call.outputs for n in t.shape for s in symbols_of(poly_of(n))}:
            self.lost_axes.setdefault(s, reason)

    def cut(self, f: Field, dim: int, position: Poly, length: Poly) -> None:
        """Record a seam in a field once a part is used: ``x[0].numel()`` uses none.

        A dim of a fixed size is always cut at the same place.
        """
        if dim in varies(f) and as_constant(length) is None:
            seam = Seam(f, dim, position, length, self._reason())
            for part in self.call.outputs:
                self.when_used(part, partial(self.seams.setdefault, seam))

    def when_used(self, tensor: Tensor, action: Callable[[], Any]) -> None:
        """Do something as soon as an operator reads the output of this call."""
        self.on_use.setdefault(id(tensor), []).append(action)
        self._alive.append(tensor)

    def unite_vectors(self, x: Tensor, vectors: Iterable[Any], dim: int) -> None:
        """Unite the elements of vectors (biases, norms' weights) with those of x along a dim."""
        of_x = self.field_along(x, dim)
        for vector in vectors:
            of_vector = self.field_along(vector, 0) if isinstance(vector, Tensor) else None
            if of_x is not None and of_vector is not None:
                self.elements.unite(of_x, of_vector)

    def write_through(self, tensor: Tensor) -> None:
        """After a write into a view, give its fields to the tensor that it is a view of."""
        if id(tensor) not in self.views:
            return
        base, made, index = self.views[id(tensor)]
        fields = [f.expand(shape_of(base)).clone() for f in self.fields_of(base)]
        for f in self.fields_of(tensor):
            placed = False
            for dim, n in enumerate(shape_of(base)):
                at = [1] * base.dim()
                at[dim] = n
                positions = torch.arange(n).view(at).expand(shape_of(base))
                there = compressed(moved(made, positions)[index])
                if varies(f) == varies(there) and len(varies(f)) == 1:
                    (d,) = varies(f)
                    own = torch.full([n], -1)
                    own[there.reshape(-1)] = f.movedim(d, 0).reshape(-1)
                    fields = self.elements.merged([*fields, own.view(at)])
                    placed = True
            if not placed:
                self.lose(f)
        self.set_fields(base, map(compressed, fields))
        self.write_through(base)


def _on_zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """The outputs' sizes of an operator without a kernel for meta tensors or symbolic sizes."""

    def known(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.zeros(shape_of(value), dtype=value.dtype, device="cpu")
        return hinted(value) if isinstance(value, torch.SymInt) else value

    args, kwargs = tree_map(known, (args, kwargs))
    return tree_map_only(Tensor, lambda t: t.to("meta"), func(*args, **kwargs))


class Sites(CallSites):
    """Tells a propagation which call of a torch function is running.

    Args:
        model: The model that runs.
        run: The propagation.

    Example:
        >>> layer, x = nn.Linear(2, 3, device="meta"), torch.zeros(1, 2, device="meta")
        >>> elements = Elements()
        >>> run = Propagation(elements, [x])
        >>> run.set_fields(x, [torch.from_numpy(elements.new(2)).reshape(1, 2)])
        >>> with Sites(layer, run), run, torch.no_grad():
        ...     out = layer(x)
        >>> list(run.sites)  # the call reads the channels of x
        [('', 'linear', 0)]
    """

    def __init__(self, model: nn.Module, run: Propagation) -> None:
        super().__init__(model)
        self.run = run

    def call(self, site: Site, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a call, and keep its record if it reads elements."""
        operands = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        record = self.run.site = SiteRecord(site[1], filled=operands)
        try:
            out = func(*args, **kwargs)
        finally:
            self.run.site = None
        if record.reads or record.consumed:
            for index, operand in enumerate(tree_leaves((args, kwargs))):
                if fields := self.run.fields_of(operand):
                    record.operands[index] = fields
            record.filled.clear()
            self.run.sites[site] = record
        return out
