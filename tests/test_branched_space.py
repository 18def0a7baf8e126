"""Branched spaces: exact costs, networks, and their JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import RECIPE, small_task
from exact_space import Model
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusals
from strategies import MODELS, counted_flops, graph_of, refused, space_of, widths_of
from torch import Tensor, nn

from widthsearch.errors import WidthsError
from widthsearch.proposers import Setting
from widthsearch.proposers.families import LinearFamily
from widthsearch.proposers.filter_groups.architecture import (
    Branch,
    BranchedArchitecture,
    branchable,
)
from widthsearch.proposers.filter_groups.branched_layers import (
    BranchedConv2d,
    deploy,
    with_branches,
    without_branches,
)
from widthsearch.proposers.filter_groups.branched_space import branched
from widthsearch.proposers.sensitivity import Sensitivity
from widthsearch.proposers.uniform import Uniform
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.space.verification import run_and_count
from widthsearch.training.trainer import fit


@st.composite
def architectures(draw: st.DrawFn, space: SearchSpace) -> BranchedArchitecture:
    """Any branches of some of a space's layers, at any widths off its grid."""
    widths = [draw(st.integers(1, 6)) * axis.divisor for axis in space.trace.axes]
    plain = BranchedArchitecture(type(space.base)(space.names, tuple(widths)), {})
    convs = [n for n, _ in space.model.template.named_modules() if branchable(space, n)]
    layers = {}
    for layer in draw(st.lists(st.sampled_from(convs), unique=True, max_size=3)):
        outputs, inputs = plain.sizes(space, layer)
        group = [draw(st.integers(-1, 2)) for _ in range(outputs)]
        branches = []
        for g in sorted(set(group) - {-1}):
            filters = tuple(f for f in range(outputs) if group[f] == g)
            reads = draw(st.lists(st.integers(0, inputs - 1), unique=True, min_size=1))
            branches.append(Branch(filters, tuple(sorted(reads))))
        if branches:
            layers[layer] = tuple(branches)
    return BranchedArchitecture(plain.widths, layers)


names = st.sampled_from(sorted(MODELS))


def some(*of: int) -> tuple[int, ...]:
    """The channels of a range."""
    return tuple(range(*of))


def residual() -> tuple[SearchSpace, BranchedArchitecture]:
    """Two branches in each convolution of the block; no branch makes channel 3 of the stream."""
    space = space_of("Residual")
    even, odd = Branch(some(0, 32, 2), (0, 1, 5)), Branch(some(1, 32, 2), some(16))
    first, last = Branch((0, 1, 2), some(32)), Branch(some(4, 16), (7, 30))
    return space, BranchedArchitecture(space.base, {"conv1": (even, odd), "conv2": (first, last)})


# -- cost --------------------------------------------------------------------------------------


def test_cost_by_hand() -> None:
    """Kernel elements × positions × Σ filters · inputs."""
    narrow = branched(*residual())
    conv1, conv2 = 16 * 3 + 16 * 16, 3 * 32 + 12 * 2
    stem, fc = 3 * 16, 16 * 10
    cost = narrow.cost(narrow.base)
    assert cost.macs == 64 * 9 * (stem + conv1 + conv2) + fc
    assert cost.params == 9 * (stem + conv1 + conv2) + fc + 10 + 2 * (16 + 32 + 16)
    assert cost.activations == 64 * (16 + 32 + 15) + 10


def test_axes_are_the_branches_widths() -> None:
    """The width that `conv1` alone makes is the sum of its branches; the stream is an axis."""
    narrow = branched(*residual())
    assert {axis.name: axis.base for axis in narrow.axes} == {
        "stem": 16,
        "conv1.branches.0.out": 16,
        "conv1.branches.0.in": 3,
        "conv1.branches.1.out": 16,
        "conv1.branches.1.in": 16,
        "conv2.branches.0.out": 3,
        "conv2.branches.0.in": 32,
        "conv2.branches.1.out": 12,
        "conv2.branches.1.in": 2,
    }
    net = narrow.build({"conv1.branches.0.out": 8, "conv1.branches.1.in": 4})
    assert net.bn1.num_features == net.conv1.out_channels == 24
    assert net.conv1.branches[1].weight.shape == (16, 4, 3, 3)


