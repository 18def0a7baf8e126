"""Names for the calls of torch's functions in a forward pass, the same in every pass of a model.

Notation: a *site* is ``(layer, name, n)``: the n-th call of the function ``name`` in ``layer``
since the forward pass began. An *operand* is one tensor among a call's arguments, by its place in
``tree_leaves((args, kwargs))``. The dependency graph names the operands of a site whose positions
belong to channels; masks and gates change those operands in passes of real networks.

Example: in ``nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))`` the second layer calls
``F.linear(x, weight, bias)`` at the site ``("1", "linear", 0)``. Its weight is operand 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from widthsearch.torch_internals import tree_map
from widthsearch.tracing.interpreter import track_layers

Site = tuple[str, str, int]


@dataclass(frozen=True, eq=False)
class Operand:
    """An operand whose positions belong to groups of channels.

    Attributes:
        index: Its place among the arguments of the call.
        axis: The axis of each position, broadcastable to the operand; -1 for none.
        group: The same for the group within the axis.

    Example:
        >>> bias = Operand(2, axis=np.array([0, 0, -1]), group=np.array([1, 0, 0]))
        >>> bias.select([torch.tensor([0.1, 0.2])], otherwise=torch.tensor([1.0])).tolist()
        [0.20000000298023224, 0.10000000149011612, 1.0]
    """

    index: int
    axis: NDArray[np.int64]
    group: NDArray[np.int64]

    def select(self, of_groups: Sequence[Tensor], otherwise: Tensor) -> Tensor:
        """A value for each position: that of its group, or ``otherwise`` where it has none.

        Args:
            of_groups: Per axis, one value for each group, shape (groups,).
            otherwise: The value of positions without a group, shape (1,).
        """
        starts = np.cumsum([1, *map(len, of_groups)])
        place = np.where(self.axis < 0, 0, starts[self.axis] + self.group)
        return torch.cat([otherwise, *of_groups])[torch.from_numpy(place).to(otherwise.device)]


class CallSites(TorchFunctionMode):
    """Passes each call of a torch function in a model's forward passes to :meth:`call`.

    Args:
        model: The model.

    Example:
        >>> class Printed(CallSites):
        ...     def call(self, site, func, args, kwargs):
        ...         print(site)
        ...         return func(*args, **kwargs)
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> with Printed(model):
        ...     out = model(torch.zeros(1, 4))
        ('0', 'linear', 0)
        ('1', 'linear', 0)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._layers: list[str] = []
        self._counts: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Self:
        begin = self._model.register_forward_pre_hook(lambda *_: self._counts.clear())
        self._hooks = [begin, *track_layers(self._model, self._layers)]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if not self._layers or name == "__get__":  # attributes of tensors, such as their shape
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if not args:  # operands have the same places whether they are named or not
            args = tuple(kwargs.pop(name) for name in ("input", "query") if name in kwargs)
        where = self._layers[-1], name
        self._counts[where] += 1
        return self.call((*where, self._counts[where] - 1), func, args, kwargs)

    def call(self, site: Site, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one call."""
        raise NotImplementedError


def with_operands(
    changes: Mapping[int, Callable[[Any], Any]], args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """The arguments of a call with some of its operands changed."""
    places = count()

    def change(operand: Any) -> Any:
        found = changes.get(next(places))
        return operand if found is None else found(operand)

    changed: tuple[Any, Any] = tree_map(change, (args, kwargs))
    return changed
