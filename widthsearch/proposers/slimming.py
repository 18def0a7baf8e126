"""Network slimming: channels by the scales of their norms, after training that shrinks them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.channels.sums import group_sums
from widthsearch.data.tasks import Task
from widthsearch.errors import StudyError
from widthsearch.modules.tree import join
from widthsearch.proposers.importance import (
    NORMS,
    Per,
    Removal,
    channel_scores,
    check_counts,
    shrink,
    thinned,
)
from widthsearch.proposers.magnitude import filter_norms
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.sgd import after_backward
from widthsearch.training.trainer import fit


@dataclass(frozen=True)
class Slimming:
    """Network slimming (Liu et al. 2017, arXiv 1708.06519): the smallest scales |γ| go first.

    The base network is trained with λΣ|γ| added to the loss; then channels of all axes are ranked
    by |γ|, the mean over the norms that a channel passes. In an axis without norms a channel has
    the mean |γ| of the network times its share of the axis's mean filter (L1).

    Attributes:
        sparsity: λ; the paper uses 1e-4, and 1e-5 for its residual and dense networks.
        recipe: How the network is trained; None for the study's recipe.
        per: What a scale is divided by.
        floor: No axis goes below this share of its base.
        members: Members of the trajectory, evenly spaced in log MACs.
    """

    sparsity: float = 1e-4
    recipe: Recipe | None = None
    per: Per = "channel"
    floor: float = 0.0
    members: int = 32

    def __post_init__(self) -> None:
        check_counts(self, "members")
        if not 0 <= self.sparsity < math.inf:
            raise StudyError(
                f"`0 <= sparsity < inf` must hold, but slimming has sparsity={self.sparsity!r}"
            )

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """Train the base network, then rank its channels.

        Raises:
            StudyError: Training diverged, or predicted latency is wanted but not known.
        """
        removal = Removal(space, per=self.per, floor=self.floor, latency=setting.latency)
        free, recipe = space.unconstrained, self.recipe or setting.recipe
        model = free.build(free.base, seed=setting.seed)
        scales = [scale for _, scale in _scales(model)]
        curve = fit(
            model,
            task,
            recipe,
            seed=setting.seed,
            device=setting.device,
            on_epoch=lambda e: setting.report(
                f"epoch {e.epoch} of {recipe.epochs}, {e.accuracy:.1f}%"
            ),
            hook=after_backward(lambda: self._penalise(scales)),
        )
        if math.isnan(curve[-1].accuracy):
            raise StudyError(
                f"slimming needs a trained network, but with lr={recipe.lr} training diverged; "
                "lower it"
            )
        channels = build_dependency_graph(free.model, free.base)
        shrink(space, channel_scores(space, channels, norm_scales(channels, model)), removal)
        return Proposal(
            "slimming",
            thinned(space, removal.path, self.members),
            {"seed": setting.seed, **asdict(self), "accuracy": curve[-1].accuracy},
        )

    def _penalise(self, scales: list[nn.Parameter]) -> None:
        """Add the gradient of the penalty, ∂λ|γ|/∂γ = λ sign(γ), to that of the loss."""
        for scale in scales:
            assert scale.grad is not None
            scale.grad.add_(scale.detach().sign(), alpha=self.sparsity)


def _scales(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The scale γ of every norm that has one, by its name."""
    return [
        (join(layer, "weight"), module.weight)
        for layer, module in model.named_modules()
        if isinstance(module, NORMS) and isinstance(module.weight, nn.Parameter)
    ]


def norm_scales(channels: DependencyGraph, model: nn.Module) -> list[Tensor]:
    """What slimming ranks channels by.

    Args:
        channels: Where the units lie in ``model``.
        model: A network.

    Returns:
        Per axis, shape (units,): a unit's channels times their mean |γ|.
    """
    scales = _scales(model)
    device = next(model.parameters()).device
    totals = [torch.zeros(n, device=device) for n in channels.groups]
    counts = [torch.zeros(n, device=device) for n in channels.groups]
    for key, scale in scales:
        if (key, 0) in channels.axis:
            magnitude = scale.detach().abs()
            for into, values in ((totals, magnitude), (counts, torch.ones_like(magnitude))):
                for axis, sums in group_sums(channels, key, 0, values).items():
                    into[axis] = into[axis] + sums
    mean = torch.cat([s.detach().abs() for _, s in scales]).mean() if scales else torch.ones(())
    filters = filter_norms(channels, model, "l1")
    out = []
    for width, total, count, norms in zip(
        channels.widths.vector, totals, counts, filters, strict=True
    ):
        of_unit = total / count if count.all() else mean.to(device) * norms / norms.mean()
        out.append(of_unit * width / len(total))
    return out
