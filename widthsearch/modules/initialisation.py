"""How a model's constructor initialises its tensors, so that it can be done at other widths.

While the constructor runs, every write to a tensor is recorded: calls of ``torch.nn.init``, a
layer's own ``reset_parameters``, and plain random fills. Replaying the record on tensors of other
sizes is the constructor's own scheme, since ``torch.nn.init`` computes its scales from the sizes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.modules.tree import direction_of, is_estimate, join, owner_of, reset, tensors_of
from widthsearch.torch_internals import TorchDispatchMode, buffers_of, parameters_of

_INIT: dict[CodeType, str] = {
    function.__code__: name
    for name, function in vars(nn.init).items()
    if name.endswith("_") and not name.startswith("_") and hasattr(function, "__code__")
}
_RESETS = ("reset_parameters", "_reset_parameters")
_FILLS = ("normal_", "uniform_", "fill_", "zero_")
_SCALED = {"normal_": ("std",), "trunc_normal_": ("std", "a", "b"), "uniform_": ("a", "b")}
_FAN_CONSTANTS = (1.0, 2.0, 3.0, 6.0, 1 / 3)


@dataclass(frozen=True)
class Step:
    """One write to a tensor.

    Attributes:
        name: A function of ``torch.nn.init``, a tensor method, or ``reset_parameters``.
        kind: ``init``, ``method``, ``reset`` (by the layer), ``unit`` (a random unit vector) or
            ``length`` (of a weight norm's directions).
        arguments: Positional arguments of a method, keyword arguments of an init function.
    """

    name: str
    kind: str
    arguments: tuple[Any, ...] | tuple[tuple[str, Any], ...] = ()


_RESET = Step("reset_parameters", "reset")
_UNIT = Step("", "unit")
_LENGTH = Step("", "length")
_UNKNOWN = Step("", "unknown")


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put torch's generators back after: the CPU's and, once CUDA is in use, its current device's.

    A CPU study leaves CUDA alone, and no device but the current one is touched.
    """
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=gpus):
        yield


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records how tensors are initialised while a model is constructed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._writes: dict[int, list[Step]] = {}
        self._inits: list[Step] = []
        self._resets: list[Any] = []
        self._frames: list[tuple[FrameType, str]] = []
        self._noted: set[int] = set()

    def construct(self, make_model: Callable[[], nn.Module]) -> nn.Module:
        """Call ``make_model`` and record; the global random state is left as it was."""
        previous = sys.getprofile()
        with kept_generators(), self:
            sys.setprofile(self._profile)
            try:
                return make_model()
            finally:
                sys.setprofile(previous)

    def steps(self, tensor: Tensor) -> tuple[Step, ...]:
        """What was written to ``tensor``, from its last complete overwriting on."""
        return tuple(self._writes.get(_storage(tensor), ()))

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code in _INIT:
                local = dict(frame.f_locals)
                tensor = local.pop("tensor", None)
                local.pop("generator", None)
                self._frames.append((frame, "init"))
                self._inits.append(Step(_INIT[code], "init", tuple(local.items())))
                if len(self._inits) == 1 and isinstance(tensor, Tensor):
                    self._noted.clear()
            elif code.co_name in _RESETS:
                self._frames.append((frame, "reset"))
                self._resets.append(frame.f_locals.get("self"))
        elif event == "return" and self._frames and self._frames[-1][0] is frame:
            _, kind = self._frames.pop()
            (self._inits if kind == "init" else self._resets).pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name.endswith("_") and args and isinstance(args[0], Tensor):
            self._write(name, args[0], args[1:])
        elif isinstance(out, Tensor) and not any(
            isinstance(a, Tensor) and _storage(a) == _storage(out) for a in args
        ):
            self._writes.pop(_storage(out), None)  # a new tensor, perhaps where an old one was
        return out

    def _write(self, name: str, tensor: Tensor, arguments: tuple[Any, ...]) -> None:
        key = _storage(tensor)
        whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        if any(_owns(module, key) for module in self._resets):
            self._writes[key] = [_RESET]
        elif self._inits:
            if key not in self._noted:  # the first write of the outermost init function
                self._noted.add(key)
                self._writes[key] = [self._inits[0]]
        elif not whole or any(isinstance(a, Tensor) for a in arguments):
            self._writes[key] = [_UNKNOWN]
        elif name in _FILLS:
            self._writes[key] = [Step(name, "method", arguments)]
        elif key in self._writes:
            self._writes[key].append(Step(name, "method", arguments))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _owns(module: Any, key: int) -> bool:
    if not isinstance(module, nn.Module):
        return False
    tensors = (*parameters_of(module).values(), *buffers_of(module).values())
    return any(t is not None and _storage(t) == key for t in tensors)


