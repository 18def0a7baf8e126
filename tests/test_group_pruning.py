"""Group pruning by hand: energies, dead structure and budgets."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from exact_space import Model
from strategies import MODELS, SEARCH_SPACES, network_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.proposers.filter_groups.branched_layers import with_branches
from widthsearch.proposers.filter_groups.branched_space import branched
from widthsearch.proposers.filter_groups.learning import find_layers
from widthsearch.proposers.filter_groups.pruning import GroupPruning, Pruned, cumulative_shares
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace

RESNET20 = f"{SEARCH_SPACES / 'resnet_cifar.py'}:resnet20"


def test_shares_by_hand() -> None:
    """The smallest entries are pruned while their sum stays below β; the largest never is."""
    shares = cumulative_shares(np.array([[1.0, 4.0, 3.0, 2.0]]))
    assert shares.tolist() == [[0.1, np.inf, 0.6, 0.3]]
    assert cumulative_shares(np.zeros((1, 2))).tolist() == [[0.0, np.inf]]


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1×1 convolution."""
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def chain() -> nn.Module:
    """Three 1×1 convolutions in a row, of 2, 3 and 2 channels."""
    layers = {"stem": conv(3, 2), "a": conv(2, 3), "b": conv(3, 2), "fc": nn.Linear(2, 10)}
    return Model(lambda m, x: m.fc(F.relu(m.b(F.relu(m.a(m.stem(x))))).mean((2, 3))), **layers)


@cache
def chain_space() -> SearchSpace:
    """The space of the chain."""
    return SearchSpace.from_model(chain, (3, 8, 8))


def pruning_of(
    space: SearchSpace, weights: dict[str, list[list[float]]], groups: dict[str, list[int]]
) -> GroupPruning:
    """Pruning of 1×1 convolutions with these square roots of energies, and these groups."""
    model = space.unconstrained.build(space.unconstrained.base, seed=0)
    with torch.no_grad():
        for layer, values in weights.items():
            weight = model.get_submodule(layer).weight
            weight.zero_()
            weight[:, :, 0, 0] = torch.tensor(values)
    chosen = {layer: torch.tensor(of) for layer, of in groups.items()}
    return GroupPruning(space, model, chosen, 1 + max(max(of) for of in groups.values()))


def striped(space: SearchSpace, model: nn.Module, count: int) -> dict[str, Tensor]:
    """Groups of the filters of each layer, by turns."""
    layers = [layer.name for layer in find_layers(space)]
    return {n: torch.arange(len(model.get_submodule(n).weight)) % count for n in layers}


def read(pruning: GroupPruning, pruned: Pruned) -> dict[str, list[tuple[list[int], list[int]]]]:
    """The branches by layer: filters and inputs."""
    architecture = pruning.architecture(pruned)
    return {
        layer: [(list(b.filters), list(b.inputs)) for b in branches]
        for layer, branches in architecture.layers.items()
    }


def test_dead_structure_is_removed_from_a_chain() -> None:
    """Filters of `a` and of the stem are removed once their channels have no consumer."""
    pruning = pruning_of(
        chain_space(),
        {"a": [[3, 1], [3, 1], [1, 3]], "b": [[3, 3, 1], [3, 3, 1]]},
        {"a": [0, 0, 1], "b": [0, 0]},
    )
    whole = pruning.pruned(0.0)
    assert whole.channels.all()
    assert pruning.macs(whole) == 64 * (6 + 6 + 6) + 20
    # Input 2 of b has 2/38 of the energy and is pruned. Filter 2 of a is then dead, and with it
    # group 1 of a, which has most of the energy in input 1; group 0 of a has 2/20 there.
    pruned = pruning.pruned(0.06)
    assert read(pruning, pruned) == {"a": [([0, 1], [0, 1])], "b": [([0, 1], [0, 1])]}
    assert pruning.widths(pruned).vector == (2, 2, 2)
    # Above 0.1 group 0 of a reads input 0 alone, and channel 1 of the stem is dead.
    pruned = pruning.pruned(0.11)
    assert read(pruning, pruned) == {"a": [([0, 1], [0])], "b": [([0, 1], [0, 1])]}
    assert pruning.widths(pruned).vector == (1, 2, 2)
    assert pruning.keep(pruned) == {"stem": [0], "a": [0, 1], "b": [0, 1]}
    assert pruning.macs(pruned) == 64 * (3 + 2 + 4) + 20


