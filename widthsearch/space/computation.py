"""Verifies what networks compute: their start and outputs, masks against cuts, and training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.errors import SpaceError
from widthsearch.modules.tree import held_tensors, join, tensors_of
from widthsearch.torch_internals import tree_map_only
from widthsearch.tracing.inputs import call, sample

if TYPE_CHECKING:
    from widthsearch.space.search_space import SearchSpace

TOLERANCE = 1e-5
"""The largest difference of two outputs that count as equal, as a share of the largest element."""


def compare_with_class(space: SearchSpace, vector: Sequence[int], seed: int) -> bool:
    """Compare a network with the one that the model's class gives at these widths, on the CPU.

    Args:
        space: The space.
        vector: The widths.
        seed: Seeds both initialisations, and the input.

    Returns:
        Whether there is such a network: see
        :meth:`~widthsearch.tracing.traced_model.TracedModel.reference`.

    Raises:
        SpaceError: A tensor starts with other values, or the outputs differ.
    """
    reference = space.model.reference(vector, seed)
    if reference is None:
        return False
    built = space.build(vector, seed=seed)
    pairs = zip(tensors_of(built), tensors_of(reference), strict=True)
    for (_, layer, name, ours), (*_, theirs) in pairs:
        if not torch.equal(ours.detach().nan_to_num(), theirs.detach().nan_to_num()):
            raise SpaceError(f"{join(layer, name)!r} does not start as the model's class starts it")
    x = random_inputs(space, 2, seed)
    worst = largest_difference(outputs(built.eval(), x), outputs(reference.eval(), x))
    if worst > TOLERANCE:
        raise SpaceError(f"its outputs are {worst:.1g} off those of the model's class")
    return True


def compare_masks_with_cuts(space: SearchSpace, seed: int) -> tuple[int, int]:
    """Compare masked channels of the base with a network without them, on the CPU.

    Args:
        space: The space.
        seed: Seeds the channels, the values and the input.

    Returns:
        The number of axes that were compared, and of those whose channels are unknown.

    Raises:
        SpaceError: The outputs differ; the message names the first axis that alone makes a
            difference.
    """
    space = space.unconstrained
    keep, unknown = random_channels(space, seed)
    if masks_off_cuts(space, keep, seed) > TOLERANCE:
        for axis, channels in keep.items():
            if (alone := masks_off_cuts(space, {axis: channels}, seed)) > TOLERANCE:
                raise SpaceError(
                    f"masking channels of axis {axis!r} is {alone:.1g} off cutting them out; pin "
                    "it for methods that rate channels"
                )
        raise SpaceError("masking channels of several axes is not what cutting them out gives")
    return len(keep), unknown


def masks_off_cuts(space: SearchSpace, keep: Mapping[str, Sequence[int]], seed: int) -> float:
    """The largest difference of the outputs of masked channels and of the channels alone."""
    base = space.build(space.base, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*base.parameters(), *base.buffers()):
            # Norms and biases that start at 1 and 0 would hide differences.
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
    x = random_inputs(space, 1, seed)
    with space.masked(base, keep):
        masked = outputs(base, x)
    return largest_difference(masked, outputs(space.extract(base, keep).eval(), x))


def random_channels(space: SearchSpace, seed: int) -> tuple[dict[str, list[int]], int]:
    """Channels to keep of each axis whose channels are known, and the number of other axes."""
    graph = build_dependency_graph(space.model, space.base)
    rng = random.Random(seed)
    keep: dict[str, list[int]] = {}
    for i, (axis, traced) in enumerate(zip(space.axes, space.trace.axes, strict=True)):
        narrower = [w for w in axis.grid if w < axis.base]
        if i not in graph.unknown and narrower:
            kept = set(rng.sample(range(graph.groups[i]), rng.choice(narrower) // traced.divisor))
            channels = enumerate(graph.channels[i].tolist())
            if positions := [c for c, group in channels if group in kept]:
                keep[axis.name] = positions
    return keep, len(graph.unknown)


def untrained(network: nn.Module, x: Any, *, gradients: bool = False) -> set[str]:
    """The trainable parameters that two training steps leave as they are.

    Args:
        network: A network on the CPU; its parameters change.
        x: A batch.
        gradients: Whether to name those alone that get no gradient at all.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trained:
        return set()
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.Adam(trained.values())  # by a small gradient it moves as far
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for _ in range(2):
            losses = [(out * torch.randn_like(out)).mean() for out in floats(call(network, x))]
            if losses := [loss for loss in losses if loss.requires_grad]:
                torch.autograd.backward(losses)
            optimizer.step()
    stay = {name for name, p in trained.items() if torch.equal(p, before[name])}
    return {name for name in stay if not gradients or trained[name].grad is None}


# -- inputs and outputs --------------------------------------------------------------------------


def random_inputs(space: SearchSpace, batch: int, seed: int) -> Any:
    """A batch of random numbers; integers and truth values are those of the space's sample."""
    generator = torch.Generator().manual_seed(seed)
    return tree_map_only(
        Tensor,
        lambda t: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t,
        sample(space.input_shape, batch, "cpu"),
    )


@torch.no_grad()
def outputs(network: nn.Module, x: Any) -> list[Tensor]:
    """The floating-point outputs, from one state of the random generator."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return list(floats(call(network, x)))


def floats(out: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a network's output, whatever holds them; of complex ones too,
    as real and imaginary parts."""
    for x in held_tensors(out):
        if x.is_complex():
            yield torch.view_as_real(x.resolve_conj())
        elif x.is_floating_point():
            yield x


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest element of each tensor of ``b``."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if y.numel():
            x, y = x.nan_to_num(), y.nan_to_num()
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-12)))
    return worst
