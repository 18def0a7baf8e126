"""Activation density: what is counted, when it has settled, how networks shrink in training."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conformance import RECIPE, ProposerConformance, setting, small_task
from hypothesis import given
from hypothesis import strategies as st
from strategies import counted_flops, space_of, spaces
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.dependency_graph import build_dependency_graph
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
from widthsearch.proposers.density import Counts, DensityMeter
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import EpochResult, Recipe
from widthsearch.training.trainer import Trainer

QUICK = ActivationDensity(patience=1, tolerance=0.3)


class TestActivationDensity(ProposerConformance):
    """Phases of one or two epochs."""

    method = "activation_density"
    proposer = QUICK


class TestInheriting(TestActivationDensity):
    """The same, with weights handed down."""

    proposer = replace(QUICK, weights="inherit")


# --- what is counted ---


class Known(nn.Module):
    """Four channels behind an activation, read in ways that have to be looked through."""

    def __init__(self, way: str = "conv", activation: Any = F.relu) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.head: nn.Module = nn.Linear(4, 10)
        if way == "conv":
            self.head = nn.Conv2d(4, 10, 1)
        elif way == "grid":
            self.head = nn.Linear(16, 10)
        self.way, self.activation = way, activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = self.activation(self.stem(x))
        if self.way == "conv":
            return self.head(F.max_pool2d(x, 2)).mean((2, 3))
        if self.way == "pool":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        elif self.way == "grid":
            x = nn.AdaptiveAvgPool2d(2)(x).flatten(1)
        elif self.way == "mean":
            x = x.mean(dim=[2, 3])
        elif self.way == "dropout":
            x = F.dropout(torch.flatten(F.avg_pool2d(x, 8), 1), 0.5)
        else:
            x = F.dropout(x[:, :, 0, 0], 0.5, training=True, inplace=True)
        return self.head(x)


def measured(space: SearchSpace, model: nn.Module, x: Tensor, **options: Any) -> list[Counts]:
    """The counts of one forward pass in training."""
    rules = options.pop("rules", {})
    channels = build_dependency_graph(space.model, options.pop("widths", space.base))
    with DensityMeter(channels, model, options.pop("threshold", None), rules) as meter:
        model(x)
    return meter.counts()


@pytest.mark.parametrize("way", ["conv", "pool", "grid", "mean", "dropout", "in place"])
def test_densities_by_hand(way: str) -> None:
    """Two of four channels are on, half of the images' pixels in one of them."""
    space = SearchSpace.from_model(lambda: Known(way), (3, 8, 8), step=1)
    model = space.build(space.base, seed=0)
    with torch.no_grad():
        model.stem.weight.zero_()
        model.stem.weight[3, 0] = 1.0  # the pixel itself
        model.stem.bias.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    x = torch.ones(4, 3, 8, 8)
    x[:2] = -1.0
    (counts,) = measured(space, model, x)
    assert counts.density().tolist() == [1.0, 0.0, 1.0, 0.5]
    values = 4 if way == "in place" else 4 * 64
    assert counts.total.tolist() == [values] * 4
    assert density_of_axes(space, [counts]) == (2.5 / 4,)


def read_by(model: nn.Module, layers: list[str], x: Tensor) -> dict[str, Tensor]:
    """What some layers read in a forward pass."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].detach()})
        )
        for name in layers
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return inputs


def images(count: int = 6) -> Tensor:
    """Noise."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_stream_is_counted_over_all_of_its_readers() -> None:
    """The residual stream is read twice: by the block, and behind an average by the classifier."""
    space = space_of("Residual")
    model = space.build(space.base, seed=0)
    seen = read_by(model, ["conv1", "conv2"], images())
    last: list[Tensor] = []
    with torch.no_grad():
        block = model.bn2(model.conv2(F.relu(model.bn1(model.conv1(seen["conv1"])))))
        last.append(F.relu(seen["conv1"] + block))
    stem, inner = measured(space, model, images())
    assert stem.active.sum() == int((seen["conv1"] != 0).sum() + (last[0] != 0).sum())
    assert stem.total.sum() == 2 * seen["conv1"].numel()
    assert inner.active.tolist() == (seen["conv2"] != 0).sum((0, 2, 3)).tolist()


