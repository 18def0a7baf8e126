"""Explicit gates in a network, whose gradients the methods compute without gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from exact_space import Model
from strategies import graph_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.space.search_space import SearchSpace


def tokens() -> nn.Module:
    """A linear layer on 16 tokens of each image, whose rows are split into windows."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x).flatten(2).transpose(1, 2)  # (N, 16, 8)
        windows = x.reshape(len(x) * 4, 4, -1)
        return m.fc(F.gelu(m.grow(windows)).mean(1).view(len(x), 4, -1).mean(1))

    embed = nn.Conv2d(3, 8, 2, 2)
    return Model(forward, embed=embed, grow=nn.Linear(8, 16), fc=nn.Linear(16, 10))


def gated(space: SearchSpace, model: nn.Module, images: int | None = None) -> list[Tensor]:
    """Multiply each channel group by a gate in the inputs of its consumers; returns the gates.

    Args:
        space: The space.
        model: A network of the space at its base, of convolutions and linear layers.
        images: The number of images, for gates of each image.

    Returns:
        Per axis, ones of shape (groups,) or (images, groups), float64, that require gradients.
    """
    graph = graph_of(space)
    lead = () if images is None else (images,)
    gates = [torch.ones(*lead, n, dtype=torch.float64, requires_grad=True) for n in graph.groups]

    def gate_input(module: nn.Module, where: tuple[str, int], groups: int, dim: int) -> None:
        axes, numbers = graph.axis[where].tolist(), graph.group[where].tolist()
        columns: Sequence[Tensor] = [
            gates[a][..., i] if a >= 0 else torch.ones(*lead, dtype=torch.float64)
            for a, i in zip(axes * groups, numbers * groups, strict=True)
        ]

        def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            factor = torch.stack(list(columns), -1)  # (C,) or (N, C)
            shape = [1] * x.dim()
            shape[0], shape[dim] = (1, *factor.shape)[-2:]
            return (x * factor.view(shape),)

        module.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups == module.in_channels > 1
            where = (key, 0 if depthwise else 1)
            if where in graph.axis:
                gate_input(module, where, 1 if depthwise else module.groups, 1)
        elif isinstance(module, nn.Linear) and (key, 1) in graph.axis:
            gate_input(module, (key, 1), 1, -1)
    return gates
