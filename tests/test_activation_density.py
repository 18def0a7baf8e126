"""Activation density: when densities have settled, and how networks shrink in training."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conformance import RECIPE, ProposerConformance, setting, small_task
from exact_space import Model
from hypothesis import given
from hypothesis import strategies as st
from strategies import counted_flops, graph_of, space_of, spaces
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.errors import StudyError
from widthsearch.proposers import activation_density
from widthsearch.proposers.activation_density import (
    ActivationDensity,
    density_of_axes,
    first_power,
    held,
    narrowed,
    plateaued,
    training_complexity,
)
from widthsearch.proposers.density import Counts
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import EpochResult, Recipe
from widthsearch.training.trainer import Trainer

QUICK = ActivationDensity(patience=1, tolerance=0.3)


class TestActivationDensity(ProposerConformance):
    """Phases of one or two epochs."""

    method = "activation_density"
    proposer = QUICK


class TestInheriting(TestActivationDensity):
    """The same with extracted weights."""

    proposer = replace(QUICK, weights="extract")


# --- the rules ---


def test_the_plateau_by_hand() -> None:
    """Over `patience` changes no density ranges by more than the tolerance."""
    history = [(0.50, 0.9), (0.60, 0.9), (0.61, 0.9), (0.612, 0.9)]
    assert not plateaued(history, 0.02, 3)  # 0.5 to 0.612
    assert plateaued(history, 0.02, 2)  # 0.60 to 0.612: 0.012 of 0.612 is 1.96%
    assert not plateaued(history, 0.019, 2)
    assert not plateaued(history[:2], 0.5, 2)  # too short
    assert plateaued([(math.nan, 0.5)] * 2, 0.0, 1)  # NaN is left out
    # A steady drift is no plateau, however small its steps.
    assert not plateaued([(0.5 * 1.01**i,) for i in range(9)], 0.02, 3)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 0.5),
    st.integers(1, 5),
)
def test_plateaus(history: list[tuple[float, float]], tolerance: float, patience: int) -> None:
    """Constant densities have settled; more tolerance or less patience never changes that."""
    assert plateaued([*history, *[history[-1]] * patience], tolerance, patience)
    if plateaued(history, tolerance, patience):
        assert len(history) > patience
        assert plateaued(history, tolerance + 0.1, patience)
        assert patience == 1 or plateaued(history, tolerance, patience - 1)


def test_narrower_widths_by_hand() -> None:
    """Rounded to the grid, never below the smallest width; an axis of NaN keeps its width."""
    space = space_of("Residual")  # stem 16 by 2, conv1 32 by 4
    assert narrowed(space, space.base, (0.5, 0.7)).vector == (8, 24)  # 22.4, 22, up to 24
    assert narrowed(space, space.base, (0.0, math.nan)).vector == (2, 32)
    assert narrowed(space, space.base, (1.0, 0.97)).vector == (16, 32)
    assert first_power(space, space.base, (0.97, 0.99)).vector == (14, 32)  # 0.97³ · 16 = 14.6
    assert first_power(space, space.base, (1.0, math.nan)) is not None
    assert first_power(space, space.widths([2, 4]), (0.5, 0.5)) is None


@given(st.data())
def test_narrower_widths(data: st.DataObject) -> None:
    """On the grid, never wider; dense axes stay."""
    space = data.draw(spaces)
    n = len(space.axes)
    densities = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    got = narrowed(space, space.base, densities)
    assert space.widths(got.vector) == got
    assert all(a <= b for a, b in zip(got.vector, space.base.vector, strict=True))
    assert narrowed(space, space.base, [1.0] * n) == space.base
    assert narrowed(space, space.base, [0.0] * n).vector == tuple(a.min_width for a in space.axes)
    power = first_power(space, space.base, densities)
    assert power is not None
    assert power != space.base and narrowed(space, power, [1.0] * n) == power


def test_complexity_by_hand() -> None:
    """10 epochs at 100 MACs and 20 at 25 are 1,500 of the 3,000 of 30 epochs at 100 MACs."""
    assert training_complexity([(10, 100), (20, 25)], 30, 100) == 0.5


def test_phases_hold_the_peak_learning_rate() -> None:
    """The recipe's warm-up, then its peak; a phase shorter than the warm-up starts low."""
    recipe = Recipe(epochs=20, lr=0.4, schedule="one_cycle", warmup_epochs=2)
    rates = [held(recipe, 50).learning_rate(step, 10) for step in range(500)]
    assert rates[0] == pytest.approx(0.4 / 21)
    assert set(rates[20:]) == {0.4}
    assert held(recipe, 1).warmup == 0.5


