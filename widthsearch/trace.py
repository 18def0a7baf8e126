"""One symbolic run of a model: its axes, the shape of every tensor, and its cost.

Every parameter and buffer gets symbols for sizes, the model runs once on meta tensors, and what
the run had to equate *is* the coupling of its layers (``symbolic.py``). FLOPs are counted on the
way with torch's own formulas, so they come out as polynomials in the widths.
"""

from __future__ import annotations

import importlib.util
import operator
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry

from widthsearch.errors import TraceError
from widthsearch.modules import clone, is_estimate, is_synced, owner_of, set_size, sizes_in
from widthsearch.modules import join as join
from widthsearch.modules import sync_attributes as sync_attributes
from widthsearch.modules import tensors_of as tensors_of
from widthsearch.polynomials import Poly, System, add, as_constant, constant, multiply, symbols_of
from widthsearch.symbolic import calling_line, poly_of, size

aten = torch.ops.aten

_SKIP = tuple(
    f"{Path(spec.origin).parent}{os.sep}"
    for name in ("torch", "widthsearch")
    if (spec := importlib.util.find_spec(name)) and spec.origin
)
BATCH_NORMS = frozenset(
    getattr(aten, name)
    for name in (
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit_functional",
        "_batch_norm_with_update",
        "_batch_norm_no_update",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    )
    if hasattr(aten, name)
)


Inputs = Sequence[Any] | Mapping[str, Any] | Tensor
"""One sample of what a model takes, without the batch: a shape, e.g. ``(3, 224, 224)``; a tensor
where the dtype matters, e.g. ``torch.zeros(16, dtype=torch.long)`` for token ids; a sequence of
those, one a positional argument; or a mapping, by keyword argument."""


def as_inputs(inputs: Inputs) -> Any:
    """The same in tuples, dictionaries and meta tensors: comparable, and small to send about."""
    if isinstance(inputs, Tensor):
        return inputs.detach().to("meta")
    if isinstance(inputs, Mapping):
        return {str(name): as_inputs(value) for name, value in inputs.items()}
    if all(hasattr(value, "__index__") and not isinstance(value, Tensor) for value in inputs):
        return tuple(map(operator.index, inputs))
    return tuple(map(as_inputs, inputs))


def sample(inputs: Any, batch: int, device: str | torch.device = "meta") -> Any:
    """A batch of zeros: a tensor, a tuple of positional or a dictionary of keyword arguments."""
    if isinstance(inputs, Tensor):
        return torch.zeros((batch, *inputs.shape), dtype=inputs.dtype, device=device)
    if isinstance(inputs, Mapping):
        return {name: sample(value, batch, device) for name, value in inputs.items()}
    if all(isinstance(value, int) for value in inputs):
        return torch.zeros((batch, *inputs), device=device)
    return tuple(sample(value, batch, device) for value in inputs)


def call(model: Callable[..., Any], x: Any) -> Any:
    """``model`` of what :func:`sample` made."""
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, Mapping) else model(x)


@dataclass(frozen=True)
class TracedAxis:
    """An axis as the run found it.

    Attributes:
        name: The first layer that makes the width.
        base: The width in the model as given, in channels.
        unit: Channels per unit of the polynomials' variable; widths are multiples of it
            (groups of a grouped convolution, heads).
        layers: Every layer with a tensor whose shape depends on the axis.
        maker: The tensor and the dim that the axis is named after.
    """

    name: str
    base: int
    unit: int
    layers: tuple[str, ...]
    maker: tuple[str, int]


