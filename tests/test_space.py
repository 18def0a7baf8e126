"""Spaces: widths in, networks and exact costs out."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    MODELS,
    Residual,
    constrained,
    counted_flops,
    random_widths,
    space_of,
    spaces,
    widths_of,
)
from torch import nn

from widthsearch.errors import SpaceError, WidthsError
from widthsearch.space.constraints import Constraints, aligned_step, default_block, default_step
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths

TORCHVISION = {
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "vgg11": 64,
    "vgg16_bn": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "densenet121": 64,
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "convnext_tiny": 64,
    "shufflenet_v2_x1_0": 64,
    "googlenet": 64,
    "vit_b_16": 224,
    "swin_t": 64,
}
SIDES = {"vit": 224, "maxvit": 224, "inception_v3": 299}
"""The inputs of models that do not take every size."""


def every_other_model() -> list[str]:
    """The torchvision classification models that are not among the above: 80 in all."""
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    return [name for name in names if name not in TORCHVISION]


def check_torchvision(name: str, side: int, backward_on: str) -> None:
    """Five random networks run forward and backward and cost what the space says."""
    space = load_space(f"torchvision:{name}", (3, side, side))
    for widths in random_widths(space, seed=len(name)):
        cost = space.cost(widths)
        net = space.build(widths, device=backward_on, seed=0)
        out = net(torch.zeros(2, *space.input_shape, device=backward_on))
        out = out if isinstance(out, torch.Tensor) else sum(o.sum() for o in out)
        out.sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert sum(p.numel() for p in net.parameters()) == cost.params
        assert counted_flops(net, space.input_shape, backward_on) == 2 * cost.macs


@pytest.mark.parametrize(("name", "side"), TORCHVISION.items())
def test_torchvision_models_are_exact(name: str, side: int) -> None:
    """One model of each family and variant, forward and backward, integer for integer."""
    # On the meta device kernels only check shapes, as strictly as the real ones.
    check_torchvision(name, side, "meta")


@pytest.mark.slow
@pytest.mark.parametrize("name", every_other_model())
def test_every_other_torchvision_model_is_exact(name: str) -> None:
    """All 80 classification models."""
    side = next((side for prefix, side in SIDES.items() if name.startswith(prefix)), 96)
    check_torchvision(name, side, "meta")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_networks_run_on_real_tensors(name: str) -> None:
    """What fits on the meta device runs for real."""
    check_torchvision(name, 64, "cpu")


@settings(max_examples=25)
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
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    space = SearchSpace.from_model(model, (3, 8, 8))
    net = space.build(1.0, seed=0)
    assert not any(bool((p == 7.0).any()) for p in net.parameters())
    assert net.conv1.weight.abs().max().item() <= 1 / math.sqrt(9 * 16)
    assert bool((next(model.parameters()) == 7.0).all())


def test_init_is_called_last() -> None:
    """A user's own scheme has the last word."""
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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"conv2": 8}, "space 'Residual' has no axis 'conv2'; did you mean 'conv1'?"),
        ({"zzz": 8}, "space 'Residual' has no axis 'zzz'; its axes are stem, conv1"),
        ([16], "space 'Residual' has 2 axes, but was given 1 widths; its axes are stem, conv1"),
        (
            [16, 30],
            "axis 'conv1' takes multiples of 4, but was given 30; the nearest it takes is 32",
        ),
        (
            {"stem": 640},
            "axis 'stem' takes 2 to 32 channels, but was given 640; the nearest it takes is 32",
        ),
        (0.0, "a width multiplier must be above 0, but is 0.0"),
        (float("nan"), "a width multiplier must be above 0, but is nan"),
        ({"stem": "16"}, "a width must be an integer, but axis 'stem' was given '16'"),
    ],
)
def test_widths_that_do_not_fit_are_refused(spec: object, message: str) -> None:
    """Each refusal names the culprit and the remedy."""
    with pytest.raises(WidthsError) as error:
        space_of("Residual").widths(spec)
    assert str(error.value) == message