# --- phases ---


class Spy(Trainer):
    """Records the networks that are trained, and can replace their accuracies."""

    runs: list[Spy]
    accuracies: tuple[float, ...] = ()

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.model, self.kwargs = model, kwargs
        self.begun = {k: v.detach().clone() for k, v in model.state_dict().items()}
        type(self).runs.append(self)

    def run_epoch(self) -> EpochResult:
        """Train an epoch, and replace its accuracy if asked to."""
        result = super().run_epoch()
        if self.accuracies:
            phase = min(len(self.runs), len(self.accuracies))
            self._curve[-1] = replace(result, value=self.accuracies[phase - 1])
        return self._curve[-1]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    """A new spy in place of the trainer."""
    own = type("Own", (Spy,), {"runs": []})
    monkeypatch.setattr(activation_density, "Trainer", own)
    return own


def test_every_phase_trains_the_smaller_network(spy: type[Spy]) -> None:
    """The trained networks have the MACs of the trajectory and of the complexity."""
    space = space_of("Residual")
    proposal = replace(QUICK, drop=100.0)(space, small_task(), setting())
    phases = proposal.provenance["phases"]
    assert len(spy.runs) == len(phases) >= 2
    trained = [counted_flops(run.model, (3, 8, 8)) // 2 for run in spy.runs]
    assert trained == [phase["macs"] for phase in phases]
    assert trained == sorted(set(trained), reverse=True)
    path = [list(widths.vector) for widths in proposal.trajectory]
    assert [phase["widths"] for phase in phases] == path[: len(phases)]
    assert len({run.kwargs["seed"] for run in spy.runs}) == len(phases)
    spent = sum(p["epochs"] * p["macs"] for p in phases) / (RECIPE.epochs * trained[0])
    final = spent + trained[-1] / trained[0]
    assert proposal.provenance["training_complexity"] == pytest.approx(spent)
    assert proposal.provenance["training_complexity_with_final"] == pytest.approx(final)
    for phase, following in itertools.pairwise(phases):
        asked = narrowed(space, space.widths(phase["widths"]), phase["densities"])
        assert following["widths"] == list(asked.vector)


def rows(run: Spy, of: str) -> set[bytes]:
    """The filters of a layer at the start of its phase, or now."""
    state = run.begun if of == "begun" else run.model.state_dict()
    return {row.numpy().tobytes() for row in state["bn1.running_mean"]}


def test_weights_are_initialised_anew_or_extracted(spy: type[Spy]) -> None:
    """With `extract`, a phase starts with filters of the last one; otherwise with none."""
    space = space_of("Residual")
    QUICK(space, small_task(), setting())
    first, second = spy.runs[:2]
    assert not rows(first, "now") & rows(second, "begun")
    spy.runs.clear()
    proposal = replace(QUICK, weights="extract")(space, small_task(), setting())
    first, second = spy.runs[:2]
    assert rows(second, "begun") < rows(first, "now")
    assert [p["extracted"] for p in proposal.provenance["phases"][:2]] == [False, True]


def narrow(space: SearchSpace, counts: list[Counts], widths: list[int]) -> tuple[Any, Any]:
    """The base network, and the narrower network with its densest channels."""
    run = activation_density._Phases(QUICK, space, small_task(), setting())
    run.model = space.build(space.base, seed=0)
    run.graph = graph_of(space.unconstrained)
    run.counts = counts
    return run.model, run.narrow(space.widths(widths))


def test_the_densest_channels_are_kept() -> None:
    """By hand: channels 1 and 2 are the least active."""
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10))
    space = SearchSpace.from_model(net, (3, 8, 8), step=1)
    counts = Counts(np.array([3.0, 0.0, 1.0, 2.0]), np.full(4, 4.0))
    model, narrowest = narrow(space, [counts], [2])
    assert torch.equal(narrowest[0].weight, model[0].weight[[0, 3]])
    assert torch.equal(narrowest[3].weight, model[3].weight[:, [0, 3]])


