"""Constraints: pins, ties, bounds, steps and alignment."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusals
from strategies import Residual, constrained, counted_flops, refused, space_of, spaces, widths_of
from torch import nn

from widthsearch.errors import SpaceError
from widthsearch.space.constraints import Constraints, aligned_step, default_block, default_step
from widthsearch.space.search_space import SearchSpace


def chain(*widths: int) -> nn.Sequential:
    """Convolutions in a row, of these widths and then ten channels."""
    return nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in pairwise((3, *widths, 10))))


@pytest.mark.parametrize(
    ("base", "divisor", "step"),
    [
        *((16, 1, 2), (32, 1, 4), (64, 1, 8), (512, 1, 8), (24, 1, 4), (30, 1, 2), (7, 1, 1)),
        *((256, 32, 32), (12, 4, 4), (20, 1, 2)),
    ],
)
def test_default_steps(base: int, divisor: int, step: int) -> None:
    """An eighth of the base as a power of two, at most 8; a divisor of the base."""
    assert default_step(base, divisor) == step


def test_a_given_step_keeps_the_base_on_the_grid() -> None:
    """A step of 16 does not fit 24 channels; 8 is the most that does."""
    space = SearchSpace.from_model(lambda: chain(24, 64), (3, 8, 8), step=16)
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
    with refused(SpaceError, message):
        space.constrained(step={"stem": 3})


@settings(max_examples=40, deadline=None)
@given(st.data(), spaces)
def test_constrained_spaces_are_exact(data: st.DataObject, whole: SearchSpace) -> None:
    """For any pins and ties, networks and costs are those of the unconstrained space."""
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


def test_a_pinned_axis_becomes_a_pinned_width() -> None:
    """It leaves the axes for the pinned widths; the same base network remains."""
    whole = space_of("Concatenated")
    space = whole.constrained(pin=["gr*", "last"])
    assert space.names == ("stem",)
    assert [(p.name, p.size) for p in space.pinned[-2:]] == [("grow", 4), ("last", 16)]
    assert {p.reason for p in space.pinned[-2:]} == {"pinned by the user"}
    assert space.cost(1.0) == whole.cost(1.0)
    assert space.cost({"stem": 5}) == whole.cost({"stem": 5})
    assert space.fingerprint != whole.fingerprint
    assert whole.names == ("stem", "grow", "last")


def test_tied_axes_keep_their_ratio() -> None:
    """They are one axis, named after the first, whose widths are whole groups of each."""
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
    others = {whole.constrained(pin="grouped").fingerprint, whole.fingerprint}
    assert whole.constrained(tie=[["stem", "grouped"]]).fingerprint not in others
    assert pinned == {("stem",): 16, ("grouped",): 24}


def test_bounds_and_steps_by_axis_and_glob() -> None:
    """Floats are multiples, integers channels; names override globs, later globs earlier ones."""
    low, high = {"*": 0.5, "stem": 4}, {"*": 1.0, "s*": 1.5}
    step = {"*": 4, "conv1": 8}
    space = SearchSpace.from_model(Residual, (3, 8, 8), min_width=low, max_width=high, step=step)
    narrower = space.constrained(max_width=1, min_width={"conv1": 0.75})
    for of, grids in {
        space: [(4, 16, 24, 4), (16, 32, 32, 8)],
        narrower: [(4, 16, 16, 4), (24, 32, 32, 8)],
    }.items():
        assert [(a.min_width, a.base, a.max_width, a.step) for a in of.axes] == grids
    assert narrower.fingerprint == space.fingerprint
    assert narrower.unconstrained is narrower


@pytest.mark.parametrize(
    ("base", "divisor", "block", "step"),
    [
        *((64, 1, 8, 8), (64, 1, 16, 16), (16, 1, 16, 8), (24, 1, 16, 8), (8, 1, 8, 4)),
        *((256, 32, 8, 32), (20, 1, 16, 4), (3, 1, 8, 1), (48, 1, 16, 16)),
    ],
)
def test_aligned_steps(base: int, divisor: int, block: int, step: int) -> None:
    """Whole blocks, or halves of one where the axis could not get narrower otherwise."""
    assert aligned_step(base, divisor, block) == step


def wide() -> nn.Module:
    """A narrow, two wide and a grouped layer."""
    grouped = nn.Conv2d(256, 96, 1, groups=4)
    return nn.Sequential(*chain(16, 64, 256)[:3], grouped, nn.Conv2d(96, 10, 1))


def test_a_device_decides_the_steps_that_no_user_gave() -> None:
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
def test_steps_that_a_user_gave_stay(
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
    """An axis with a given step keeps it."""
    space = space_of("Residual")
    assert [a.step for a in space.constrained(align="cuda").axes] == [8, 8]
    assert [a.step for a in space.constrained(align="cpu").axes] == [8, 16]
    assert [a.step for a in space.constrained(align=4, step={"stem": 1}).axes] == [1, 4]


@refusals("constraints")
def test_constraints_that_cannot_be_met_are_refused(values: dict[str, Any], message: str) -> None:
    """Each refusal names the culprit and the rule or the close match."""
    with refused(SpaceError, message):
        space_of("Residual").constrained(**values)


def test_a_tie_without_a_common_ratio_is_refused() -> None:
    """16 and 9 channels have no narrower widths in that ratio."""
    with pytest.raises(SpaceError, match=r"'0' \(16\), '1' \(9\) have no narrower widths"):
        SearchSpace.from_model(lambda: chain(16, 9), (3, 8, 8), tie=[["0", "1"]])


def test_scores_of_channels_are_summed_over_ties() -> None:
    """The lowest-scored channels of each tied axis go together."""
    whole = space_of("Plain")  # 8 and 16 channels
    space = whole.constrained(tie="conv*")
    a, b = np.arange(8.0), np.arange(16.0)[::-1]
    (tie_scores,) = space.tie_scores([a, b])
    assert tie_scores.tolist() == [i + (2 * i) + (2 * i + 1) for i in range(8)]
    assert whole.tie_scores([a, b])[1] is b


@pytest.mark.parametrize(("tie", "found"), [([[]], "is none"), ([["0"]], "is '0' alone")])
def test_a_tie_of_fewer_than_two_axes_is_refused(tie: list[list[str]], found: str) -> None:
    """Of none too."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    space = SearchSpace.from_model(model, (4,))
    with pytest.raises(SpaceError, match=f"a tie takes two axes or more, but .*{found}"):
        space.constrained(tie=tie)