def test_costs_take_whatever_is_whole() -> None:
    """Widths, sequences of them, integers and whole floats; many at once or one."""
    space = space_of("Residual")
    widths = [space.widths(0.5), space.base]
    expected = [space.cost(w).macs for w in widths]
    assert space.macs(widths[0]).shape == ()
    assert space.macs(widths[0]) == expected[0]
    for many in (
        widths,
        [w.vector for w in widths],
        np.array([w.vector for w in widths], float),
        np.array([w.vector for w in widths], np.uint8),
        (widths[0], list(widths[1].vector)),
    ):
        assert space.macs(many).tolist() == expected
    assert space.params([]).tolist() == []
    assert space.activations(space.base) == space.cost(1.0).activations
    between = space.macs([7, 9])  # off the grid, which has multiples of 2 and 4
    assert space.macs([6, 8]) < between < space.macs([8, 12])
    grouped = space_of("Grouped")  # in units of 4 channels
    assert grouped.macs([19, 24, 8]) == grouped.macs([16, 24, 8])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([8.5, 16], "widths must be whole numbers, but one is 8.5"),
        ([[8, float("nan")]], "widths must be whole numbers, but one is nan"),
        ([[8, float("inf")]], "widths must be whole numbers, but one is inf"),
        (["8", "16"], "widths must be whole numbers, but are of type <U2"),
        ([True, False], "widths must be whole numbers, but are of type bool"),
        ([8, -16], "widths must not be negative, but one is -16"),
        (
            [8, 16, 4],
            "the widths of space 'Residual' have shape (2,) or (N, 2), but were given with shape "
            "(3,)",
        ),
        (
            0.5,
            "the widths of space 'Residual' have shape (2,) or (N, 2), but were given with "
            "shape ()",
        ),
        ([[8, 16], [8]], "width vectors must have one length, but have several"),
        (
            Widths(("a", "b"), (8, 16)),
            "widths must be of the axes stem, conv1 of space 'Residual', but are of a, b",
        ),
    ],
)
def test_costs_refuse_what_is_not_whole_or_not_of_the_space(given: Any, message: str) -> None:
    """One line, of each quantity."""
    space = space_of("Residual")
    for cost in (space.macs, space.params, space.activations):
        with pytest.raises(WidthsError) as error:
            cost(given)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("base", "unit", "step"),
    [
        *((16, 1, 2), (32, 1, 4), (64, 1, 8), (512, 1, 8), (24, 1, 4), (30, 1, 2), (7, 1, 1)),
        *((256, 32, 32), (12, 4, 4), (20, 1, 2)),
    ],
)
def test_default_steps(base: int, unit: int, step: int) -> None:
    """An eighth of the base as a power of two, at most 8; a divisor of the base."""
    assert default_step(base, unit) == step


def test_a_given_step_keeps_the_base_on_the_grid() -> None:
    """A step of 16 does not fit 24 channels; 8 is the most that does."""

    def make_model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 64, 1), nn.Conv2d(64, 10, 1))

    space = SearchSpace.from_model(make_model, (3, 8, 8), step=16)
    assert [(a.base, a.step) for a in space.axes] == [(24, 8), (64, 16)]


def test_a_step_of_a_named_axis_is_kept_or_refused() -> None:
    """One for all, or for a glob, is made to fit; groups stay whole."""
    space = space_of("Grouped")
    (stem, *_) = space.constrained(step={"s*": 3}).axes
    assert (stem.base, stem.step) == (16, 4)
    assert space.constrained(step=3).axes[0].step == 4
    assert space.constrained(step={"stem": 8}).axes[0].step == 8
    message = (
        "a step must divide its axis's base in whole groups of 4, but axis 'stem' has base=16 and "
        "was given step=3; it can be 4, 8, 16"
    )
    with pytest.raises(SpaceError) as error:
        space.constrained(step={"stem": 3})
    assert str(error.value) == message


def test_a_space_is_called_after_what_makes_it() -> None:
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
def test_what_no_space_is_made_of(model: object, shape: object, message: str) -> None:
    """No model, or no shape."""
    with pytest.raises(SpaceError) as error:
        SearchSpace.from_model(model, shape)  # type: ignore[arg-type]
    assert str(error.value).endswith(message)


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
    with pytest.raises(SpaceError) as error:
        SearchSpace.from_model(lambda: nn.Conv2d(3, 10, 1), (3, 8, 8))
    assert str(error.value) == (
        "a model must have a free width, but all widths of Conv2d are fixed: 'weight' (10: output "
        "of the model), 'weight' (3: input of the model); change the line that fixes one, or give "
        "another model"
    )


