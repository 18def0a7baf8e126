"""Prune-and-tune by the magnitude of filters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.channels.sums import group_sums
from widthsearch.data.tasks import Task
from widthsearch.proposers.importance import Per, check_counts
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.proposers.tuning import Tuning, check_rate, prune_and_tune
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe

Norm = Literal["l1", "l2"]


@dataclass(frozen=True)
class Magnitude:
    """The filters with the smallest norm go first (Li et al. 2017, arXiv 1608.08710).

    Prune-and-tune as in :class:`~widthsearch.proposers.fisher.Fisher`, which see; the score of a
    channel is the norm of all filters that make it.

    Attributes:
        norm: ``l1``: Σ|W|; ``l2``: √ΣW².
        every: Fine-tuning steps between two removals, of one grid step of one axis each.
        lr: The constant learning rate of fine-tuning.
        per: What a score is divided by.
        pretrain: How the base network is trained first; None for the study's recipe.
    """

    norm: Norm = "l1"
    every: int = 100
    lr: float = 8e-4
    per: Per = "channel"
    pretrain: Recipe | None = None

    def __post_init__(self) -> None:
        check_counts(self, "every")
        check_rate(self.lr)

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """Train the base network, then remove channels while it is fine-tuned."""
        trajectory, measured = prune_and_tune(
            space,
            task,
            setting,
            self.score,
            every=self.every,
            lr=self.lr,
            per=self.per,
            pretrain=self.pretrain or setting.recipe,
        )
        return Proposal("magnitude", trajectory, {"seed": setting.seed, **asdict(self), **measured})

    def score(self, tuning: Tuning) -> list[Tensor]:
        """Fine-tune for a stretch; per axis the norm of each unit after it, shape (units,)."""
        tuning.train()
        return filter_norms(tuning.channels, tuning.model, self.norm)


def filter_norms(channels: DependencyGraph, model: nn.Module, norm: Norm) -> list[Tensor]:
    """The norm of the filters that make each unit of each axis, over all layers that make it.

    Args:
        channels: Where the units lie in ``model``.
        model: A network.
        norm: Which.

    Returns:
        Per axis, shape (units,).
    """
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    out = [torch.zeros(n, device=device) for n in channels.groups]
    for key, dim in channels.axis:
        weight = parameters.get(key)
        if weight is None or weight.dim() < 2 or channels.consumers.get(key) == dim:
            continue
        amounts = weight.detach().abs() if norm == "l1" else weight.detach().square()
        sums = amounts.movedim(dim, 0).flatten(1).sum(1).float()
        for axis, of_units in group_sums(channels, key, dim, sums).items():
            out[axis] = out[axis] + of_units
    return out if norm == "l1" else [total.sqrt() for total in out]
