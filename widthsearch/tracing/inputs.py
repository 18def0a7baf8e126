"""Descriptions of a model's inputs, and batches of zeros made from them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Sequence[Any] | Mapping[str, Any] | Tensor
"""One sample of a model's inputs, without the batch: a shape, e.g. ``(3, 224, 224)``; a tensor
where the dtype matters, e.g. ``torch.zeros(16, dtype=torch.long)`` for token ids; a sequence of
those, one per positional argument; or a mapping, by keyword argument."""


def as_inputs(inputs: Inputs) -> Any:
    """The same in tuples, dictionaries and meta tensors: comparable, and small to pickle."""
    if isinstance(inputs, Tensor):
        return inputs.detach().to("meta")
    if isinstance(inputs, Mapping):
        return {str(name): as_inputs(value) for name, value in inputs.items()}
    if all(hasattr(value, "__index__") and not isinstance(value, Tensor) for value in inputs):
        return tuple(map(operator.index, inputs))
    return tuple(map(as_inputs, inputs))


def inputs_to_json(inputs: Any) -> Any:
    """Inputs in the form of :func:`as_inputs` as JSON values."""
    if isinstance(inputs, Tensor):
        return {"tensor": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, Mapping):
        return {"mapping": {name: inputs_to_json(value) for name, value in inputs.items()}}
    return inputs if isinstance(inputs, int) else [inputs_to_json(value) for value in inputs]


def inputs_from_json(content: Any) -> Any:
    """The inputs behind :func:`inputs_to_json`'s values."""
    if isinstance(content, Mapping) and "tensor" in content:
        dtype = getattr(torch, content["dtype"])
        return torch.empty(content["tensor"], dtype=dtype, device="meta")
    if isinstance(content, Mapping):
        return {name: inputs_from_json(value) for name, value in content["mapping"].items()}
    return content if isinstance(content, int) else tuple(map(inputs_from_json, content))


def image_shape(inputs: Any) -> tuple[int, ...] | None:
    """The shape of a model's one floating-point input; None for other types or several inputs.

    Args:
        inputs: In the form of :func:`as_inputs`.

    Example:
        >>> image_shape((3, 32, 32)), image_shape(as_inputs([torch.zeros(3, 32, 32)]))
        ((3, 32, 32), (3, 32, 32))
        >>> image_shape({"ids": torch.zeros(16, dtype=torch.long)}) is None
        True
    """
    if isinstance(inputs, tuple) and len(inputs) == 1 and not isinstance(inputs[0], int):
        return image_shape(inputs[0])
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return tuple(inputs.shape)
    shaped = isinstance(inputs, tuple) and all(isinstance(size, int) for size in inputs)
    return inputs if shaped else None


def sample(inputs: Any, batch: int, device: str | torch.device = "meta") -> Any:
    """A batch of zeros: a tensor, a tuple of positional or a dictionary of keyword arguments."""
    if isinstance(inputs, Tensor):
        return torch.zeros((batch, *inputs.shape), dtype=inputs.dtype, device=device)
    if isinstance(inputs, Mapping):
        return {name: sample(value, batch, device) for name, value in inputs.items()}
    if all(isinstance(value, int) for value in inputs):
        return torch.zeros((batch, *inputs), device=device)
    return tuple(sample(value, batch, device) for value in inputs)


def call(model: Callable[..., Any], x: Any) -> Any:
    """Call ``model`` with a batch from :func:`sample`."""
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, Mapping) else model(x)