# -- constraints -----------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data(), spaces)
def test_constrained_spaces_are_exact(data: st.DataObject, whole: SearchSpace) -> None:
    """However axes are pinned and tied, a network is what the free space makes of its widths."""
    space = data.draw(constrained(whole))
    widths = space.widths(data.draw(widths_of(space)))
    net = space.build(widths, seed=0)
    cost = space.cost(widths)
    assert sum(p.numel() for p in net.parameters()) == cost.params
    assert counted_flops(net, space.input_shape) == 2 * cost.macs
    to_unconstrained = space.to_unconstrained(widths)
    for quantity in ("macs", "params", "activations"):
        assert whole.cost_form(quantity)(to_unconstrained.vector) == getattr(cost, quantity)
    for name, width in to_unconstrained.items():
        maker = name if name in dict(net.named_modules()) else ""
        assert net.get_submodule(maker).weight.shape[0] == width
    assert space.to_unconstrained(space.base) == whole.base
    assert space.unconstrained.names == whole.names


def test_a_pinned_axis_is_said_to_be() -> None:
    """It leaves the axes for the pinned widths; the same base network remains."""
    whole = space_of("Concatenated")
    space = whole.constrained(pin=["gr*", "last"])
    assert space.names == ("stem",)
    assert [(p.name, p.size, p.reason) for p in space.pinned][-2:] == [
        ("grow", 4, "pinned by the user"),
        ("last", 16, "pinned by the user"),
    ]
    assert space.cost(1.0) == whole.cost(1.0)
    assert space.cost({"stem": 5}) == whole.cost({"stem": 5})
    assert space.fingerprint != whole.fingerprint
    assert whole.names == ("stem", "grow", "last")


def test_tied_axes_keep_their_ratio() -> None:
    """They are one axis, named after the first, whose widths are whole units of each."""
    whole = space_of("Grouped")  # widths 16 and 24 in four groups, and 8
    space = whole.constrained(tie=[["last", "grouped"]])
    stem, axis = space.axes
    assert stem == whole.axes[0]
    assert (axis.name, axis.base, axis.min_width, axis.max_width, axis.step, axis.tied) == (
        *("grouped", 24, 12, 48, 12),
        ("last",),
    )
    assert space.to_unconstrained(space.widths({"grouped": 36})).vector == (16, 36, 12)
    again = space.constrained(tie="*")
    assert [(a.name, a.tied, list(a.grid)) for a in again.axes] == [
        ("stem", ("grouped", "last"), [8, 16, 24, 32])
    ]
    assert again.to_unconstrained(again.widths([8])).vector == (8, 12, 4)
    pinned = {(a.name, *a.tied): a.base for a in whole.constrained(pin="last").axes}
    assert whole.constrained(tie=[["stem", "grouped"]]).fingerprint not in {
        whole.constrained(pin="grouped").fingerprint,
        whole.fingerprint,
    }
    assert pinned == {("stem",): 16, ("grouped",): 24}


def test_bounds_and_steps_by_axis_and_glob() -> None:
    """Floats are multiples, integers channels; a name goes before a glob, a later glob first."""
    space = SearchSpace.from_model(
        Residual,
        (3, 8, 8),
        min_width={"*": 0.5, "stem": 4},
        max_width={"*": 1.0, "s*": 1.5},
        step={"*": 4, "conv1": 8},
    )
    assert [(a.min_width, a.base, a.max_width, a.step) for a in space.axes] == [
        (4, 16, 24, 4),
        (16, 32, 32, 8),
    ]
    narrower = space.constrained(max_width=1, min_width={"conv1": 0.75})
    assert [(a.min_width, a.base, a.max_width, a.step) for a in narrower.axes] == [
        (4, 16, 16, 4),
        (24, 32, 32, 8),
    ]
    assert narrower.fingerprint == space.fingerprint
    assert narrower.unconstrained is narrower


@pytest.mark.parametrize(
    ("base", "unit", "block", "step"),
    [
        *((64, 1, 8, 8), (64, 1, 16, 16), (16, 1, 16, 8), (24, 1, 16, 8), (8, 1, 8, 4)),
        *((256, 32, 8, 32), (20, 1, 16, 4), (3, 1, 8, 1), (48, 1, 16, 16)),
    ],
)
def test_aligned_steps(base: int, unit: int, block: int, step: int) -> None:
    """Whole blocks, or halves of one where the axis could not get narrower otherwise."""
    assert aligned_step(base, unit, block) == step


