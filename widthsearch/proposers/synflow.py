"""SynFlow: pruning at initialisation without data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.channels.sums import gate_gradients
from widthsearch.errors import StudyError
from widthsearch.proposers.importance import NORMS, GreedyRemoval, Per
from widthsearch.proposers.protocol import Count, Proposal, Setting, Share
from widthsearch.space.computation import floats
from widthsearch.space.search_space import SearchSpace
from widthsearch.torch_internals import tree_map_only
from widthsearch.tracing.inputs import call, sample
from widthsearch.utils.devices import check_device, deterministic_cudnn
from widthsearch.utils.validation import validated_dataclass

if TYPE_CHECKING:
    from widthsearch.data.tasks import AnyTask


@validated_dataclass("synflow")
class SynFlow:
    """Synaptic flow, for channels: SynFlow (Tanaka et al. 2020, arXiv 2006.05467).

    In the linearised network all weights are replaced by their absolute values, all biases by 0 and
    all norms by the identity. R is the sum of its outputs for an input of ones; inputs of integers
    or truth values are those that the space was traced with. The score of a channel is
    ``Σ w ∂R/∂w`` over the weights that read it. Channels are pruned in rounds whose MACs fall
    exponentially, and the rest is scored anew in each round. No layer collapses. All computation is
    in float64, because R is a product over all layers.

    Deviations: the paper prunes single weights; scores are divided by MACs; channels are removed in
    grid steps of an axis; the weights that make a channel are not part of its score; activations
    other than ReLU remain. In axes that a user tied, groups of the same number are removed
    together. An axis whose channels cannot be told apart is scored as a whole, with all of its
    weights.

    Attributes:
        rounds: Rounds of scoring; default 100, as in the paper.
        per: The cost that scores are divided by; default ``macs``. ``channel`` does not divide, as
            in the paper.
        floor: No axis is narrowed below this share of its base; default 0.
        members: Members of the trajectory, evenly spaced in log MACs; default 32.

    Example:
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> proposal = SynFlow(rounds=10, floor=0.5)(space, None, Setting(seed=0))
        >>> proposal.trajectory[0].vector, proposal.trajectory[-1].vector
        ((8, 8), (4, 4))
    """

    rounds: Count = 100
    per: Per = "macs"
    floor: Share = 0.0
    members: Count = 32
    reads_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __call__(self, space: SearchSpace, task: AnyTask | None, setting: Setting) -> Proposal:
        """Score and remove channels in rounds; the result depends on the seed's weights alone.

        Raises:
            StudyError: The predicted latency is unknown, or R is not finite.
        """
        removal = GreedyRemoval(space, per=self.per, floor=self.floor, latency=setting.latency)
        graph = build_dependency_graph(space.model, space.base)
        device = check_device(setting.device)
        model = linearised(space.build(space.base, seed=setting.seed)).to(device)
        ones = linear_inputs(space, device)
        sizes = [axis.divisor for axis in space.trace.axes]  # channels per group
        left = [np.arange(n) for n in graph.groups]
        base, narrowest = space.macs([space.base.vector, removal.min_width])
        for target in np.geomspace(base, narrowest, self.rounds + 1)[1:]:
            scores = [s[of] for s, of in zip(synaptic_flow(graph, model, ones), left, strict=True)]
            of_channels = [np.repeat(s / n, n) for s, n in zip(scores, sizes, strict=True)]
            removed = removal.remove_lowest(of_channels, until=float(target))
            for i, (count, size) in enumerate(zip(removed, sizes, strict=True)):
                ascending = np.argsort(scores[i], kind="stable")
                dead, left[i] = np.split(left[i][ascending], [count // size])
                if len(dead) and i not in graph.unknown:
                    silence(graph, model, i, dead)
        provenance = {"seed": setting.seed, **asdict(self)}
        return Proposal("synflow", removal.trajectory(self.members), provenance)


def linearised(model: nn.Module) -> nn.Module:
    """Linearise a network in place: weights |w| in float64, no biases, norms as the identity.

    ReLU is the identity on the positive values that then flow; other activations remain.
    """
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0 if name.endswith("bias") else parameter.sign())
    for module in model.modules():
        if isinstance(module, NORMS):
            module.forward = _identity  # type: ignore[method-assign]
    return model


def linear_inputs(space: SearchSpace, device: torch.device | str = "cpu") -> Any:
    """A batch of one sample: ones in float64; integers and truth values are those of the trace.

    Returns:
        A tensor, or a tuple of positional or a dictionary of keyword arguments, as the space was
        traced.
    """
    return tree_map_only(
        Tensor,
        lambda t: torch.ones_like(t, dtype=torch.float64) if t.is_floating_point() else t,
        sample(space.input_shape, 1, device),
    )


def _identity(x: Tensor) -> Tensor:
    return x


def synaptic_flow(graph: DependencyGraph, model: nn.Module, ones: Any) -> list[NDArray[np.float64]]:
    """Per axis, Σ w ∂R/∂w over the weights that read each group, shape (groups,).

    Args:
        graph: The dependency graph of the network.
        model: A linearised network.
        ones: Its input, as of :func:`linear_inputs`; R is the sum of all floating-point outputs.

    Raises:
        StudyError: R is not finite.
    """

    def flow() -> Tensor:
        total = torch.stack([out.sum() for out in floats(call(model, ones))]).sum()
        if torch.isnan(total):
            raise StudyError(
                "synflow needs an output of numbers, but for the sample of this space, with ones "
                "for its floating-point inputs, the network gives NaN; trace the space with a "
                "sample that has none, or use `sensitivity`, `uniform` or `random`"
            )
        if torch.isinf(total):
            raise StudyError(
                "synflow multiplies the weights of all layers, and the product exceeds float64 in "
                "this network; use `sensitivity`, `uniform` or `random`"
            )
        return total

    with deterministic_cudnn():
        gradients = gate_gradients(graph, model, flow)
    scores = [g.double().cpu().numpy() for g in gradients]
    return [np.full_like(s, s.mean()) if i in graph.unknown else s for i, s in enumerate(scores)]


def silence(graph: DependencyGraph, model: nn.Module, axis: int, groups: NDArray[np.int64]) -> None:
    """Set to zero all weights that make or read some groups of an axis."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for (key, dim), axes in graph.axis.items():
            if key in parameters:
                mine = (axes == axis) & np.isin(graph.group[key, dim], groups)
                index = torch.from_numpy(np.flatnonzero(mine)).to(parameters[key].device)
                parameters[key].index_fill_(dim, index, 0)
