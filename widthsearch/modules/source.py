"""The source code of a model: a digest of its classes, and the line that is running."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import linecache
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

FOREIGN = tuple(
    f"{Path(spec.origin).parent}{os.sep}"
    for name in ("torch", "widthsearch")
    if (spec := importlib.util.find_spec(name)) and spec.origin
)
"""Folders whose lines are no part of a model's code."""


def is_foreign(frame: FrameType) -> bool:
    """Whether a frame runs torch's code, this package's, or code without a file."""
    return frame.f_code.co_filename.startswith(("<", *FOREIGN))


def running(within: CodeType | None = None) -> Iterator[FrameType]:
    """The frames that are running, the innermost first, up to that of some code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not within:
        yield frame
        frame = frame.f_back


def line_of(frame: FrameType | None) -> str:
    """``file:line`` and the text of the line that a frame runs."""
    if frame is None:
        return "torch's own code"
    filename = frame.f_code.co_filename
    text = linecache.getline(filename, frame.f_lineno).strip()
    short = "/".join(filename.replace("\\", "/").split("/")[-2:])
    return f"{short}:{frame.f_lineno} `{text}`"


def model_line(within: CodeType | None = None) -> str:
    """:func:`line_of` the innermost frame of the model's code, up to that of some code."""
    return line_of(next((frame for frame in running(within) if not is_foreign(frame)), None))


def assignment_of(cls: type, name: str) -> str:
    """``file:line`` of the first assignment to an attribute in a class or its bases."""
    for base in cls.__mro__:
        if not _is_own(base):
            continue
        try:
            lines, start = inspect.getsourcelines(base)
        except (OSError, TypeError):  # made in a shell, by exec, or without a file
            continue
        for number, line in enumerate(lines, start):
            if re.search(rf"\bself\.{re.escape(name)}\b.*[^=]=[^=]", line):
                return f"{Path(inspect.getfile(base)).name}:{number}"
    return cls.__module__


def names_in_forward(module: nn.Module) -> frozenset[str]:
    """Every name that a module's ``forward``, or a method that it names, looks up."""
    return _names_in_forward(type(module))  # type: ignore[arg-type]


@functools.cache
def _names_in_forward(cls: Any) -> frozenset[str]:
    names: set[str] = set()
    rest = ["forward"]
    while rest:
        held = inspect.getattr_static(cls, rest.pop(), None)
        codes = [function.__code__ for function in _functions(held)]
        while codes:
            code = codes.pop()
            rest += [name for name in code.co_names if name not in names]
            names.update(code.co_names)
            codes += [value for value in code.co_consts if isinstance(value, CodeType)]
    return frozenset(names)


def _functions(held: Any) -> Iterator[FunctionType]:
    """A function, and those that its decorators hold in closures."""
    rest, seen = [held], set[int]()
    while rest:
        value = rest.pop()
        value = getattr(value, "__func__", value)  # of a static or a class method
        if isinstance(value, FunctionType) and id(value) not in seen:
            seen.add(id(value))
            yield value
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # it is empty
                    rest.append(cell.cell_contents)


def source_digest(model: nn.Module) -> str | None:
    """A digest of the source of the classes of a model's modules; None if one has no source.

    It does not depend on comments, layout or tensor values, and does not cover functions outside
    the classes.
    """
    described = [
        (name, [_class_digest(c) for c in type(module).__mro__ if _is_own(c)])
        for name, module in model.named_modules()
    ]
    if any(None in digests for _, digests in described):
        return None
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _is_own(cls: type) -> bool:
    """Whether a class is neither Python's nor torch's."""
    return cls.__module__.partition(".")[0] not in ("builtins", "torch", "typing", "abc")


@functools.cache
def _class_digest(cls: type) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # defined in a shell, by exec, or without a file
        return None
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