def wide() -> nn.Module:
    """A narrow, a wide and a grouped layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.Conv2d(16, 64, 1),
        nn.Conv2d(64, 256, 1),
        nn.Conv2d(256, 96, 1, groups=4),
        nn.Conv2d(96, 10, 1),
    )


def test_a_device_decides_the_steps_that_nobody_gave() -> None:
    """Whole blocks where an axis has eight of them; narrow axes keep their reach and grid."""
    space = SearchSpace.from_model(wide, (3, 8, 8))
    assert [a.step for a in space.axes] == [2, 8, 8, 8]
    on_cpu = space.with_constraints(Constraints(), block=16)
    assert [a.step for a in on_cpu.axes] == [2, 8, 16, 16]
    assert [a.min_width for a in on_cpu.axes] == [2, 8, 32, 16]
    assert [a.base for a in on_cpu.axes] == [16, 64, 256, 96]
    assert all(set(a.grid) <= set(b.grid) for a, b in zip(on_cpu.axes, space.axes, strict=True))
    assert on_cpu.fingerprint == space.fingerprint
    bounded = space.with_constraints(Constraints(min=0.5, pin="0"), block=16)
    assert [(a.step, a.min_width) for a in bounded.axes] == [(8, 32), (16, 128), (16, 48)]


@pytest.mark.parametrize(
    ("of_space", "of_study", "steps"),
    [
        ({"step": 4}, {}, [4, 4, 4, 4]),
        ({"align": 32}, {}, [8, 32, 32, 32]),
        ({"align": "none"}, {}, [2, 8, 8, 8]),
        ({"step": {"2": 4}}, {}, [2, 8, 4, 16]),
        ({}, {"step": 4}, [4, 4, 4, 4]),
        ({}, {"align": "cuda"}, [8, 8, 8, 8]),
        ({}, {"align": "none"}, [2, 8, 8, 8]),
        ({}, {"step": {"2": 4}}, [2, 8, 4, 16]),
        ({"step": {"2": 4}}, {"step": {"3": 8}}, [2, 8, 4, 8]),
    ],
)
def test_steps_that_somebody_gave_stay(
    of_space: dict[str, Any], of_study: dict[str, Any], steps: list[int]
) -> None:
    """In the space or in the study; ``none`` is as good as a step."""
    space = SearchSpace.from_model(wide, (3, 8, 8), **of_space)
    assert [a.step for a in space.with_constraints(Constraints(**of_study), block=16).axes] == steps


def test_devices_have_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CPU that this runs on; of tensor cores."""
    assert default_block("cuda") == default_block("cuda:1") == 8
    for capability, block in {"AVX512": 16, "AVX2": 8, "NEON": 8, "DEFAULT": 8}.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert default_block("cpu") == block
        assert default_block("cuda") == 8


