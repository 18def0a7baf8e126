"""Descriptions of a model's inputs, and batches made from them."""

from __future__ import annotations

import base64
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from widthsearch.tracing.sample_values import set_value

Inputs = Sequence[Any] | Mapping[str, Any] | Tensor
"""One sample of a model's inputs, without the batch: a shape, e.g. ``(3, 224, 224)``; a tensor
where the dtype or the values matter, e.g. ``torch.arange(16)`` for token ids; a sequence of those,
one per positional argument; or a mapping, by keyword argument. A model that branches on values of
its inputs is traced with those of the tensor; a shape stands for zeros."""


def as_inputs(inputs: Inputs) -> Any:
    """The same in tuples, dictionaries, and tensors on the CPU (or on meta, without values)."""
    if isinstance(inputs, Tensor):
        return inputs.detach() if inputs.device.type == "meta" else inputs.detach().cpu().clone()
    if isinstance(inputs, Mapping):
        return {str(name): as_inputs(value) for name, value in inputs.items()}
    if all(hasattr(value, "__index__") and not isinstance(value, Tensor) for value in inputs):
        return tuple(map(operator.index, inputs))
    return tuple(map(as_inputs, inputs))


def inputs_to_json(inputs: Any) -> Any:
    """Inputs in the form of :func:`as_inputs` as JSON values."""
    if isinstance(inputs, Tensor):
        content = {"tensor": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
        if inputs.device.type != "meta" and inputs.any():
            values = inputs.contiguous().flatten().view(torch.uint8).numpy()
            content["values"] = base64.b64encode(values.tobytes()).decode()
        return content
    if isinstance(inputs, Mapping):
        return {"mapping": {name: inputs_to_json(value) for name, value in inputs.items()}}
    return inputs if isinstance(inputs, int) else [inputs_to_json(value) for value in inputs]


def inputs_from_json(content: Any) -> Any:
    """The inputs behind :func:`inputs_to_json`'s values."""
    if isinstance(content, Mapping) and "tensor" in content:
        dtype = getattr(torch, content["dtype"])
        if "values" not in content:
            return torch.zeros(content["tensor"], dtype=dtype)
        values = bytearray(base64.b64decode(content["values"]))
        return torch.frombuffer(values, dtype=dtype).view(content["tensor"])
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
    """A batch: a tensor, a tuple of positional or a dictionary of keyword arguments.

    It repeats the values of tensors, and has zeros for shapes. On the meta device it has no values,
    but :class:`~widthsearch.tracing.sample_values.SampleValues` knows them.
    """
    if isinstance(inputs, Tensor):
        if torch.device(device).type != "meta":
            return _repeated(inputs, batch).to(device)
        empty = torch.empty((batch, *inputs.shape), dtype=inputs.dtype, device=device)
        return set_value(empty, partial(_repeated, inputs, batch))
    if isinstance(inputs, Mapping):
        return {name: sample(value, batch, device) for name, value in inputs.items()}
    if all(isinstance(value, int) for value in inputs):
        return sample(torch.empty(inputs, device="meta"), batch, device)
    return tuple(sample(value, batch, device) for value in inputs)


def _repeated(inputs: Tensor, batch: int) -> Tensor:
    shape = (batch, *inputs.shape)
    if inputs.device.type == "meta":
        return torch.zeros(shape, dtype=inputs.dtype)
    return inputs.expand(shape).clone()


def call(model: Callable[..., Any], x: Any) -> Any:
    """Call ``model`` with a batch from :func:`sample`."""
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, Mapping) else model(x)
