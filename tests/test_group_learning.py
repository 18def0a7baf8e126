"""Group learning: the regulariser by autograd, and the steps by a literal loop."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conformance import RECIPE, setting, small_task
from strategies import SEARCH_SPACES, network_of, space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.proposers.filter_groups.learning import (
    GroupedLayer,
    GroupLasso,
    GroupLearning,
    find_layers,
    learn_groups,
)
from widthsearch.space.loading import load_space
from widthsearch.training.sgd import sgd_step

RESNET20 = f"{SEARCH_SPACES / 'resnet_cifar.py'}:resnet20"


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
    """Stems, depthwise and grouped convolutions are left out."""
    assert [layer.name for layer in find_layers(space_of(model))] == layers


def test_projection_shortcuts_are_not_grouped() -> None:
    """The other 1×1 convolutions of ResNet-50 are grouped."""
    space = load_space("torchvision:resnet50", (3, 64, 64))
    found = {layer.name for layer in find_layers(space)}
    every = {n for n, m in space.model.template.named_modules() if isinstance(m, nn.Conv2d)}
    assert every - found == {"conv1", *(f"layer{i}.0.downsample.0" for i in range(1, 5))}


def test_the_scale_equals_the_papers() -> None:
    """sqrt(C_in·H·W / 16384) · k / C_out^1.5 of ResNet-20's first block and last stage."""
    scales = {layer.name: layer.scale for layer in find_layers(load_space(RESNET20))}
    assert scales["layer1.0.conv1"] == pytest.approx(1 * 3 / 16**1.5)
    assert scales["layer3.0.conv1"] == pytest.approx((32 * 16 * 16 / 16384) ** 0.5 * 3 / 64**1.5)


# -- the regulariser ---------------------------------------------------------------------------


def literal_r(p: Tensor, weight: Tensor) -> Tensor:
    """R of one layer, as in the paper: p (G, F), weight (F, C, k, k)."""
    total = weight.new_zeros(())
    for p_g in p:
        norms = [((p_g[:, None, None] * w_c) ** 2).sum().sqrt() for w_c in weight.unbind(1)]
        total = total + p_g.sqrt().sum() ** 2 * sum(norms)
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


def test_first_derivatives_equal_autograds() -> None:
    """∂R/∂W and ∂R/∂p of two layers at once."""
    layers = [some_layer(seed) for seed in (0, 1)]
    p, weight = (torch.stack(of) for of in zip(*layers, strict=True))
    lasso = GroupLasso(p, weight.square().sum((-2, -1)))
    ours_w = weight * lasso.weight_factor()[..., None, None]
    ours_p = lasso.probability_gradient()
    for i, (q, w) in enumerate(layers):
        q.requires_grad_()
        w.requires_grad_()
        by_p, by_w = torch.autograd.grad(literal_r(q, w), (q, w))
        torch.testing.assert_close(ours_w[i], by_w, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours_p[i], by_p, rtol=1e-6, atol=1e-6)


def test_hard_groups_have_a_gradient() -> None:
    """One-hot assignments: ∂R/∂W = n_g² · W / ‖W of the group and channel‖."""
    weight = some_layer()[1]
    p = F.one_hot(torch.tensor([0, 0, 2, 2, 2]), 3).T.double()
    lasso = GroupLasso(p[None], weight.square().sum((-2, -1))[None])
    ours = weight * lasso.weight_factor()[0, ..., None, None]
    first = 4 * weight[:2] / weight[:2].square().sum((0, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(ours[:2], first, rtol=1e-6, atol=1e-6)


def test_the_mixed_derivative_equals_difference_quotients() -> None:
    """(∂²R/∂p∂W)·v by central differences of ∂R/∂p, and by autograd."""
    p, weight = some_layer()
    v = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    squares = weight.square().sum((-2, -1))
    ours = GroupLasso(p[None], squares[None]).mixed_product(2 * (weight * v).sum((-2, -1))[None])[0]

    def by_p(w: Tensor) -> Tensor:
        return GroupLasso(p[None], w.square().sum((-2, -1))[None]).probability_gradient()[0]

    e = 1e-5
    torch.testing.assert_close(
        ours, (by_p(weight + e * v) - by_p(weight - e * v)) / (2 * e), rtol=1e-6, atol=1e-6
    )
    q, w = p.clone().requires_grad_(), weight.clone().requires_grad_()
    (by_w,) = torch.autograd.grad(literal_r(q, w), w, create_graph=True)
    (exact,) = torch.autograd.grad((by_w * v).sum(), q)
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


# -- learning ----------------------------------------------------------------------------------


def batch() -> tuple[Tensor, Tensor]:
    """Images and labels of ten classes."""
    x = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(20) % 10


def backward_of(model: nn.Module) -> Callable[[], Tensor]:
    """The backward pass of the batch, for a step hook."""
    x, y = batch()

    def backward() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return backward


def two_steps_literally(
    model: nn.Module, layers: tuple[GroupedLayer, ...], groups: int, penalty: float
) -> tuple[dict[str, Tensor], nn.Module]:
    """Group learning by the formulas, layer by layer, with copies and autograd."""
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

    x, y = batch()
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


def test_learning_equals_the_literal_algorithm() -> None:
    """Two steps give the logits and weights of the formulas."""
    space, model, _ = network_of("Residual", seed=3)
    layers = find_layers(space)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        alphas, wanted = two_steps_literally(copy.deepcopy(model), layers, 2, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    penalties = [0.5 * 0.1 * ramp for ramp in (0.5, 1.0)]
    learning = GroupLearning(model, layers, groups=2, lr=1e-3, temperature=0.5, penalties=penalties)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        losses = [learning.step(optimizer, backward_of(model)).item() for _ in range(2)]
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
    """The look-ahead is undone: weights, momentum and statistics are those of plain steps."""
    space = space_of("Concatenated")
    layers, options = find_layers(space), {"groups": 4, "lr": 1e-3, "temperature": 0.5}
    results = []
    for plain in (True, False):
        model = space.build(space.base, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        learning = GroupLearning(model, layers, **options, penalties=[0.0] * 3)
        for _ in range(3):
            (sgd_step if plain else learning.step)(optimizer, backward_of(model))
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
    (a, momenta_a), (b, momenta_b) = results
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    for i, state in momenta_a.items():
        assert torch.equal(state["momentum_buffer"], momenta_b[i]["momentum_buffer"])


def test_a_strong_penalty_empties_channels_of_groups() -> None:
    """Learning moves energy out of some channels of each group."""
    space, task = space_of("Residual"), small_task()

    def least_share(penalty: float) -> float:
        model, layers = space.build(space.base, seed=0), find_layers(space)
        options = {"groups": 2, "penalty": penalty, "lr": 1e-2, "temperature": 0.5}
        groups = learn_groups(model, layers, task, RECIPE, setting(), **options)
        energy = model.conv1.weight.detach().square().sum((2, 3))
        of = torch.stack([energy[groups["conv1"] == g].sum(0) for g in range(2)])
        shares = (of / of.sum(1, keepdim=True)).sort(1).values
        return float(shares[:, :4].sum())

    assert least_share(20.0) < 0.5 * least_share(0.0)