def test_devices_have_their_alignment() -> None:
    """What a step was given for keeps it."""
    space = space_of("Residual")
    assert [a.step for a in space.constrained(align="cuda").axes] == [8, 8]
    assert [a.step for a in space.constrained(align="cpu").axes] == [8, 16]
    assert [a.step for a in space.constrained(align=4, step={"stem": 1}).axes] == [1, 4]


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"pin": "stemm"}, "no axis matches 'stemm'; did you mean 'stem'?"),
        ({"pin": ["cnov*"]}, "no axis matches 'cnov*'; did you mean 'conv*'?"),
        ({"pin": "st"}, "no axis matches 'st'; did you mean 'stem'?"),
        ({"pin": "ste?m"}, "no axis matches 'ste?m'; did you mean 'stem'?"),
        ({"min_width": {"zzz": 0.5}}, "no axis matches 'zzz'; the axes are stem, conv1"),
        (
            {"tie": [["stem", "fc"]]},
            "no axis matches 'fc': the width of 'fc' is pinned (output of the model)",
        ),
        ({"pin": [3]}, "an axis is given by its name or a glob, but was 3"),
        ({"pin": "*"}, "an axis must be left to search, but all 2 are pinned"),
        (
            {"tie": ["stem", "conv1"]},
            "a tie takes two axes or more, but 'stem' is 'stem' alone; axes that keep their ratio "
            "go into one list: tie=[['a', 'b']]",
        ),
        (
            {"tie": "*", "pin": "stem"},
            "an axis is tied once or pinned, but 'stem' is pinned too",
        ),
        (
            {"tie": ["*", "*"]},
            "an axis is tied once or pinned, but 'stem' is in another tie too",
        ),
        (
            {"min_width": 1.5},
            "`0 < min <= 1` must hold (multiples of an axis's base width), but min is 1.5",
        ),
        (
            {"max_width": {"stem": 0.5}},
            "`max >= 1` must hold (multiples of an axis's base width, or whole channels), but "
            "max of 'stem' is 0.5",
        ),
        (
            {"max_width": {"s*": 2}},
            "`max >= base` must hold, but axis 'stem' has base=16 and was given max=2 channels; "
            "a multiple of the base is written 2.0",
        ),
        ({"step": 0}, "`step >= 1` must hold, in whole channels, but step=0"),
        ({"step": {"stem": 1.5}}, "`step >= 1` must hold, in whole channels, but step=1.5"),
        (
            {"step": {"*": 7, "conv1": 7}},
            "a step must divide its axis's base, but axis 'conv1' has base=32 and was given "
            "step=7; it can be 1, 2, 4, 8, 16, 32",
        ),
        ({"align": "gpu"}, "`align` must be cuda, cpu, none or a number of channels, but is 'gpu'"),
        (
            {"align": 8, "step": 4},
            "one step for every axis leaves nothing to align, but step=4 and align=8: leave one "
            "out",
        ),
    ],
)
def test_constraints_that_cannot_be_met_are_refused(
    constraints: dict[str, object], message: str
) -> None:
    """Each refusal names the culprit and the rule or the close match."""
    with pytest.raises(SpaceError) as error:
        space_of("Residual").constrained(**constraints)
    assert str(error.value) == message


def test_a_tie_without_a_common_ratio_is_refused() -> None:
    """16 and 9 channels have no narrower widths in that ratio."""

    def make_model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 9, 1), nn.Conv2d(9, 10, 1))

    with pytest.raises(SpaceError, match=r"'0' \(16\), '1' \(9\) have no narrower widths"):
        SearchSpace.from_model(make_model, (3, 8, 8), tie=[["0", "1"]])


def test_scores_of_channels_are_folded_over_ties() -> None:
    """The lowest-scored channels of each tied axis go together."""
    whole = space_of("Plain")  # 8 and 16 channels
    space = whole.constrained(tie="conv*")
    a, b = np.arange(8.0), np.arange(16.0)[::-1]
    (tie_scores,) = space.tie_scores([a, b])
    assert tie_scores.tolist() == [i + (2 * i) + (2 * i + 1) for i in range(8)]
    assert whole.tie_scores([a, b])[1] is b


# -- proof -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_small_spaces_are_proved(name: str) -> None:
    """On real tensors."""
    report = space_of(name).check(vectors=1)
    assert list(report.networks) == ["narrowest", "widest", "random 1"]
    assert str(report) == (
        "checked: 3 networks (narrowest, widest, random 1) run forward and backward on cpu; MACs, "
        "parameters and activations are as predicted"
    )


def test_attention_is_counted_in_full() -> None:
    """Neither encoder layers' fast path nor fused attention hides its products."""
    space = load_space("torchvision:vit_b_16", (3, 224, 224))
    before = torch.backends.mha.get_fastpath_enabled()
    space.check(vectors=0, device="meta")
    assert torch.backends.mha.get_fastpath_enabled() == before


