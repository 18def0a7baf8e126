"""Channels: where they lie, and what a gate on each would feel."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from strategies import MODELS, space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels import find_channels, gate_gradients, unit_sums


def test_channels_of_a_concatenation_lie_one_after_the_other() -> None:
    """The second part starts where the first ends, at any widths."""
    space = space_of("Concatenated")
    channels = find_channels(space, space.widths({"stem": 6, "grow": 3}))
    assert channels.units == (6, 3, 16)
    for key, dim in (("last.weight", 1), ("bn.weight", 0), ("bn.running_var", 0)):
        assert channels.axis[key, dim].tolist() == [0] * 6 + [1] * 3
        assert channels.unit[key, dim].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_channels_of_a_flatten_are_blocks() -> None:
    """(N, C, 4, 4) flattens to 16 consecutive elements a channel."""
    space = space_of("Plain")
    channels = find_channels(space, space.base)
    assert channels.unit["fc.weight", 1].tolist() == [i // 16 for i in range(256)]


def test_a_unit_of_grouped_channels_is_one_of_each_group() -> None:
    """Four groups of four: channel 0 goes with 4, 8 and 12."""
    space = space_of("Grouped")
    channels = find_channels(space, space.base)
    assert channels.units == (4, 6, 8)
    assert channels.unit["stem.weight", 0].tolist() == [0, 1, 2, 3] * 4
    assert channels.unit["grouped.weight", 0].tolist() == [0, 1, 2, 3, 4, 5] * 4
    assert channels.unit["grouped.weight", 1].tolist() == [0, 1, 2, 3]
    assert channels.unit["last.weight", 1].tolist() == [0, 1, 2, 3, 4, 5] * 4


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_position_has_its_owner(name: str) -> None:
    """Nothing is unknown, and every unit has as many positions as the shape says."""
    space = space_of(name)
    channels = find_channels(space, space.base)
    assert channels.unknown == frozenset()
    assert all((axes >= 0).all() for axes in channels.axis.values())


# Per model and reading layer: per axis, its slice of the layer's input channels.
GATES: Mapping[str, Mapping[str, Mapping[int, tuple[int, int, int]]]] = {
    "Plain": {"conv2": {0: (0, 8, 1)}, "fc": {1: (0, 256, 16)}},
    "Residual": {"conv1": {0: (0, 16, 1)}, "conv2": {1: (0, 32, 1)}, "fc": {0: (0, 16, 1)}},
    "Concatenated": {
        "grow": {0: (0, 8, 1)},
        "last": {0: (0, 8, 1), 1: (8, 12, 1)},
        "fc": {2: (0, 16, 1)},
    },
    "Depthwise": {
        "expand": {0: (0, 8, 1)},
        "depthwise": {1: (0, 32, 1)},
        "project": {1: (0, 32, 1)},
        "fc": {0: (0, 8, 1)},
    },
    "Grouped": {"grouped": {0: (0, 16, 1)}, "last": {1: (0, 24, 1)}, "fc": {2: (0, 8, 1)}},
}


@pytest.mark.parametrize("name", sorted(GATES))
def test_saliency_equals_an_explicit_gate(name: str) -> None:
    """The gate's gradient from weights alone is that of a gate multiplied into the network."""
    space = space_of(name)
    model = space.build(space.base, seed=1).double()
    gates = [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in space.base.vector]
    modules = dict(model.named_modules())

    def gated(where: Mapping[int, tuple[int, int, int]]) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            factor = torch.ones(args[0].shape[1], dtype=torch.float64)
            for axis, (start, stop, repeat) in where.items():
                outside = torch.ones(len(factor) - stop, dtype=torch.float64)
                inside = gates[axis].repeat_interleave(repeat)
                factor = factor * torch.cat([torch.ones(start).double(), inside, outside])
            return (args[0] * factor.view(1, -1, *[1] * (args[0].dim() - 2)),)

        return hook

    for layer, where in GATES[name].items():
        modules[layer].register_forward_pre_hook(gated(where))
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(x), torch.arange(16) % 10).backward()
    channels = find_channels(space, space.base)
    for i, (gate, gradient) in enumerate(zip(gates, gate_gradients(channels, model), strict=True)):
        assert gate.grad is not None
        expected = unit_sums(channels, *space.trace.axes[i].maker, gate.grad)[i]
        assert torch.allclose(expected, gradient.double(), rtol=1e-5, atol=1e-8)
        assert bool(gate.grad.any())
