"""The symbolic run: intercepts every operation, imposes its size rules and counts its FLOPs.

Meta-device kernels validate less than real ones. The checks they skip are made here.

Notation: ``x``, ``weight`` and ``out`` are meta tensors whose sizes are polynomials (``Poly``) over
the symbols of a ``System``. *Impose* means: make an equation of two sizes hold at every width.
*Pin* means: fix a size at its value in the model as given, with a reason. *Integers* are sizes that
were pinned on entry to an operation or a module that cannot run on symbolic sizes.

Example: a convolution with a weight of ``s0 × s1 × 3 × 3`` reads a tensor of ``s7`` channels. The
meta kernel does not compare the two, so ``_convolution`` imposes ``s7 = s1``. Its output has ``s0``
channels, and torch's FLOP formula adds ``2 · 9 · H · W · s0 · s1`` to the FLOPs of the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from widthsearch.errors import TraceError, first_line
from widthsearch.modules.source import FOREIGN, model_line
from widthsearch.modules.tree import held_tensors
from widthsearch.torch_internals import (
    TorchDispatchMode,
    check_sizes,
    enable_python_dispatcher,
    schema_of,
    tree_map,
    tree_map_only,
    without_modes,
)
from widthsearch.tracing.inputs import call, sample
from widthsearch.tracing.polynomials import Poly, System, add, as_constant, constant, symbols_of
from widthsearch.tracing.sample_values import (
    SampleValues,
    is_symbolic,
    tensors_among,
    unknown,
)
from widthsearch.tracing.symbolic_ints import plain_numbers, poly_of
from widthsearch.tracing.views import impose_view
from widthsearch.tracing.writes import SCATTERS, WRITES, taken_dims

aten = torch.ops.aten


def operators(names: str) -> frozenset[Any]:
    """The ATen operators with these names, as far as this version of torch has them."""
    return frozenset(getattr(aten, name) for name in names.split() if hasattr(aten, name))


BATCH_NORMS = operators(
    """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_no_update
    cudnn_batch_norm miopen_batch_norm
    """
)


_UNCOUNTED = operators("_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2")
"""Products of one matrix for each group of rows: their sizes depend on values."""

_LOOK_UPS: dict[Any, Callable[..., Iterator[int]]] = {
    **dict.fromkeys(
        operators("embedding _embedding_bag _embedding_bag_forward_only"), lambda *_: iter((0,))
    ),
    **dict.fromkeys(
        (
            *operators(
                "index_select gather index_add index_add_ index_copy index_copy_ index_fill"
            ),
            *(aten.index_fill_, *SCATTERS),
        ),
        lambda dim, *_: iter((dim,)),
    ),
    **dict.fromkeys(
        operators("index _unsafe_index index_put index_put_ _unsafe_index_put"),
        lambda indices, *_: taken_dims(indices),
    ),
}
"""Per operation that indexes a tensor by another, the indexed dims given its other arguments."""


def with_integers(tree: Any, system: System, reason: str) -> Any:
    """``tree`` with every symbolic size pinned, or None if it has none."""
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
            return unknown(
                torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
            )
        return value

    fixed = tree_map(fix, tree)
    return fixed if found else None


class SymbolicInterpreter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Imposes the size rules of operations, counts FLOPs, and tracks the module that is running.

    Attributes:
        inputs: The model's inputs by id, and tensors computed from them alone.
        layers: Names of the modules that are running, outermost first.
        operation: The operation that is running.
        of_input: Those of ``inputs`` that it reads.
        used: Ids of the tensors that some operation read.
        flops: FLOPs per layer.
        activations: Output elements of all convolutions and matrix products.
        fixed_in: Layers in which an equation took a symbol's freedom.
        lines: The lines that did.
        outputs: The shapes of the model's outputs.

    Example:
        >>> from widthsearch.tracing.symbolic_ints import size
        >>> system = System()
        >>> shape = [size(system, {(system.fresh(n),): 1}) for n in (8, 5)]  # s0 × s1
        >>> layer = nn.Linear(5, 8, bias=False)
        >>> layer.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        >>> run = execute(layer, system, (5,), {}, train=False)
        >>> system.value(1), run.flops[""], run.outputs  # the input gives s1, the output pins s0
        ({(): 5}, {(0,): 10}, [(1, 8)])
    """

    def __init__(self, system: System, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.system = system
        self.inputs = {id(x): x for x in inputs}
        self.layers: list[str] = []
        self.operation = ""
        self.of_input: list[Tensor] = []
        self.used: set[int] = set()
        self.flops: dict[str, Poly] = {}
        self.activations: Poly = {}
        self.fixed_in: set[str] = set()
        self.lines: set[str] = set()
        self.outputs: list[tuple[int, ...]] = []

    def reason(self, equation: Poly = {}) -> str:  # noqa: B006  a Poly never changes in place
        """The reason of a pin now: the model's input if it is the equation's constant."""
        sizes = {n for x in self.of_input for n in x.shape}
        return "input of the model" if abs(equation.get((), 0)) in sizes else self.line()

    def line(self) -> str:
        """The line that is running, as a reason for a pin in the layer that is running."""
        self.fixed_in.add(self.layers[-1] if self.layers else "")
        self.lines.add(line := running_line())
        return line

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operation = str(func)
        tensors = list(tensors_among(args))
        self.of_input = [a for a in tensors if id(a) in self.inputs]
        try:
            out = self._run(func, tensors, args, kwargs or {})
            if self.of_input and len(self.of_input) == len(tensors) and isinstance(out, Tensor):
                self.inputs[id(out)] = out
            return out
        finally:
            self.of_input = []  # what code compares between two operations is no input

    def _run(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run one operation: impose its size rules, and count its FLOPs."""
        packet = func.overloadpacket
        if packet in _UNCOUNTED:
            raise TraceError(
                f"a model's products must be those that torch counts, but {func} is none: "
                f"{running_line()}; use another implementation of the layer (of transformers' "
                "experts, `config._experts_implementation = 'batched_mm'`)"
            )
        self.used.update(map(id, tensors))
        if any(a.device.type != "meta" for a in tensors):
            sizes = is_symbolic((*args, *kwargs.values()))
            if not sizes and all(a.device.type != "meta" for a in tensors):
                return func(*args, **kwargs)  # plain tensor attributes keep their values
            args = tree_map_only(Tensor, lambda a: a.to("meta"), args)
        if packet in BATCH_NORMS:
            return self._norm(len(schema_of(func).returns), *args)
        if packet is aten.native_group_norm:  # torch's own compares a group's channels with 1
            self.system.quotient(poly_of(args[0].shape[1]), poly_of(args[6]))
            return self._norm(3, *args[:3])
        if packet is aten.convolution:
            self._convolution(*args)
        elif func.namespace not in ("aten", "prims", "prim"):
            why = f"{func} may check no sizes: {self.reason()}"
            args, kwargs = with_integers((args, kwargs), self.system, why) or (args, kwargs)
        elif packet in _LOOK_UPS:
            self._look_up(_LOOK_UPS[packet], *args)
        elif packet.__name__.startswith(("upsample_", "_upsample_")):
            self._pin_positions(args[0])
        elif packet in (aten.slice, aten.select):
            self._slice(packet, *args)
        elif packet in (aten.view, aten._unsafe_view, aten.reshape):
            impose_view(self.system, *args)
        elif packet is aten.topk:
            dim = args[2] if len(args) > 2 else -1
            self._impose_at_least(poly_of(args[0].shape[dim]), poly_of(args[1]))
        if packet in WRITES:
            WRITES[packet](self._pin_written, *args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            out = self._run_with_integers(func, args, kwargs, error)
        if packet in flop_registry:
            self._count(flop_registry[packet](*args, **kwargs, out_val=out), out)
        return out

    def _run_with_integers(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """Run an operation without a kernel for symbolic sizes, or without a meta kernel.

        A composite operation runs as those that it is made of. Of others, the sizes of the inputs
        are pinned. Without a meta kernel it runs on zeros on the CPU for its outputs' sizes, unless
        torch marks them as dependent on values.
        """
        if isinstance(error, TypeError):  # torch has one Python kernel for overloads that differ
            with self:
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        message = first_line(error).split(". ")[0][:160]
        why = f"{self.line()} ({func} takes no symbolic sizes: {message})"
        pinned = with_integers((args, kwargs), self.system, why)
        if pinned is None and not isinstance(error, NotImplementedError):
            raise error
        args, kwargs = pinned or (args, kwargs)
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            if torch.Tag.dynamic_output_shape in func.tags:
                raise
        with without_modes():
            zeros = tree_map_only(Tensor, partial(torch.zeros_like, device="cpu"), (args, kwargs))
            out = func(*zeros[0], **zeros[1])
            return tree_map_only(Tensor, lambda t: unknown(t.to("meta")), out)

    def _look_up(self, dims: Callable[..., Iterator[int]], x: Tensor, *rest: Any) -> None:
        """Pin an indexed dim: an index is a position, which other sizes do not have."""
        for dim in dims(*rest):
            if (n := poly_of(x.shape[dim])) and as_constant(n) is None:
                self.system.pin_value(n, f"looked up by index: {running_line()}")

    def _pin_written(self, n: Any) -> None:
        """Pin a number of positions that are written by index."""
        if as_constant(p := poly_of(n)) is None:
            self.system.pin_value(p, f"written by index: {self.line()}")

    def _pin_positions(self, x: Tensor) -> None:
        """Pin the dims that are resized: they are spatial, even those of a parameter."""
        for n in x.shape[2:]:
            if as_constant(p := poly_of(n)) is None:
                self.system.pin_value(p, f"a position, not a channel: {running_line()}")

    def _slice(self, packet: Any, x: Tensor, dim: int = 0, *bounds: Any) -> None:
        """Impose that the bounds of a slice, or a selected index, exist at every width."""
        n = poly_of(x.shape[dim])
        last = add(n, constant(1), -1) if packet is aten.select else n
        for bound in bounds[:2]:
            if bound is None or bound == sys.maxsize:
                continue
            p = poly_of(bound)
            if self.system.hint(p) < 0:
                p = add(p, n)
            self._impose_at_least(p, constant(0))
            self._impose_at_least(last, p)

    def _impose_at_least(self, a: Poly, b: Poly) -> None:
        """Impose ``a >= b`` at every width."""
        system = self.system
        if system.never_below(a, b):
            return
        a, b = system.canonical(a), system.canonical(b)
        # An attribute of the module may be the first terms of a sum: x[:, :self.first] of a
        # concatenation of `first` and other channels.
        prefix: Poly = {}
        for monomial in sorted(a):
            prefix = add(prefix, {monomial: a[monomial]})
            if symbols_of(b) <= system.soft and system.hint(prefix) == system.hint(b):
                system.impose(add(b, prefix, -1))
                return
        rest = system.hint(a) - system.hint(b)
        if rest > 0 and symbols_of(b):  # a = b + t, with a new symbol t
            b = add(b, {(system.fresh(rest),): 1})
            system.impose(add(a, b, -1))
        else:
            system.pin_value(a, self.reason())
            system.pin_value(b, self.reason())

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> None:
        """Impose the channels of a convolution, which its meta kernel does not compare."""
        transposed, groups = options[3], options[5]
        inputs = weight.shape[0] if transposed else weight.shape[1] * groups
        check_sizes(x.shape[1] == inputs)
        for n in weight.shape[2:]:
            if as_constant(poly_of(n)) is None:  # a weight that is no nn.Conv's
                self.system.pin_value(poly_of(n), "size of a convolution's kernel")
        check_sizes(weight.shape[0] % groups == 0)
        if bias is not None:
            outputs = weight.shape[1] * groups if transposed else weight.shape[0]
            check_sizes(bias.shape[0] == outputs)

    def _norm(self, returns: int, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Replace batch or group norm: the output has x's shape, its vectors x's channels."""
        for vector in rest:
            if isinstance(vector, Tensor) and vector.dim() == 1:
                self.used.add(id(vector))
                check_sizes(vector.shape[0] == x.shape[1])
        nothing = torch.empty((0,), device="meta")
        out = torch.empty(x.shape, dtype=x.dtype, device="meta")  # quicker than empty_like
        return (unknown(out), *([nothing] * (returns - 1)))

    def _count(self, flops: Any, out: Any) -> None:
        layer = self.layers[-1] if self.layers else ""
        self.flops[layer] = add(self.flops.get(layer, {}), poly_of(flops))
        first = out if isinstance(out, Tensor) else out[0]
        self.activations = add(self.activations, poly_of(first.numel()))


def running_line() -> str:
    """``file:line`` and the text of the innermost line of the model's code that is running."""
    return model_line(run_on_meta.__code__)


class TraceInterrupted(Exception):  # noqa: N818 - the tracer pins the layer's sizes and goes on
    """A run that failed in some layer.

    Attributes:
        layer: The module's name, empty for the model itself.
        reason: The reason for pinning the sizes that enter the module.
    """

    def __init__(self, layer: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.layer, self.reason = layer, reason


@contextmanager
def _explained(model: nn.Module, run: SymbolicInterpreter) -> Iterator[None]:
    """Name the module and the operation in any error."""
    try:
        yield
    except TraceError:
        raise
    except Exception as error:
        layer = run.layers[-1] if run.layers else ""
        kind = type(model.get_submodule(layer)).__name__
        place = place_of(error)
        raise TraceInterrupted(
            layer,
            f"needs integers at {place}: {first_line(error)}",
            f"cannot trace {type(model).__name__}: module {layer or '(the model itself)'!r} "
            f"({kind}) failed at {place} in operation {run.operation or 'none'}: "
            f"{first_line(error)}. A model must run on tensors without values (device 'meta') for "
            "an input of the shape given; move code that reads values out of forward",
        ) from error


def place_of(error: BaseException) -> str:
    """``file:line`` of the innermost frame of ``error`` outside torch and this package."""
    place = "torch's own code"
    traceback = error.__traceback__
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if not filename.startswith(FOREIGN):
            place = f"{Path(filename).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Turn off attention's fused inference path, which hides its products from FLOP counters."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run_on_meta(model: nn.Module, x: Any, mode: TorchDispatchMode) -> Any:
    """Run a model on the meta device in a dispatch mode, on a batch from :func:`sample`.

    Values of the batch are known to code that reads them.
    """
    with (
        no_fast_path(),
        torch.device("meta"),
        enable_python_dispatcher(),
        torch.no_grad(),
        plain_numbers(),
        SampleValues(random=model.training),
        mode,
    ):
        return call(model, x)


def execute(
    symbolic: nn.Module, system: System, inputs: Any, fixed: Mapping[str, str], *, train: bool
) -> SymbolicInterpreter:
    """Run a model of symbolic sizes; the sizes of its outputs are pinned.

    Args:
        symbolic: The model; its tensors are on the meta device.
        system: The symbols in its sizes.
        inputs: Its inputs, as :func:`~widthsearch.tracing.inputs.as_inputs` returns them.
        fixed: Modules that run on integers, each with the reason.
        train: Whether to run in training mode.

    Raises:
        TraceInterrupted: A module fails.
    """
    # Training mode refuses batches of one sample in batch norm.
    x = sample(inputs, 2 if train else 1)
    run = SymbolicInterpreter(system, tuple(held_tensors(x)))
    system.reason, system.line = run.reason, running_line
    hooks = track_layers(symbolic, run.layers)
    for layer, why in fixed.items():
        hook = partial(_pin_inputs, system, why)
        module = symbolic.get_submodule(layer)
        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    symbolic.train(train)
    with _explained(symbolic, run):
        out = run_on_meta(symbolic, x, run)
    for handle in hooks:
        handle.remove()
    for tensor in held_tensors(out):
        shape = [system.pin_value(poly_of(n), "output of the model") for n in tensor.shape]
        run.outputs.append(tuple(shape))
    return run


def track_layers(model: nn.Module, layers: list[str]) -> list[RemovableHandle]:
    """Keep the names of the modules that are running in ``layers``, the innermost last.

    Returns:
        The hooks that do it; remove them after the run.
    """

    def leave(*_: Any) -> None:  # a hook's result would replace the module's output
        layers.pop()

    handles = []
    for layer, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, at=layer: layers.append(at)))
        handles.append(module.register_forward_hook(leave))
    return handles


def _pin_inputs(system: System, reason: str, _module: nn.Module, *inputs: Any) -> Any:
    return with_integers(inputs, system, reason)
