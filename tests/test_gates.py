"""Gradients of gates on channels equal those of gates that are multiplied into the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_networks import CONVOLUTIONS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.channels.sums import gate_gradients
from widthsearch.space.search_space import SearchSpace


class Chain(nn.Module):
    """Three convolutions whose outputs can be gated."""

    def __init__(self, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.a, self.b = conv(1, 8, 3, padding=1), conv(8, 12, 3, padding=1)
        self.c, self.fc = conv(12, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor, gates: Any = (1, 1, 1)) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        x = F.relu(self.a(x)) * gates[0]
        x = F.relu(self.b(x)) * gates[1]
        return self.fc((F.relu(self.c(x)) * gates[2]).mean((2, 3)))


def check_gates(model: Callable[[], nn.Module], sizes: tuple[int, ...], train: bool) -> None:
    """Compare with gates of ``sizes`` channels that the model takes as its second argument."""
    space = SearchSpace.from_model(model, (1, 8, 8))
    network = space.build(space.base, seed=0).double().train(train)
    x = torch.randn(20, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gates = [torch.ones(1, n, 1, 1, dtype=torch.float64, requires_grad=True) for n in sizes]

    def loss(*gates: Any) -> Tensor:
        return F.cross_entropy(network(x, *gates), torch.arange(20) % 10)

    network(x)  # one step of a spectral norm's power iteration
    state = {k: v.clone() for k, v in network.state_dict().items()}
    expected = torch.autograd.grad(loss(gates), gates)
    network.load_state_dict(state)
    found = gate_gradients(build_dependency_graph(space.model, space.base), network, loss)
    for n, right in zip(sizes, expected, strict=True):
        mine = found[space.base.vector.index(n)]
        assert right.any()
        assert torch.allclose(
            mine, right.flatten(), rtol=1e-5, atol=1e-5 * float(right.abs().max())
        )
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("convolution", sorted(CONVOLUTIONS))
def test_gates_of_computed_weights(convolution: str, train: bool) -> None:
    """The gate's gradient goes through the weight that the convolution reads."""
    check_gates(lambda: Chain(CONVOLUTIONS[convolution]), (8, 12, 16), train)


class Reader(nn.Module):
    """A function of an image and of parameters, behind a convolution."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.a, self.fc, self.function = nn.Conv2d(1, 8, 3), nn.Linear(12, 10), function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor, gates: Any = (1,)) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        x = F.relu(self.a(x)) * gates[0]
        return self.fc(F.relu(self.function(self, x)))


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 3)


READERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Reader(
        lambda m, x: F.linear(x.mean((2, 3)), m.w * m.g), w=_matrix(12, 8), g=_matrix(12, 1)
    ),
    "matmul": lambda: Reader(lambda m, x: x.mean((2, 3)) @ m.w.tanh(), w=_matrix(8, 12)),
    "matmul from the left": lambda: Reader(
        lambda m, x: (m.w.tanh() @ x.flatten(2)).mean(2), w=_matrix(12, 8)
    ),
    "einsum": lambda: Reader(
        lambda m, x: torch.einsum("nchw,oc->no", x, F.softplus(m.w)), w=_matrix(12, 8)
    ),
    "batched": lambda: Reader(
        lambda m, x: torch.bmm(x.flatten(2).transpose(1, 2), m.w.expand(len(x), -1, -1)).mean(1),
        w=_matrix(8, 12),
    ),
    "transposed": lambda: Reader(
        lambda m, x: F.conv_transpose2d(x, m.w * 2).mean((2, 3)), w=_matrix(8, 12, 3, 3)
    ),
    "used twice": lambda: Reader(
        lambda m, x: F.linear(x.mean((2, 3)), m.w) + F.linear(x.amax((2, 3)), m.w), w=_matrix(12, 8)
    ),
    "flattened": lambda: Reader(
        lambda m, x: m.w(x.flatten(1)), w=parametrizations.weight_norm(nn.Linear(8 * 36, 12))
    ),
    "residual": lambda: Reader(
        lambda m, x: m.w((x + m.b(x)).mean((2, 3))), b=nn.Conv2d(8, 8, 1), w=nn.Linear(8, 12)
    ),
}


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"residual"}))
def test_gates_of_functions(reader: str) -> None:
    """Consumers need no layer: linear functions, products and einsum, of computed weights."""
    check_gates(READERS[reader], (8,), train=True)


def test_a_gate_does_not_change_what_a_weight_makes() -> None:
    """Input and output channels of a weight are the same ones; gates multiply the inputs alone."""
    space = SearchSpace.from_model(READERS["residual"], (1, 8, 8))
    network = space.build(space.base, seed=0).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    gate = torch.ones(1, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    graph = build_dependency_graph(space.model, space.base)
    (found, *_) = gate_gradients(graph, network, lambda: network(x).square().sum())
    y = F.relu(network.a(x))
    y = network.w(((y + network.b(y * gate)) * gate).mean((2, 3)))
    (expected,) = torch.autograd.grad(network.fc(F.relu(y)).square().sum(), gate)
    assert torch.allclose(found, expected.flatten(), rtol=1e-5)


def test_gates_of_pruned_weights() -> None:
    """A mask of torch.nn.utils.prune multiplies the weight that is read."""
    space = SearchSpace.from_model(lambda: Chain(nn.Conv2d), (1, 8, 8))
    network = space.build(space.base, seed=0).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    graph = build_dependency_graph(space.model, space.base)
    prune.l1_unstructured(network.b, "weight", 0.5)
    gates = [torch.ones(1, n, 1, 1, dtype=torch.float64, requires_grad=True) for n in (8, 12, 16)]
    expected = torch.autograd.grad(network(x, gates).square().sum(), gates)
    found = gate_gradients(graph, network, lambda: network(x).square().sum())
    for mine, right in zip(found, expected, strict=True):
        assert torch.allclose(mine, right.flatten(), rtol=1e-5)
