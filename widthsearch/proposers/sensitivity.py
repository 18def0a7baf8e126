"""Structured pruning at initialisation with a compute-aware score (3SP)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional as F

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.channels.sums import gate_gradients
from widthsearch.data.loaders import DeviceLoader
from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task
from widthsearch.proposers.importance import (
    CostAt,
    Per,
    Removal,
    channel_scores,
    check_counts,
    shrink,
    thinned,
)
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.devices import check_device, deterministic_cudnn, seeded


@dataclass(frozen=True)
class Sensitivity:
    """3SP (van Amersfoort et al. 2020, arXiv 2007.00389): saliency per MAC, at initialisation.

    Saliency of channel i is ``|∂L/∂c_i|`` of a gate ``c_i = 1``, from a forward and a backward pass
    of one class-balanced batch. Channels with the least saliency for what they cost go first. An
    axis whose channels cannot be told apart is scored as a whole.

    Attributes:
        batch_size: Samples in a batch (at least one a class is taken).
        batches: Batches; L is the mean of their losses, so a gate's gradients are added with their
            signs, as those of the samples of a batch are.
        per: What a channel's saliency is divided by: its cost in ``macs``, ``params`` or predicted
            ``latency``, or nothing (``channel``).
        cost: ``recomputed``: what a channel costs at the widths reached so far; ``fixed``: at the
            base widths, as in the paper.
        floor: No axis goes below this share of its base.
        members: Members of the trajectory, evenly spaced in log MACs.
    """

    batch_size: int = 256
    batches: int = 1
    per: Per = "macs"
    cost: CostAt = "recomputed"
    floor: float = 0.0
    members: int = 32

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "batches", "members")

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """A backward pass a batch, then channels go one step of an axis at a time.

        Raises:
            StudyError: Predicted latency is wanted but not known.
        """
        removal = Removal(
            space, per=self.per, cost=self.cost, floor=self.floor, latency=setting.latency
        )
        saliency = self.saliency(space, task, setting)
        shrink(space, saliency, removal)
        sums = {a.name: float(s.sum()) for a, s in zip(space.axes, saliency, strict=True)}
        return Proposal(
            "sensitivity",
            thinned(space, removal.path, self.members),
            {"seed": setting.seed, **asdict(self), "saliency_per_axis": sums},
        )

    def saliency(
        self, space: SearchSpace, task: Task, setting: Setting
    ) -> list[NDArray[np.float64]]:
        """Per axis, the saliency of each channel of the base network at initialisation.

        Of tied axes, the channels that matter least in each go together.
        """
        free, device = space.unconstrained, check_device(setting.device)
        rng = np.random.default_rng(setting.seed)
        model = free.build(free.base, seed=setting.seed).to(device)
        # Train mode: before training, batch norm's running statistics say nothing. The gates stand
        # after it, so that it does not undo them.
        with seeded(setting.seed, 0, device), deterministic_cudnn():
            for _ in range(self.batches):
                index = balanced(task.train.labels, task.classes, self.batch_size, rng)
                batch = Split(task.train.images[index], task.train.labels[index])
                ((x, y),) = DeviceLoader(batch, task, len(batch), device).batches()
                loss = F.cross_entropy(model(x), y) / self.batches
                loss.backward()  # type: ignore[no-untyped-call]
        channels = build_dependency_graph(free.model, free.base)
        return channel_scores(space, channels, [g.abs() for g in gate_gradients(channels, model)])


def balanced(
    labels: NDArray[np.int64], classes: int, batch_size: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Indices of a batch with equally many samples of each class, at least one."""
    each = max(1, batch_size // classes)
    chosen = []
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        chosen.append(generator.permutation(members)[:each])
    return np.sort(np.concatenate(chosen))