@settings(max_examples=40, deadline=None)
@given(st.data(), names)
def test_costs_are_exact(data: st.DataObject, model: str) -> None:
    """At the base and at any widths of the branched space, as integers."""
    space = space_of(model)
    architecture = data.draw(architectures(space))
    narrow = branched(space, architecture)
    for widths in (narrow.base.vector, data.draw(widths_of(narrow))):
        cost = narrow.cost(widths)
        net = narrow.build(widths, seed=0)
        assert counted_flops(net, space.input_shape) == 2 * cost.macs
        assert sum(p.numel() for p in net.parameters()) == cost.params
        assert run_and_count(net, space.input_shape, "cpu") == cost


def test_without_branches_it_is_the_plain_space() -> None:
    """Names and costs are the same."""
    space = space_of("Depthwise")
    same = branched(space, BranchedArchitecture(space.base, {}))
    assert same.names == space.names
    for multiplier in (0.5, 1.0, 2.0):
        assert same.cost(multiplier) == space.cost(multiplier)


def test_torchvision_models_have_branched_spaces() -> None:
    """ResNet-18 with every second input in every 3×3 convolution of its blocks."""
    space = load_space("torchvision:resnet18", (3, 64, 64))
    plain = BranchedArchitecture(space.base, {})
    layers = {}
    for name, module in space.model.template.named_modules():
        if branchable(space, name) and module.kernel_size == (3, 3):
            outputs, inputs = plain.sizes(space, name)
            half = outputs // 2
            thin = Branch(some(half), some(0, inputs, 2))
            layers[name] = thin, Branch(some(half, outputs), some(inputs))
    narrow = branched(space, BranchedArchitecture(space.base, layers))
    narrow.check(device="meta", vectors=2)
    assert narrow.cost(narrow.base).macs < space.cost(space.base).macs


# -- networks ----------------------------------------------------------------------------------


def convolved(net: BranchedConv2d, x: Tensor) -> Tensor:
    """The output of the layer, filter by filter."""
    out = torch.zeros(len(x), net.out_channels, *x.shape[2:])
    for conv, branch in zip(net.branches, net.current(), strict=True):
        for row, channel in enumerate(branch.filters):
            weight = conv.weight[row : row + 1]
            out[:, channel] = nn.functional.conv2d(x[:, branch.inputs], weight, padding=1)[:, 0]
    return out if net.bias is None else out + net.bias[:, None, None]


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gathers_convolves_and_places(bias: bool) -> None:
    """The output equals that of single filters; no branch makes channel 1."""
    given = (Branch((3,), (0, 2, 4)), Branch((0, 2), (4,)))
    layer = BranchedConv2d(nn.Conv2d(5, 4, 3, padding=1, bias=bias), 5, 4, given)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(layer(x), convolved(layer, x), rtol=1e-5, atol=1e-5)
    blank = layer(x)[:, 1]
    assert bool((blank == (layer.bias[1] if layer.bias is not None else 0)).all())


def test_at_other_widths_the_channels_follow_from_the_sizes() -> None:
    """Inputs start evenly spread and wrap around; filters are spread or left out evenly."""
    space, architecture = residual()
    narrow = branched(space, architecture)
    assert narrow.build(narrow.base).conv1.current() == architecture.layers["conv1"]
    layer = narrow.build({"conv2.branches.0.out": 2, "conv2.branches.1.out": 6}).conv2
    assert [b.filters for b in layer.current()] == [(0, 2), (4, 6, 8, 10, 12, 14)]
    assert [b.inputs for b in layer.current()] == [some(32), (16, 17)]
    wrapped = narrow.build({"conv1.branches.1.in": 16, "stem": 12}).conv1
    assert [b.inputs for b in wrapped.current()] == [(0, 1, 2), (*some(6, 12), *some(10))]
    cut = narrow.build({"stem": 2}).conv2
    assert [len([c for c in b.filters if c >= 0]) for b in cut.current()] == [1, 1]


