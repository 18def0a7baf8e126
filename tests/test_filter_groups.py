"""Filter groups: the proposer, its provenance and its errors."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from conformance import ProposerConformance, setting, small_task
from strategies import space_of
from torch import nn

from widthsearch.errors import SpaceError
from widthsearch.proposers import Setting
from widthsearch.proposers.filter_groups.architecture import BranchedArchitecture
from widthsearch.proposers.filter_groups.branched_space import branched
from widthsearch.proposers.filter_groups.proposer import FilterGroups
from widthsearch.space.search_space import SearchSpace


class TestFilterGroups(ProposerConformance):
    """Two groups, two epochs of each kind."""

    method = "filter_groups"
    proposer = FilterGroups(groups=2, penalty=1.0, members=3)
    cannot: ClassVar[dict[str, str]] = {"regression": "filter groups need an ungrouped Conv2d"}


def test_the_provenance_holds_the_branched_architectures() -> None:
    """Each is within its budget and has exact MACs; the trajectory has its projection."""
    space = space_of("Residual")
    proposal = TestFilterGroups.proposer(space, small_task(), setting())
    assert proposal.provenance["branched"]
    plain = [widths.vector for widths in proposal.trajectory]
    base = space.cost(space.base).macs
    for member in proposal.provenance["branched"]:
        architecture = BranchedArchitecture.from_json(member["architecture"], space)
        narrow = branched(space, architecture)
        assert narrow.cost(narrow.base).macs == member["macs"] <= member["budget"] * base
        assert tuple(member["plain"]) in plain
        assert narrow.build(narrow.base, seed=0)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_a_space_without_such_layers_is_refused() -> None:
    """The error names the space and another method."""
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10))
    space = SearchSpace.from_model(mlp, (3, 8, 8), name="mlp")
    with pytest.raises(SpaceError, match=r"space 'mlp' has none; use another method"):
        FilterGroups()(space, small_task(), Setting())
