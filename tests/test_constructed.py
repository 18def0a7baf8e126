"""Built networks are what the user's class gives when it is constructed at their widths."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from composed import LENGTH, Composed, composed, streams
from hypothesis import assume, given, settings
from torch import nn

from widthsearch.channels.extraction import widths_of
from widthsearch.space.search_space import SearchSpace


def assert_same(built: nn.Module, constructed: nn.Module, x: torch.Tensor) -> None:
    """Every tensor and the output are equal."""
    found, expected = built.state_dict(), constructed.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    built.eval(), constructed.eval()
    torch.testing.assert_close(built(x), constructed(x), rtol=1e-6, atol=1e-6)


def compare(plan: tuple[str, ...], base: tuple, other: tuple, own_init: bool) -> None:
    """A space of a composed network, built at the widths of another one."""
    space = SearchSpace.from_model(partial(Composed, plan, base, own_init), (LENGTH, 5))
    x = torch.randn(2, LENGTH, 5, generator=torch.Generator().manual_seed(0))
    for widths in (base, other):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            constructed = Composed(plan, widths, own_init)
        assert_same(
            space.model.build(widths_of(space.model, constructed).vector, seed=3), constructed, x
        )


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(composed())
def test_many_built_networks_are_constructed_ones(drawn: tuple) -> None:
    """The same, more often."""
    plan, base, other, own_init = drawn
    assume(streams(plan, base) == streams(plan, other))
    compare(plan, base, other, own_init)


@settings(max_examples=50, deadline=None)
@given(composed())
def test_built_networks_are_constructed_ones(drawn: tuple) -> None:
    """Random networks at random widths: the same start for the same seed, and the same output."""
    plan, base, other, own_init = drawn
    assume(streams(plan, base) == streams(plan, other))
    compare(plan, base, other, own_init)
