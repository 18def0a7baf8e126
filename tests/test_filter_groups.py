"""Filter groups: the regulariser by autograd, learning by a literal loop, pruning by hand."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import RECIPE, ProposerConformance, setting, small_task
from strategies import MODELS, space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.errors import SpaceError, StudyError
from widthsearch.proposers import Setting
from widthsearch.proposers.filter_groups.branched_space import (
    BranchedArchitecture,
    branched,
    with_branches,
)
from widthsearch.proposers.filter_groups.learning import (
    GroupedLayer,
    GroupLasso,
    GroupLearning,
    find_layers,
    learn_groups,
)
from widthsearch.proposers.filter_groups.proposer import (
    FilterGroups,
    GroupPruning,
    Pruned,
    cumulative_shares,
)
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.sgd import sgd_step


class TestFilterGroups(ProposerConformance):
    """Two groups, two epochs of each kind."""

    method = "filter_groups"
    proposer = FilterGroups(groups=2, penalty=1.0, members=3)


RESNET20 = f"{Path(__file__).parent.parent / 'search_spaces' / 'resnet_cifar.py'}:resnet20"


# -- which layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "layers"),
    {
        "Plain": ["conv2"],  # the stem reads the image
        "Residual": ["conv1", "conv2"],
        "Concatenated": ["grow", "last"],
        "Depthwise": ["expand", "project"],
        "Grouped": ["last"],
    }.items(),
)
def test_ungrouped_convolutions_between_free_widths_are_grouped(
    model: str, layers: list[str]
) -> None:
    """Not the stem, not depthwise or grouped ones."""
    assert [layer.name for layer in find_layers(space_of(model))] == layers


def test_projection_shortcuts_are_not_grouped() -> None:
    """ResNet-50's other 1×1 convolutions are."""
    space = load_space("torchvision:resnet50", (3, 64, 64))
    found = {layer.name for layer in find_layers(space)}
    every = {n for n, m in space.model.template.named_modules() if isinstance(m, nn.Conv2d)}
    assert every - found == {"conv1", *(f"layer{i}.0.downsample.0" for i in range(1, 5))}


def test_the_scale_is_the_papers() -> None:
    """sqrt(C_in·H·W / 16384) · k / C_out^1.5 of ResNet-20's first block and last stage."""
    scales = {layer.name: layer.scale for layer in find_layers(load_space(RESNET20))}
    assert scales["layer1.0.conv1"] == pytest.approx(1 * 3 / 16**1.5)
    assert scales["layer3.0.conv1"] == pytest.approx((32 * 16 * 16 / 16384) ** 0.5 * 3 / 64**1.5)


# -- the regulariser ---------------------------------------------------------------------------


def literal_r(p: Tensor, weight: Tensor) -> Tensor:
    """R of one layer, as in the paper: p (G, F), weight (F, C, k, k)."""
    total = weight.new_zeros(())
    for p_g in p:
        lasso = weight.new_zeros(())
        for c in range(weight.shape[1]):
            lasso = lasso + ((p_g[:, None, None] * weight[:, c]) ** 2).sum().sqrt()
        total = total + p_g.sqrt().sum() ** 2 * lasso
    return total


def some_layer(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities of 3 groups and a weight of 5 filters and 4 channels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(3, 5, generator=generator, dtype=torch.float64).softmax(0)
    return p, torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)


def test_r_by_hand() -> None:
    """One channel, two filters: s = (√p1 + √p2)², ℓ = sqrt((p1·3)² + (p2·4)²)."""
    p = torch.tensor([[0.25, 1.0]])
    weight = torch.tensor([3.0, 4.0]).view(2, 1, 1, 1)
    assert literal_r(p, weight).item() == pytest.approx(2.25 * (0.75**2 + 4.0**2) ** 0.5)


