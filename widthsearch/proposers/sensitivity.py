"""3SP: structured pruning at initialisation with a compute-aware score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.channels.sums import gate_gradients
from widthsearch.data.loaders import StreamLoader, loader_of
from widthsearch.data.tasks import AnyTask, OwnTask, Task
from widthsearch.proposers.importance import CostAt, GreedyRemoval, Per, channel_scores
from widthsearch.proposers.protocol import Count, Proposal, Setting, Share
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.devices import check_device, deterministic_cudnn, seeded
from widthsearch.utils.validation import validated_dataclass


@validated_dataclass("sensitivity")
class Sensitivity:
    """Saliency per MAC at initialisation: 3SP (van Amersfoort et al. 2020, arXiv 2007.00389).

    The saliency of channel i is ``|∂L/∂c_i|`` for a gate ``c_i = 1`` that multiplies the channel
    where its consumers read it, from one forward and backward pass of a class-balanced batch, or of
    the first batches of a task of the user's own.
    Greedy removal prunes the channels with the least saliency per MAC.

    Deviations: channels are removed in grid steps of an axis; savings are recomputed by default; an
    axis whose channels cannot be told apart is scored as a whole.

    Attributes:
        batch_size: Samples per batch, at least one per class; default 256. The batches of a user's
            own task have their own size.
        batches: Batches; default 1. L is the mean loss of all batches, so that the gradients of a
            gate are added with their signs.
        per: The cost that saliency is divided by: ``macs`` (default, as in the paper), ``params``,
            predicted ``latency``, or ``channel`` for plain saliency.
        cost: ``recomputed`` (default) takes the saving of a step at the widths reached so far;
            ``fixed`` takes it at the base widths, as in the paper.
        floor: No axis is narrowed below this share of its base; default 0.
        members: Members of the trajectory, evenly spaced in log MACs; default 32.

    Example:
        >>> from torch import nn
        >>> from widthsearch.data.tasks import load_task
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> proposal = Sensitivity(floor=0.5)(space, load_task("digits"), Setting(seed=0))
        >>> proposal.trajectory[0].vector, proposal.trajectory[-1].vector
        ((8, 8), (4, 4))
    """

    batch_size: Count = 256
    batches: Count = 1
    per: Per = "macs"
    cost: CostAt = "recomputed"
    floor: Share = 0.0
    members: Count = 32
    trains: ClassVar[bool] = False

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Score the channels, then remove them greedily.

        Raises:
            StudyError: The predicted latency is unknown.
        """
        removal = GreedyRemoval(
            space, per=self.per, cost=self.cost, floor=self.floor, latency=setting.latency
        )
        saliency = self.saliency(space, task, setting)
        removal.remove_lowest(saliency)
        sums = {a.name: float(s.sum()) for a, s in zip(space.axes, saliency, strict=True)}
        provenance = {"seed": setting.seed, **asdict(self), "saliency_per_axis": sums}
        return Proposal("sensitivity", removal.trajectory(self.members), provenance)

    def saliency(
        self, space: SearchSpace, task: AnyTask, setting: Setting
    ) -> list[NDArray[np.float64]]:
        """The saliency of each channel of the base network at initialisation, per axis (base,)."""
        unconstrained, device = space.unconstrained, check_device(setting.device)
        model = unconstrained.build(unconstrained.base, seed=setting.seed).to(device)
        graph = build_dependency_graph(unconstrained.model, unconstrained.base)
        gradients = [torch.zeros(n, device=device) for n in graph.groups]
        # In train mode, since batch norm's running statistics carry no information before training.
        # The gates stand after batch norm, so that it does not cancel them.
        with seeded(setting.seed, 0, device), deterministic_cudnn():
            drawn = self.batch_size, self.batches, setting.seed
            for batch in class_balanced_batches(task, *drawn, device):

                def loss(batch: Any = batch) -> Tensor:
                    return task.loss(model, batch) / self.batches

                found = gate_gradients(graph, model, loss)
                gradients = [a + b for a, b in zip(gradients, found, strict=True)]
        return channel_scores(space, graph, [g.abs() for g in gradients])


def class_balanced_batches(
    task: AnyTask, batch_size: int, batches: int, seed: int, device: torch.device
) -> Iterator[Any]:
    """So many batches of training data without augmentation; those of an own task in their order.

    Args:
        task: The data.
        batch_size: Samples per batch, with equally many per class; an own task has its own.
        batches: The number of batches.
        seed: Draws the samples, or the order of an own task.
        device: The device of the batches.
    """
    if isinstance(task, OwnTask):
        stream = StreamLoader(task, device)
        stream.begin(batches, torch.Generator().manual_seed(seed))
        yield from (stream.batch() for _ in range(batches))
        return
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        batch = task.train.subset(_batch(task, batch_size, rng))
        yield loader_of(batch, task, len(batch), device).plain()


def _batch(task: Task, batch_size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Indices of a batch: balanced by class where the targets are classes, else drawn at random."""
    if task.loss_name == "cross_entropy":
        return balanced(task.train.labels, task.classes, batch_size, generator)
    return np.sort(generator.permutation(len(task.train))[:batch_size])


def balanced(
    labels: NDArray[Any], classes: int, batch_size: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Draw indices of a batch with equally many samples per class, at least one."""
    each = max(1, batch_size // classes)
    members = (np.flatnonzero(labels == label) for label in range(classes))
    chosen = [generator.permutation(of_label)[:each] for of_label in members]
    return np.sort(np.concatenate(chosen))