def test_what_is_concatenated_counts_for_the_axes_that_it_is_of() -> None:
    """The first eight channels that `last` reads are the stem's, the other four the growth's."""
    space = space_of("Concatenated")
    model = space.build(space.base, seed=0)
    seen = read_by(model, ["grow", "last"], images())
    stem, grow, last = measured(space, model, images())
    both = (seen["last"] != 0).sum((0, 2, 3))
    alone = (seen["grow"] != 0).sum((0, 2, 3))
    assert stem.active.tolist() == (both[:8] + alone).tolist()
    assert grow.active.tolist() == both[8:].tolist()
    assert last.total.tolist() == [6 * 64] * 16


def test_flattened_positions_count_for_their_channel() -> None:
    """Each channel is 16 inputs of the classifier."""
    space = space_of("Plain")
    model = space.build(space.base, seed=0)
    seen = read_by(model, ["fc"], images())["fc"]
    _, second = measured(space, model, images())
    assert second.active.tolist() == (seen != 0).view(6, 16, 16).sum((0, 2)).tolist()


def test_groups_and_depthwise_filters_read_their_own_channels() -> None:
    """A unit of the grouped stem is a channel of each group; a depthwise filter reads its own."""
    space = space_of("Grouped")
    model = space.build(space.base, seed=0)
    seen = (read_by(model, ["grouped"], images())["grouped"] != 0).sum((0, 2, 3))
    stem = measured(space, model, images())[0]
    assert stem.active.tolist() == seen.view(4, 4).sum(0).tolist()
    narrow = space.widths({"stem": 4})  # four groups of one channel each are still groups
    model = space.build(narrow, seed=0)
    seen = (read_by(model, ["grouped"], images())["grouped"] != 0).sum()
    assert measured(space, model, images(), widths=narrow)[0].active.tolist() == [int(seen)]
    space = space_of("Depthwise")
    model = space.build(space.base, seed=0)
    inputs = read_by(model, ["depthwise", "project"], images())
    expand = measured(space, model, images())[space.names.index("expand")]
    both = sum((x != 0).sum((0, 2, 3)) for x in inputs.values())
    assert expand.active.tolist() == both.tolist()


def test_smooth_activations_count_by_a_share_of_their_root_mean_square() -> None:
    """GELU has no zeros: |x| > 0.05 rms, or what a threshold says; ReLU counts what is not zero."""
    space = SearchSpace.from_model(lambda: Known("conv", F.gelu), (3, 8, 8), step=1)
    model = space.build(space.base, seed=0)
    with torch.no_grad():
        x = F.gelu(model.stem(images()))
    rms = x.square().mean().sqrt()
    for threshold, share in ((None, 0.05), (0.3, 0.3)):
        rules: dict[str, float] = {}
        (counts,) = measured(space, model, images(), threshold=threshold, rules=rules)
        assert rules == {"head.weight": share}
        assert counts.active.tolist() == (x.abs() > share * rms).sum((0, 2, 3)).tolist()
        assert counts.active.sum() < x.numel()
    assert (measured(space, model, images(), threshold=0.0)[0].density() == 1).all()
    rules = {}
    measured(space_of("Plain"), space_of("Plain").build(1.0, seed=0), images(), rules=rules)
    assert rules == {"conv2.weight": 0.0, "fc.weight": 0.0}


def test_a_linear_layer_that_is_merely_random_counts_as_dense() -> None:
    """Normal activations are 96% dense, so bottlenecks without activation stay."""
    space = SearchSpace.from_model(lambda: Known("conv", lambda x: x), (3, 8, 8), step=1)
    model = space.build(space.base, seed=0)
    nn.init.zeros_(model.stem.bias)
    (counts,) = measured(space, model, images(64))
    assert 0.95 < counts.active.sum() / counts.total.sum() < 0.97


def test_training_is_counted_alone_and_is_what_it_was() -> None:
    """Every image once an epoch, none of evaluation; the same weights; no hook stays."""
    space, task = space_of("Residual"), small_task()
    recipe = Recipe(epochs=1, batch_size=50, lr=0.05)
    models = [space.build(space.base, seed=0) for _ in range(2)]
    with DensityMeter(
        build_dependency_graph(space.model, space.base), models[0], None, {}
    ) as meter:
        Trainer(models[0], task, recipe, seed=0).run_epoch()
    Trainer(models[1], task, recipe, seed=0).run_epoch()
    assert meter.counts()[1].total.tolist() == [100 * 64] * 32
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for module in models[0].modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_failing_forward_pass_leaves_nothing_behind() -> None:
    """Torch's functions are ours to watch during the pass alone."""
    space = space_of("Residual")
    model = space.build(space.base, seed=0)
    with (
        DensityMeter(build_dependency_graph(space.model, space.base), model, None, {}),
        pytest.raises(RuntimeError),
    ):
        model(torch.zeros(2, 5, 8, 8))
    assert not torch.overrides._get_current_function_mode_stack()


