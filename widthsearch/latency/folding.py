"""Folding of BatchNorms into convolutions, as inference engines do.

Example: in ``bn(conv(x))`` the two are one affine map of the convolution's window, so ``conv`` gets
the weights of that map and ``bn`` becomes the identity. In ``bn(conv(x)) + conv(x)`` nothing folds,
because the second term needs the convolution as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from widthsearch.torch_internals import BatchNormBase, tree_leaves
from widthsearch.tracing.inputs import call

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def fold_batchnorm(model: nn.Module, x: Any) -> None:
    """Fold BatchNorms into the convolutions before them, in place.

    One run shows which: a BatchNorm folds if its input is the output of a convolution, no other
    operation uses that output, and both modules run once. The model's outputs stay the same up to
    rounding.

    Args:
        model: The model, in eval mode.
        x: An input: a tensor, a tuple of positional or a dictionary of keyword arguments.
    """
    assert not model.training
    uses = _UseCounter()
    convolved: dict[int, tuple[Tensor, nn.Module]] = {}
    pairs: list[tuple[Any, Any, Tensor]] = []
    calls: Counter[nn.Module] = Counter()

    def after_convolution(module: nn.Module, _: Any, output: Tensor) -> None:
        calls[module] += 1
        convolved[id(output)] = output, module  # kept alive, so that no other tensor gets its id
        uses.count[id(output)] = 0

    def after_batchnorm(module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        calls[module] += 1
        if id(inputs[0]) in convolved:
            pairs.append((convolved[id(inputs[0])][1], module, inputs[0]))

    hooks = []
    for module in model.modules():
        if type(module) in _CONVOLUTIONS:  # a parametrised convolution has a subclass, so no fold
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, BatchNormBase) and module.running_mean is not None:
            hooks.append(module.register_forward_hook(after_batchnorm))
    with torch.no_grad(), uses:
        uses.add(call(model, x))  # an output of the model is in use, too
    for hook in hooks:
        hook.remove()
    for convolution, batchnorm, output in pairs:
        if uses.count[id(output)] == calls[convolution] == calls[batchnorm] == 1:
            folded = fuse_conv_bn_eval(convolution, batchnorm, isinstance(convolution, _TRANSPOSED))
            convolution.weight, convolution.bias = folded.weight, folded.bias
            batchnorm.forward = _identity


def _identity(x: Tensor) -> Tensor:
    return x


class _UseCounter(TorchFunctionMode):
    """Counts by tensor id how many operations use each tensor to compute other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # reading a size is none
            self.add((args, kwargs))
        return result

    def add(self, tree: Any) -> None:
        """Count one use of each tensor in a tree."""
        self.count.update(id(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
