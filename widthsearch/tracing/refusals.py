"""Models that cannot be traced, and the error of a model that fails on its own input."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from widthsearch.errors import TraceError
from widthsearch.modules.tree import clone, tensors_of
from widthsearch.torch_internals import forward_pre_hooks_of, parameters_of, pruned_tensor
from widthsearch.tracing.inputs import call, sample


def forward_error(model: nn.Module, inputs: Any) -> Exception | None:
    """The error of the model's own forward pass on zeros, if it has one and is on the CPU."""
    tensors = {id(tensor): tensor for *_, tensor in tensors_of(model)}
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return None
    for *_, tensor in tensors_of(model):
        if not isinstance(tensor, nn.Parameter):  # a run may write to it
            tensors[id(tensor)] = tensor.detach().clone()
    with torch.no_grad(), torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(clone(model, tensors).eval(), sample(inputs, 1, "cpu"))
        except Exception as error:  # noqa: BLE001  forward may raise any error
            return error
    return None


def refuse_model(model: nn.Module) -> None:
    """Refuse modules whose copies would not be what a user's class makes at other widths.

    Raises:
        TraceError: Names the module and the way out.
    """
    for layer, module in model.named_modules():
        name = f"module {layer or '(the model itself)'!r} ({type(module).__name__})"
        if any(p is not None and is_lazy(p) for p in parameters_of(module).values()):
            raise TraceError(
                f"a model's tensors must have sizes, but {name} has none before its first run: run "
                "the model once on a sample where it is made"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"a model's modules must be Python code, but {name} is compiled by torch.jit: give "
                "the module that it was compiled from"
            )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise TraceError(
                f"a model must not be spread over devices yet, but {name} is: give its `.module`, "
                "and wrap the network that is built"
            )
        for hook in forward_pre_hooks_of(module):
            if (tensor := pruned_tensor(hook)) is not None:
                raise TraceError(
                    f"a model must be without the masks of torch.nn.utils.prune, whose sizes are "
                    f"fixed, but {name} has one on {tensor!r}: call torch.nn.utils.prune.remove("
                    f"module, {tensor!r}) where the model is made"
                )