@dataclass(frozen=True)
class Scheme:
    """How to initialise each tensor of a model at any width.

    Attributes:
        steps: Per tensor, what its constructor wrote; an empty tuple means the layer's own
            ``reset_parameters``, where it has one.
        constants: Tensors that hold one value everywhere.
        moments: Mean and standard deviation of tensors that were made in a way that cannot be
            replayed; they are drawn anew from a normal distribution.
        kept: Buffers with content that no width changes.
    """

    steps: Mapping[str, tuple[Step, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, float] = field(default_factory=dict)
    moments: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, recorder: Recorder | None) -> Scheme:
        """Read the scheme of a model as it was just constructed (or, without a recorder, given)."""
        steps: dict[str, tuple[Step, ...]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        constants: dict[str, float] = {}
        moments: dict[str, tuple[float, float]] = {}
        kept: dict[str, Tensor] = {}
        for module, layer, name, tensor in tensors_of(model):
            key = join(layer, name)
            shapes[key] = tuple(tensor.shape)
            recorded = recorder.steps(tensor) if recorder else ()
            owner = model.get_submodule(owner_of(layer))
            resettable = callable(getattr(owner, "reset_parameters", None))
            if is_estimate(module, name):
                steps[key] = (_UNIT,)
            elif recorded and all(step.kind in ("init", "method") for step in recorded):
                steps[key] = recorded
            elif direction_of(module, name) is not None:
                if bool((tensor == tensor.flatten()[0]).all()):
                    constants[key] = float(tensor.detach().flatten()[0])
                else:
                    steps[key] = (_LENGTH,)
            elif (
                ((recorded == (_RESET,) or recorder is None) and resettable)
                or tensor.device.type == "meta"
                or tensor.numel() == 0
            ):
                steps[key] = (_RESET,)
            elif bool((tensor == tensor.flatten()[0]).all()):
                constants[key] = float(tensor.detach().flatten()[0])
            elif name in buffers_of(module) or not tensor.is_floating_point():
                kept[key] = tensor.detach().clone()
            else:
                values = tensor.detach().float()
                moments[key] = float(values.mean()), float(values.std())
        return cls(steps, shapes, constants, moments, kept)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Initialise every tensor of ``model``, from the global random state."""
        done: set[str] = set()
        for _, layer, name, _ in tensors_of(model):
            owner = owner_of(layer)
            if _RESET in self.steps.get(join(layer, name), ()) and owner not in done:
                done.add(owner)
                reset(model, owner)
        for _, layer, name, tensor in tensors_of(model):
            key = join(layer, name)
            if key in self.constants:
                tensor.fill_(self.constants[key])
            elif key in self.kept:
                tensor.copy_(self.kept[key])
            elif key in self.moments:
                mean, std = self.moments[key]
                tensor.normal_(mean, std)
            else:
                for step in self.steps[key]:
                    _replay(step, tensor, self.shapes[key])
        for module, layer, name, tensor in tensors_of(model):
            if self.steps.get(join(layer, name)) == (_LENGTH,):
                direction = direction_of(module, name)
                assert direction is not None
                tensor.copy_(torch.norm_except_dim(direction[0], 2, direction[1]))


def _replay(step: Step, tensor: Tensor, base: tuple[int, ...]) -> None:
    if step.kind == "init":
        keywords = dict(step.arguments)
        for name in _SCALED.get(step.name, ()):
            keywords[name] = _rescaled(keywords[name], base, tuple(tensor.shape))
        getattr(nn.init, step.name)(tensor, **keywords)
    elif step.kind == "method":
        arguments = step.arguments
        if step.name in _SCALED:
            arguments = tuple(_rescaled(a, base, tuple(tensor.shape)) for a in arguments)
        getattr(tensor, step.name)(*arguments)
    elif step.kind == "unit":
        tensor.normal_()
        tensor.div_(tensor.norm())


def _rescaled(value: Any, base: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """``value``, or the like of it at the new fan where it was ``sqrt(c / fan)`` at the base's.

    Constructors often write the formula out: ``normal_(0, sqrt(2 / fan_out))``.
    """
    if not isinstance(value, float) or value == 0 or len(base) < 2:
        return value
    for dims in ((0,), (1,)):
        for with_kernel in (True, False):
            kernel = math.prod(base[2:]) if with_kernel else 1
            old = math.prod(base[d] for d in dims) * kernel
            new = math.prod(shape[d] for d in dims) * kernel
            if any(math.isclose(value * value * old, c, rel_tol=1e-6) for c in _FAN_CONSTANTS):
                return value * math.sqrt(old / new)
    return value
