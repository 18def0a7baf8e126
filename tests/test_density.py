"""The density meter: which values it counts, and that it disturbs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import RECIPE, small_task
from exact_space import Model
from strategies import graph_of, network_of, space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.proposers.activation_density import density_of_axes
from widthsearch.proposers.density import Counts, DensityMeter
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.trainer import Trainer


def pooled(way: str, activation: Any = F.relu) -> nn.Module:
    """Four channels behind an activation, then pooling, dropout or flattening, then a consumer."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "conv": lambda x: F.max_pool2d(x, 2),
        "pool": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        "grid": lambda x: nn.AdaptiveAvgPool2d(2)(x).flatten(1),
        "mean": lambda x: x.mean(dim=[2, 3]),
        "dropout": lambda x: F.dropout(torch.flatten(F.avg_pool2d(x, 8), 1), 0.5),
        "in place": lambda x: F.dropout(x[:, :, 0, 0], 0.5, training=True, inplace=True),
    }
    heads = {"conv": nn.Conv2d(4, 10, 1), "grid": nn.Linear(16, 10)}
    stem, head = nn.Conv2d(3, 4, 1), heads.get(way, nn.Linear(4, 10))
    return Model(lambda m, x: m.head(ways[way](activation(m.stem(x)))), stem=stem, head=head)


def measured(space: SearchSpace, model: nn.Module, x: Tensor, **options: Any) -> list[Counts]:
    """The counts of one forward pass in training."""
    rules = options.pop("rules", {})
    graph = build_dependency_graph(space.model, options.pop("widths", space.base))
    with DensityMeter(graph, model, options.pop("threshold", None), rules) as meter:
        model(x)
    return meter.counts()


@pytest.mark.parametrize("way", ["conv", "pool", "grid", "mean", "dropout", "in place"])
def test_densities_by_hand(way: str) -> None:
    """Two of four channels are active, and in a third one half of the images."""
    space = SearchSpace.from_model(lambda: pooled(way), (3, 8, 8), step=1)
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
    """The inputs of some layers in a forward pass."""
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
    """Random images."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_stream_is_counted_over_all_of_its_consumers() -> None:
    """The stream has two consumers: the block, and the classifier behind an average."""
    space, model, _ = network_of("Residual")
    seen = read_by(model, ["conv1", "conv2"], images())
    with torch.no_grad():
        block = model.bn2(model.conv2(F.relu(model.bn1(model.conv1(seen["conv1"])))))
        last = F.relu(seen["conv1"] + block)
    stem, inner = measured(space, model, images())
    assert stem.active.sum() == int((seen["conv1"] != 0).sum() + (last != 0).sum())
    assert stem.total.sum() == 2 * seen["conv1"].numel()
    assert inner.active.tolist() == (seen["conv2"] != 0).sum((0, 2, 3)).tolist()


def test_the_parts_of_a_concatenation_count_for_their_axes() -> None:
    """The first eight input channels of `last` are the stem's, the other four the growth's."""
    space, model, _ = network_of("Concatenated")
    seen = read_by(model, ["grow", "last"], images())
    stem, grow, last = measured(space, model, images())
    both = (seen["last"] != 0).sum((0, 2, 3))
    alone = (seen["grow"] != 0).sum((0, 2, 3))
    assert stem.active.tolist() == (both[:8] + alone).tolist()
    assert grow.active.tolist() == both[8:].tolist()
    assert last.total.tolist() == [6 * 64] * 16


def test_flattened_positions_count_for_their_channel() -> None:
    """Each channel has 16 inputs of the classifier."""
    space, model, _ = network_of("Plain")
    seen = read_by(model, ["fc"], images())["fc"]
    _, second = measured(space, model, images())
    assert second.active.tolist() == (seen != 0).view(6, 16, 16).sum((0, 2)).tolist()


def test_grouped_and_depthwise_convolutions_count_their_own_channels() -> None:
    """A channel group of the stem has one channel of each convolution group."""
    space, model, _ = network_of("Grouped")
    seen = (read_by(model, ["grouped"], images())["grouped"] != 0).sum((0, 2, 3))
    stem = measured(space, model, images())[0]
    assert stem.active.tolist() == seen.view(4, 4).sum(0).tolist()
    narrow = space.widths({"stem": 4})  # four groups of one channel each are still groups
    model = space.build(narrow, seed=0)
    seen = (read_by(model, ["grouped"], images())["grouped"] != 0).sum()
    assert measured(space, model, images(), widths=narrow)[0].active.tolist() == [int(seen)]
    space, model, _ = network_of("Depthwise")
    inputs = read_by(model, ["depthwise", "project"], images())
    expand = measured(space, model, images())[space.names.index("expand")]
    both = sum((x != 0).sum((0, 2, 3)) for x in inputs.values())
    assert expand.active.tolist() == both.tolist()


def test_smooth_activations_have_a_relative_threshold() -> None:
    """GELU has no zeros: |x| > 0.05 rms, or the given share; ReLU counts nonzero values."""
    space = SearchSpace.from_model(lambda: pooled("conv", F.gelu), (3, 8, 8), step=1)
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
    space, model, _ = network_of("Plain")
    rules = {}
    measured(space, model, images(), rules=rules)
    assert rules == {"conv2.weight": 0.0, "fc.weight": 0.0}


def test_bf16_activations_without_zeros_are_counted() -> None:
    """By the relative threshold, in the precision that `auto` takes on a GPU."""
    space = SearchSpace.from_model(lambda: pooled("conv", F.gelu), (3, 8, 8), step=1)
    model = space.build(space.base, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        (counts,) = measured(space, model, images())
        x = F.gelu(model.stem(images()))
    assert x.dtype == torch.bfloat16
    rms = x.float().square().mean().sqrt().bfloat16()
    assert counts.active.tolist() == (x.abs() > 0.05 * rms).sum((0, 2, 3)).tolist()
    assert 0 < counts.active.sum() < x.numel()


def test_normally_distributed_activations_count_as_dense() -> None:
    """They are 96% dense, so that bottlenecks without activation keep their width."""
    space = SearchSpace.from_model(lambda: pooled("conv", lambda x: x), (3, 8, 8), step=1)
    model = space.build(space.base, seed=0)
    nn.init.zeros_(model.stem.bias)
    (counts,) = measured(space, model, images(64))
    assert 0.95 < counts.active.sum() / counts.total.sum() < 0.97


def test_only_training_is_counted_and_it_is_not_changed() -> None:
    """Every image counts once per epoch, weights are the same, and no hook remains."""
    space, task = space_of("Residual"), small_task()
    models = [space.build(space.base, seed=0) for _ in range(2)]
    with DensityMeter(graph_of(space), models[0], None, {}) as meter:
        Trainer(models[0], task, RECIPE, seed=0).run_epoch()
    Trainer(models[1], task, RECIPE, seed=0).run_epoch()
    assert meter.counts()[1].total.tolist() == [100 * 64] * 32
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for module in models[0].modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_failing_forward_pass_leaves_no_function_mode() -> None:
    """The meter overrides torch's functions during the pass only."""
    _, model, graph = network_of("Residual")
    with DensityMeter(graph, model, None, {}), pytest.raises(RuntimeError):
        model(torch.zeros(2, 5, 8, 8))
    assert not torch.overrides._get_current_function_mode_stack()
