"""SynFlow: pruning at initialisation without data."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.channels.sums import gate_gradients
from widthsearch.data.tasks import Task
from widthsearch.errors import StudyError
from widthsearch.proposers.importance import NORMS, Per, Removal, check_counts, shrink, thinned
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.devices import check_device, deterministic_cudnn


@dataclass(frozen=True)
class SynFlow:
    """SynFlow (Tanaka et al. 2020, arXiv 2006.05467) for channels: no data, no layer collapse.

    In the linearised network, all weights replaced by their absolute values, all biases by 0 and
    all norms by the identity, R is the sum of the outputs for an input of ones. The score of a
    channel is that of the weights that read it, ``Σ w ∂R/∂w``. Channels with the smallest scores
    go, in rounds whose MACs fall exponentially, and those that are left are scored anew. In
    float64, since R is a product over all layers. Of axes that a user tied, units of the same
    number go together; an axis whose channels cannot be told apart is scored as a whole, with all
    of its weights.

    Attributes:
        rounds: How often channels are scored.
        per: What a score is divided by.
        floor: No axis goes below this share of its base.
        members: Members of the trajectory, evenly spaced in log MACs.
    """

    rounds: int = 100
    per: Per = "channel"
    floor: float = 0.0
    members: int = 32

    def __post_init__(self) -> None:
        check_counts(self, "rounds", "members")

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """Depends on the seed's weights alone.

        Raises:
            StudyError: Predicted latency is wanted but not known, or R is beyond float64.
        """
        removal = Removal(space, per=self.per, floor=self.floor, latency=setting.latency)
        channels = build_dependency_graph(space.model, space.base)
        device = check_device(setting.device)
        model = linearised(space.build(space.base, seed=setting.seed)).to(device)
        ones = torch.ones(1, *task.input_shape, dtype=torch.float64, device=device)
        units = [axis.divisor for axis in space.trace.axes]
        left = [np.arange(n) for n in channels.groups]
        base, narrowest = space.macs([space.base.vector, removal.min_width])
        for target in np.geomspace(base, narrowest, self.rounds + 1)[1:]:
            scores = [
                s[of] for s, of in zip(synaptic_flow(channels, model, ones), left, strict=True)
            ]
            of_channels = [np.repeat(s / n, n) for s, n in zip(scores, units, strict=True)]
            gone = shrink(space, of_channels, removal, until=float(target))
            for i, (count, unit) in enumerate(zip(gone, units, strict=True)):
                ascending = np.argsort(scores[i], kind="stable")
                dead, left[i] = np.split(left[i][ascending], [count // unit])
                if len(dead) and i not in channels.unknown:
                    silence(channels, model, i, dead)
        return Proposal(
            "synflow",
            thinned(space, removal.path, self.members),
            {"seed": setting.seed, **asdict(self)},
        )


def linearised(model: nn.Module) -> nn.Module:
    """The network, changed in place: |weights| in float64, no biases, norms that pass on.

    On the positive values that then flow, ReLU is the identity; other activations stay.
    """
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0 if name.endswith("bias") else parameter.sign())
    for module in model.modules():
        if isinstance(module, NORMS):
            module.forward = _pass_on  # type: ignore[method-assign]
    return model


def _pass_on(x: Tensor) -> Tensor:
    return x


def synaptic_flow(
    channels: DependencyGraph, model: nn.Module, ones: Tensor
) -> list[NDArray[np.float64]]:
    """Per axis, Σ w ∂R/∂w over the weights that read each unit, shape (units,).

    Args:
        channels: Where the units lie in ``model``.
        model: A linearised network.
        ones: Its input.

    Raises:
        StudyError: R is beyond float64.
    """
    model.zero_grad()
    with deterministic_cudnn():
        flow = model(ones).sum()
        if not torch.isfinite(flow):
            raise StudyError(
                "synflow multiplies the weights of all layers, and of this network the product is "
                "beyond float64; use `sensitivity`"
            )
        flow.backward()
    scores = [g.double().cpu().numpy() for g in gate_gradients(channels, model)]
    return [np.full_like(s, s.mean()) if i in channels.unknown else s for i, s in enumerate(scores)]


def silence(
    channels: DependencyGraph, model: nn.Module, axis: int, units: NDArray[np.int64]
) -> None:
    """Set to zero all weights that make or read units of an axis."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for (key, dim), axes in channels.axis.items():
            if key in parameters:
                mine = (axes == axis) & np.isin(channels.group[key, dim], units)
                index = torch.from_numpy(np.flatnonzero(mine)).to(parameters[key].device)
                parameters[key].index_fill_(dim, index, 0)
