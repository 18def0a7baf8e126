"""Integers in the arguments of a call: found, and exchanged in a copy.

An integer may be an argument itself, or lie within sequences, mappings, dataclasses and
configuration objects (a ``transformers`` configuration, a namespace).

Example:
    >>> value = {"widths": [16, 32], "bias": True}
    >>> dict(integers(value))
    {(('item', 'widths'), ('item', 0)): 16, (('item', 'widths'), ('item', 1)): 32}
    >>> with_integers(value, {(("item", "widths"), ("item", 1)): 48}), value["widths"]
    ({'widths': [16, 48], 'bias': True}, [16, 32])
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

Path = tuple[tuple[str, Any], ...]
"""The steps to an integer: ``("item", key or index)`` or ``("attr", name)``."""

_WHOLE = (nn.Module, Tensor, type, str, FunctionType, MethodType, ModuleType, functools.partial)
"""What has no integers to exchange."""
_DEPTH = 5


def integers(value: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Every integer within a value, with the steps to it."""
    if type(value) is int:
        yield path, value
    elif isinstance(value, _WHOLE) or len(path) > _DEPTH:
        return
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from integers(item, (*path, ("item", i)))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from integers(item, (*path, ("item", key)))
    elif not callable(value):
        for name, item in _attributes(value):
            yield from integers(item, (*path, ("attr", name)))


def _attributes(value: Any) -> list[tuple[str, Any]]:
    own = getattr(value, "__dict__", {})
    if dataclasses.is_dataclass(value):  # they may have slots
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        own = {**fields, **own}  # and numbers that they compute from their fields
    return list(own.items())


def with_integers(value: Any, numbers: Mapping[Path, int]) -> Any:
    """A copy of a value with other integers at some paths; what holds none of them is shared."""
    if not numbers:
        return value
    if () in numbers:
        return numbers[()]
    within: dict[tuple[str, Any], dict[Path, int]] = {}
    for path, number in numbers.items():
        within.setdefault(path[0], {})[path[1:]] = number
    if isinstance(value, tuple):
        items = [with_integers(v, within.get(("item", i), {})) for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    changed = copy.copy(value)
    for (how, key), inner in within.items():
        if how == "item":
            changed[key] = with_integers(value[key], inner)
        else:  # also in a frozen dataclass
            object.__setattr__(changed, key, with_integers(getattr(value, key), inner))
    return changed


def untouched(value: Any) -> Any:
    """A copy of a value's lists and dictionaries, since a constructor may change those it gets."""
    if type(value) in (list, tuple):
        return type(value)(map(untouched, value))
    if type(value) is dict:
        return {key: untouched(item) for key, item in value.items()}
    return value


@functools.lru_cache(maxsize=4096)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def bound(function: Callable[..., Any], args: Any, kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a call by name, with the defaults of those that are left out."""
    arguments = _signature(function).bind(*args, **kwargs)
    arguments.apply_defaults()
    return arguments


def alike(a: Any, b: Any) -> bool:
    """Whether two arguments are surely equal, so that they lead to the same modules."""
    if a is b:
        return not isinstance(a, nn.Module | Tensor)
    if type(a) is not type(b):
        return False
    if isinstance(a, functools.partial):
        return alike((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return isinstance(a, int | float | str) and a == b
