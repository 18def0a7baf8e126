"""A digest of the source code of a model's classes."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap

from torch import nn


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