# --- the rules ---


def test_the_plateau_by_hand() -> None:
    """Over `patience` changes no density may range by more than the tolerance."""
    history = [(0.50, 0.9), (0.60, 0.9), (0.61, 0.9), (0.612, 0.9)]
    assert not plateaued(history, 0.02, 3)  # 0.5 to 0.612
    assert plateaued(history, 0.02, 2)  # 0.60 to 0.612: 0.012 of 0.612 is 1.96%
    assert not plateaued(history, 0.019, 2)
    assert not plateaued(history[:2], 0.5, 2)  # too short
    assert plateaued([(math.nan, 0.5)] * 2, 0.0, 1)  # what is not measured does not count
    # A steady drift is no plateau, however small its steps.
    assert not plateaued([(0.5 * 1.01**i,) for i in range(9)], 0.02, 3)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 0.5),
    st.integers(1, 5),
)
def test_plateaus(history: list[tuple[float, float]], tolerance: float, patience: int) -> None:
    """A standstill is one; more tolerance or less patience never undoes one."""
    assert plateaued([*history, *[history[-1]] * patience], tolerance, patience)
    if plateaued(history, tolerance, patience):
        assert len(history) > patience
        assert plateaued(history, tolerance + 0.1, patience)
        assert patience == 1 or plateaued(history, tolerance, patience - 1)


def test_narrower_widths_by_hand() -> None:
    """Rounded, snapped, never below the least; what is not measured stays."""
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
    assert space.widths(got) == got
    assert all(a <= b for a, b in zip(got.vector, space.base.vector, strict=True))
    assert narrowed(space, space.base, [1.0] * n) == space.base
    assert narrowed(space, space.base, [0.0] * n).vector == tuple(a.min_width for a in space.axes)
    power = first_power(space, space.base, densities)
    assert power is not None
    assert power != space.base and narrowed(space, power, [1.0] * n) == power


def test_complexity_by_hand() -> None:
    """10 epochs at 100 MACs and 20 at 25 are 1,500 of the 3,000 of 30 epochs at 100."""
    assert training_complexity([(10, 100), (20, 25)], 30, 100) == 0.5


def test_phases_hold_the_highest_learning_rate() -> None:
    """The recipe's warm-up, then its lr; a phase shorter than the warm-up still begins low."""
    recipe = Recipe(epochs=20, lr=0.4, schedule="one_cycle", warmup_epochs=2)
    rates = [held(recipe, 50).learning_rate(step, 10) for step in range(500)]
    assert rates[0] == pytest.approx(0.4 / 21)
    assert set(rates[20:]) == {0.4}
    assert held(recipe, 1).warmup == 0.5


# --- phases ---


class Spy(Trainer):
    """Records the networks that are trained; accuracies can be dictated."""

    runs: list[Spy]
    accuracies: tuple[float, ...] = ()

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.model, self.kwargs = model, kwargs
        self.begun = {k: v.detach().clone() for k, v in model.state_dict().items()}
        type(self).runs.append(self)

    def run_epoch(self) -> EpochResult:
        """The epoch, perhaps with another accuracy."""
        result = super().run_epoch()
        if self.accuracies:
            phase = min(len(self.runs), len(self.accuracies))
            self._curve[-1] = replace(result, accuracy=self.accuracies[phase - 1])
        return self._curve[-1]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    """A fresh one in place of the training loop."""
    own = type("Own", (Spy,), {"runs": []})
    monkeypatch.setattr(activation_density, "Trainer", own)
    return own