@dataclass(frozen=True)
class Pinned:
    """A width that is not free.

    Attributes:
        name: The first layer with this width.
        size: Its value, in channels.
        reason: What fixes it.
        layers: Every layer whose shape depends on it.
    """

    name: str
    size: int
    reason: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """What one symbolic run of a model tells.

    Polynomials are over the axes' indices; variable ``i`` is ``width_i / axes[i].unit``.

    Attributes:
        axes: The free widths.
        pinned: The widths that are not free, each with its reason.
        shapes: Per parameter and buffer, its sizes as polynomials.
        attributes: Per module and attribute that repeats a size, its value.
        macs: Multiply-accumulates of one sample's forward pass in eval mode (half of what
            ``FlopCounterMode`` counts as FLOPs).
        params: Number of parameters.
        activations: Output elements of every operation that multiplies (convolutions, matrix
            products) for one sample; "activations" of Radosavovic et al. 2020 (RegNet, section 2).
        layer_macs: The MACs of each layer.
    """

    axes: tuple[TracedAxis, ...]
    pinned: tuple[Pinned, ...]
    shapes: Mapping[str, tuple[Poly, ...]]
    attributes: Mapping[tuple[str, str], Poly]
    macs: Poly
    params: Poly
    activations: Poly
    layer_macs: Mapping[str, Poly]


@dataclass
class _Symbol:
    """Where a symbol stands."""

    layer: str
    tensor: str  # its name in the state dict
    dim: int
    makes: bool
    """Whether it is the output width of a layer's weight."""


def _tensors_among(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_among(value)


_LOOK_UPS: dict[Any, Callable[..., Iterator[int]]] = {
    aten.embedding: lambda *_: iter((0,)),
    aten._embedding_bag: lambda *_: iter((0,)),
    aten._embedding_bag_forward_only: lambda *_: iter((0,)),
    aten.index_select: lambda dim, *_: iter((dim,)),
    aten.gather: lambda dim, *_: iter((dim,)),
    aten.index: lambda places, *_: (d for d, at in enumerate(places) if at is not None),
    aten.index_put: lambda places, *_: (d for d, at in enumerate(places) if at is not None),
    aten.index_put_: lambda places, *_: (d for d, at in enumerate(places) if at is not None),
}
"""Per operation that looks up by index, the dims in which it does, by its further arguments."""


def in_numbers(tree: Any, system: System, reason: str) -> Any:
    """``tree`` with every symbolic size fixed, or None if there is none."""
    found = False

    def fix(value: Any) -> Any:
        nonlocal found
        if isinstance(value, torch.SymInt):
            found = True
            return system.pin_value(poly_of(value), reason)
        if isinstance(value, Tensor) and any(
            isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride())
        ):
            found = True
            shape, stride = ([fix(n) for n in numbers] for numbers in (value.shape, value.stride()))
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return value

    fixed = tree_map(fix, tree)
    return fixed if found else None


