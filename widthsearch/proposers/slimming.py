"""Network slimming: channels ranked by the scales of their norms, after sparse training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.channels.sums import group_sums
from widthsearch.data.tasks import AnyTask, steps_of_epoch
from widthsearch.modules.tree import join
from widthsearch.proposers.importance import NORMS, GreedyRemoval, Per, channel_scores
from widthsearch.proposers.magnitude import filter_norms
from widthsearch.proposers.protocol import Checkpoint, Count, Finite, Proposal, Setting, Share
from widthsearch.proposers.tuning import load_weights, train_base
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.sgd import after_backward
from widthsearch.utils.validation import validated_dataclass


@validated_dataclass("slimming")
class Slimming:
    """Channels with the smallest scale |γ| are removed first: network slimming (Liu et al. 2017,
    arXiv 1708.06519).

    The base network is trained with λΣ|γ| added to the loss, from half of its initial γ and with
    weight decay on γ, as in the authors' code (from a checkpoint: as it is). Then the channels of
    all axes are ranked by |γ|.

    The ranking means something once λ has polarised the scales into small and large ones. The λ of
    the paper (1e-4) does so in its 160 epochs, but moves no scale in short trainings. By default λ
    is therefore the first one whose training polarises the scales: from the least that could take
    a scale to zero by itself, but at least the paper's, it rises threefold a training.

    Deviations: λ, see above; scales are divided by MACs; only the widths are used, and networks are
    trained from scratch; a channel of several norms has the mean of their |γ|; in an axis without
    norms a channel has the mean |γ| of the network times the ratio of its filters' L1 norm to the
    mean of the axis.

    Attributes:
        sparsity: λ; by default (None) it follows from the polarisation.
        polarised: The scales are polarised once this share of them is below a tenth of the largest;
            default 0.5.
        trainings: The most trainings to find λ; default 4.
        recipe: The recipe of the sparse training; default the study's recipe.
        weights: A checkpoint of the base network, from which the sparse training starts.
        per: The cost that scales are divided by; default ``macs``. ``channel`` does not divide, as
            in the paper.
        floor: No axis is narrowed below this share of its base; default 0.
        members: Members of the trajectory, evenly spaced in log MACs; default 32.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> method = Slimming(sparsity=1e-2, recipe=Recipe(epochs=1), floor=0.5)
        >>> proposal = method(space, load_task("digits"), Setting(seed=0))
        >>> [widths.vector for widths in proposal.trajectory]
        [(8,), (7,), (6,), (5,), (4,)]
    """

    sparsity: Finite | None = None
    polarised: Share = 0.5
    trainings: Count = 4
    recipe: Recipe | None = None
    weights: Checkpoint | None = None
    per: Per = "macs"
    floor: Share = 0.0
    members: Count = 32

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Train the base network, once or until its scales are polarised, then rank its channels.

        Returns:
            The proposal; its provenance has ``trained``, for each training its λ, the share of
            scales below a tenth of the largest, and the accuracy (or the loss of an own task); and
            a warning if the scales are not polarised.

        Raises:
            StudyError: Training diverged, or the predicted latency is unknown.
        """
        removal = GreedyRemoval(space, per=self.per, floor=self.floor, latency=setting.latency)
        recipe = self.recipe or setting.recipe
        sparsity = first_sparsity(recipe, task) if self.sparsity is None else self.sparsity
        trained: list[dict[str, float]] = []
        while True:
            model, value = self.train(space, task, setting, sparsity)
            share = polarisation(model)
            trained.append({"sparsity": sparsity, "polarisation": share, task.measure: value})
            searched = self.sparsity is None and share < self.polarised and _scales(model)
            if not searched or len(trained) == self.trainings:
                break
            sparsity *= 3
        unconstrained = space.unconstrained
        graph = build_dependency_graph(unconstrained.model, unconstrained.base)
        removal.remove_lowest(channel_scores(space, graph, norm_scales(graph, model)))
        warnings = [
            f"λ = {sparsity:.2g} took {share:.0%} of the scales below a tenth of the largest, not "
            f"{self.polarised:.0%}, so that their order means little; give it a longer recipe or "
            "more trainings"
        ]
        provenance = {
            "seed": setting.seed,
            **asdict(self),
            "trained": trained,
            "warnings": warnings if searched else [],
        }
        return Proposal("slimming", removal.trajectory(self.members), provenance)

    def train(
        self, space: SearchSpace, task: AnyTask, setting: Setting, sparsity: float
    ) -> tuple[nn.Module, float]:
        """The base network after a training with λ = ``sparsity``, and its accuracy or loss."""
        unconstrained, recipe = space.unconstrained, self.recipe or setting.recipe
        model = unconstrained.build(unconstrained.base, seed=setting.seed)
        scales = list(_scales(model).values())
        if self.weights is not None:
            load_weights(model, self.weights)
        else:
            with torch.no_grad():
                for scale in scales:
                    scale.mul_(_START)
        hook = after_backward(lambda: penalise(scales, sparsity, recipe.weight_decay))
        return model, train_base(model, task, recipe, setting, hook)


_START = 0.5  # of the initial scales, in the authors' networks
_PAPER = 1e-4


def first_sparsity(recipe: Recipe, task: AnyTask) -> float:
    """The first λ to try: the least that could polarise the scales, but at least the paper's.

    The penalty alone moves a scale by λ lr / (1 - momentum) a step of SGD. Below λ = γ (1 -
    momentum) / Σ lr it cannot take a scale from its start, γ = 0.5, to zero within the training.
    Of other optimizers this is an estimate, without momentum.
    """
    steps = steps_of_epoch(task, recipe.batch_size)
    rates = sum(recipe.learning_rate(step, steps) for step in range(recipe.epochs * steps))
    return max(_PAPER, _START * (1 - (recipe.momentum or 0)) / rates)


def penalise(scales: Sequence[Tensor], sparsity: float, weight_decay: float) -> None:
    """Add to the gradients of scales those of λ|γ|, λ sign(γ), and of weight decay.

    Scales without a gradient are frozen, or of norms that the loss does not use: they remain.
    """
    for scale in scales:
        if scale.grad is None:
            continue
        scale.grad.add_(scale.detach().sign(), alpha=sparsity)
        scale.grad.add_(scale.detach(), alpha=weight_decay)


def polarisation(model: nn.Module) -> float:
    """The share of all |γ| that is below a tenth of the largest; 0 without norms."""
    every = [scale.detach().abs() for scale in _scales(model).values()]
    if not every:
        return 0.0
    together = torch.cat(every)
    return (together < together.max() / 10).float().mean().item()


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
