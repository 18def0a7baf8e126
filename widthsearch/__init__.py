"""Network pruning as a search over layer widths.

>>> space = widthsearch.SearchSpace.from_model(make_model, input_shape=(3, 32, 32))
>>> net = space.build(space.widths(0.5))

Importing the package imports neither torch nor Ray nor Optuna; each name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widthsearch.cost import Cost as Cost
    from widthsearch.errors import WidthsearchError as WidthsearchError
    from widthsearch.space import SearchSpace as SearchSpace
    from widthsearch.space import load_space as load_space
    from widthsearch.widths import Axis as Axis
    from widthsearch.widths import Widths as Widths

__version__ = "0.1.0"

_WHERE = {
    "Axis": "widths",
    "Cost": "cost",
    "SearchSpace": "space",
    "Widths": "widths",
    "WidthsearchError": "errors",
    "load_space": "space",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'widthsearch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"widthsearch.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
