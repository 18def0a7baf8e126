"""Spaces: widths in, networks and exact costs out."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from exact_space import Model
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusals
from strategies import MODELS, Residual, counted_flops, refused, space_of, spaces, widths_of
from torch import Tensor, nn

from widthsearch.errors import SpaceError, WidthsError
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths


@settings(max_examples=25, deadline=None)
@given(st.data(), spaces)
def test_small_networks_are_exact(data: st.DataObject, space: SearchSpace) -> None:
    """At any widths on the grid, the built network has the predicted counts and trains."""
    widths = data.draw(widths_of(space))
    net = space.build(widths, seed=0)
    cost = space.cost(widths)
    assert sum(p.numel() for p in net.parameters()) == cost.params
    assert counted_flops(net, space.input_shape) == 2 * cost.macs
    net.train()(torch.randn(2, *space.input_shape)).sum().backward()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_built_network_is_of_the_users_class_with_its_attributes_set(name: str) -> None:
    """Attributes that repeat a size follow it."""
    space = space_of(name)
    net = space.build(0.5)
    assert type(net) is MODELS[name]
    assert net.training
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == module.weight.shape[0]
            assert module.in_channels == module.weight.shape[1] * module.groups
            assert module.in_channels % module.groups == 0
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_mean)
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)


class Scaled(Residual):
    """A constructor with a scheme of its own, in every style that is met in practice."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.conv2.weight, 0.0, math.sqrt(2 / (9 * self.conv2.out_channels)))
        self.stem.weight.data.normal_(0, 0.03)
        nn.init.zeros_(self.bn2.weight)
        self.scale = nn.Parameter(torch.full((16, 1, 1), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As before, with a scale on the stem."""
        return super().forward(x) * self.scale.mean()


def test_the_constructors_initialisation_is_followed_at_every_width() -> None:
    """Scales that depend on fans follow the new fans; constants and defaults stay."""
    space = SearchSpace.from_model(Scaled, (3, 8, 8), max_width=16.0)
    net = space.build(16.0, seed=0)
    stem, inner = 256, 512
    assert net.stem.weight.std().item() == pytest.approx(0.03, rel=0.05)
    assert net.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * inner)), rel=0.02)
    assert net.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * stem)), rel=0.02)
    assert bool((net.bn2.weight == 0).all())
    assert bool((net.bn1.weight == 1).all())
    assert bool((net.scale == 0.1).all())
    bound = 1 / math.sqrt(stem)  # nn.Linear's own default
    assert net.fc.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_a_given_module_is_initialised_by_its_layers() -> None:
    """Weights are never cut from the model that was given."""
    model = Residual()
    for p in model.parameters():
        nn.init.constant_(p, 7.0)
    space = SearchSpace.from_model(model, (3, 8, 8))
    net = space.build(1.0, seed=0)
    assert not any(bool((p == 7.0).any()) for p in net.parameters())
    assert net.conv1.weight.abs().max().item() <= 1 / math.sqrt(9 * 16)
    assert bool((next(model.parameters()) == 7.0).all())


def test_init_is_called_last() -> None:
    """A user's own scheme comes last."""
    space = SearchSpace.from_model(
        Residual, (3, 8, 8), init=lambda net: nn.init.ones_(net.conv1.weight)
    )
    assert bool((space.build(0.5).conv1.weight == 1).all())


def test_building_is_seeded_and_leaves_the_global_state_alone() -> None:
    """The same seed gives the same network."""
    space = space_of("Residual")
    state = torch.get_rng_state()
    a, b, c = (space.build(0.5, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)
    space.build(0.5)
    assert not torch.equal(state, torch.get_rng_state())


def test_networks_share_nothing() -> None:
    """Training one leaves the next as it was."""
    space = space_of("Residual")
    a, b = space.build(0.5, seed=0), space.build(0.5, seed=0)
    with torch.no_grad():
        a.conv1.weight.zero_()
    assert bool(b.conv1.weight.any())


def test_widths_from_a_multiplier_a_mapping_or_integers() -> None:
    """Multipliers snap; a mapping may be partial; integers are one an axis."""
    space = space_of("Residual")
    assert space.widths(0.5).vector == (8, 16)
    assert space.widths(0.51).vector == (8, 16)
    assert space.widths({"conv1": 20}).vector == (16, 20)
    assert space.widths([4, 8]) == space.widths(np.array([4, 8]))
    assert space.widths(space.base) == space.base


@refusals("widths")
def test_widths_that_do_not_fit_are_refused(values: Any, message: str) -> None:
    """Each refusal names the culprit and the remedy."""
    with refused(WidthsError, message):
        space_of("Residual").widths(values)


def test_costs_take_any_whole_numbers() -> None:
    """Widths, sequences of them, integers and whole floats; many at once or one."""
    space = space_of("Residual")
    widths = [space.widths(0.5), space.base]
    expected = [space.cost(w).macs for w in widths]
    assert space.macs(widths[0]).shape == ()
    assert space.macs(widths[0]) == expected[0]
    vectors = [w.vector for w in widths]
    arrays = [np.array(vectors, kind) for kind in (float, np.uint8)]
    for many in (widths, vectors, *arrays, (widths[0], list(vectors[1]))):
        assert space.macs(many).tolist() == expected
    assert space.params([]).tolist() == []
    assert space.activations(space.base) == space.cost(1.0).activations
    between = space.macs([7, 9])  # off the grid, which has multiples of 2 and 4
    assert space.macs([6, 8]) < between < space.macs([8, 12])
    grouped = space_of("Grouped")  # in groups of 4 channels
    assert grouped.macs([19, 24, 8]) == grouped.macs([16, 24, 8])


@refusals("costs")
def test_costs_refuse_what_is_not_whole_or_not_of_the_space(values: Any, message: str) -> None:
    """One line, of each quantity."""
    space = space_of("Residual")
    for cost in (space.macs, space.params, space.activations):
        with refused(WidthsError, message):
            cost(values)


def test_costs_refuse_widths_of_other_axes() -> None:
    """With the names of both."""
    message = "widths must be of the axes stem, conv1 of space 'Residual', but are of a, b"
    with refused(WidthsError, message):
        space_of("Residual").macs(Widths(("a", "b"), (8, 16)))


def test_a_space_is_named_after_its_function_or_class() -> None:
    """A function or a class; a lambda has no name."""
    for model in (Residual, lambda: Residual(), partial(Residual), Residual()):
        assert SearchSpace.from_model(model, (3, 8, 8)).name == "Residual"


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (3, (3, 8, 8), "a function without arguments that returns one, but was given 3"),
        *(
            (Residual, shape, f"a tensor, or a sequence or mapping of those, but was {shape!r}")
            for shape in ("1x8x8", 3, None, (3, 8.5, 8), (3, "8", 8), (-1, 3, 8, 8))
        ),
    ],
)
def test_no_space_is_made_of_other_values(model: object, shape: object, message: str) -> None:
    """No model, or no shape."""
    with refused(SpaceError, message, whole=False):
        SearchSpace.from_model(model, shape)  # type: ignore[arg-type]


def test_a_space_travels_to_workers() -> None:
    """It is pickled without weights, and builds the same networks there."""
    space = space_of("Depthwise")
    packed = cloudpickle.dumps(space)
    again = cloudpickle.loads(packed)
    a, b = (s.build(0.5, seed=3).state_dict() for s in (space, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert again.fingerprint == space.fingerprint
    assert again.cost(0.5) == space.cost(0.5)


def test_models_that_differ_in_kernel_size_have_other_fingerprints() -> None:
    """Their layers have the same names and widths, but their networks cost something else."""

    def space(kernel: int) -> SearchSpace:
        return SearchSpace.from_model(
            lambda: nn.Sequential(nn.Conv2d(3, 8, kernel, padding="same"), nn.Conv2d(8, 4, 1)),
            (3, 8, 8),
            name="net",
        )

    assert space(3).axes == space(5).axes
    assert space(3).fingerprint == space(3).fingerprint != space(5).fingerprint


def test_a_model_without_freedom_is_refused() -> None:
    """The message names each width and the reason for which it is fixed."""
    message = (
        "a model must have a free width, but all widths of Conv2d are fixed: 'weight' (10): output "
        "of the model; 'weight' (3): input of the model; change the line that fixes one, or give "
        "another model"
    )
    with refused(SpaceError, message):
        SearchSpace.from_model(lambda: nn.Conv2d(3, 10, 1), (3, 8, 8))


# -- proof -----------------------------------------------------------------------------------


def recurrent(kind: type) -> nn.Module:
    """A recurrent layer, whose fused kernels hide its products from torch's counter."""
    layer = kind(6, 16, num_layers=2, batch_first=True)
    return Model(lambda m, x: m.o(m.r(x)[0][:, -1]), r=layer, o=nn.Linear(16, 5))


def products() -> nn.Module:
    """Products by ``einsum``, which makes none over a dim of size 1."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.einsum("bnd,bmd->bnm", m.a(x), m.b(x)))

    return Model(forward, a=nn.Linear(6, 8), b=nn.Linear(6, 8), o=nn.Linear(7, 5))


@pytest.mark.parametrize(
    "make", [partial(recurrent, nn.LSTM), partial(recurrent, nn.GRU), products]
)
def test_check_counts_what_torchs_counter_does_not_see(make: Any) -> None:
    """Fused kernels are turned off, and ``einsum`` is counted at the next width above 1."""
    space = SearchSpace.from_model(make, (7, 6))
    assert space.check().device == "cpu"
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


def test_shares_of_pinned_widths_are_parts_of_the_whole() -> None:
    """Each is the sum of the MACs of different layers."""
    space = SearchSpace.from_model(partial(recurrent, nn.LSTM), (7, 6))
    shares = space.trace.pinned_shares()
    assert shares and all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_small_spaces_are_verified(name: str) -> None:
    """On real tensors."""
    report = space_of(name).check(vectors=1)
    assert list(report.networks) == ["narrowest", "widest", "random 1"]
    assert str(report).startswith(
        "checked: 3 networks (narrowest, widest, random 1) run forward and backward on cpu; MACs, "
        "parameters and activations are as predicted; start and outputs equal those of the model's "
        "class at: base"
    )


def branching(otherwise: str) -> nn.Module:
    """Code that branches on a width, which a trace cannot follow."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        if x.shape[1] > 12:
            x = x + m.second(x)
        elif otherwise == "fail":
            x = m.second(x) @ x[:, :, :1]
        return m.last(x)

    first, second, last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
    return Model(forward, first=first, second=second, last=last)


@pytest.mark.parametrize(
    ("otherwise", "message"),
    [
        ("skip", "its macs are 896, but the space predicts 1,152"),
        (
            "fail",
            "module '(the model itself)' (Model) fails in forward in eval mode, operation aten.bmm",
        ),
    ],
)
def test_a_space_that_does_not_hold_is_named(otherwise: str, message: str) -> None:
    """With the first widths and the quantity, or the module and the operation."""
    space = SearchSpace.from_model(lambda: branching(otherwise), (3, 8, 8), name="branching")
    where = "space 'branching' does not hold at its narrowest widths [2]: "
    with refused(SpaceError, where + message, whole=False):
        space.check()
