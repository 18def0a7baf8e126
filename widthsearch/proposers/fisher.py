"""Prune-and-tune by Fisher information."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.data.tasks import Task
from widthsearch.proposers.importance import Per, check_counts
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.proposers.tuning import Tuning, check_rate, prune_and_tune
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.sgd import after_backward


@dataclass(frozen=True)
class Fisher:
    """Fisher pruning (Theis et al. 2018, arXiv 1801.05787; Crowley et al. 2018, arXiv 1810.04622).

    A trained network is fine-tuned; after every so many steps the channels whose removal raises
    the loss least, to second order, are removed: one grid step of the axis where a channel is worth
    least. It ends at the setting's lowest MACs. Axes that no convolution or linear layer reads, or
    whose channels cannot be cut alone, keep their base width. Pin axes (the residual stream) to
    prune blocks alone, as the papers do.

    Attributes:
        every: Fine-tuning steps over which information is gathered, for each network on the way.
        lr: Their constant learning rate.
        per: What a channel's information is divided by: nothing (``channel``), or its cost in
            ``macs``, ``params`` or predicted ``latency``.
        pretrain: How the base network is trained first; None for the study's recipe.
    """

    every: int = 100
    lr: float = 8e-4
    per: Per = "channel"
    pretrain: Recipe | None = None

    def __post_init__(self) -> None:
        check_counts(self, "every")
        check_rate(self.lr)

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """Train the base network, then remove channels while it is fine-tuned.

        Raises:
            StudyError: Training diverged, or predicted latency is wanted but not known.
            SpaceError: No axis can be cut.
        """
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
        return Proposal("fisher", trajectory, {"seed": setting.seed, **asdict(self), **measured})

    def score(self, tuning: Tuning) -> list[Tensor]:
        """Fine-tune for a stretch; per axis Δ of each unit over it, shape (units,)."""
        information = FisherInformation(tuning.channels, tuning.model)
        with information:
            tuning.train(after_backward(lambda: information.gather(tuning.batch_size)))
        return information.deltas()


_READING: dict[Callable[..., Any], int] = {
    F.conv1d: 1,
    F.conv2d: 1,
    F.conv3d: 1,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 1,
    F.conv_transpose3d: 1,
    F.linear: -1,
}
"""Functions that read channels with a weight (their second argument), and along which dim."""


class FisherInformation(TorchFunctionMode):
    """While it lasts, gathers the information of a gate on each unit where its axis is read.

    With a gate c = 1 on each unit of each image, as its readers see it, the loss rises by about
    ``Δ = 1/(2N) Σ_n (∂L_n/∂c_n)²`` when the unit goes, and
    ``∂L_n/∂c_n = Σ_xy a_nxy ∂L_n/∂a_nxy`` summed over all readers (Theis et al. 2018). Batch
    norm in training mode lets images act on each other: for L_n stands the batch's summed loss.

    Args:
        channels: Where the units lie in ``model``.
        model: The network that will run.
    """

    def __init__(self, channels: DependencyGraph, model: nn.Module) -> None:
        super().__init__()
        self._units = channels.groups
        self._readers: dict[int, tuple[str, NDArray[np.int64], NDArray[np.int64]]] = {}
        self._unseen: list[set[str]] = [set() for _ in channels.groups]
        for key, parameter in model.named_parameters():
            where = key, channels.consumers.get(key, -1)
            if where == (key, 1) and parameter.shape[1] == 1 and where not in channels.axis:
                where = key, 0  # depthwise: the filter is the channel
            if where in channels.axis:
                self._readers[id(parameter)] = key, channels.axis[where], channels.group[where]
                for axis in set(channels.axis[where].tolist()) - {-1}:
                    self._unseen[axis].add(key)
        self._read = {i for i, keys in enumerate(self._unseen) if keys}
        device = next(model.parameters()).device
        self._felt: dict[int, list[Tensor]] = {}
        self._sums = [torch.zeros(n, dtype=torch.float64, device=device) for n in self._units]
        self._images = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _READING and torch.is_grad_enabled() and id(args[1]) in self._readers:
            x = args[0].movedim(_READING[func], 1)
            seen = _Witness.apply(x, self._note(id(args[1]), x.shape[1]))
            args = (seen.movedim(1, _READING[func]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _note(self, reader: int, inputs: int) -> Callable[[Tensor], None]:
        """What takes the gradients of a reader's gates, shape (rows, inputs)."""
        key, axes, units = self._readers[reader]
        if len(axes) > inputs:  # a depthwise filter for each of a channel's outputs
            axes, units = (of[:: len(axes) // inputs] for of in (axes, units))
        else:  # groups read alike
            axes, units = (np.tile(of, inputs // len(of)) for of in (axes, units))

        def note(gradients: Tensor) -> None:
            for axis in set(axes.tolist()) - {-1}:
                mine = torch.from_numpy(np.flatnonzero(axes == axis)).to(gradients.device)
                index = torch.from_numpy(units[axes == axis]).to(gradients.device)
                felt = gradients.new_zeros(len(gradients), self._units[axis])
                felt.index_add_(1, index, gradients[:, mine])
                self._felt.setdefault(axis, []).append(felt)
                self._unseen[axis].discard(key)

        return note

    def gather(self, images: int) -> None:
        """Add what the images of a batch felt, after a backward pass of its mean loss."""
        for axis, felt in self._felt.items():
            # Windows and tokens of an image lie one after the other.
            of_image = torch.stack([f.view(images, -1, f.shape[1]).sum(1) for f in felt]).sum(0)
            self._sums[axis] += (images * of_image.double()).square().sum(0)
        self._felt.clear()
        self._images += images

    def deltas(self) -> list[Tensor]:
        """Per axis, Δ of each unit, shape (units,); inf where some reader was not seen."""
        return [
            torch.full_like(sums, torch.inf)
            if self._unseen[i] or i not in self._read
            else sums / (2 * self._images)
            for i, sums in enumerate(self._sums)
        ]


class _Witness(torch.autograd.Function):
    """The identity; tells of Σ a ∂L/∂a over all dims but the first two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        products = x.float() * gradient.float()
        ctx.note(products.flatten(2).sum(2) if x.dim() > 2 else products)
        return gradient, None
