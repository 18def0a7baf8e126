"""Network slimming: channels ranked by the scales of their norms, after sparse training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.channels.sums import group_sums
from widthsearch.data.tasks import AnyTask
from widthsearch.modules.tree import join
from widthsearch.proposers.importance import NORMS, GreedyRemoval, Per, channel_scores
from widthsearch.proposers.magnitude import filter_norms
from widthsearch.proposers.protocol import Count, Finite, Proposal, Setting, Share
from widthsearch.proposers.tuning import train_base
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.sgd import after_backward
from widthsearch.utils.validation import validated_dataclass


@validated_dataclass("slimming")
class Slimming:
    """Channels with the smallest scale |γ| are removed first: network slimming (Liu et al. 2017,
    arXiv 1708.06519).

    The base network is trained with λΣ|γ| added to the loss. Then the channels of all axes are
    ranked by |γ|.

    Deviations: only the widths are used, and networks are trained from scratch; a channel of
    several norms has the mean of their |γ|; in an axis without norms a channel has the mean |γ| of
    the network times the ratio of its filters' L1 norm to the mean of the axis.

    Attributes:
        sparsity: λ; default 1e-4, as in the paper (1e-5 for its residual and dense networks).
        recipe: The recipe of the sparse training; default the study's recipe.
        per: The cost that scales are divided by; default ``channel``: none, as in the paper.
        floor: No axis is narrowed below this share of its base; default 0.
        members: Members of the trajectory, evenly spaced in log MACs; default 32.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> method = Slimming(recipe=Recipe(epochs=1), floor=0.5)
        >>> proposal = method(space, load_task("digits"), Setting(seed=0))
        >>> [widths.vector for widths in proposal.trajectory]
        [(8,), (7,), (6,), (5,), (4,)]
    """

    sparsity: Finite = 1e-4
    recipe: Recipe | None = None
    per: Per = "channel"
    floor: Share = 0.0
    members: Count = 32

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Train the base network, then rank its channels.

        Raises:
            StudyError: Training diverged, or the predicted latency is unknown.
        """
        removal = GreedyRemoval(space, per=self.per, floor=self.floor, latency=setting.latency)
        unconstrained, recipe = space.unconstrained, self.recipe or setting.recipe
        model = unconstrained.build(unconstrained.base, seed=setting.seed)
        scales = list(_scales(model).values())
        hook = after_backward(lambda: self.penalise(scales))
        value = train_base(model, task, recipe, setting, hook)
        graph = build_dependency_graph(unconstrained.model, unconstrained.base)
        removal.remove_lowest(channel_scores(space, graph, norm_scales(graph, model)))
        provenance = {"seed": setting.seed, **asdict(self), task.measure: value}
        return Proposal("slimming", removal.trajectory(self.members), provenance)

    def penalise(self, scales: Sequence[Tensor]) -> None:
        """Add the gradient of the penalty, ∂λ|γ|/∂γ = λ sign(γ), to that of the loss."""
        for scale in scales:
            assert scale.grad is not None
            scale.grad.add_(scale.detach().sign(), alpha=self.sparsity)


def _scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scale γ of every norm that has one, by name."""
    return {
        join(layer, "weight"): module.weight
        for layer, module in model.named_modules()
        if isinstance(module, NORMS) and isinstance(module.weight, nn.Parameter)
    }


def norm_scales(graph: DependencyGraph, model: nn.Module) -> list[Tensor]:
    """The scores of network slimming.

    Args:
        graph: The dependency graph of the network.
        model: A network.

    Returns:
        Per axis, shape (groups,): the channels of a group times their mean |γ|.
    """
    scales = _scales(model)
    device = next(model.parameters()).device
    totals = [torch.zeros(n, device=device) for n in graph.groups]
    counts = [torch.zeros(n, device=device) for n in graph.groups]
    for key, scale in scales.items():
        if (key, 0) in graph.axis:
            magnitude = scale.detach().abs()
            for into, values in ((totals, magnitude), (counts, torch.ones_like(magnitude))):
                for axis, sums in group_sums(graph, key, 0, values).items():
                    into[axis] = into[axis] + sums
    every = [scale.detach().abs() for scale in scales.values()]
    mean = torch.cat(every).mean() if every else torch.ones(())
    filters = filter_norms(graph, model, "l1")
    out = []
    of_axes = zip(graph.widths.vector, totals, counts, filters, strict=True)
    for width, total, count, norms in of_axes:
        of_group = total / count if count.all() else mean.to(device) * norms / norms.mean()
        out.append(of_group * width / len(total))
    return out
