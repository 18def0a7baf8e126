"""Masks equal cuts, and gates equal explicit gates, in networks of every kind."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import BLOCKS, CONVOLUTIONS, Network

from widthsearch.channels.dependency_graph import build_dependency_graph
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
            of_channel = graph.group[traced.maker].tolist()
            keep[axis.name] = [c for c, group in enumerate(of_channel) if group in groups]
    network = space.build(space.base, seed=seed).eval()
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, 6, 6)
        with space.masked(network, keep):
            expected = network(x)
        found = space.extract(network, keep)(x)
    assert expected.isfinite().all()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
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
