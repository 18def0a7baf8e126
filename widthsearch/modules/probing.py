"""What a constructor makes when it is given other integers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from fractions import Fraction
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.modules.arguments import Path, alike, untouched, with_integers
from widthsearch.modules.construction import Call, Frame, Session
from widthsearch.modules.tree import join, sizes_in, tensors_of
from widthsearch.torch_internals import buffers_of, children_of, parameters_of

Where = tuple[str, int | str]
"""A tensor's name and a dim, or a layer's name and an attribute."""
Leaf = tuple[str, Path]
"""An argument's name and a path within it; or ``"#n"`` and a path within (args, kwargs) of the n-th
call of a function that takes sizes."""

SAME_RESTS = 120
"""A multiple of 2 to 6, 8, 10 and 12: numbers that differ by it leave the same rests."""

Responses = Mapping[Where, tuple[int, Fraction]]
"""The sizes that change with a number: each one's value at the base, and its slope."""


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a model, by its name."""
    return {join(layer, name): tuple(t.shape) for _, layer, name, t in tensors_of(model)}


def sizes_of(model: nn.Module) -> dict[Where, int]:
    """Every size in a model: attributes first, then tensors', inputs' dims before outputs'."""
    found: dict[Where, int] = {}
    for layer, module in model.named_modules():
        found.update({(layer, name): value for name, value in sizes_in(module)})
    for key, shape in shapes_of(model).items():
        found.update({(key, dim): shape[dim] for dim in reversed(range(len(shape)))})
    return found