def test_every_phase_trains_the_smaller_network(spy: type[Spy]) -> None:
    """MACs of what is trained are those of the trajectory; the complexity is theirs."""
    space = space_of("Residual")
    proposal = replace(QUICK, drop=100.0)(space, small_task(), setting())
    phases = proposal.provenance["phases"]
    assert len(spy.runs) == len(phases) >= 2
    trained = [counted_flops(run.model, (3, 8, 8)) // 2 for run in spy.runs]
    assert trained == [phase["macs"] for phase in phases]
    assert trained == sorted(set(trained), reverse=True)
    assert [phase["widths"] for phase in phases] == [
        list(w.vector) for w in proposal.trajectory[: len(phases)]
    ]
    assert len({run.kwargs["seed"] for run in spy.runs}) == len(phases)
    spent = sum(p["epochs"] * p["macs"] for p in phases) / (RECIPE.epochs * trained[0])
    assert proposal.provenance["training_complexity"] == pytest.approx(spent)
    assert proposal.provenance["training_complexity_with_final"] == pytest.approx(
        spent + trained[-1] / trained[0]
    )
    for phase, following in itertools.pairwise(phases):
        asked = narrowed(space, space.widths(phase["widths"]), phase["densities"])
        assert following["widths"] == list(asked.vector)


def rows(run: Spy, of: str) -> set[bytes]:
    """The filters of a layer when its phase began, or as they are."""
    state = run.begun if of == "begun" else run.model.state_dict()
    return {row.numpy().tobytes() for row in state["bn1.running_mean"]}


def test_weights_are_made_anew_or_handed_down(spy: type[Spy]) -> None:
    """Inherited: the next phase begins with channels of the last, the densest; else with none."""
    space = space_of("Residual")
    QUICK(space, small_task(), setting())
    first, second = spy.runs[:2]
    assert not rows(first, "now") & rows(second, "begun")
    spy.runs.clear()
    proposal = replace(QUICK, weights="inherit")(space, small_task(), setting())
    first, second = spy.runs[:2]
    assert rows(second, "begun") < rows(first, "now")
    assert [p["inherited"] for p in proposal.provenance["phases"][:2]] == [False, True]


def cut(space: SearchSpace, counts: list[Counts], widths: list[int]) -> tuple[Any, Any]:
    """The base network, and what is cut from it."""
    run = activation_density._PhaseRun(QUICK, space, small_task(), setting(), {}, "phase")
    run.model = space.build(space.base, seed=0)
    run.channels = build_dependency_graph(space.unconstrained.model, space.unconstrained.base)
    run.counts = counts
    return run.model, run.cut(space.widths(widths))


def test_the_densest_channels_are_kept() -> None:
    """By hand: channels 1 and 2 are the least active."""
    space = SearchSpace.from_model(lambda: Known("pool"), (3, 8, 8), step=1)
    counts = Counts(np.array([3.0, 0.0, 1.0, 2.0]), np.full(4, 4.0))
    model, narrow = cut(space, [counts], [2])
    assert torch.equal(narrow.stem.weight, model.stem.weight[[0, 3]])
    assert torch.equal(narrow.head.weight, model.head.weight[:, [0, 3]])


def test_tied_axes_keep_the_densest_of_each() -> None:
    """Also at widths that the space without the tie does not have."""
    space = space_of("Residual").constrained(tie=[["stem", "conv1"]], step=1, min_width=0.05)
    counts = [Counts(np.arange(n, dtype=float), np.full(n, 32.0)) for n in (16, 32)]
    model, narrow = cut(space, counts, [1])
    assert torch.equal(narrow.stem.weight, model.stem.weight[15:])
    assert torch.equal(narrow.conv1.weight, model.conv1.weight[30:, 15:])


class ZeroPadded(nn.Module):
    """A shortcut that pads channels, so that no channel of either axis can be cut alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = F.relu(self.stem(x))
        y = self.conv1(x)
        more = y.shape[1] - x.shape[1]
        return self.fc(F.relu(y + F.pad(x, (0, 0, 0, 0, 0, more))).mean((2, 3)))


def test_channels_that_cannot_be_told_apart_begin_anew(spy: type[Spy]) -> None:
    """Such an axis is resized, but not inherited, and the phase says so."""
    space = SearchSpace.from_model(ZeroPadded, (3, 8, 8))
    assert build_dependency_graph(space.model, space.base).unknown
    method = replace(QUICK, weights="inherit", drop=100.0)
    phases = method(space, small_task(), setting()).provenance["phases"]
    assert len(phases) >= 2
    assert not any(phase["inherited"] for phase in phases)
    assert all(None not in phase["densities"] for phase in phases)


def test_tied_axes_have_one_density() -> None:
    """Over the readers of all of them; inherited widths may lie off the free space's own grid."""
    free = space_of("Grouped")
    tied = free.constrained(tie=[["stem", "last"]])
    counts = [
        Counts(np.full(4, 3.0), np.full(4, 4.0)),
        Counts(np.full(24, 1.0), np.full(24, 1.0)),
        Counts(np.full(8, 0.0), np.full(8, 2.0)),
    ]
    assert density_of_axes(tied, counts) == (12 / 32, 1.0)
    method = replace(QUICK, weights="inherit", drop=100.0)
    phases = method(tied, small_task(), setting()).provenance["phases"]
    assert [phase["inherited"] for phase in phases] == [False] + [True] * (len(phases) - 1)
    assert len(phases) >= 2


def stopped(method: ActivationDensity, **changes: Any) -> tuple[str, int]:
    """Why, and after how many phases."""
    proposal = method(space_of("Residual"), small_task(), replace(setting(), **changes))
    assert len(proposal.trajectory) >= 2
    return proposal.provenance["stopped"], len(proposal.provenance["phases"])


def test_why_it_stops(spy: type[Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy that falls, densities near 1, the lowest cost, or a grid too coarse."""
    spy.accuracies = (90.0, 88.0, 86.9)
    why, phases = stopped(replace(QUICK, drop=3.0), lowest=0.0)
    assert (why, phases) == ("accuracy is more than 3 points below the first phase's", 3)
    spy.accuracies = ()
    why, phases = stopped(replace(QUICK, until=0.01))
    assert (why, phases) == ("every density is 0.01 or more, or its axis at its least", 1)
    why, phases = stopped(QUICK, lowest=0.9)
    assert (why, phases) == ("the next widths are below the lowest wanted", 1)
    monkeypatch.setattr(activation_density, "density_of_axes", lambda *_: (0.94, 0.94))
    why, phases = stopped(QUICK)  # 16 by 2 and 32 by 4 stay
    assert (why, phases) == ("no density moves its axis by a step", 1)


def test_a_space_without_narrower_networks_has_one_member() -> None:
    """There is nothing else to propose."""
    space = SearchSpace.from_model(ZeroPadded, (3, 8, 8), step={"stem": 8, "conv1": 16})
    assert QUICK(space, small_task(), setting()).trajectory == (space.base,)


def test_training_that_diverges(spy: type[Spy]) -> None:
    """Of the base it is an error that says what to do; later it is the end."""
    spy.accuracies = (80.0, math.nan)
    proposal = QUICK(space_of("Residual"), small_task(), setting())
    assert proposal.provenance["stopped"] == "training diverged"
    assert proposal.provenance["phases"][-1]["accuracy"] is None
    with pytest.raises(StudyError, match=r"diverged in epoch 1; lower lr \(1e\+30\)"):
        ActivationDensity()(
            space_of("Plain"),
            small_task(),
            replace(setting(), recipe=replace(RECIPE, lr=1e30, warmup_epochs=0)),
        )


def test_one_epoch_is_the_ablation() -> None:
    """At initialisation batch norm and ReLU leave half of everything: a uniform halving."""
    proposal = ActivationDensity(max_epochs=1)(space_of("Residual"), small_task(), setting())
    first = proposal.provenance["phases"][0]
    assert (first["epochs"], first["plateau"]) == (1, False)
    assert first["densities"] == pytest.approx([0.5, 0.5], abs=0.15)


def test_it_says_how_far_it_is() -> None:
    """A line an epoch."""
    said: list[str] = []
    QUICK(space_of("Residual"), small_task(), replace(setting(), report=said.append))
    assert said[0].startswith("phase 1 at 1.00 of the base's MACs, epoch 1 of at most 2: accuracy ")
    assert any(line.startswith("phase 2 at 0.") for line in said)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "kept"),
        ("tolerance", -0.1),
        ("patience", 0),
        ("max_epochs", 0),
        ("until", 0.0),
        ("drop", -1.0),
        ("threshold", -0.1),
    ],
)
def test_bad_fields_are_refused(field: str, value: Any) -> None:
    """With the rule and the value."""
    with pytest.raises(StudyError, match=f"activation_density has {field}={value!r}"):
        ActivationDensity(**{field: value})
