"""Structured pruning at initialisation with a compute-aware score (3SP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from widthsearch.channels import find_channels, gate_gradients
from widthsearch.data import DeviceLoader, Split, Task
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.space import SearchSpace
from widthsearch.widths import Widths


@dataclass(frozen=True)
class Sensitivity:
    """3SP (van Amersfoort et al. 2020, arXiv 2007.00389): saliency per MAC, at initialisation.

    Saliency of channel i is ``|∂L/∂c_i|`` of a gate ``c_i = 1``, from one forward and backward
    pass of one class-balanced batch. Channels with the least saliency per MAC go first.

    Attributes:
        batch_size: Samples in the batch (at least one a class is taken).
        cost: ``recomputed``: the MACs that a channel costs at the widths reached so far;
            ``fixed``: at the base widths, as in the paper.
        members: Members of the trajectory, evenly spaced in log MACs.
    """

    batch_size: int = 256
    cost: Literal["recomputed", "fixed"] = "recomputed"
    members: int = 32

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """One batch, one backward pass, then channels go one step of an axis at a time."""
        saliency = self.saliency(space, task, setting)
        trajectory = remove_by_score(space, saliency, cost=self.cost, members=self.members)
        return Proposal(
            "sensitivity",
            trajectory,
            {
                "seed": setting.seed,
                "batch_size": self.batch_size,
                "cost": self.cost,
                "saliency_per_axis": {
                    axis.name: float(s.sum()) for axis, s in zip(space.axes, saliency, strict=True)
                },
            },
        )

    def saliency(
        self, space: SearchSpace, task: Task, setting: Setting
    ) -> list[NDArray[np.float64]]:
        """Per axis, the saliency of each channel of the base network at initialisation.

        Of tied axes, the channels that matter least in each go together.
        """
        free, seed, device = space.free, setting.seed, setting.device
        generator = np.random.default_rng(seed)
        index = balanced(task.train.labels, task.classes, self.batch_size, generator)
        batch = Split(task.train.images[index], task.train.labels[index])
        ((x, y),) = DeviceLoader(batch, task, len(batch), device).batches()
        model = space.build(space.base, seed=seed, device="cpu").to(device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # dropout
            # Train mode: before training, batch norm's running statistics say nothing. The gates
            # stand after it, so that it does not undo them.
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        gradients = gate_gradients(find_channels(free, free.base), model)
        # A unit's saliency is shared by its channels (those that only go together).
        return space.folded(
            [
                np.repeat(g.abs().double().cpu().numpy() / axis.unit, axis.unit)
                for g, axis in zip(gradients, free.trace.axes, strict=True)
            ]
        )


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


def remove_by_score(
    space: SearchSpace,
    saliency: list[NDArray[np.float64]],
    *,
    cost: Literal["recomputed", "fixed"],
    members: int,
) -> tuple[Widths, ...]:
    """The trajectory of removing what has the least saliency per MAC, until nothing may go.

    Args:
        space: The space; the trajectory starts at its base and stays on its grid.
        saliency: Per axis, the saliency of each of the base's channels.
        cost: Whether a channel's MACs are recomputed as widths change.
        members: How many members to keep, evenly spaced in log MACs.
    """
    form = space.form("macs")
    steps = np.array([axis.step for axis in space.axes], np.float64)
    least = np.array([axis.least for axis in space.axes])
    curvature = np.diag(form.quadratic) / form.units**2
    # What the next step of each axis would lose: sums over its least salient channels.
    losses = []
    for axis, scores in zip(space.axes, saliency, strict=True):
        ascending = np.sort(scores)
        losses.append(ascending.reshape(-1, axis.step).sum(1))
    removed = np.zeros(len(space.axes), np.int64)
    widths = np.array(space.base.vector, np.float64)
    fixed = form.marginal(widths) * steps
    path = [widths.astype(np.int64)]
    while True:
        free = widths - steps >= least
        if not free.any():
            break
        if cost == "recomputed":  # exact: F(w) − F(w − step)
            saved = form.marginal(widths) * steps - curvature * steps**2
        else:
            saved = fixed
        score = np.array(
            [
                loss[k] / max(s, 1e-12) if ok else np.inf
                for loss, k, s, ok in zip(losses, removed, saved, free, strict=True)
            ]
        )
        weakest = int(np.argmin(score))
        widths[weakest] -= steps[weakest]
        removed[weakest] += 1
        path.append(widths.astype(np.int64))
    macs = np.log(form(np.stack(path)))
    wanted = np.linspace(macs[0], macs[-1], members)
    # The first member of the path at or below each of the wanted costs.
    kept = np.minimum(np.searchsorted(-macs, -wanted - 1e-12), len(path) - 1)
    return tuple(
        Widths(space.names, tuple(int(w) for w in path[i])) for i in dict.fromkeys(kept.tolist())
    )
