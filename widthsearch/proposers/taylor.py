"""Taylor importance: the gradients of gates in a trained network."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar, Literal

import torch
from torch import Tensor

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.channels.sums import Gates
from widthsearch.data.tasks import AnyTask
from widthsearch.proposers.importance import GreedyRemoval, channel_scores
from widthsearch.proposers.protocol import Count, Proposal, Setting
from widthsearch.proposers.tuning import FineTuner, PruneAndTune, base_network
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.sgd import Backward
from widthsearch.utils.validation import validated_dataclass


@validated_dataclass("taylor")
class Taylor(PruneAndTune):
    """First-order Taylor importance of gates (Molchanov et al. 2019, arXiv 1906.10771, with gates).

    The importance of a channel of a trained network is ``√(mean of (∂L/∂c)²)`` over ``every``
    batches, for a gate ``c = 1`` that multiplies it where its consumers read it: how much a batch's
    loss changes, to first order, when the channel is removed. With ``schedule="once"`` all
    channels are ranked once by importance per cost, with ``"turns"`` fine-tuning and single
    removals alternate, as in :class:`~widthsearch.proposers.fisher.Fisher`. With ``per="latency"``
    importance per predicted ms is what HALP maximises (Shen et al. 2022, arXiv 2110.10811), here
    greedily in place of its knapsack.

    Deviations: the paper ranks single channels by the mean square, which orders them alike. A sum
    over the channels of a step, per cost, has to be a loss, not its square: else the few largest
    channels decide. Gates stand behind the activation in the consumers' inputs, not behind batch
    norm alone; a tied axis has one gate over all of its consumers; scores are divided by MACs;
    channels are removed in grid steps of an axis.

    Attributes:
        schedule: ``once`` (default) or ``turns``.
        every: The batches that importance is averaged over, and with ``turns`` the fine-tuning
            steps between two removals; default 100.
        lr: The constant learning rate of fine-tuning; default 8e-4.
        per: The cost that importance is divided by; default ``macs``.
        pretrain: The recipe of the base network; default the study's recipe.
        weights: A checkpoint of the base network, in place of its training.
        members: Members of the trajectory with ``once``, evenly spaced in log MACs; default 32.

    Example:
        >>> from torch import nn
        >>> from widthsearch.data.tasks import load_task
        >>> from widthsearch.training.recipe import Recipe
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> setting = Setting(recipe=Recipe(epochs=1))
        >>> proposal = Taylor(every=4)(space, load_task("digits"), setting)
        >>> proposal.trajectory[0].vector, proposal.trajectory[-1].vector
        ((8, 8), (1, 1))
    """

    schedule: Literal["once", "turns"] = "once"
    members: Count = 32
    name: ClassVar[str] = "taylor"

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Train the base network, then rank its channels, once or by turns.

        Raises:
            StudyError: Training diverged, the checkpoint is not of the base network, or the
                predicted latency is unknown.
            SpaceError: With ``turns``: no axis can be narrowed.
        """
        if self.schedule == "turns":
            return super().__call__(space, task, setting)
        removal = GreedyRemoval(space, per=self.per, latency=setting.latency)
        plain, recipe = space.unconstrained, self.pretrain or setting.recipe
        model = base_network(plain, task, recipe, setting, self.weights)
        graph = build_dependency_graph(plain.model, plain.base)
        tuner = FineTuner(self, plain, model, graph, task, recipe, setting)
        value = tuner.value()
        scores = channel_scores(space, graph, importance(tuner, tune=False))
        removal.remove_lowest(scores)
        sums = {a.name: float(s.sum()) for a, s in zip(space.axes, scores, strict=True)}
        provenance = {"seed": setting.seed, **asdict(self), task.measure: value}
        provenance["importance_per_axis"] = sums
        return Proposal("taylor", removal.trajectory(self.members), provenance)

    def score(self, tuner: FineTuner) -> list[Tensor]:
        """Fine-tune for a stretch; per axis, the importance of each group, shape (groups,)."""
        return importance(tuner, tune=True)


def importance(tuner: FineTuner, *, tune: bool) -> list[Tensor]:
    """The root mean square of ∂L/∂c over the batches of a stretch, per axis of shape (groups,).

    Args:
        tuner: Has the network and its batches.
        tune: Whether the network is fine-tuned by the batches; else its weights stay.
    """
    sums = [torch.zeros(n, dtype=torch.float64) for n in tuner.graph.groups]
    batches = 0

    def step(optimizer: torch.optim.Optimizer, backward: Backward) -> Tensor:
        nonlocal sums, batches
        optimizer.zero_grad()
        with Gates(tuner.graph, tuner.model) as gates:
            loss = backward()
        found = gates.gradients([leaf.grad for leaf in gates.leaves])
        sums = [s.to(g.device) + g.double().square() for s, g in zip(sums, found, strict=True)]
        batches += 1
        if tune:
            optimizer.step()
        return loss

    tuner.tune(step)
    return [(total / batches).sqrt() for total in sums]
