"""Functions that hold modules of a tree: copies of the tree need functions of their own.

``copy.deepcopy`` copies no functions. A lambda that closes over ``self``, kept as an attribute or a
hook, would run the modules of the original in every copy.

Example:
    >>> class Net(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.layer = nn.Identity()
    ...         self.run = lambda: self.layer
    >>> net = Net()
    >>> closures = Closures(net)
    >>> memo = dict(closures.memo)
    >>> other = copy.deepcopy(net, memo)
    >>> closures.fill(memo)
    >>> other.run() is other.layer
    True
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from widthsearch.errors import TraceError
from widthsearch.torch_internals import REGISTERED, buffers_of, parameters_of

_PLAIN = (bool, int, float, complex, str, bytes, type, ModuleType, type(None))


class Closures:
    """The functions among a tree's attributes that hold modules or tensors of the tree.

    Args:
        model: The tree.

    Attributes:
        memo: For the id of each such function, an empty one that replaces it in a copy.

    Raises:
        TraceError: An attribute holds a module of the tree in a way that no copy can have.
    """

    def __init__(self, model: nn.Module) -> None:
        held = {id(module): module for module in model.modules()}
        for module in model.modules():
            for tensor in (*parameters_of(module).values(), *buffers_of(module).values()):
                if tensor is not None:
                    held[id(tensor)] = tensor  # type: ignore[assignment]
        self._tree = frozenset(held)
        self._found: dict[int, FunctionType] = {}
        count = -1
        while count < len(self._found):  # again, for functions that hold functions in a circle
            count = len(self._found)
            self._known: dict[int, bool] = {}
            for layer, module in model.named_modules():
                for name, value in vars(module).items():
                    if name not in REGISTERED and not isinstance(value, _PLAIN):
                        self._place = f"{name!r} of module {layer or '(the model itself)'!r}"
                        self._reaches(value)
        self.memo = {key: self._empty(function) for key, function in self._found.items()}

    def fill(self, memo: dict[int, Any]) -> None:
        """Give the functions their content, copied with the memo of the tree's copy."""
        for key, function in self._found.items():
            new = self.memo[key]
            for cell, own in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
                if own is not cell:
                    own.cell_contents = copy.deepcopy(cell.cell_contents, memo)
            if self._reaches(function.__defaults__):
                new.__defaults__ = copy.deepcopy(function.__defaults__, memo)
            if self._reaches(function.__kwdefaults__):
                new.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)

    def _empty(self, function: FunctionType) -> FunctionType:
        cells = tuple(
            CellType() if self._reaches(_content(cell)) else cell
            for cell in function.__closure__ or ()
        )
        new = FunctionType(
            function.__code__, function.__globals__, function.__name__, closure=cells
        )
        new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        new.__qualname__, new.__dict__ = function.__qualname__, dict(function.__dict__)
        return new

    def _reaches(self, value: Any) -> bool:
        """Whether a value holds a module or a tensor of the tree."""
        if id(value) in self._tree or id(value) in self._found:
            return True
        if isinstance(value, (*_PLAIN, Tensor)):
            return False
        if id(value) not in self._known:
            self._known[id(value)] = False
            held = [self._reaches(part) for part in _parts(value)]  # each, to find all functions
            self._known[id(value)] = found = any(held)
            if isinstance(value, FunctionType):
                self._refuse(value, self._globals(value), "a global name")
                if found:
                    self._found[id(value)] = value
            elif isinstance(value, weakref.ref):
                self._refuse(value, found, "a weak reference")
            elif hasattr(value, "__wrapped__"):  # a cache around a function
                self._refuse(value, found, f"a {type(value).__name__}")
        return self._known[id(value)]

    def _globals(self, function: FunctionType) -> bool:
        names = function.__code__.co_names
        return any(id(function.__globals__.get(name)) in self._tree for name in names)

    def _refuse(self, value: Any, holds: bool, how: str) -> None:
        if holds:
            raise TraceError(
                f"copies of a model must not run its own modules, but attribute {self._place} "
                f"holds one by {how}: give it the module as an argument, or close over `self`"
            )


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that was never set
        return None


def _parts(value: Any) -> Iterator[Any]:
    """What a value holds."""
    if isinstance(value, FunctionType):
        yield from map(_content, value.__closure__ or ())
        yield value.__defaults__
        yield value.__kwdefaults__
    elif isinstance(value, MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, weakref.ref):
        yield value() if isinstance(value(), nn.Module) else None  # torch keeps those of tensors
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    else:
        yield getattr(value, "__wrapped__", None)
        yield from (getattr(value, "__dict__", None) or {}).values()
