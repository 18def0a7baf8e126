"""The symbolic run itself: what is asked of each operation that runs, and what it leaves behind.

Kernels for tensors without values check less than real ones do; what they would let pass is asked
here. What cannot run on symbolic sizes is given numbers, and what entered it is pinned.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from widthsearch.errors import first_line
from widthsearch.torch_internals import (
    TorchDispatchMode,
    enable_python_dispatcher,
    tree_leaves,
    tree_map,
    tree_map_only,
)
from widthsearch.tracing.inputs import call, sample
from widthsearch.tracing.polynomials import Poly, System, add, as_constant, constant, symbols_of
from widthsearch.tracing.symbolic_ints import calling_line, poly_of

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


class SymbolicInterpreter(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        return _line()

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
                self.system.pin_value(n, f"looked up by index: {_line()}")

    def _position(self, x: Tensor) -> None:
        """What is resized to an image is a grid of positions, even where it is a parameter."""
        for n in x.shape[2:]:
            if as_constant(p := poly_of(n)) is None:
                self.system.pin_value(p, f"a position, not a channel: {_line()}")

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


def _line() -> str:
    """The line of the model's code that is running."""
    return calling_line(_SKIP, run_on_meta.__code__)


class Stopped(Exception):  # noqa: N818 - what it becomes depends on where it stopped
    """A run that came to an end in some layer."""

    def __init__(self, layer: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.layer, self.reason = layer, reason


@contextmanager
def _explained(model: nn.Module, run: SymbolicInterpreter) -> Iterator[None]:
    """Name the module and the operation in whatever goes wrong."""
    try:
        yield
    except Exception as error:
        layer = run.layers[-1] if run.layers else ""
        kind = type(model.get_submodule(layer)).__name__
        place = calling_line_of(error)
        raise Stopped(
            layer,
            f"needs numbers at {place}: {first_line(error)}",
            f"cannot trace {type(model).__name__}: module {layer or '(the model itself)'!r} "
            f"({kind}) failed at {place} in operation {run.operation or 'none'}: "
            f"{first_line(error)}. A model must run on tensors without values (device 'meta') for "
            "an input of the shape given; move what reads values out of forward",
        ) from error


def calling_line_of(error: BaseException) -> str:
    """``file:line`` of the innermost frame of ``error`` that is not torch's or ours."""
    place = "torch's own code"
    traceback = error.__traceback__
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if not filename.startswith(_SKIP):
            place = f"{Path(filename).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


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


def execute(
    symbolic: nn.Module, system: System, inputs: Any, fixed: Mapping[str, str], *, train: bool
) -> SymbolicInterpreter:
    """Run a model of symbolic sizes; its outputs' sizes are pinned.

    Args:
        symbolic: The model; its tensors are on the meta device.
        system: The symbols in its sizes.
        inputs: What it takes, as :func:`~widthsearch.tracing.inputs.as_inputs` gives it.
        fixed: Modules that are to run in numbers, each with the reason.
        train: Whether to run in training mode.

    Raises:
        Stopped: It fails somewhere.
    """
    # Training mode refuses batches of one sample in batch norm.
    x = sample(inputs, 2 if train else 1)
    run = SymbolicInterpreter(system, tuple(_tensors_in(x)))
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


def _entering(run: SymbolicInterpreter, layer: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        run.layers.append(layer)

    return hook


def _with_numbers(system: System, reason: str) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return in_numbers((args, kwargs), system, reason)

    return hook


def _leaving(run: SymbolicInterpreter) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
        run.layers.pop()

    return hook


def _tensors_in(out: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(out) if isinstance(x, Tensor))