def test_first_derivatives_are_autograds() -> None:
    """∂R/∂W and ∂R/∂p of two layers at once."""
    layers = [some_layer(seed) for seed in (0, 1)]
    p, weight = (torch.stack(of) for of in zip(*layers, strict=True))
    lasso = GroupLasso(p, weight.square().sum((-2, -1)))
    ours_w = weight * lasso.over_weights()[..., None, None]
    ours_p = lasso.by_probabilities()
    for i, (q, w) in enumerate(layers):
        q.requires_grad_()
        w.requires_grad_()
        by_p, by_w = torch.autograd.grad(literal_r(q, w), (q, w))
        torch.testing.assert_close(ours_w[i], by_w, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours_p[i], by_p, rtol=1e-6, atol=1e-6)


def test_hard_groups_have_a_gradient() -> None:
    """One-hot assignments: ∂R/∂W = n_g² · W / ‖W of the group and channel‖, an empty group none."""
    weight = some_layer()[1]
    p = F.one_hot(torch.tensor([0, 0, 2, 2, 2]), 3).T.double()
    lasso = GroupLasso(p[None], weight.square().sum((-2, -1))[None])
    ours = weight * lasso.over_weights()[0, ..., None, None]
    first = 4 * weight[:2] / weight[:2].square().sum((0, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(ours[:2], first, rtol=1e-6, atol=1e-6)


def test_the_mixed_derivative_is_a_difference_quotient() -> None:
    """(∂²R/∂p∂W)·v against central differences of ∂R/∂p, and against autograd."""
    p, weight = some_layer()
    v = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    squares = weight.square().sum((-2, -1))
    ours = GroupLasso(p[None], squares[None]).along(2 * (weight * v).sum((-2, -1))[None])[0]

    def by_p(w: Tensor) -> Tensor:
        return GroupLasso(p[None], w.square().sum((-2, -1))[None]).by_probabilities()[0]

    e = 1e-5
    torch.testing.assert_close(
        ours, (by_p(weight + e * v) - by_p(weight - e * v)) / (2 * e), rtol=1e-6, atol=1e-6
    )
    q, w = p.clone().requires_grad_(), weight.clone().requires_grad_()
    (by_w,) = torch.autograd.grad(literal_r(q, w), w, create_graph=True)
    (exact,) = torch.autograd.grad((by_w * v).sum(), q)
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


# -- learning ----------------------------------------------------------------------------------


def two_steps_literally(
    model: nn.Module,
    layers: tuple[GroupedLayer, ...],
    x: Tensor,
    y: Tensor,
    groups: int,
    penalty: float,
) -> tuple[dict[str, Tensor], nn.Module]:
    """Group learning as the formulas say, a layer at a time, with copies and autograd."""
    tau, steps, lr = 0.5, 2, 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    names = [layer.name for layer in layers]
    weights = {n: model.get_submodule(n).weight for n in names}
    alphas = {n: torch.zeros(groups, len(w)) for n, w in weights.items()}
    adam = torch.optim.Adam(alphas.values(), lr=1e-3, eps=1e-12)
    scale = {layer.name: layer.scale * groups**1.5 for layer in layers}

    def penalise(net: nn.Module, p: dict[str, Tensor], factor: float) -> None:
        for n in names:
            w = net.get_submodule(n).weight
            (gradient,) = torch.autograd.grad(literal_r(p[n], w), w)
            with torch.no_grad():
                w -= factor * scale[n] * gradient

    for step in range(steps):
        p = {}
        for n, alpha in alphas.items():
            noise = -torch.empty(alpha.shape).exponential_().log()
            p[n] = F.softmax(alpha / tau + noise, 0)
        noises = {n: p[n].log() - alphas[n] / tau for n in names}  # up to a constant
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        factor = penalty * lr * (step + 1) / steps

        ahead = copy.deepcopy(model)
        second = torch.optim.SGD(ahead.parameters(), lr, momentum=0.9)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        penalise(ahead, p, factor)
        after_penalty = {n: ahead.get_submodule(n).weight.detach().clone() for n in names}
        second.zero_grad()
        F.cross_entropy(ahead(x), y).backward()
        second.step()
        direct = {}
        for n in names:
            q = p[n].clone().requires_grad_()
            (direct[n],) = torch.autograd.grad(
                literal_r(q, ahead.get_submodule(n).weight.detach()), q
            )
        penalise(ahead, p, factor)
        for n in names:
            v = ahead.get_submodule(n).weight.detach() - after_penalty[n]
            q = p[n].clone().requires_grad_()
            w = weights[n].detach().clone().requires_grad_()
            (by_w,) = torch.autograd.grad(literal_r(q, w), w, create_graph=True)
            (mixed,) = torch.autograd.grad((by_w * v).sum(), q)
            alpha = alphas[n].clone().requires_grad_()
            F.softmax(alpha / tau + noises[n], 0).backward(direct[n] + mixed)
            alphas[n].grad = alpha.grad
        adam.step()
        hard = {n: F.one_hot(a.argmax(0), groups).T.float() for n, a in alphas.items()}
        penalise(model, hard, factor)
    return alphas, model


def test_learning_is_the_literal_algorithm() -> None:
    """Two steps of the vectorised version give the logits and weights of the formulas."""
    space = space_of("Residual")
    layers = find_layers(space)
    model = space.build(space.base, seed=3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, 8, 8, generator=generator)
    y = torch.arange(20) % 10
    with torch.random.fork_rng():
        torch.manual_seed(5)
        alphas, wanted = two_steps_literally(copy.deepcopy(model), layers, x, y, 2, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    penalties = [0.5 * 0.1 * ramp for ramp in (0.5, 1.0)]
    learning = GroupLearning(model, layers, groups=2, lr=1e-3, temperature=0.5, penalties=penalties)

    def backward() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    with torch.random.fork_rng():
        torch.manual_seed(5)
        losses = [learning.step(optimizer, backward).item() for _ in range(2)]
    assert losses[1] != losses[0]
    found = {
        layer.name: logits
        for stack in learning._stacks
        for layer, logits in zip(stack.layers, stack.logits, strict=True)
    }
    for name, alpha in alphas.items():
        assert alpha.abs().max() > 5e-4
        torch.testing.assert_close(found[name], alpha, rtol=1e-3, atol=1e-6)
    state = model.state_dict()
    for name, tensor in wanted.state_dict().items():  # batch norm's statistics too
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)


def test_without_a_penalty_learning_is_training() -> None:
    """Looking ahead leaves no trace: weights, momentum and statistics are those of plain steps."""
    space = space_of("Concatenated")
    x, y = torch.randn(20, 3, 8, 8), torch.arange(20) % 10
    results = []
    for plain in (True, False):
        model = space.build(space.base, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        learning = GroupLearning(
            model,
            find_layers(space),
            groups=4,
            lr=1e-3,
            temperature=0.5,
            penalties=[0.0] * 3,
        )

        def backward(model: nn.Module = model) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

        for _ in range(3):
            (sgd_step if plain else learning.step)(optimizer, backward)
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
    (a, momenta_a), (b, momenta_b) = results
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    for i, state in momenta_a.items():
        assert torch.equal(state["momentum_buffer"], momenta_b[i]["momentum_buffer"])


def test_a_strong_penalty_empties_channels_of_groups() -> None:
    """Learning moves energy out of some channels of each group, and accuracy survives."""
    space, task = space_of("Residual"), small_task()

    def least_share(penalty: float) -> float:
        model = space.build(space.base, seed=0)
        groups = learn_groups(
            model,
            find_layers(space),
            task,
            RECIPE,
            groups=2,
            penalty=penalty,
            lr=1e-2,
            temperature=0.5,
            seed=0,
            device="cpu",
            report=lambda _: None,
        )
        energy = model.conv1.weight.detach().square().sum((2, 3))
        of = torch.stack([energy[groups["conv1"] == g].sum(0) for g in range(2)])
        shares = (of / of.sum(1, keepdim=True)).sort(1).values
        return float(shares[:, :4].sum())

    assert least_share(20.0) < 0.5 * least_share(0.0)


def test_divergence_is_an_error() -> None:
    """With the setting that caused it."""
    space, task = space_of("Residual"), small_task()
    with pytest.raises(StudyError, match=r"penalty=1e\+30"):
        FilterGroups(penalty=1e30)(space, task, setting())


# -- pruning -----------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    """Below β goes the smallest while the sum stays below β; the largest never."""
    shares = cumulative_shares(np.array([[1.0, 4.0, 3.0, 2.0]]))
    assert shares.tolist() == [[0.1, np.inf, 0.6, 0.3]]
    assert (shares >= 0.1).all()  # a β that is not above the smallest energy drops nothing
    assert ((shares >= 0.11) == [[False, True, True, True]]).all()
    assert ((shares >= 0.3) == [[False, True, True, True]]).all()
    assert ((shares >= 0.31) == [[False, True, True, False]]).all()
    assert ((shares >= 1.0) == [[False, True, False, False]]).all()
    assert cumulative_shares(np.zeros((1, 2))).tolist() == [[0.0, np.inf]]


class Chain(nn.Module):
    """Three 1×1 convolutions in a row, of 2, 3 and 2 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1, bias=False)
        self.a = nn.Conv2d(2, 3, 1, bias=False)
        self.b = nn.Conv2d(3, 2, 1, bias=False)
        self.fc = nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        return self.fc(F.relu(self.b(F.relu(self.a(self.stem(x))))).mean((2, 3)))


@cache
def chain_space() -> SearchSpace:
    """The space of the chain."""
    return SearchSpace.from_model(Chain, (3, 8, 8))


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


def read(pruning: GroupPruning, pruned: Pruned) -> dict[str, list[tuple[list[int], list[int]]]]:
    """The branches by layer: filters and inputs."""
    architecture = pruning.architecture(pruned)
    return {
        layer: [(list(b.filters), list(b.inputs)) for b in branches]
        for layer, branches in architecture.layers.items()
    }


def test_dead_structure_goes_from_a_chain() -> None:
    """What `b` no longer reads, `a` no longer makes; what nobody reads, the stem neither."""
    pruning = pruning_of(
        chain_space(),
        {"a": [[3, 1], [3, 1], [1, 3]], "b": [[3, 3, 1], [3, 3, 1]]},
        {"a": [0, 0, 1], "b": [0, 0]},
    )
    whole = pruning.pruned(0.0)
    assert whole.units.all()
    assert pruning.macs(whole) == 64 * (6 + 6 + 6) + 20
    # b's channel 2 has 2/38 of its energy: below β it goes. a's filter 2 is then read by none, and
    # with it goes group 1 of a, which alone reads channel 1 well; a's group 0 has 2/20 there.
    pruned = pruning.pruned(0.06)
    assert read(pruning, pruned) == {"a": [([0, 1], [0, 1])], "b": [([0, 1], [0, 1])]}
    assert pruning.widths(pruned).vector == (2, 2, 2)
    # Above 0.1 group 0 of a reads channel 0 alone, and the stem's channel 1 is read by none.
    pruned = pruning.pruned(0.11)
    assert read(pruning, pruned) == {"a": [([0, 1], [0])], "b": [([0, 1], [0, 1])]}
    assert pruning.widths(pruned).vector == (1, 2, 2)
    assert pruning.keep(pruned) == {"stem": [0], "a": [0, 1], "b": [0, 1]}
    assert pruning.macs(pruned) == 64 * (3 + 2 + 4) + 20


def test_whole_filters_go_where_nothing_else_would_remove_them() -> None:
    """`b` is read by the classifier, which is not grouped; `a` by `b` alone."""
    pruning = pruning_of(
        chain_space(),
        {"a": [[3, 3], [3, 3], [0.1, 0.1]], "b": [[3, 3, 3], [1, 1, 1]]},
        {"a": [0, 0, 0], "b": [0, 1]},
    )
    # b's filter 1 has a tenth of the energy; a's filter 2 far less, but it is read.
    pruned = pruning.pruned(0.11)
    assert read(pruning, pruned) == {"a": [([0, 1, 2], [0, 1])], "b": [([0], [0, 1, 2])]}
    assert pruning.widths(pruned).vector == (2, 3, 1)


def test_the_stream_of_a_residual_block_stays_where_others_make_it() -> None:
    """Filters of the last convolution go one by one; the stem goes on making their channels."""
    space = space_of("Residual")
    model = space.build(space.base, seed=0)
    with torch.no_grad():
        model.conv2.weight[:4] *= 1e-3  # its filters
        model.conv1.weight[8:16] *= 1e-3  # not pruned as such: conv2 reads their channels
        model.conv2.weight[:, 20:] *= 1e-3  # whose makers in conv1 die
    groups = {"conv1": torch.arange(32) % 2, "conv2": torch.arange(16) % 2}
    pruning = GroupPruning(space, model, groups, 2)
    pruned = pruning.pruned(1e-3)
    assert pruning.widths(pruned).vector == (16, 20)
    conv1, conv2 = read(pruning, pruned)["conv1"], read(pruning, pruned)["conv2"]
    assert sorted(conv1[0][0] + conv1[1][0]) == list(range(20))
    assert sorted(conv2[0][0] + conv2[1][0]) == list(range(4, 16))
    assert conv2[0][1] == list(range(20))


class Forked(nn.Module):
    """Two 1×1 convolutions that are summed, and one that reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1, bias=False)
        self.a = nn.Conv2d(2, 2, 1, bias=False)
        self.b = nn.Conv2d(2, 2, 1, bias=False)
        self.c = nn.Conv2d(2, 2, 1, bias=False)
        self.fc = nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = self.stem(x)
        return self.fc(self.c(F.relu(self.a(x) + self.b(x))).mean((2, 3)))


@pytest.mark.parametrize("both", [True, False])
def test_a_channel_goes_when_no_filter_makes_it(both: bool) -> None:
    """Both makers' filters must have gone; then its reader reads the other channel alone."""
    space = SearchSpace.from_model(Forked, (3, 8, 8))
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


def test_dead_structure_goes_through_a_concatenation() -> None:
    """`last` reads the stem's 8 channels and 4 of `grow`: what it leaves of those dies there."""
    space = space_of("Concatenated")
    model = space.build(space.base, seed=0)
    with torch.no_grad():
        model.last.weight[:, [0, 9]] = 0  # the stem's first, and the second of `grow`
        model.grow.weight[:, 0] = 0
    groups = {"grow": torch.zeros(4, dtype=torch.long), "last": torch.arange(16) // 8}
    pruning = GroupPruning(space, model, groups, 2)
    pruned = pruning.pruned(1e-6)
    assert pruning.keep(pruned) == {
        "stem": list(range(1, 8)),
        "grow": [0, 2, 3],
        "last": list(range(16)),
    }
    branches = pruning.architecture(pruned).layers
    assert [b.inputs for b in branches["last"]] == [tuple(range(10))] * 2
    assert [b.filters for b in branches["grow"]] == [(0, 1, 2)]


def test_pinned_axes_keep_their_channels() -> None:
    """A user's pin holds: filters go, their channels stay."""
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


def test_tied_axes_are_as_wide_as_the_widest_asks() -> None:
    """Half of one and all of the other is all."""
    space = chain_space().constrained(tie=[["stem", "b"]], min_width=0.5, step=1)
    pruning = pruning_of(
        space,
        {"a": [[3, 0.1], [3, 0.1], [3, 0.1]], "b": [[3, 3, 3], [3, 3, 3]]},
        {"a": [0, 0, 0], "b": [0, 0]},
    )
    pruned = pruning.pruned(0.01)
    assert pruning.widths(pruned).vector == (1, 3, 2)
    assert pruning.projected(pruned).vector == (2, 3)


def test_block_macs_of_resnet20_are_the_papers() -> None:
    """40,108,032 MACs in blocks, shortcuts left out; the last of each block loses whole filters."""
    space = load_space(RESNET20)
    model = space.build(space.base, seed=0)
    groups = {
        layer.name: torch.arange(len(model.get_submodule(layer.name).weight)) % 4
        for layer in find_layers(space)
    }
    pruning = GroupPruning(space, model, groups, 4)
    whole = pruning.pruned(0.0)
    assert pruning.grouped_macs(whole) == 40_108_032
    assert pruning.macs(whole) == space.cost(space.base).macs
    last = [layer.name for layer in pruning._layers if np.isfinite(layer.whole).any()]
    assert last == [f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in range(3)]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_budgets_are_met_from_below(model: str) -> None:
    """By the least β that does, at the exact cost of the branched network, nested in β."""
    space = space_of(model)
    net = space.build(space.base, seed=1)
    groups = {
        layer.name: torch.arange(len(net.get_submodule(layer.name).weight)) % 3
        for layer in find_layers(space)
    }
    pruning = GroupPruning(space, net, groups, 3)
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
            assert not (pruned.units & ~before.units).any()
            assert not any(
                (a & ~b).any() for a, b in zip(pruned.inputs, before.inputs, strict=True)
            )
        before = pruned
    assert pruning.solve(1.0) is None  # one MAC


@pytest.mark.parametrize("model", sorted(MODELS))
def test_the_branched_network_computes_what_the_masked_one_does(model: str) -> None:
    """Inherited weights, eval mode, 1e-5: weights at zero where pruned, dead channels masked."""
    space = space_of(model)
    net = space.build(space.base, seed=2)
    with torch.no_grad():  # statistics of batch norm that matter
        for _ in range(3):
            net(torch.randn(32, 3, 8, 8))
    net.eval()
    layers = find_layers(space)
    groups = {
        layer.name: torch.arange(len(net.get_submodule(layer.name).weight)) % 3 for layer in layers
    }
    pruning = GroupPruning(space, net, groups, 3)
    pruned = pruning.pruned(0.4)
    fine = space.constrained(
        min_width={a.name: t.divisor for a, t in zip(space.axes, space.trace.axes, strict=True)},
        step=1,
    )
    reference = copy.deepcopy(net)
    with torch.no_grad():
        for layer, alive, reads in zip(layers, pruned.filters, pruned.inputs, strict=True):
            kept = torch.from_numpy(reads)[groups[layer.name]] & torch.from_numpy(alive)[:, None]
            reference.get_submodule(layer.name).weight.mul_(kept[:, :, None, None])
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), fine.masked(reference, pruning.keep(pruned)):
        wanted = reference(x)
    narrow = fine.extract(net, pruning.keep(pruned))
    ours = with_branches(narrow, pruning.architecture(pruned))
    assert not torch.allclose(wanted, net(x), atol=1e-3)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-5, atol=1e-5)


# -- the proposal ------------------------------------------------------------------------------


def test_the_provenance_holds_the_branched_architectures() -> None:
    """Each within its budget, with its plain projection in the trajectory, and exact MACs."""
    space = space_of("Residual")
    proposal = FilterGroups(groups=2, penalty=1.0, members=3)(space, small_task(), setting())
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
    """By name, with another method."""
    space = SearchSpace.from_model(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10)),
        (3, 8, 8),
        name="mlp",
    )
    with pytest.raises(SpaceError, match=r"space 'mlp' has none; use another method"):
        FilterGroups()(space, small_task(), Setting())


@pytest.mark.parametrize(
    "field", [{"groups": 0}, {"penalty": -1.0}, {"temperature": 0.0}, {"members": 0}]
)
def test_bad_hyperparameters_are_refused(field: dict[str, float]) -> None:
    """With the rule and the value."""
    name, value = next(iter(field.items()))
    with pytest.raises(StudyError, match=rf"`{name} .*{name}={value}"):
        FilterGroups(**field)