def test_whole_filters_are_pruned_if_they_would_never_die() -> None:
    """The consumer of `b` is the classifier, which is not grouped; that of `a` is `b`."""
    pruning = pruning_of(
        chain_space(),
        {"a": [[3, 3], [3, 3], [0.1, 0.1]], "b": [[3, 3, 3], [1, 1, 1]]},
        {"a": [0, 0, 0], "b": [0, 1]},
    )
    # Filter 1 of b has a tenth of the energy; filter 2 of a has far less, but b reads it.
    pruned = pruning.pruned(0.11)
    assert read(pruning, pruned) == {"a": [([0, 1, 2], [0, 1])], "b": [([0], [0, 1, 2])]}
    assert pruning.widths(pruned).vector == (2, 3, 1)


def test_a_stream_keeps_the_channels_that_other_layers_make() -> None:
    """Filters of the last convolution of a block are pruned; the stem makes their channels."""
    space, model, _ = network_of("Residual")
    with torch.no_grad():
        model.conv2.weight[:4] *= 1e-3  # whole filters
        model.conv1.weight[8:16] *= 1e-3  # not pruned: conv2 reads their channels
        model.conv2.weight[:, 20:] *= 1e-3  # inputs, whose filters in conv1 are then dead
    groups = {"conv1": torch.arange(32) % 2, "conv2": torch.arange(16) % 2}
    pruning = GroupPruning(space, model, groups, 2)
    pruned = pruning.pruned(1e-3)
    assert pruning.widths(pruned).vector == (16, 20)
    conv1, conv2 = read(pruning, pruned)["conv1"], read(pruning, pruned)["conv2"]
    assert sorted(conv1[0][0] + conv1[1][0]) == list(range(20))
    assert sorted(conv2[0][0] + conv2[1][0]) == list(range(4, 16))
    assert conv2[0][1] == list(range(20))