class Branching(nn.Module):
    """What a trace cannot see: code that asks how wide a layer is."""

    def __init__(self, otherwise: str) -> None:
        super().__init__()
        self.otherwise = otherwise
        self.first = nn.Conv2d(3, 16, 1)
        self.second = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 8, 8) to (N, 4, 8, 8)."""
        x = self.first(x)
        if x.shape[1] > 12:
            x = x + self.second(x)
        elif self.otherwise == "fail":
            x = self.second(x) @ x[:, :, :1]
        return self.last(x)


@pytest.mark.parametrize(
    ("otherwise", "message"),
    [
        ("skip", "its macs are 896, but the space predicts 1,152"),
        (
            "fail",
            "module '(the model itself)' (Branching) fails in forward in eval mode, operation "
            "aten.bmm",
        ),
    ],
)
def test_a_space_that_does_not_hold_is_named(otherwise: str, message: str) -> None:
    """With the first widths and the quantity, or the module and the operation."""
    space = SearchSpace.from_model(lambda: Branching(otherwise), (3, 8, 8), name="branching")
    with pytest.raises(SpaceError) as error:
        space.check()
    assert str(error.value).startswith(
        "space 'branching' does not hold at its narrowest widths [2]: "
    )
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- files -----------------------------------------------------------------------------------


@given(st.data(), spaces)
def test_widths_files_load_where_they_were_saved(data: st.DataObject, space: SearchSpace) -> None:
    """Any widths on the grid, as JSON that says whose they are."""
    widths = space.widths(data.draw(widths_of(space)))
    with TemporaryDirectory() as folder:
        path = Path(folder, "widths.json")
        space.save_widths(path, widths)
        assert space.load_widths(path) == widths
        content = json.loads(path.read_text())
        assert [file.name for file in path.parent.iterdir()] == ["widths.json"]
    assert content == {
        "space": space.name,
        "fingerprint": space.fingerprint,
        "base": dict(space.base),
        "widths": dict(widths),
    }


def test_widths_of_another_space_are_refused(tmp_path: Path) -> None:
    """The message says what differs."""
    path = tmp_path / "widths.json"
    own = space_of("Residual")
    own.save_widths(path, 0.5)
    wide = SearchSpace.from_model(wider, (3, 8, 8), name="Residual")
    named = SearchSpace.from_model(Residual, (3, 8, 8), name="other")
    for space, difference in {
        space_of("Plain"): "it has no axis 'stem'",
        own.constrained(pin="conv1"): "it has no axis 'conv1'",
        wide: "the base of axis 'conv1' is 32 in the file and 48 in it",
        named: "their names differ, though their axes are alike",
    }.items():
        with pytest.raises(WidthsError) as error:
            space.load_widths(path)
        assert str(error.value) == (
            f"widths must be loaded into their own space, but {str(path)!r} is of 'Residual' (2 "
            f"axes) and the space given is {space.name!r} ({len(space.axes)} axes): {difference}"
        )
    own.constrained(pin="conv1").save_widths(path, 0.5)
    with pytest.raises(WidthsError, match="the file has no axis 'conv1'"):
        own.load_widths(path)
    with pytest.raises(WidthsError, match="other axes are tied to theirs, or the same widths cost"):
        own.constrained(tie="*").load_widths(path)


def wider() -> nn.Module:
    """The same names, another base."""
    model = Residual()
    model.conv1 = nn.Conv2d(16, 48, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(48)
    model.conv2 = nn.Conv2d(48, 16, 3, padding=1, bias=False)
    return model


EDITS: dict[str, tuple[object, str]] = {
    "not JSON": ("{'a'", "cannot be read: it is not JSON: Expecting property name"),
    "not a mapping": ("[1]", "must hold space, fingerprint, base, widths, but"),
    "a missing key": ({"widths": ...}, "has no 'widths'"),
    "widths in a list": ({"widths": [16, 32]}, "`widths` must be one integer by axis name"),
    "an unknown axis": (
        {"widths": {"stem": 8, "conv1": 8, "stemm": 8}},
        "the space has no axis 'stemm'; did you mean 'stem'?",
    ),
    "an axis left out": ({"widths": {"stem": 8}}, "axis 'conv1' has no width; its base is 32"),
    "off the grid": (
        {"widths": {"stem": 8, "conv1": 9}},
        "axis 'conv1' takes multiples of 4, but was given 9; the nearest it takes is 8",
    ),
    "no integer": (
        {"widths": {"stem": 8.0, "conv1": 8}},
        "a width must be an integer, but axis 'stem' was given 8.0",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_hand_edited_widths_file_is_checked(case: str, tmp_path: Path) -> None:
    """One line that names the file and what is wrong in it."""
    change, message = EDITS[case]
    space, path = space_of("Residual"), tmp_path / "widths.json"
    space.save_widths(path, 0.5)
    if isinstance(change, dict):
        content = json.loads(path.read_text()) | change
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    else:
        path.write_text(str(change))
    with pytest.raises(WidthsError) as error:
        space.load_widths(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_widths_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(WidthsError, match="cannot be read: No such file or directory"):
        space_of("Residual").load_widths(tmp_path / "none.json")
