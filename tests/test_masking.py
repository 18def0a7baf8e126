"""Masks equal cuts, and gates equal explicit gates, in networks of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import BLOCKS, CONVOLUTIONS, Network
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.errors import SpaceError
from widthsearch.space.search_space import SearchSpace


def check_masks(convolution: str, blocks: list[str], seed: int) -> list[str]:
    """Masking equals cutting for random groups of all axes at once; returns the unknown axes."""
    torch.manual_seed(0)
    space = SearchSpace.from_model(lambda: Network(convolution, blocks), (3, 6, 6))
    graph = build_dependency_graph(space.model, space.base)
    rng = random.Random(seed)
    keep = {}
    for i, (axis, traced) in enumerate(zip(space.axes, space.trace.axes, strict=True)):
        if i not in graph.unknown:
            width = rng.choice([w for w in axis.grid if w <= axis.base])
            groups = rng.sample(range(graph.groups[i]), width // traced.divisor)
            of_channel = graph.channels[i].tolist()
            keep[axis.name] = [c for c, group in enumerate(of_channel) if group in groups]
    network = space.build(space.base, seed=seed).double().eval()  # rounding is no difference
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        with space.masked(network, keep):
            expected = network(x)
        found = space.extract(network, keep)(x)
    assert expected.isfinite().all()
    assert (found - expected).abs().max() <= 1e-8 * expected.abs().max()
    return [space.names[i] for i in graph.unknown]


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_masking_equals_cutting_in_each_block(block: str) -> None:
    """Only operators that no mask can follow make axes unknown."""
    unknown = check_masks("Conv2d", [block, "residual"], seed=1)
    assert bool(unknown) == (block in {"sorted", "rolled"})


@pytest.mark.parametrize("convolution", sorted(CONVOLUTIONS))
def test_masking_equals_cutting_with_computed_weights(convolution: str) -> None:
    """The statistics of a weight leave masked channels out."""
    assert not check_masks(convolution, ["convolution", "residual"], seed=2)


class Mixed(nn.Module):
    """A function of the channels between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.fc, self.function = nn.Linear(16, 5), function

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 6, 6) to (N, 5)."""
        return self.fc(self.function(self.mid(self.stem(x))).mean((2, 3)))


LIBRARY = torch.library.Library("widthsearch_test", "DEF")
LIBRARY.define("cube(Tensor x) -> Tensor")
LIBRARY.impl("cube", lambda x: x**3, "CPU")  # no kernel for tensors without values


def _first_is_zero(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.avg_pool3d": lambda x: F.local_response_norm(x, 3),
    "aten.fft_fft": lambda x: torch.fft.fft(x, dim=1).abs(),
    "aten.argmax": lambda x: x * x.argmax(1, keepdim=True),
    "aten.arange": lambda x: x * torch.arange(x.shape[1])[:, None, None],
    "aten.nansum": lambda x: x - x.nanmean(1, keepdim=True),
    "change sides of a cut": _first_is_zero,
}
"""Functions that no mask can follow, by a part of the reason."""


@pytest.mark.parametrize("reason", sorted(LOST))
def test_what_no_mask_can_follow_is_unknown(reason: str) -> None:
    """The reason names the operator and the line, and so does the refusal to cut."""
    space = SearchSpace.from_model(lambda: Mixed(LOST[reason]), (3, 6, 6))
    unknown = build_dependency_graph(space.model, space.base).unknown
    assert unknown.keys() == {1} and reason in unknown[1] and "test_masking.py" in unknown[1]
    with pytest.raises(SpaceError, match="cannot be removed one by one, since"):
        space.extract(space.build(1.0), {"mid": [0, 1, 2, 3]})


def test_an_operator_without_a_meta_kernel_does_not_end_the_run() -> None:
    """Its sizes are pinned by the trace; the other axes are known."""
    space = SearchSpace.from_model(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), Cube(), nn.Linear(8, 3)),
        (4,),
    )
    graph = build_dependency_graph(space.model, space.base)
    assert space.base.vector == (6,) and not graph.unknown


class Cube(nn.Module):
    """The operator above as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        return torch.ops.widthsearch_test.cube(x)


