"""Runs of a function that makes a model, with every constructor call seen and open to change.

A *call* is the construction of one ``nn.Module``: its outermost ``__init__``. Constructors make
modules of their own, so the calls of a model form a tree, with the function itself as its root.
While a :class:`Session` runs, the ``__init__`` of the classes concerned is wrapped: a subclass sees
each call with its arguments and may make it with others. All else that the user's code does, and
the order of its random numbers, is as without.

Example:
    >>> class Block(nn.Module):
    ...     def __init__(self, width: int) -> None:
    ...         super().__init__()
    ...         self.inner, self.outer = nn.Linear(width, 8), nn.Linear(8, width)
    >>> recorder = Recorder()
    >>> model = recorder.run(lambda: nn.Sequential(Block(4), nn.ReLU()))
    >>> [call.names for call in recorder.root.walk()][1:]
    [['0'], ['0.inner'], ['0.outer'], ['1'], ['']]
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from widthsearch.modules.arguments import Path
from widthsearch.modules.origins import Origins
from widthsearch.torch_internals import children_of

_ALONE = threading.RLock()
_COPIERS: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
"""How ``copy.deepcopy`` copies instances of a class; asked before ``__deepcopy__``."""
SIZING = {
    *("zeros", "ones", "empty", "rand", "randn", "full", "eye", "arange", "linspace", "logspace"),
    *("randperm", "new_zeros", "new_ones", "new_empty", "new_full", "repeat", "expand", "tile"),
    *("repeat_interleave", "view", "reshape"),
}
"""torch's functions whose integers become sizes of a constructor's own tensors."""


@dataclass(eq=False)
class Call:
    """A constructor call.

    Attributes:
        kind: The full name of the module's class, which is the same where a function makes the
            class itself anew.
        copied: Whether the module came from ``copy.deepcopy`` of one that had been constructed.
        children: The calls that its constructor made, in order.
        parts: In a copy, the calls of modules within it that its constructor did not make, by name.
        names: Where the module stands in the model; empty where the model does not keep it.
        numbers: The integers among its arguments in the model as given, by argument and path.
        members: The names of what the module holds in the model as given.
        flags: The truth values among its attributes there.

    Example:
        >>> block = Call("my.Block", children=[Call("my.Layer")])
        >>> root = Call("", children=[block, Call("my.Head")])
        >>> [call.kind for call in root.walk()]
        ['', 'my.Block', 'my.Layer', 'my.Head']
    """

    kind: str
    copied: bool = False
    children: list[Call] = field(default_factory=list)
    parts: dict[str, Call] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    numbers: dict[tuple[str, Path], int] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    flags: dict[str, bool] = field(default_factory=dict)

    def walk(self) -> Iterator[Call]:
        """This call and all within it, outer ones first."""
        yield self
        for child in (*self.children, *self.parts.values()):
            yield from child.walk()

    def again(self) -> Call:
        """The same calls, without names and parts."""
        return Call(self.kind, self.copied, [child.again() for child in self.children])

    def pairs(self, other: Call) -> Iterator[tuple[Call, Call]]:
        """Each of these calls with that of another tree of the same shape, without parts."""
        yield self, other
        for child, twin in zip(self.children, other.children, strict=True):
            yield from child.pairs(twin)


@dataclass(frozen=True, eq=False)
class Recording:
    """A function that makes a model, and the calls that it made when it was called first.

    Attributes:
        make_model: The function.
        root: A call that stands for the function; the constructor calls are within it.
        classes: The classes that were constructed.
        complete: Whether they were all of the model's modules.

    Example:
        >>> _, recorder = record(lambda: nn.Linear(3, 4))
        >>> recording = recorder.recording
        >>> [call.kind for call in recording.root.children], recording.classes
        (['torch.nn.modules.linear.Linear'], (<class 'torch.nn.modules.linear.Linear'>,))
    """

    make_model: Callable[[], nn.Module]
    root: Call
    classes: tuple[type, ...]
    complete: bool = True


def kind_of(cls: type) -> str:
    """A class's full name."""
    return f"{cls.__module__}.{cls.__qualname__}"


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore torch's generators afterwards: the CPU's, and the current device's if CUDA is in use.

    CUDA is not initialised by it, and other devices are not affected.
    """
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=gpus):
        yield


class DivergedError(Exception):
    """A constructor made other modules than when it was recorded."""


@dataclass(eq=False)
class Frame:
    """A constructor that is running.

    Attributes:
        call: The call.
        module: The module that it makes; None for the function that makes the model.
        position: How many calls it has made.
        sizings: How often it has called one of :data:`SIZING`.

    Example:
        >>> frame = Frame(Call("my.Block", children=[Call("my.Layer")]))
        >>> frame.call.children[frame.position].kind  # the constructor call to expect next
        'my.Layer'
    """

    call: Call
    module: nn.Module | None = None
    position: int = 0
    sizings: int = 0


class Session(TorchFunctionMode):
    """A run of the function that makes a model.

    Args:
        root: The call that stands for the function, with the calls to expect within it.
        classes: The classes whose constructors are wrapped.

    Attributes:
        frames: The constructors that are running, the innermost last.

    Example:
        >>> class Wider(Session):
        ...     def construct(self, frame, original, args, kwargs):
        ...         layer, inputs, outputs = args
        ...         super().construct(frame, original, (layer, inputs, 2 * outputs), kwargs)
        >>> _, recorder = record(lambda: nn.Linear(3, 4))
        >>> recording = recorder.recording
        >>> Wider(recording.root, recording.classes).run(recording.make_model)
        Linear(in_features=3, out_features=8, bias=True)
    """

    def __init__(self, root: Call, classes: Iterable[type]) -> None:
        super().__init__()
        self.root, self.classes = root, tuple(classes)
        self.frames = [Frame(root)]
        self._made: dict[int, tuple[nn.Module, Call]] = {}
        self._how: dict[int, tuple[Any, Any, Any, Tensor]] = {}
        self._constructing: set[int] = set()
        self._thread = 0
        self._copying = False

    def run(self, make_model: Callable[[], nn.Module]) -> nn.Module:
        """Call the function.

        Raises:
            DivergedError: It made other modules than are expected.
        """
        with _ALONE, ExitStack() as stack:
            self._thread = threading.get_ident()
            stack.callback(self._forget)
            for cls in self.classes:
                self._wrap(cls, stack)
            nn.Module.__init_subclass__ = self._on_new_class(stack)  # type: ignore[method-assign]
            stack.callback(delattr, nn.Module, "__init_subclass__")
            with self:
                model = make_model()
            self.leave(self.frames[0])
            self.finish(model)
        return model

    # -- methods that subclasses override ---------------------------------------------------------

    def expect(self, cls: type, copied: bool) -> Call:
        """The call that the innermost frame makes now."""
        frame = self.frames[-1]
        if frame.position < len(frame.call.children):
            call = frame.call.children[frame.position]
            if call.kind == kind_of(cls) and call.copied == copied:
                frame.position += 1
                return call
        raise DivergedError(f"{frame.call.kind} makes a {cls.__name__} that the base has not")

    def leave(self, frame: Frame) -> None:
        """A constructor has returned."""
        if frame.position != len(frame.call.children):
            left = frame.call.children[frame.position].kind
            raise DivergedError(f"{frame.call.kind} makes no {left}, but does in the base")

    def construct(
        self, frame: Frame, original: Callable[..., None], args: Any, kwargs: Any
    ) -> None:
        """Make a call; ``args`` begin with the module."""
        original(*args, **kwargs)
        self.leave(frame)

    def sized(self, frame: Frame, number: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of the frame's call of one of :data:`SIZING`, counted from 0."""
        return args, kwargs

    def fits(self, call: Call, source: nn.Module) -> bool:
        """Whether a module may be copied as it is for a call."""
        return True

    def finish(self, model: nn.Module) -> None:
        """The function has returned."""

    # -- how --------------------------------------------------------------------------------------

    def call_of(self, module: nn.Module) -> Call | None:
        """The call that made a module."""
        made = self._made.get(id(module))
        return made[1] if made else None

    def _forget(self) -> None:
        self._thread = 0  # wrappers of classes that a function made live on
        self._made.clear()
        self._how.clear()

    def _wrap(self, cls: type, stack: ExitStack) -> None:
        """Wrap the constructor of a class and its copying until the session ends."""
        own = vars(cls).get("__init__")
        original: Any = own or cls.__init__  # type: ignore[misc]
        if not isinstance(original, FunctionType):
            return

        @functools.wraps(original)
        def __init__(module: Any, /, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if (
                type(module) is not cls  # a subclass's constructor calls its base's
                or threading.get_ident() != self._thread
                or id(module) in self._constructing
            ):
                original(module, *args, **kwargs)
            else:
                call = self.expect(cls, copied=False)
                self._construct(call, original, (module, *args), kwargs)

        def restore() -> None:
            _COPIERS.pop(cls, None)
            if vars(cls).get("__init__") is __init__:  # no decorator has replaced it since
                if own is None:
                    del cls.__init__  # type: ignore[misc]
                else:
                    cls.__init__ = own  # type: ignore[misc]

        cls.__init__ = __init__  # type: ignore[misc]
        _COPIERS[cls] = self._copy
        stack.callback(restore)

    def _construct(self, call: Call, original: Any, args: Any, kwargs: Any) -> None:
        module = args[0]
        frame = Frame(call, module)
        self.frames.append(frame)
        self._constructing.add(id(module))
        self._made[id(module)] = module, call
        self._how[id(module)] = original, args[1:], kwargs, torch.get_rng_state()
        try:
            self.construct(frame, original, args, kwargs)
        finally:
            self._constructing.discard(id(module))
            self.frames.pop()

    def _on_new_class(self, stack: ExitStack) -> Any:
        def __init_subclass__(cls: type, **kwargs: Any) -> None:  # noqa: N807
            super(nn.Module, cls).__init_subclass__(**kwargs)  # type: ignore[misc]
            if threading.get_ident() == self._thread:
                self._wrap(cls, stack)

        return classmethod(__init_subclass__)  # type: ignore[arg-type]

    def _copy(self, module: nn.Module, memo: Any) -> Any:
        """What ``copy.deepcopy`` does with a module, as a call of its own."""
        mine = threading.get_ident() == self._thread and id(module) in self._made
        if not mine or self._copying:
            return _deep_copy(module, memo)
        call = self.expect(type(module), copied=True)
        self._copying = True
        try:
            result = _deep_copy(module, memo)
        finally:
            self._copying = False
        self._pair(module, result, call)
        return self._fitted(call, module, result)

    def _fitted(self, call: Call, source: nn.Module, result: nn.Module) -> nn.Module:
        """A copy at the sizes that are wanted of it.

        Of others, it is constructed as its original was, from the same random numbers.
        """
        if self.fits(call, result):
            return result
        for name, part in call.parts.items():
            parent, _, own = name.rpartition(".")
            new = self._fitted(part, source.get_submodule(name), result.get_submodule(name))
            children_of(result.get_submodule(parent))[own] = new
        if call.parts:
            return result
        original, args, kwargs, state = self._how[id(source)]
        with torch.random.fork_rng(devices=()):
            torch.set_rng_state(state)
            new = type(source).__new__(type(source))
            self._construct(call, original, (new, *args), kwargs)
        return new

    def part(self, call: Call, name: str, of: Call) -> Call:
        """The call of a module within a copy that the copied module's constructor did not make."""
        return call.parts[name]

    def _pair(self, source: nn.Module, result: nn.Module, call: Call) -> None:
        """Note the call of each module of a copy."""
        twins = {id(a): b for a, b in self._made[id(source)][1].pairs(call)}
        part = None
        for (name, old), new in zip(source.named_modules(), result.modules(), strict=True):
            of = self.call_of(old)
            if of is not None and id(of) in twins:
                self._made[id(new)] = new, twins[id(of)]
                self._how[id(new)] = self._how[id(old)]
            elif of is not None and (part is None or not name.startswith(f"{part}.")):
                part = name
                self._pair(old, new, self.part(call, name, of))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in SIZING and threading.get_ident() == self._thread:
            frame = self.frames[-1]
            args, kwargs = self.sized(frame, frame.sizings, args, kwargs)
            frame.sizings += 1
        return func(*args, **kwargs)


def _deep_copy(module: nn.Module, memo: Any) -> Any:
    own = getattr(module, "__deepcopy__", None)
    if own is not None:
        return own(memo)
    return copy._reconstruct(module, memo, *module.__reduce_ex__(4))  # type: ignore[attr-defined]


def every_class(cls: type = nn.Module) -> Iterator[type]:
    """A class and all that are derived from it."""
    seen: dict[type, None] = {cls: None}
    rest = [cls]
    while rest:
        subs: list[type] = rest.pop().__subclasses__()
        for sub in subs:
            if sub not in seen and not sub.__module__.startswith("torch.jit"):
                seen[sub] = None
                rest.append(sub)
    return iter(seen)


class Recorder(Session):
    """Runs the function for the first time, and notes its calls in :attr:`root`.

    Attributes:
        recording: The function, its calls and their classes.
        origins: Where the content of each tensor comes from; writers are calls.
        complete: Whether it constructed every module of the model.
    """

    recording: Recording

    def __init__(self) -> None:
        super().__init__(Call(""), every_class())
        self.origins = Origins(lambda: self.frames[-1].call)
        self.complete = True
        self._used: dict[type, None] = {}

    def run(self, make_model: Callable[[], nn.Module]) -> nn.Module:  # noqa: D102
        with self.origins:
            model = super().run(make_model)
        self.recording = Recording(make_model, self.root, tuple(self._used), self.complete)
        return model

    def expect(self, cls: type, copied: bool) -> Call:  # noqa: D102
        self._used[cls] = None
        call = Call(kind_of(cls), copied)
        self.frames[-1].call.children.append(call)
        return call

    def leave(self, frame: Frame) -> None:  # noqa: D102
        pass

    def part(self, call: Call, name: str, of: Call) -> Call:  # noqa: D102
        call.parts[name] = Call(of.kind, True)
        return call.parts[name]

    def _pair(self, source: nn.Module, result: nn.Module, call: Call) -> None:
        call.children = self._made[id(source)][1].again().children
        super()._pair(source, result, call)

    def finish(self, model: nn.Module) -> None:  # noqa: D102
        if isinstance(model, nn.Module):
            for name, module in model.named_modules(remove_duplicate=False):
                call = self.call_of(module)
                self.complete &= call is not None
                if call is not None:
                    call.names.append(name)


def record(make_model: Callable[[], nn.Module]) -> tuple[nn.Module, Recorder]:
    """A model, and the recorder of the calls that made it; the random state stays as it was."""
    while True:
        loaded = len(sys.modules)
        recorder = Recorder()
        with kept_generators():
            model = recorder.run(make_model)
        if len(sys.modules) == loaded:  # an import may construct modules of its own, once
            return model, recorder