def test_tied_axes_keep_the_densest_of_each() -> None:
    """Also at widths that are off the grid of the unconstrained space."""
    space = space_of("Residual").constrained(tie=[["stem", "conv1"]], step=1, min_width=0.05)
    counts = [Counts(np.arange(n, dtype=float), np.full(n, 32.0)) for n in (16, 32)]
    model, narrowest = narrow(space, counts, [1])
    assert torch.equal(narrowest.stem.weight, model.stem.weight[15:])
    assert torch.equal(narrowest.conv1.weight, model.conv1.weight[30:, 15:])


def zero_padded() -> nn.Module:
    """A shortcut that pads channels, so that channels of both axes cannot be told apart."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y = m.conv1(x)
        more = y.shape[1] - x.shape[1]
        return m.fc(F.relu(y + F.pad(x, (0, 0, 0, 0, 0, more))).mean((2, 3)))

    stem, conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    return Model(forward, stem=stem, conv1=conv1, fc=nn.Linear(16, 10))


def test_channels_that_cannot_be_told_apart_start_from_new_weights(spy: type[Spy]) -> None:
    """Such an axis is narrowed without extraction, and the phase records that."""
    space = SearchSpace.from_model(zero_padded, (3, 8, 8))
    assert graph_of(space).unknown
    method = replace(QUICK, weights="extract", drop=100.0)
    phases = method(space, small_task(), setting()).provenance["phases"]
    assert len(phases) >= 2
    assert not any(phase["extracted"] for phase in phases)
    assert all(None not in phase["densities"] for phase in phases)


def test_tied_axes_have_one_density() -> None:
    """Over all of their consumers, also with extracted weights."""
    free = space_of("Grouped")
    tied = free.constrained(tie=[["stem", "last"]])
    some = {4: (3.0, 4.0), 24: (1.0, 1.0), 8: (0.0, 2.0)}  # active and total of each group
    counts = [Counts(np.full(n, active), np.full(n, total)) for n, (active, total) in some.items()]
    assert density_of_axes(tied, counts) == (12 / 32, 1.0)
    method = replace(QUICK, weights="extract", drop=100.0)
    phases = method(tied, small_task(), setting()).provenance["phases"]
    assert [phase["extracted"] for phase in phases] == [False] + [True] * (len(phases) - 1)
    assert len(phases) >= 2


def stopped(method: ActivationDensity, **changes: Any) -> tuple[str, int]:
    """The reason of the end, and the number of phases."""
    proposal = method(space_of("Residual"), small_task(), replace(setting(), **changes))
    assert len(proposal.trajectory) >= 2
    return proposal.provenance["stopped"], len(proposal.provenance["phases"])


def test_the_reasons_to_stop(spy: type[Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    """A drop of accuracy, densities near 1, the lowest cost, or a coarse grid."""
    spy.accuracies = (90.0, 88.0, 86.9)
    why = "accuracy is more than 3 points below the first phase's"
    assert stopped(replace(QUICK, drop=3.0), lowest=0.0) == (why, 3)
    spy.accuracies = ()
    why = "every density is 0.01 or more, or its axis at its smallest width"
    assert stopped(replace(QUICK, until=0.01)) == (why, 1)
    why = "the next widths are below the lowest of interest"
    assert stopped(QUICK, lowest=0.9) == (why, 1)
    monkeypatch.setattr(activation_density, "density_of_axes", lambda *_: (0.94, 0.94))
    assert stopped(QUICK) == ("no density moves its axis by a step", 1)  # 16 by 2, 32 by 4


def test_a_space_without_narrower_networks_has_one_member() -> None:
    """The base is the only network of the grid."""
    space = SearchSpace.from_model(zero_padded, (3, 8, 8), step={"stem": 8, "conv1": 16})
    assert QUICK(space, small_task(), setting()).trajectory == (space.base,)


def test_divergence_ends_the_method(spy: type[Spy]) -> None:
    """In the first phase it is an error with the way out, later the end of the trajectory."""
    spy.accuracies = (80.0, math.nan)
    proposal = QUICK(space_of("Residual"), small_task(), setting())
    assert proposal.provenance["stopped"] == "training diverged"
    assert proposal.provenance["phases"][-1]["accuracy"] is None
    with pytest.raises(StudyError, match=r"with lr=1e\+30 it diverged in epoch 1; lower it"):
        wild = replace(RECIPE, lr=1e30, warmup_epochs=0)
        ActivationDensity()(space_of("Plain"), small_task(), replace(setting(), recipe=wild))


def test_one_epoch_per_phase_halves_all_widths() -> None:
    """At initialisation batch norm and ReLU leave half of the values of every axis."""
    proposal = ActivationDensity(max_steps=1)(space_of("Residual"), small_task(), setting())
    first = proposal.provenance["phases"][0]
    assert (first["epochs"], first["plateau"]) == (1, False)
    assert first["densities"] == pytest.approx([0.5, 0.5], abs=0.15)


def test_steps_decide_on_the_plateau_and_the_length_of_a_phase() -> None:
    """In whole epochs: two steps each of 50 of the 100 images."""

    def first(**fields: int) -> Any:
        method = ActivationDensity(tolerance=0.9, **fields)
        return method(space_of("Residual"), small_task(), setting()).provenance["phases"][0]

    ends = [(1, None), (1, 3), (1, 1), (3, 5), (3, 7)]
    found = [first(patience=p, max_steps=m) if m else first(patience=p) for p, m in ends]
    assert [(phase["epochs"], phase["steps"], phase["plateau"]) for phase in found] == [
        (2, 4, True),  # within the two epochs of the recipe
        (2, 4, True),
        (1, 2, False),
        (3, 6, True),  # two epochs' change
        (3, 6, True),
    ]


def test_short_phases_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without a plateau, with the field to raise."""
    proposal = ActivationDensity(patience=90)(space_of("Residual"), small_task(), setting())
    phases = proposal.provenance["phases"]
    (line,) = proposal.warnings
    assert line.startswith(f"{len(phases)} of {len(phases)} phases ended after 4 to 4 steps with")
    assert "raise max_steps, for example to 3,000" in line
    monkeypatch.setattr(activation_density, "SETTLING", 4)
    long = ActivationDensity(patience=90)(space_of("Residual"), small_task(), setting())
    assert long.warnings == []
    settled = ActivationDensity(patience=1, tolerance=0.9)
    assert settled(space_of("Residual"), small_task(), setting()).warnings == []


def test_progress_is_reported() -> None:
    """One line per epoch."""
    lines: list[str] = []
    QUICK(space_of("Residual"), small_task(), replace(setting(), report=lines.append))
    first = "phase 1 at 1.00 of the base's MACs, epoch 1 of at most 2: accuracy "
    assert lines[0].startswith(first)
    assert any(line.startswith("phase 2 at 0.") for line in lines)