class Inputs(nn.Module):
    """An image, a vector and token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(3, 16, 1), nn.Linear(7, 16)
        self.table, self.fc = nn.Embedding(11, 16), nn.Linear(16, 5)

    def forward(self, image: Tensor, vector: Tensor, ids: Tensor) -> tuple[None, Tensor]:
        """(N, 3, 6, 6), (N, 7) and (N, 4) to (N, 5)."""
        x = self.image(image).mean((2, 3)) + self.vector(vector) + self.table(ids).sum(1)
        return None, self.fc(F.relu(x))


def test_several_inputs_share_their_channels() -> None:
    """Channel i of the convolution is column i of the table and row i of the linear layer."""
    inputs = (torch.zeros(3, 6, 6), torch.zeros(7), torch.zeros(4, dtype=torch.long))
    space = SearchSpace.from_model(Inputs, inputs)
    graph = build_dependency_graph(space.model, space.base)
    assert not graph.unknown
    for where in (("image.weight", 0), ("vector.weight", 0), ("table.weight", 1), ("fc.weight", 1)):
        assert graph.group[where].tolist() == list(range(16))
    network = space.build(1.0, seed=0).double().eval()
    x = (
        torch.randn(2, 3, 6, 6).double(),
        torch.randn(2, 7).double(),
        torch.tensor([[1, 2, 3, 4]] * 2),
    )
    keep = {"image": [1, 4, 5, 6, 8, 11, 12, 15]}
    with torch.no_grad(), space.masked(network, keep):
        expected = network(*x)[1]
    assert torch.allclose(space.extract(network, keep)(*x)[1], expected, rtol=1e-5)


class Bags(nn.Module):
    """Rows of a table, combined."""

    def __init__(self, mode: str, weighted: bool) -> None:
        super().__init__()
        self.table, self.fc = nn.EmbeddingBag(11, 16, mode=mode), nn.Linear(16, 5)
        self.score = nn.Linear(3, 4) if weighted else None

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        """(N, 4) and (N, 3) to (N, 5)."""
        weights = None if self.score is None else self.score(x)
        return self.fc(F.relu(self.table(ids, per_sample_weights=weights)))


@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("mean", False), ("max", False), ("sum", True)]
)
def test_bags_of_embeddings_have_their_tables_channels(mode: str, weighted: bool) -> None:
    """Whatever combines the rows; what weighs them has as many as there are rows, and is pinned."""
    inputs = (torch.zeros(4, dtype=torch.long), torch.zeros(3))
    space = SearchSpace.from_model(lambda: Bags(mode, weighted), inputs)
    assert space.names == ("table",)
    assert not build_dependency_graph(space.model, space.base).unknown
    network = space.build(1.0, seed=0).double().eval()
    x, keep = (
        (torch.tensor([[1, 2, 3, 4]] * 2), torch.randn(2, 3).double()),
        {"table": [1, 4, 9, 12]},
    )
    with torch.no_grad(), space.masked(network, keep):
        expected = network(*x)
    assert torch.allclose(space.extract(network, keep)(*x), expected, rtol=1e-9)


names = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4)
convolutions = st.sampled_from(sorted(CONVOLUTIONS))


@settings(max_examples=50, deadline=None)
@given(convolutions, names, st.integers(0, 99))
def test_masking_equals_cutting(convolution: str, blocks: list[str], seed: int) -> None:
    """In random compositions of blocks."""
    check_masks(convolution, blocks, seed)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(convolutions, names, st.integers(0, 99))
def test_masking_equals_cutting_in_many_networks(
    convolution: str, blocks: list[str], seed: int
) -> None:
    """The same, 2,000 times."""
    check_masks(convolution, blocks, seed)