def members_of(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module holds: its children, parameters and buffers."""
    held = (children_of(module), parameters_of(module), buffers_of(module))
    return tuple(name for group in held for name, value in group.items() if value is not None)


def flags_of(module: nn.Module) -> dict[str, bool]:
    """The truth values among a module's attributes."""
    return {name: value for name, value in vars(module).items() if isinstance(value, bool)}


_CONSTANTS = (
    *(type, ModuleType, FunctionType, BuiltinFunctionType, functools.partial, type(None)),
    *(bool, int, float, str, tuple, frozenset, torch.dtype, logging.Logger),
)


def reads_only_arguments(cls: type) -> bool:
    """Whether a constructor surely makes the same module of the same arguments.

    It does not if its code reads what a function around the class holds, or a global object that
    code can change: there a module's size may stand.
    """

    def reads(code: CodeType, names: Mapping[str, Any]) -> bool:
        return any(not isinstance(names.get(name), _CONSTANTS) for name in code.co_names) or any(
            reads(inner, names) for inner in code.co_consts if isinstance(inner, CodeType)
        )

    functions = (
        getattr(value, "__func__", value)
        for base in cls.__mro__
        if base is not object and not base.__module__.startswith("torch.")
        for name, value in vars(base).items()
        if name != "forward"
    )
    return not any(
        reads(f.__code__, f.__globals__) or not set(f.__code__.co_freevars) <= {"__class__"}
        for f in functions
        if isinstance(f, FunctionType)
    )


_FILLS = {
    *("fill_", "zero_", "normal_", "uniform_", "erfinv_"),
    *("add_", "sub_", "mul_", "div_", "clamp_"),
}


class Sketch(Session):
    """A session that makes memory without values as meta tensors, to save time.

    Attributes:
        values: Whether memory has values nevertheless: some constructors read them.

    Example:
        >>> from widthsearch.modules.construction import record
        >>> _, recorder = record(lambda: nn.Linear(3, 4))
        >>> recording = recorder.recording
        >>> Sketch(recording.root, recording.classes).run(recording.make_model).weight.device
        device(type='meta')
    """

    values = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.values:
            pass
        elif func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        elif func.__name__ in _FILLS or getattr(func, "__module__", "") == "torch.nn.init":
            given = [*args, *kwargs.values()]
            if _on_meta(given[0]) and not any(isinstance(value, Tensor) for value in given[1:]):
                return given[0]
        return super().__torch_function__(func, types, args, kwargs)


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


class Prober(Sketch):
    """A session that can construct a module once more, with other numbers, while it is made.

    Args:
        root: The call that stands for the function, with the calls to expect within it.
        classes: The classes whose constructors are wrapped.

    Attributes:
        finished: The calls that have returned, each with its class, its arguments and its module's
            attributes.
        probed: The call that is being probed; None while none is.
        changes: The numbers that it is given.

    Example:
        >>> from widthsearch.modules.construction import record
        >>> recording = record(lambda: nn.Linear(3, 4))[1].recording
        >>> prober = Prober(recording.root, recording.classes)
        >>> prober.probed is None and not prober.finished
        True
    """

    def __init__(self, root: Call, classes: Iterable[type]) -> None:
        super().__init__(root, classes)
        self.finished: dict[Call, tuple[type, dict[str, Any], dict[str, Any]]] = {}
        self.probed: Frame | None = None
        self.changes: Mapping[Leaf, int] = {}
        self._seen: dict[Any, Responses | None] = {}
        self._doubled: dict[Any, dict[Where, int]] = {}
        self._closed: dict[type, bool] = {}

    def probing(self, frame: Frame, original: Any, args: Any, kwargs: Any, arguments: Any) -> bool:
        """Make a call within a probe; returns whether it is one.

        A call that is as it was in the base's run makes the module of that run.
        """
        if self.probed is not None and not self._reused(frame, arguments.arguments):
            original(*args, **kwargs)
            self.leave(frame)
        return self.probed is not None

    def _reused(self, frame: Frame, arguments: Mapping[str, Any]) -> bool:
        """Whether a call within a probe is as it was in the base's run; if so, so is its module."""
        known = self.finished.get(frame.call)
        cls = type(frame.module)
        if known is None or known[0] is not cls:  # a function makes this class anew
            return False
        if cls not in self._closed:
            self._closed[cls] = reads_only_arguments(cls)
        if not self._closed[cls]:
            return False
        _, given, kept = known
        if not all(alike(value, arguments[name]) for name, value in given.items()):
            return False
        vars(frame.module).update(untouched(kept))
        return True

    def together(
        self, frame: Frame, original: Any, arguments: Any, numbers: Mapping[Leaf, int]
    ) -> dict[Where, int]:
        """The sizes in tensors when numbers are twice as large; none where that is refused."""
        assert frame.module is not None
        key = frame.call.kind, tuple(numbers.items()), 0, tuple(shapes_of(frame.module).items())
        if key not in self._doubled:
            changes = {leaf: 2 * v for leaf, v in numbers.items()}
            after = self.probe(frame, original, arguments, changes) or {}
            self._doubled[key] = {w: n for w, n in after.items() if isinstance(w[1], int)}
        return self._doubled[key]

    def responses(
        self,
        frame: Frame,
        original: Any,
        arguments: Any,
        leaves: tuple[Leaf, ...],
        v: int,
        step: int = 0,
    ) -> Responses | None:
        """The sizes that change with numbers: each one's value at the base, and its slope.

        None where the constructor refuses other numbers, or makes other modules of them.

        Args:
            frame: The call.
            original: The constructor.
            arguments: Its arguments.
            leaves: The numbers, which change together.
            v: Their value.
            step: By how much they change; 0 for a multiple of them if possible.
        """
        assert frame.module is not None
        key = frame.call.kind, leaves, v, step, tuple(shapes_of(frame.module).items())
        if key in self._seen:
            return self._seen[key]
        before = sizes_of(frame.module)

        def slopes(new: int) -> Responses | None:
            after = self.probe(frame, original, arguments, dict.fromkeys(leaves, new))
            if after is None or after.keys() != before.keys():
                return None
            pairs = ((where, u, after[where]) for where, u in before.items())
            return {where: (u, Fraction(n - u, new - v)) for where, u, n in pairs if n != u}

        for new in (v + step,) if step else (2 * v, 3 * v, v + 1):
            if (found := slopes(new)) is not None:
                break
        slopes_of = (found or {}).values()
        doubtful = any(u != slope * v or (u % v and v % u) for u, slope in slopes_of)
        # Another value gives other slopes if sizes are rounded to the number, or divide it.
        for other in (new + step,) if step else (new + v, v + SAME_RESTS):
            if found and doubtful and (again := slopes(other)) is not None:
                found = {where: each for where, each in found.items() if again.get(where) == each}
        return self._seen.setdefault(key, found)

    def probe(
        self, frame: Frame, original: Any, arguments: Any, changes: Mapping[Leaf, int]
    ) -> dict[Where, int] | None:
        """The sizes in a module that is made with other numbers; None where it cannot be."""
        kind: Any = type(frame.module)
        fresh: Any = kind.__new__(kind)
        given = dict(arguments.arguments)
        given[next(iter(given))] = fresh
        for name in given:
            numbers = {path: v for (of, path), v in changes.items() if of == name}
            given[name] = with_integers(untouched(given[name]), numbers)
        call = type(arguments)(arguments.signature, given)
        self.probed, self.changes = Frame(frame.call, fresh), changes
        self.frames.append(self.probed)
        self._constructing.add(id(fresh))
        try:
            original(*call.args, **call.kwargs)
            self.leave(self.probed)
        except Exception:  # noqa: BLE001  a constructor may refuse a number in any way
            return None
        finally:
            self._constructing.discard(id(fresh))
            self.frames.pop()
            self.probed = None
        return sizes_of(fresh)
