"""Prune-and-tune by the magnitude of filters."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.channels.sums import group_sums
from widthsearch.modules.tree import is_depthwise
from widthsearch.proposers.tuning import FineTuner, PruneAndTune
from widthsearch.utils.validation import validated_dataclass

Norm = Literal["l1", "l2"]


@validated_dataclass("magnitude")
class Magnitude(PruneAndTune):
    """Prune-and-tune that removes the filters with the smallest norm (Li et al. 2017, arXiv
    1608.08710).

    The score of a channel is the norm of all filters that make it: ``l1``: Σ|W|, ``l2``: √ΣW². The
    procedure and its deviations are those of :class:`~widthsearch.proposers.fisher.Fisher`.

    Attributes:
        norm: The norm; default ``l1``, as in the paper.
        every: Fine-tuning steps between two removals; default 100.
        lr: The constant learning rate of fine-tuning; default 8e-4.
        per: The cost that scores are divided by; default ``macs``. ``channel`` does not divide, as
            in the paper.
        pretrain: The recipe of the base network; default the study's recipe.
        weights: A checkpoint of the base network, in place of its training.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> from widthsearch.proposers import Setting
        >>> from widthsearch.space.search_space import SearchSpace
        >>> from widthsearch.training.recipe import Recipe
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> setting = Setting(recipe=Recipe(epochs=1), lowest=0.5)
        >>> proposal = Magnitude(every=1)(space, load_task("digits"), setting)
        >>> proposal.trajectory[0].vector, sorted(proposal.provenance["members"][0])
        ((8, 8), ['accuracy', 'epochs', 'macs'])
    """

    norm: Norm = "l1"
    name: ClassVar[str] = "magnitude"

    def score(self, tuner: FineTuner) -> list[Tensor]:
        """Fine-tune for a stretch; per axis, the norm of each group after it, shape (groups,)."""
        tuner.tune()
        return filter_norms(tuner.graph, tuner.model, self.norm)


def filter_norms(graph: DependencyGraph, model: nn.Module, norm: Norm) -> list[Tensor]:
    """The norm of the filters that make each group of channels, over all layers that make it.

    Args:
        graph: The dependency graph of the network.
        model: A network.
        norm: The norm.

    Returns:
        Per axis, shape (groups,).
    """
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    out = [torch.zeros(n, device=device) for n in graph.groups]
    for key, dim in graph.axis:
        weight = parameters.get(key)
        if weight is None or weight.dim() < 2:
            continue  # norms and biases are no filters
        owner = model.get_submodule(key.rpartition(".")[0])
        if graph.consumers.get(key) == dim and not is_depthwise(owner):
            continue  # a consumer does not make its channels, but for a filter of one channel
        amounts = weight.detach().abs() if norm == "l1" else weight.detach().square()
        sums = amounts.movedim(dim, 0).flatten(1).sum(1).float()
        for axis, of_groups in group_sums(graph, key, dim, sums).items():
            out[axis] = out[axis] + of_groups
    return out if norm == "l1" else [total.sqrt() for total in out]
