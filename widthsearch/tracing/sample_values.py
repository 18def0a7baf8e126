"""Values of the sample beside a run on meta tensors, for code that branches on them.

A tensor is *known* if it was computed from the model's inputs and constants alone: no weight and no
width has a part in it. Its operations run on the sample's values too, on the CPU, so that
``mask.all()`` has an answer. The answer is the same at every width. Tensors that depend on a
weight or a width have no values, and code that reads them fails as on any meta tensor.

Example: a decoder's ``if attention_mask.all():`` takes the branch of the sample's mask, and
``if hidden.norm() > 1:`` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from widthsearch.torch_internals import (
    TorchDispatchMode,
    schema_of,
    storage_of,
    tree_leaves,
    tree_map,
    tree_map_only,
    without_modes,
)

aten = torch.ops.aten

_CONSTANTS = {torch.tensor: 0, torch.as_tensor: 0, torch.asarray: 0, torch.Tensor.new_tensor: 1}
"""Functions that make tensors from numbers, and which argument the numbers are."""
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_READERS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
_NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put)
_VALUE = "_sample_value"


def set_value(tensor: Tensor, value: Tensor | Callable[[], Tensor] | None) -> Tensor:
    """Make a meta tensor known: by its values, or by a function that returns them."""
    setattr(tensor, _VALUE, value)
    return tensor


def unknown(tensor: Tensor) -> Tensor:
    """Forget the values of a tensor that stands in for one with other content."""
    return set_value(tensor, None)


def tensors_among(values: Any) -> Iterator[Tensor]:
    """The tensors among some arguments, also within lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_among(value)


def is_symbolic(value: Any) -> bool:
    """Whether a number, or one within a list, depends on a width."""
    if isinstance(value, torch.SymInt):
        return value.node.maybe_as_int() is None
    if isinstance(value, list | tuple):
        return any(map(is_symbolic, value))
    return isinstance(value, torch.SymFloat | torch.SymBool)


class SampleValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the operations of known tensors on their values too. It is the outermost mode.

    Attributes:
        random: Whether random numbers are known too: in training mode, code may skip a layer at
            random. The context keeps the CPU's generator.

    Example:
        >>> weight = torch.empty(3, device="meta")
        >>> with SampleValues(), torch.device("meta"):
        ...     mask = torch.tensor([True, True]).all()  # a meta tensor whose value is known
        ...     bool(mask)
        True
    """

    def __init__(self, random: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random = random
        self._constants = _Constants(self)
        self._generator = torch.random.fork_rng(devices=())
        self._spoiled: dict[int, Tensor] = {}  # by storage: values that a weight was written into

    def __enter__(self) -> SampleValues:
        self._generator.__enter__()
        torch.default_generator.manual_seed(0)
        super().__enter__()  # type: ignore[no-untyped-call]
        self._constants.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._constants.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._generator.__exit__(*error)

    def value(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, if it is known."""
        if tensor.device.type != "meta":
            return tensor
        value = getattr(tensor, _VALUE, None)
        if value is not None and not isinstance(value, Tensor):
            value = value()
            set_value(tensor, value)
        if value is not None and storage_of(value) in self._spoiled:
            return None
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:  # code may name its device: `x.to(device)`
            kwargs = {**kwargs, "device": torch.device("meta")}
        tensors = list(tensors_among((*args, *kwargs.values())))
        if any(t.device.type != "meta" for t in tensors):  # plain attributes of modules
            if all(t.device.type != "meta" for t in tensors) and "device" not in kwargs:
                return func(*args, **kwargs)
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        if func.overloadpacket in _INDEXED:
            args = (args[0], self._positions(args[1]), *args[2:])
        tensors = list(tensors_among((*args, *kwargs.values())))
        if not self._known(func, tensors, args, kwargs):
            self._spoil(func, args)
            return func(*args, **kwargs)
        try:
            values = self._run(func, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):  # the run on meta says why
            self._spoil(func, args)
            return func(*args, **kwargs)
        if not _NEEDS_VALUES.isdisjoint(func.tags):
            return tree_map(_on_meta, values)
        out = func(*args, **kwargs)
        for meta, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
            if isinstance(meta, Tensor) and meta.device.type == "meta":
                set_value(meta, value)
        return out

    def _positions(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Masks as the positions that they choose: these set the sizes of what is indexed."""
        out: list[Tensor | None] = []
        for index in indices:
            mask = index is not None and index.dtype in (torch.bool, torch.uint8)
            value = self.value(index) if mask and index is not None else None
            if value is None or value.device == index.device:  # type: ignore[union-attr]
                out.append(index)
            else:
                out.extend(map(_on_meta, value.nonzero(as_tuple=True)))
        return out

    def _known(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
        return (
            all(self.value(t) is not None for t in tensors)
            and (self.random or torch.Tag.nondeterministic_seeded not in func.tags)
            and not is_symbolic((*args, *kwargs.values()))
        )

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.value(value)
            return int(value) if isinstance(value, torch.SymInt) else value

        args, kwargs = tree_map(real, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)

    def _spoil(self, func: Any, args: Any) -> None:
        """Forget the values of tensors that an operation writes unknown content into."""
        for argument, given in zip(schema_of(func).arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_among((given,)):
                    if tensor.device.type == "meta" and (value := self.value(tensor)) is not None:
                        self._spoiled[storage_of(value)] = value


class _Constants(TorchFunctionMode):
    """Keeps the values of constants, and answers calls that bypass the dispatcher."""

    def __init__(self, values: SampleValues) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READERS and (value := self._values.value(args[0])) is not None:
            return func(value, *args[1:], **kwargs)
        if (
            func is F.group_norm
            and isinstance(args[1], torch.SymInt)
            and args[0].shape[1] == args[1]
        ):
            return _by_channel(*args, **kwargs)  # torch takes no symbolic number of groups
        if func in _INDEXING:
            args = (args[0], self._index(args[1]), *args[2:])
        data = args[_CONSTANTS[func]] if func in _CONSTANTS else None
        if isinstance(data, torch.SymInt | torch.SymFloat):
            number = int(data) if isinstance(data, torch.SymInt) else float(data)
            return unknown(func(*(number if a is data else a for a in args), **kwargs))
        out = func(*args, **kwargs)
        if data is not None and not isinstance(data, Tensor) and out.device.type == "meta":
            with without_modes():
                set_value(out, func(*args, **{**kwargs, "device": "cpu"}))
        return out

    def _index(self, index: Any) -> Any:
        """An index with its lists as known tensors."""
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        numbers = isinstance(index, list) and all(isinstance(i, int) for i in index)
        return self.__torch_function__(torch.tensor, (), (index,)) if numbers else index


def _by_channel(
    x: Any, _groups: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """A group norm with a group for each channel."""
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return value
    return set_value(value.to("meta"), value)
