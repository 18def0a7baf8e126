"""Models of layers and a function, and their spaces once they are verified to be exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from strategies import random_widths
from torch import nn

from widthsearch.space.search_space import SearchSpace
from widthsearch.space.verification import run_and_count

IMAGE = (3, 8, 8)
TOKENS = torch.zeros(7, dtype=torch.long)


class Model(nn.Module):
    """Named layers and a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function of the model and its inputs."""
        return self.function(self, *args, **kwargs)


def exact_space(make: Any, inputs: Any, device: str = "meta") -> SearchSpace:
    """The model's space, after five networks cost what it predicts and run on real tensors."""
    space = SearchSpace.from_model(make, inputs, step=1)
    for widths in random_widths(space, seed=1):
        # Of width 1, torch's einsum makes a product without a kernel, which is not counted.
        wide = [max(w, 2 * axis.step) for w, axis in zip(widths, space.axes, strict=True)]
        counted = run_and_count(space.build(wide, device=device, seed=0), space.input_shape, device)
        assert counted == space.cost(wide)
        if device == "meta":
            run_and_count(space.build(wide, seed=0), space.input_shape, "cpu")
    return space


def bases(space: SearchSpace) -> dict[str, tuple[int, int]]:
    """Each axis's base and channels per group."""
    return {axis.name: (axis.base, axis.divisor) for axis in space.trace.axes}


def reasons(space: SearchSpace) -> dict[tuple[str, int], str]:
    """The reasons of pinned widths, without those of inputs and outputs."""
    return {
        (p.name, p.size): p.reason
        for p in space.pinned
        if p.reason not in ("input of the model", "output of the model")
    }