def numel(tensor: Tensor) -> Poly:
    """A tensor's number of elements."""
    out = constant(1)
    for n in tensor.shape:
        out = multiply(out, poly_of(n))
    return out


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Run(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, stands in for batch norm, and remembers what is running."""

    def __init__(self, system: System, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.system = system
        self.inputs = {id(x): x for x in inputs}  # and what is made of them alone
        self.layers: list[str] = []
        self.operation = ""
        self.of_input = False
        self.used: set[int] = set()
        self.flops: dict[str, Poly] = {}
        self.activations: Poly = {}
        self.fixed_in: set[str] = set()

    def reason(self) -> str:
        """Why an equation that is imposed now holds."""
        return "input of the model" if self.of_input else self.line()

    def line(self) -> str:
        """The line that is running."""
        self.fixed_in.add(self.layers[-1] if self.layers else "")
        return calling_line(_SKIP)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        self.operation = str(func)
        tensors = list(_tensors_among(args))
        self.of_input = any(id(a) in self.inputs for a in tensors)
        self.used.update(map(id, tensors))
        if any(a.device.type != "meta" for a in tensors):
            if all(a.device.type != "meta" for a in tensors):
                return func(*args, **kwargs)  # plain tensors of the model's own keep their values
            args = tree_map_only(Tensor, lambda a: a.to("meta"), args)
        if packet in BATCH_NORMS:
            return self._batch_norm(len(func._schema.returns), *args)
        if packet is aten.convolution:
            self._convolution(*args)
        elif packet is aten.native_group_norm and args[1] is not None:
            torch._check(args[1].shape[0] == args[0].shape[1])
        elif func.namespace not in ("aten", "prims", "prim"):
            why = f"{func} may check no sizes: {self.reason()}"
            args, kwargs = in_numbers((args, kwargs), self.system, why) or (args, kwargs)
        elif packet in _LOOK_UPS:
            self._look_up(_LOOK_UPS[packet], *args)
        elif packet.__name__.startswith(("upsample_", "_upsample_")):
            self._position(args[0])
        elif packet in (aten.slice, aten.select):
            self._cut(packet, *args)
        elif packet is aten.topk:
            self._never_below(
                poly_of(args[0].shape[args[2] if len(args) > 2 else -1]), poly_of(args[1])
            )
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            out = self._in_numbers(func, args, kwargs, error)
        if self.of_input and all(id(a) in self.inputs for a in tensors) and isinstance(out, Tensor):
            self.inputs[id(out)] = out
        if packet in flop_registry:
            self._count(flop_registry[packet](*args, **kwargs, out_val=out), out)
        return out

    def _in_numbers(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """An operation without a kernel for symbolic sizes, or for tensors without values at all.

        What enters it is fixed. Its outputs' sizes are then those for zeros, unless it is known
        that they depend on values.
        """
        says = first_line(error).split(". ")[0][:160]
        why = f"{self.line()} ({func} takes no symbolic sizes: {says})"
        numbers = in_numbers((args, kwargs), self.system, why)
        if numbers is None and not isinstance(error, NotImplementedError):
            raise error
        args, kwargs = numbers or (args, kwargs)
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            if torch.Tag.dynamic_output_shape in func.tags:
                raise
        zeros = tree_map_only(Tensor, lambda t: torch.zeros_like(t, device="cpu"), (args, kwargs))
        return tree_map_only(Tensor, lambda t: t.to("meta"), func(*zeros[0], **zeros[1]))

    def _look_up(self, dims: Callable[..., Iterator[int]], x: Tensor, *rest: Any) -> None:
        """Positions that a model knows by number: another size would have no meaning there."""
        for dim in dims(*rest):
            if (n := poly_of(x.shape[dim])) and as_constant(n) is None:
                self.system.pin_value(n, f"looked up by index: {self.line()}")

    def _position(self, x: Tensor) -> None:
        """What is resized to an image is a grid of positions, even where it is a parameter."""
        for n in x.shape[2:]:
            if as_constant(p := poly_of(n)) is None:
                self.system.pin_value(p, f"a position, not a channel: {self.line()}")

    def _cut(self, packet: Any, x: Tensor, dim: int = 0, *place: Any) -> None:
        """A slice or a choice asks that its places are there at every width."""
        n = poly_of(x.shape[dim])
        last = add(n, constant(1), -1) if packet is aten.select else n
        for at in place[:2]:
            if at is None or at == sys.maxsize:
                continue
            p = poly_of(at)
            if self.system.hint(p) < 0:
                p = add(p, n)
            for more, less in ((p, constant(0)), (last, p)):
                self._never_below(more, less)

    def _never_below(self, more: Poly, less: Poly) -> None:
        system = self.system
        if system.never_below(more, less):
            return
        more, less = system.canonical(more), system.canonical(less)
        part: Poly = {}
        for monomial in sorted(more):  # a number that the code keeps may be some of the parts
            part = add(part, {monomial: more[monomial]})
            if symbols_of(less) <= system.soft and system.hint(part) == system.hint(less):
                system.impose(add(less, part, -1))
                return
        rest = system.hint(more) - system.hint(less)
        if rest > 0 and symbols_of(less):  # the larger is the smaller and something else
            less = add(less, {(system.fresh(rest),): 1})
            system.impose(add(more, less, -1))
        else:
            system.pin_value(more, self.reason())
            system.pin_value(less, self.reason())

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> None:
        """What convolutions ask of their weights and biases, but not on the meta device."""
        transposed, groups = options[3], options[5]
        inputs = weight.shape[0] if transposed else weight.shape[1] * groups
        torch._check(x.shape[1] == inputs)
        for n in weight.shape[2:]:
            if as_constant(poly_of(n)) is None:  # a weight from code of the model's own
                self.system.pin_value(poly_of(n), "size of a convolution's kernel")
        torch._check(weight.shape[0] % groups == 0)
        if bias is not None:
            outputs = weight.shape[1] * groups if transposed else weight.shape[0]
            torch._check(bias.shape[0] == outputs)

    def _batch_norm(self, returns: int, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Batch norm keeps shapes; all it asks is that its vectors have x's channels."""
        for vector in rest:
            if isinstance(vector, Tensor) and vector.dim() == 1:
                self.used.add(id(vector))
                torch._check(vector.shape[0] == x.shape[1])
        nothing = torch.empty((0,), device="meta")
        return (torch.empty_like(x), *([nothing] * (returns - 1)))

    def _count(self, flops: Any, out: Any) -> None:
        layer = self.layers[-1] if self.layers else ""
        self.flops[layer] = add(self.flops.get(layer, {}), poly_of(flops))
        first = out if isinstance(out, Tensor) else out[0]
        self.activations = add(self.activations, poly_of(first.numel()))


class _Stopped(Exception):  # noqa: N818 - what it becomes depends on where it stopped
    """A run that came to an end in some layer."""

    def __init__(self, layer: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.layer, self.reason = layer, reason


@contextmanager
def _explained(model: nn.Module, run: _Run) -> Iterator[None]:
    """Name the module and the operation in whatever goes wrong."""
    try:
        yield
    except Exception as error:
        layer = run.layers[-1] if run.layers else ""
        kind = type(model.get_submodule(layer)).__name__
        place = calling_line_of(error)
        raise _Stopped(
            layer,
            f"needs numbers at {place}: {first_line(error)}",
            f"cannot trace {type(model).__name__}: module {layer or '(the model itself)'!r} "
            f"({kind}) failed at {place} in operation {run.operation or 'none'}: "
            f"{first_line(error)}. A model must run on tensors without values (device 'meta') for "
            "an input of the shape given; move what reads values out of forward",
        ) from error


def calling_line_of(error: BaseException) -> str:
    """``file:line`` of the innermost frame of ``error`` that is not torch's or ours."""
    place = "unknown code"
    traceback = error.__traceback__
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if not filename.startswith(_SKIP):
            place = f"{Path(filename).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Run ``model`` on symbolic widths.

    Modules keep sizes in attributes of their own (``self.hidden_dim``) and use them in forward,
    which fixes a width. Where a run met that, it is run again with those attributes symbolic, and
    what that frees is kept. A module whose code needs numbers is given numbers: its widths are
    pinned, and the run goes on around it.

    Args:
        model: Any module; neither it nor its tensors are changed.
        inputs: One sample's shape, e.g. ``(3, 224, 224)``; see :data:`Inputs` for several inputs.

    Raises:
        TraceError: The model cannot run on meta tensors; names the module and the operation.
    """
    inputs = as_inputs(inputs)
    _refuse_lazy(model)
    fixed: dict[str, str] = {}
    while True:
        try:
            best = _Attempt(model, inputs, frozenset(), fixed)
            break
        except _Stopped as stop:
            if not stop.layer or _within(stop.layer, fixed) is not None:
                raise TraceError(str(stop)) from stop.__cause__
            fixed = {**fixed, stop.layer: stop.reason}
    tried: frozenset[tuple[str, str]] = frozenset()
    latest = best
    while repeated := latest.repeated_sizes(tried):
        tried |= repeated
        try:
            latest = _Attempt(model, inputs, latest.attributes | repeated, fixed)
        except _Stopped:  # the code needs a number there
            continue
        if latest.freedom > best.freedom:
            best = latest
    return best.collect()


def _within(layer: str, fixed: Mapping[str, str]) -> str | None:
    """Why a layer is to be given numbers, if it is."""
    for name, reason in fixed.items():
        if layer == name or layer.startswith(f"{name}."):
            return reason
    return None


def _refuse_lazy(model: nn.Module) -> None:
    for layer, module in model.named_modules():
        if any(is_lazy(p) for p in module._parameters.values()):
            raise TraceError(
                f"a model's tensors must have sizes, but module {layer or '(the model itself)'!r} "
                f"({type(module).__name__}) has none before its first run: run the model once on "
                "a sample where it is made"
            )


class _Attempt:
    """A run with certain attributes symbolic and certain layers in numbers, and all it told."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        attributes: frozenset[tuple[str, str]],
        fixed: Mapping[str, str],
    ) -> None:
        self.model, self.inputs, self.attributes, self.fixed = model, inputs, attributes, fixed
        self.system = System()
        self.symbols: dict[int, _Symbol] = {}
        self.sized: dict[str, Tensor] = {}
        self.values: dict[tuple[str, str], Poly] = {}
        symbolic = self._symbolic()
        self.run = _execute(symbolic, self.system, inputs, fixed, train=False)
        used = self.run.used
        if any(id(tensor) not in used for tensor in self.sized.values()):
            # Some layers run in training alone (auxiliary heads): let them say what they tie.
            used = used | _execute(symbolic, self.system, inputs, fixed, train=True).used
        self._settle(used)

    @property
    def freedom(self) -> int:
        """How many sizes of tensors are not fixed."""
        values = (self.system.value(symbol) for symbol in self.symbols)
        return sum(as_constant(value) is None for value in values)

    def repeated_sizes(self, tried: Set[tuple[str, str]]) -> Set[tuple[str, str]]:
        """Attributes of modules in which a width was fixed that may be sizes.

        First those that have such a width's value, then any other number.
        """
        fixed = {self.system.hints[pin.symbol] for pin in self.system.pins} - {1}
        numbers = {
            (layer, name): value
            for layer in self.run.fixed_in
            for module in [self.model.get_submodule(layer)]
            if not is_synced(module)
            for name, value in sizes_in(module)
            if value > 1 and (layer, name) not in tried
        }
        likely = {place for place, value in numbers.items() if value in fixed}
        return likely or numbers.keys()

    def _symbolic(self) -> nn.Module:
        """A copy of the model on meta tensors with symbolic sizes."""
        copies: dict[int, Tensor] = {}
        for module, layer, name, tensor in tensors_of(self.model):
            owner = owner_of(layer)
            numbers = name in module._buffers and has_content(module, name, tensor)
            why = _within(owner, self.fixed)
            layer_of = self.model.get_submodule(owner) if owner != layer else module
            convolution = isinstance(layer_of, nn.modules.conv._ConvNd) and tensor.dim() > 2
            output = 1 if convolution and layer_of.transposed else 0
            key = join(layer, name)
            shape: list[torch.SymInt | int] = []
            for dim, n in enumerate(tensor.shape):
                if n == 1 or numbers or (convolution and dim > 1):
                    shape.append(n)
                    continue
                symbol = self.system.fresh(n)
                makes = dim == output and tensor.dim() > 1
                self.symbols[symbol] = _Symbol(owner, key, dim, makes)
                if why is not None:
                    self.system.pin([symbol], why)
                shape.append(size(self.system, self.system.value(symbol)))
            meta = torch.empty(shape, dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                meta = nn.Parameter(meta, requires_grad=False)
            copies[id(tensor)] = self.sized[key] = meta
        symbolic = clone(self.model, copies)
        chosen = set(self.attributes)
        for layer, module in symbolic.named_modules():
            depthwise = isinstance(module, nn.modules.conv._ConvNd) and (
                1 < module.groups == module.in_channels
            )
            if depthwise and _within(layer, self.fixed) is None:
                chosen.add((layer, "groups"))
        for layer, name in sorted(chosen):
            hint = dict(sizes_in(symbolic.get_submodule(layer)))[name]
            symbol = self.system.fresh(hint)
            self.values[layer, name] = {(symbol,): 1}
            self.system.soft.add(symbol)
            set_size(symbolic, layer, name, size(self.system, self.values[layer, name]))
        for module in symbolic.modules():
            sync_attributes(module)
        return symbolic

    def _settle(self, used: set[int]) -> None:
        """Pin what is left open: what nothing read, what is in no tensor, what is not quadratic."""
        system = self.system
        for symbol, where in self.symbols.items():
            if id(self.sized[where.tensor]) not in used:
                system.pin_value({(symbol,): 1}, "never used in forward")
        for poly in (self.run.activations, *self.run.flops.values()):
            system.transparent(poly)
        shaping = {s for symbol in self.symbols for s in symbols_of(system.value(symbol))}
        for (layer, name), poly in self.values.items():
            loose = symbols_of(system.canonical(poly)) - shaping
            system.pin(sorted(loose), f"attribute {join(layer, name)!r}, which no tensor repeats")
        costs = [*self.run.flops.values(), self.run.activations, *map(numel, self.sized.values())]
        while high := [m for poly in costs for m in system.canonical(poly) if len(m) > 2]:
            # Most often a number of tokens that are parameters, which every layer multiplies.
            powers = Counter(s for monomial in high for s in monomial)
            worst = max(powers, key=lambda s: (powers[s], s))
            system.pin([worst], "the cost is not quadratic in it")

    def collect(self) -> Trace:
        """What the run told, in terms of axes."""
        return _collect(self.system, self.symbols, self.sized, self.values, self.run)


def has_content(module: nn.Module, name: str, buffer: Tensor) -> bool:
    """Whether a buffer holds more than one value, so that it has no like at other sizes."""
    if is_estimate(module, name):
        return False
    if not buffer.is_floating_point():
        return True
    return buffer.device.type != "meta" and bool((buffer != buffer.flatten()[:1]).any())


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Attention's fused inference path hides its products from the counter."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run_on_meta(model: nn.Module, x: Any, mode: TorchDispatchMode) -> Any:
    """Run a model whose tensors are on the meta device, on :func:`sample`'s tensors, in a mode."""
    with (
        _no_fast_path(),
        torch.device("meta"),
        enable_python_dispatcher(),
        torch.no_grad(),
        mode,
    ):
        return call(model, x)


def _execute(
    symbolic: nn.Module, system: System, inputs: Any, fixed: Mapping[str, str], *, train: bool
) -> _Run:
    # Training mode refuses batches of one sample in batch norm.
    x = sample(inputs, 2 if train else 1)
    run = _Run(system, tuple(_tensors_in(x)))
    system.reason = run.reason
    hooks = []
    for layer, module in symbolic.named_modules():
        hooks.append(module.register_forward_pre_hook(_entering(run, layer)))
        hooks.append(module.register_forward_hook(_leaving(run)))
        if layer in fixed:
            hook = _with_numbers(system, fixed[layer])
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    symbolic.train(train)
    with _explained(symbolic, run):
        out = run_on_meta(symbolic, x, run)
    for hook in hooks:
        hook.remove()
    for tensor in _tensors_in(out):
        for n in tensor.shape:
            system.pin_value(poly_of(n), "output of the model")
    return run


def _entering(run: _Run, layer: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        run.layers.append(layer)

    return hook


def _with_numbers(system: System, reason: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return in_numbers((args, kwargs), system, reason)

    return hook


def _leaving(run: _Run) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
        run.layers.pop()

    return hook


def _tensors_in(out: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(out) if isinstance(x, Tensor))


def _collect(
    system: System,
    symbols: Mapping[int, _Symbol],
    sized: Mapping[str, Tensor],
    attributes: Mapping[tuple[str, str], Poly],
    run: _Run,
) -> Trace:
    owners: dict[int, list[int]] = {}  # free symbol -> the symbols that are a multiple of it
    layers: dict[int, dict[str, None]] = {}  # free symbol -> the layers it shapes
    for symbol, where in symbols.items():
        value = system.value(symbol)
        for free in symbols_of(value):
            layers.setdefault(free, {})[where.layer] = None
            if len(value) == 1 and len(next(iter(value))) == 1:
                owners.setdefault(free, []).append(symbol)

    ordered: list[tuple[int, int]] = []  # (symbol that names the axis, free symbol)
    for free in layers:
        named = owners.get(free) or [min(s for s in symbols if free in symbols_of(system.value(s)))]
        makers = [s for s in named if symbols[s].makes]
        ordered.append((min(makers or named), free))
    ordered.sort()
    axes: list[TracedAxis] = []
    for namer, free in ordered:
        where = symbols[namer]
        name = where.layer or where.tensor
        if any(axis.name == name for axis in axes):
            name = where.tensor
        count = sum(axis.name.split("#")[0] == name for axis in axes)
        name = f"{name}#{count + 1}" if count else name
        unit = system.value(namer).get((free,), 1) if namer in owners.get(free, ()) else 1
        maker = where.tensor, where.dim
        base = system.hints[free] * unit
        axes.append(TracedAxis(name, base, unit, tuple(layers[free]), maker))

    index = {free: i for i, (_, free) in enumerate(ordered)}

    def over_axes(poly: Poly) -> Poly:
        canonical = system.canonical(poly)
        return {tuple(sorted(index[s] for s in m)): c for m, c in canonical.items()}

    flops: Poly = {}
    for poly in run.flops.values():
        flops = add(flops, poly)
    params: Poly = {}
    for tensor in sized.values():
        if isinstance(tensor, nn.Parameter):
            params = add(params, numel(tensor))
    return Trace(
        axes=tuple(axes),
        pinned=_pinned(system, symbols),
        shapes={name: tuple(over_axes(poly_of(n)) for n in t.shape) for name, t in sized.items()},
        attributes={where: over_axes(poly) for where, poly in attributes.items()},
        macs=_halved(over_axes(flops)),
        params=over_axes(params),
        activations=over_axes(run.activations),
        layer_macs={layer: _halved(over_axes(poly)) for layer, poly in run.flops.items()},
    )


def _halved(flops: Poly) -> Poly:
    assert all(c % 2 == 0 for c in flops.values()), "torch counts two FLOPs a MAC"
    return {m: c // 2 for m, c in flops.items()}


def _pinned(system: System, symbols: Mapping[int, _Symbol]) -> tuple[Pinned, ...]:
    reasons = {pin.symbol: pin.reason for pin in system.pins}
    grouped: dict[int, list[int]] = {}
    for symbol in symbols:
        if as_constant(system.value(symbol)) is not None:
            root = symbol
            while root not in reasons:
                root = min(system.parents[root], key=lambda s: s not in reasons)
            grouped.setdefault(root, []).append(symbol)
    rows: dict[tuple[str, int, str], dict[str, None]] = {}
    for root, members in grouped.items():
        first = symbols[members[0]]
        row = first.layer or first.tensor, system.hints[members[0]], reasons[root]
        rows.setdefault(row, {}).update(dict.fromkeys(symbols[s].layer for s in members))
    return tuple(Pinned(*row, tuple(layers)) for row, layers in rows.items())
