"""Records how a model's constructor initialises its tensors, and replays that at other widths.

Notation: a *step* is one write to a tensor: a call of ``torch.nn.init``, a layer's own
``reset_parameters``, or an in-place fill. The *scheme* of a model is the list of steps of each
tensor, from the last step on that overwrites the whole tensor. To *replay* a step is to repeat it
on a tensor of another shape; ``torch.nn.init`` computes its scale from the new shape. A scale that
a constructor computed itself, ``sqrt(c / fan)``, is recomputed for the new fan (``_rescaled``).

Example: the constructor ::

    self.conv = nn.Conv2d(3, 16, 3)                       # step 1: reset_parameters
    nn.init.kaiming_normal_(self.conv.weight)             # step 2: init kaiming_normal_
    self.scale = nn.Parameter(torch.full((16,), 0.1))     # no step, a constant value

has the scheme ``conv.weight: (step 2,)``, ``conv.bias: (step 1,)`` and the constant 0.1 for
``scale``. At a width of 8, ``kaiming_normal_`` runs on a weight of ``8 × 3 × 3 × 3``.
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

from widthsearch.modules.tree import (
    direction_of,
    is_estimate,
    join,
    owner_of,
    reset,
    tensors_of,
    varying_dims,
)
from widthsearch.torch_internals import TorchDispatchMode, buffers_of, parameters_of

_INIT: dict[CodeType, str] = {
    function.__code__: name
    for name, function in vars(nn.init).items()
    if name.endswith("_") and not name.startswith("_") and hasattr(function, "__code__")
}
_SCALED = {"normal_": ("std",), "trunc_normal_": ("std", "a", "b"), "uniform_": ("a", "b")}
"""Arguments that constructors compute from the fan, by function."""
_FAN_CONSTANTS = (1.0, 2.0, 3.0, 6.0, 1 / 3)
"""The c in ``sqrt(c / fan)``: Glorot and LeCun (1), He (2), and their bounds for uniform values."""
_RESETS = ("reset_parameters", "_reset_parameters")
_FILLS = ("normal_", "uniform_", "fill_", "zero_")


@dataclass(frozen=True)
class Step:
    """One write to a tensor.

    Attributes:
        name: A function of ``torch.nn.init``, a tensor method, or ``reset_parameters``.
        kind: ``init``, ``method``, ``reset`` (by the layer), ``unit`` (a random unit vector),
            ``length`` (the norms of a weight norm's directions) or ``unknown`` (no replay).
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
    """Restore torch's generators afterwards: the CPU's, and the current device's if CUDA is in use.

    CUDA is not initialised by it, and other devices are not affected.
    """
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=gpus):
        yield


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the steps of every tensor while a model is constructed.

    As a dispatch mode it sees every write to a tensor, but not the function that wrote. A profile
    hook tracks which functions of ``torch.nn.init`` and which ``reset_parameters`` are running.

    Example:
        >>> recorder = Recorder()
        >>> layer = recorder.construct(lambda: nn.Linear(3, 2))
        >>> [step.name for step in recorder.steps(layer.weight)]
        ['reset_parameters']
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._writes: dict[int, list[Step]] = {}  # by storage
        self._inits: list[Step] = []  # init functions that are running, outermost first
        self._resets: list[Any] = []  # modules whose reset_parameters is running
        self._frames: list[tuple[FrameType, str]] = []  # the frames of both
        self._noted: set[int] = set()  # storages that the outermost init function wrote to

    def construct(self, make_model: Callable[[], nn.Module]) -> nn.Module:
        """Call ``make_model`` and record; the global random state is restored."""
        previous = sys.getprofile()
        with kept_generators(), self:
            sys.setprofile(self._profile)
            try:
                return make_model()
            finally:
                sys.setprofile(previous)

    def steps(self, tensor: Tensor) -> tuple[Step, ...]:
        """The writes to ``tensor``, from the last one on that overwrote all of it."""
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name.endswith("_") and args and isinstance(args[0], Tensor):
            self._write(name, args[0], args[1:])
        elif isinstance(out, Tensor) and not any(
            isinstance(a, Tensor) and _storage(a) == _storage(out) for a in args
        ):
            self._writes.pop(_storage(out), None)  # a new tensor may reuse a freed storage
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
    """The initialisation of each tensor of a model at any width. Each is in one of the mappings.

    Attributes:
        steps: Per tensor, the steps of its constructor.
        shapes: Per tensor, its shape in the model as given.
        constants: The value of tensors that hold one value everywhere.
        moments: Mean and standard deviation of tensors whose steps cannot be replayed; they are
            drawn from a normal distribution.
        kept: The content of buffers that is the same at every width, once along dims that repeat
            it.
    """

    steps: Mapping[str, tuple[Step, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, float] = field(default_factory=dict)
    moments: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, recorder: Recorder | None) -> Scheme:
        """The scheme of a model: from its recorder, or without one from its layers and values."""
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
                one = tensor.detach()
                for dim in set(range(one.dim())) - varying_dims(one):
                    one = one.narrow(dim, 0, 1)
                kept[key] = one.clone()
            else:
                values = tensor.detach().float()
                moments[key] = float(values.mean()), float(values.std())
        return cls(steps, shapes, constants, moments, kept)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Initialise every tensor of ``model``, drawing from the global random state.

        Layers are reset first, because a reset overwrites all of a layer's tensors; then every
        tensor's own steps are replayed; then the lengths of weight norms are computed.
        """
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
    """``value`` rescaled to the new fan, if it is ``sqrt(c / fan)`` for the base's shape.

    Constructors often compute the scale themselves: ``normal_(0, sqrt(2 / fan_out))``. The fan is
    the size of dim 0 or 1, with or without the kernel.
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