@settings(max_examples=25, deadline=None)
@given(st.data(), names)
def test_plain_networks_compute_the_same(data: st.DataObject, model: str) -> None:
    """Filled with zeros, split again, and merged for deployment, in eval mode to 1e-5."""
    space = space_of(model)
    architecture = data.draw(architectures(space))
    narrow = branched(space, architecture)
    x = torch.randn(3, *space.input_shape, generator=torch.Generator().manual_seed(0))
    for widths in (narrow.base.vector, data.draw(widths_of(narrow))):
        net = narrow.build(widths, seed=0)
        net(x)  # statistics of batch norm
        out = net.eval()(x)
        plain = without_branches(net)
        assert not any(isinstance(m, BranchedConv2d) for m in plain.modules())
        torch.testing.assert_close(plain(x), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(deploy(net)(x), out, rtol=1e-5, atol=1e-5)
        if widths == narrow.base.vector:
            again = with_branches(plain, architecture).state_dict()
            assert all(torch.equal(tensor, again[key]) for key, tensor in net.state_dict().items())


def test_deploy_merges_branches_that_read_the_same() -> None:
    """One convolution per set of inputs; a single branch of all channels is plain."""
    space = space_of("Residual")
    thirds = tuple(Branch(some(i, 32, 3), some(16)) for i in range(3))
    alike = Branch((1, 5), (0, 1)), Branch((0, 2), (3,)), Branch((3, 4), (0, 1))
    architecture = BranchedArchitecture(space.base, {"conv1": thirds, "conv2": alike})
    net = branched(space, architecture).build(1.0, seed=0).eval()
    merged = deploy(net)
    assert type(merged.conv1) is nn.Conv2d
    assert merged.conv2.given == (Branch((1, 3, 4, 5), (0, 1)), Branch((0, 2), (3,)))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(merged(x), net(x), rtol=1e-5, atol=1e-5)
    assert counted_flops(merged, (3, 8, 8)) == counted_flops(net, (3, 8, 8))
    assert isinstance(net.conv1, BranchedConv2d)  # the argument is not changed


def test_branches_are_initialised_like_their_layer() -> None:
    """By the model's own scheme at the sizes of the branch: He's fan-in, and torch's default."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.conv(torch.relu(m.stem(x))))
        return m.fc(torch.relu(m.last(x)).mean((2, 3)))

    def make() -> nn.Module:
        stem, conv, last = (nn.Conv2d(n, 64, 3, padding=1) for n in (3, 64, 64))
        nn.init.kaiming_normal_(conv.weight)
        nn.init.constant_(conv.bias, 0.5)
        return Model(forward, stem=stem, conv=conv, last=last, fc=nn.Linear(64, 10))

    space = SearchSpace.from_model(make, (3, 8, 8))
    both = (Branch(some(32), some(16)), Branch(some(32, 64), (1, 2, 3, 4)))
    narrow = branched(space, BranchedArchitecture(space.base, {"conv": both, "last": both}))
    net = narrow.build(narrow.base, seed=0)
    for branch, inputs in zip(net.conv.branches, (16, 4), strict=True):
        assert branch.weight.std().item() == pytest.approx((2 / (9 * inputs)) ** 0.5, rel=0.1)
    assert (net.conv.bias == 0.5).all()
    for branch, inputs in zip(net.last.branches, (16, 4), strict=True):
        bound = (9 * inputs) ** -0.5
        assert 0.9 * bound < branch.weight.abs().max().item() <= bound
    assert 0 < net.last.bias.abs().max().item() <= (9 * 64) ** -0.5
    again = narrow.build(narrow.base, seed=0).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in net.state_dict().items())


def test_a_branched_network_trains_and_comes_back_from_json(tmp_path: Path) -> None:
    """From scratch by the one training loop; the architecture and the weights are read again."""
    space, architecture = residual()
    narrow = branched(space, architecture)
    net = narrow.build(narrow.base, seed=0)
    curve = fit(net, small_task(), replace(RECIPE, epochs=3), seed=0)
    assert curve[-1].loss < curve[0].loss
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    read = BranchedArchitecture.from_json(json.loads(json.dumps(architecture.to_json())), space)
    assert read == architecture
    again = branched(space, read)
    loaded = again.build(again.base, initialise=False)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.randn(2, 3, 8, 8)
    # Not bit for bit, since training leaves the network's weights channels last.
    torch.testing.assert_close(loaded.eval()(x), net.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_branched_network_computes_the_same_on_cuda() -> None:
    """And trains there."""
    narrow = branched(*residual())
    x = torch.randn(3, 3, 8, 8)
    net = narrow.build(narrow.base, seed=0).eval()
    on_cuda = narrow.build(narrow.base, seed=0).eval().cuda()
    torch.testing.assert_close(on_cuda(x.cuda()).cpu(), net(x), rtol=1e-3, atol=1e-3)
    merged = deploy(on_cuda)
    torch.testing.assert_close(merged(x.cuda()), on_cuda(x.cuda()), rtol=1e-3, atol=1e-3)
    assert len(fit(net, small_task(), RECIPE, seed=0, device="cuda")) == 2


def test_a_branched_space_is_a_space_like_any_other() -> None:
    """Families, constraints and proposers accept it; two architectures are two spaces."""
    space, architecture = residual()
    narrow = branched(space, architecture)
    narrow.check()
    base = narrow.cost(narrow.base).macs
    assert narrow.cost(LinearFamily(narrow, narrow.base).solve(0.5 * base)).macs <= 0.5 * base
    pinned = narrow.constrained(pin="conv1.*", step=1)
    assert "conv1.branches.0.out" not in pinned.names
    assert pinned.cost(pinned.base) == narrow.cost(narrow.base)
    pinned.check()
    for proposer in (Uniform(), Sensitivity()):
        proposal = proposer(narrow, small_task(), Setting())
        assert all(narrow.widths(w.vector) == w for w in proposal.trajectory)
    # The dependency graph does not follow channels through branches.
    assert graph_of(narrow).unknown
    swapped = {**architecture.layers, "conv1": architecture.layers["conv1"][::-1]}
    other = branched(space, BranchedArchitecture(architecture.widths, swapped))
    assert other.fingerprint != narrow.fingerprint
    copied = copy.deepcopy(narrow.build(0.5, seed=0))
    assert copied(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_ties_and_pins_apply_to_the_plain_space_only() -> None:
    """An architecture names all axes, and the branched space has neither ties nor pins."""
    space, architecture = residual()
    constrained = space.constrained(pin="stem")
    assert branched(constrained, architecture).names == branched(space, architecture).names


# -- JSON --------------------------------------------------------------------------------------


@refusals("architecture")
def test_an_architecture_that_does_not_fit_is_refused(values: Any, message: str) -> None:
    """The residual architecture's JSON with one value changed: one line that names the culprit."""
    path, value = values
    content: Any = {"": json.loads(json.dumps(residual()[1].to_json()))}
    at, path = content, ["", *path]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with refused(WidthsError, message, whole=False):
        BranchedArchitecture.from_json(content[""], space_of("Residual"))


def test_widths_are_multiples_of_their_groups() -> None:
    """A width of an axis with four groups is refused if it is no multiple of four."""
    space = space_of("Grouped")
    content = BranchedArchitecture(space.base, {}).to_json()
    assert BranchedArchitecture.from_json(content, space).widths == space.base
    content["widths"]["stem"] = 14
    with refused(WidthsError, "axis 'stem' takes multiples of 4, but `widths` has 14"):
        BranchedArchitecture.from_json(content, space)
