"""Spaces by reference: a torchvision classifier, or a function that returns a space."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from widthsearch.errors import SpaceError, WidthsearchError, did_you_mean
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.references import load_function


def load_space(
    reference: str, input_shape: Sequence[int] | None = None, classes: int | None = None
) -> SearchSpace:
    """The space behind a reference, traced once per process.

    Args:
        reference: ``torchvision:NAME``, ``package.module:function`` or ``path/to/file.py:function``
            (a function without required arguments that returns a :class:`SearchSpace`).
        input_shape: One sample's shape; only for ``torchvision:NAME``, by default (3, 224, 224).
        classes: The number of classes of a ``torchvision:NAME``, by default 1,000 as on ImageNet;
            other references set their own.

    Raises:
        SpaceError: The reference cannot be resolved; the message is one line.
    """
    prefix, _, name = reference.partition(":")
    if prefix == "torchvision":
        return _torchvision(name, tuple(input_shape or (3, 224, 224)), classes or 1000)
    if not name and prefix in _classifiers():
        raise SpaceError(
            f"{reference!r} must be `package.module:function` or `path/to/file.py:function`; did "
            f"you mean 'torchvision:{prefix}'?"
        )
    if input_shape is not None:
        raise SpaceError(
            f"an input shape goes with `torchvision:NAME` alone; {reference!r} sets its own"
        )
    return _from_function(reference, load_function(reference))


@functools.cache
def _from_function(reference: str, function: Callable[[], Any]) -> SearchSpace:
    required = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise SpaceError(f"{reference!r} must need no arguments, but needs {', '.join(required)}")
    try:
        space = function()
    except WidthsearchError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise SpaceError(f"{reference!r} failed: {type(error).__name__}: {text}") from error
    if not isinstance(space, SearchSpace):
        raise SpaceError(
            f"{reference!r} must return a SearchSpace, but returned {type(space).__name__}; "
            "wrap a model with SearchSpace.from_model(model, input_shape)"
        )
    return space


def _classifiers() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


@functools.cache
def _torchvision(name: str, input_shape: tuple[int, ...], classes: int) -> SearchSpace:
    import torchvision

    known = _classifiers()
    if name not in known:
        hint = did_you_mean(name, known, f"it has {', '.join(known[:5])}, …")
        raise SpaceError(f"torchvision has no classification model {name!r}; {hint}")
    options: dict[str, Any] = {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # else they warn
    make_model = functools.partial(torchvision.models.get_model, name, weights=None, **options)
    return SearchSpace.from_model(make_model, input_shape, name=f"torchvision:{name}")