def forked() -> nn.Module:
    """Two 1×1 convolutions whose outputs are summed, and one that reads the sum."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.fc(m.c(F.relu(m.a(x) + m.b(x))).mean((2, 3)))

    inner = {name: conv(2, 2) for name in "abc"}
    return Model(forward, stem=conv(3, 2), **inner, fc=nn.Linear(2, 10))


@pytest.mark.parametrize("both", [True, False])
def test_a_channel_without_filters_is_removed(both: bool) -> None:
    """Only if the filters of both layers were pruned; its consumer then has one input."""
    space = SearchSpace.from_model(forked, (3, 8, 8))
    weak = [[3.0, 3.0], [0.1, 0.1]]
    strong = [[3.0, 3.0], [3.0, 3.0]]
    pruning = pruning_of(
        space,
        {"a": weak, "b": weak if both else strong, "c": strong},
        {"a": [0, 0], "b": [0, 1], "c": [0, 0]},
    )
    pruned = pruning.pruned(0.01)
    branches = read(pruning, pruned)
    assert branches["a"] == [([0], [0, 1])]
    if both:
        assert branches["b"] == [([0], [0, 1])]
        assert branches["c"] == [([0, 1], [0])]
        assert pruning.widths(pruned).vector == (2, 1, 2)
        assert pruning.macs(pruned) == 64 * (6 + 2 + 2 + 2) + 20
    else:
        assert branches["b"] == [([0], [0, 1]), ([1], [0, 1])]
        assert branches["c"] == [([0, 1], [0, 1])]
        assert pruning.widths(pruned).vector == (2, 2, 2)


def test_dead_structure_is_followed_through_a_concatenation() -> None:
    """`last` reads 8 channels of the stem and 4 of `grow`; pruned inputs kill filters there."""
    space, model, _ = network_of("Concatenated")
    with torch.no_grad():
        model.last.weight[:, [0, 9]] = 0  # the first of the stem, and the second of `grow`
        model.grow.weight[:, 0] = 0
    groups = {"grow": torch.zeros(4, dtype=torch.long), "last": torch.arange(16) // 8}
    pruning = GroupPruning(space, model, groups, 2)
    pruned = pruning.pruned(1e-6)
    left = {"stem": list(range(1, 8)), "grow": [0, 2, 3], "last": list(range(16))}
    assert pruning.keep(pruned) == left
    branches = pruning.architecture(pruned).layers
    assert [b.inputs for b in branches["last"]] == [tuple(range(10))] * 2
    assert [b.filters for b in branches["grow"]] == [(0, 1, 2)]


def test_pinned_axes_keep_their_channels() -> None:
    """Filters of a pinned axis are pruned, but the axis keeps its width."""
    space = chain_space().constrained(pin="a")
    pruning = pruning_of(
        space,
        {"a": [[3, 3], [3, 3], [3, 3]], "b": [[3, 3, 0.1], [3, 3, 0.1]]},
        {"a": [0, 0, 0], "b": [0, 0]},
    )
    pruned = pruning.pruned(0.01)
    assert pruning.widths(pruned).vector == (2, 3, 2)
    assert read(pruning, pruned)["a"] == [([0, 1], [0, 1])]
    assert pruning.projected(pruned).names == ("stem", "b")


def test_tied_axes_are_as_wide_as_the_widest() -> None:
    """Half of one axis and all of the other give the full width."""
    space = chain_space().constrained(tie=[["stem", "b"]], min_width=0.5, step=1)
    pruning = pruning_of(
        space,
        {"a": [[3, 0.1], [3, 0.1], [3, 0.1]], "b": [[3, 3, 3], [3, 3, 3]]},
        {"a": [0, 0, 0], "b": [0, 0]},
    )
    pruned = pruning.pruned(0.01)
    assert pruning.widths(pruned).vector == (1, 3, 2)
    assert pruning.projected(pruned).vector == (2, 3)


def test_block_macs_of_resnet20_equal_the_papers() -> None:
    """40,108,032 MACs in blocks, without shortcuts; last layers of blocks prune whole filters."""
    space = load_space(RESNET20)
    model = space.build(space.base, seed=0)
    pruning = GroupPruning(space, model, striped(space, model, 4), 4)
    whole = pruning.pruned(0.0)
    assert pruning.grouped_macs(whole) == 40_108_032
    assert pruning.macs(whole) == space.cost(space.base).macs
    last = [layer.name for layer in pruning._layers if np.isfinite(layer.whole).any()]
    assert last == [f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in range(3)]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_budgets_are_met_from_below(model: str) -> None:
    """By the smallest β that meets the exact cost of the branched network, nested in β."""
    space, net, _ = network_of(model, seed=1)
    pruning = GroupPruning(space, net, striped(space, net, 3), 3)
    base = space.cost(space.base).macs
    before = None
    for share in (0.95, 0.8, 0.7):
        beta = pruning.solve(share * base)
        if beta is None:
            continue
        pruned = pruning.pruned(beta)
        assert pruning.macs(pruned) <= share * base
        lower = pruning.betas[np.searchsorted(pruning.betas, beta) - 1]
        assert pruning.macs(pruning.pruned(lower)) > share * base
        narrow = branched(space, pruning.architecture(pruned))
        assert narrow.cost(narrow.base).macs == pruning.macs(pruned)
        if before is not None:
            assert not (pruned.channels & ~before.channels).any()
            for now, earlier in zip(pruned.inputs, before.inputs, strict=True):
                assert not (now & ~earlier).any()
        before = pruned
    assert pruning.solve(1.0) is None  # one MAC


@pytest.mark.parametrize("model", sorted(MODELS))
def test_the_branched_network_computes_the_function_of_the_masked_one(model: str) -> None:
    """With extracted weights in eval mode to 1e-5; the masked network has zeros instead."""
    space, net, _ = network_of(model, seed=2)
    with torch.no_grad():  # statistics of batch norm that matter
        for _ in range(3):
            net(torch.randn(32, 3, 8, 8))
    net.eval()
    groups = striped(space, net, 3)
    pruning = GroupPruning(space, net, groups, 3)
    pruned = pruning.pruned(0.4)
    fine = space.constrained(min_width={a.name: a.divisor for a in space.trace.axes}, step=1)
    reference = copy.deepcopy(net)
    with torch.no_grad():
        for layer, alive, reads in zip(groups, pruned.filters, pruned.inputs, strict=True):
            kept = torch.from_numpy(reads)[groups[layer]] & torch.from_numpy(alive)[:, None]
            reference.get_submodule(layer).weight.mul_(kept[:, :, None, None])
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), fine.masked(reference, pruning.keep(pruned)):
        wanted = reference(x)
    narrow = fine.extract(net, pruning.keep(pruned))
    ours = with_branches(narrow, pruning.architecture(pruned))
    assert not torch.allclose(wanted, net(x), atol=1e-3)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-5, atol=1e-5)
