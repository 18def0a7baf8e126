"""Prune-and-tune by Fisher information."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.call_sites import CallSites, Site
from widthsearch.channels.dependency_graph import DependencyGraph
from widthsearch.channels.sums import of_input_channels
from widthsearch.proposers.tuning import FineTuner, PruneAndTune
from widthsearch.training.sgd import after_backward
from widthsearch.utils.validation import validated_dataclass


@validated_dataclass("fisher")
class Fisher(PruneAndTune):
    """Fisher pruning (Theis et al. 2018, arXiv 1801.05787; Crowley et al. 2018, arXiv 1810.04622).

    A trained network is fine-tuned. After every ``every`` steps, channels whose removal raises the
    loss least, to second order (see :class:`FisherInformation`), are removed: one grid step of the
    axis with the least information per channel. The method ends at the setting's lowest MACs.

    Deviations: the papers remove one channel at a time, and only inside residual blocks (pin the
    residual stream to do the same). Axes that no convolution or linear layer consumes, or whose
    channels cannot be told apart, keep their base width.

    Attributes:
        every: Fine-tuning steps over which information is gathered, for each network on the way;
            default 100.
        lr: The constant learning rate of fine-tuning; default 8e-4, as in the papers.
        per: The cost that information is divided by: ``macs`` (default, as Theis et al.),
            ``params``, predicted ``latency``, or ``channel``: none, as the other paper.
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
        >>> proposal = Fisher(every=1)(space, load_task("digits"), setting)
        >>> proposal.trajectory[0].vector, sorted(proposal.provenance["members"][0])
        ((8, 8), ['accuracy', 'epochs', 'macs'])
    """

    name: ClassVar[str] = "fisher"

    def score(self, tuner: FineTuner) -> list[Tensor]:
        """Fine-tune for a stretch; per axis, Δ of each group over the stretch, shape (groups,)."""
        information = FisherInformation(tuner.graph, tuner.model)
        with information:
            tuner.tune(after_backward(lambda: information.gather(tuner.batch_size)))
        return information.deltas()


_CONSUMERS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), 1),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1),
    "linear": -1,
}
"""Functions that consume channels with a weight, their second argument, by the dim of channels."""


class FisherInformation(CallSites):
    """Gathers the Fisher information of gates on channel groups, while it is active.

    Notation::

        N      images; n an image with the loss L_n
        a_nxy  the activation of a channel at position (x, y)
        c_n    a gate of 1 that multiplies all channels of a group in image n, as consumers read it

    Removing the group, c_n = 0, raises the loss by about ``Δ = 1/(2N) Σ_n (∂L_n/∂c_n)²`` (Theis et
    al. 2018), where ``∂L_n/∂c_n = Σ_xy a_nxy ∂L_n/∂a_nxy``, summed over all channels of the group
    and all consumers before it is squared. No gate is inserted: each consumer passes its input
    through :class:`_GateProbe`, which computes that sum in the backward pass.

    For example, two consumers whose sums are 3 and -1 in the only image give Δ = (3 - 1)²/2 = 2.

    In train mode batch norm makes the loss of an image depend on the other images: L_n then is the
    summed loss of the batch.

    Args:
        graph: The dependency graph of the network.
        model: The network.

    Example:
        >>> from widthsearch.channels.dependency_graph import build_dependency_graph
        >>> from widthsearch.space.search_space import SearchSpace
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> space = SearchSpace.from_model(net, (2,))
        >>> model = space.build(space.base, seed=0)
        >>> graph = build_dependency_graph(space.model, space.base)
        >>> with FisherInformation(graph, model) as information:
        ...     loss = model(torch.randn(5, 2)).square().mean()
        ...     loss.backward()
        ...     information.gather(5)
        >>> [delta.shape for delta in information.deltas()]
        [torch.Size([4])]
    """

    def __init__(self, graph: DependencyGraph, model: nn.Module) -> None:
        super().__init__(model)
        self._groups = graph.groups
        # By call: the axis and group of each channel that its weight reads.
        self._consumers: dict[Site, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._unseen: list[set[Site]] = [set() for _ in graph.groups]
        for site, operands in graph.gates.items():
            for operand in operands:
                if operand.index == 1 and max(operand.axis.shape) == operand.axis.size:
                    self._consumers[site] = operand.axis.reshape(-1), operand.group.reshape(-1)
                for axis in set(operand.axis.reshape(-1).tolist()) - {-1}:
                    self._unseen[axis].add(site)
        self._consumed = {i for i, sites in enumerate(self._unseen) if sites}
        device = next(model.parameters()).device
        self._gradients: dict[int, list[Tensor]] = {}  # per axis, of this batch: (rows, groups)
        self._sums = [torch.zeros(n, dtype=torch.float64, device=device) for n in self._groups]
        self._images = 0

    def call(self, site: Site, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one call, with a probe of its input if it is a consumer."""
        if (dim := _CONSUMERS.get(site[1])) and site in self._consumers and torch.is_grad_enabled():
            x = args[0].movedim(dim, 1)
            probed = _GateProbe.apply(x, self._collector(site, x.shape[1]))
            args = (probed.movedim(1, dim), *args[1:])
        return func(*args, **kwargs)

    def _collector(self, site: Site, inputs: int) -> Callable[[Tensor], None]:
        """A function that stores the gate gradients of a consumer's inputs, (rows, inputs)."""
        axes, groups = (of_input_channels(of, inputs) for of in self._consumers[site])

        def collect(gradients: Tensor) -> None:
            for axis in set(axes.tolist()) - {-1}:
                mine = torch.from_numpy(np.flatnonzero(axes == axis)).to(gradients.device)
                index = torch.from_numpy(groups[axes == axis]).to(gradients.device)
                of_groups = gradients.new_zeros(len(gradients), self._groups[axis])
                of_groups.index_add_(1, index, gradients[:, mine])
                self._gradients.setdefault(axis, []).append(of_groups)
                self._unseen[axis].discard(site)

        return collect

    def gather(self, images: int) -> None:
        """Add the information of a batch, after the backward pass of its mean loss."""
        for axis, gradients in self._gradients.items():
            # Rows are images, or the windows or tokens of an image one after the other.
            of_image = torch.stack([g.view(images, -1, g.shape[1]).sum(1) for g in gradients])
            self._sums[axis] += (images * of_image.sum(0).double()).square().sum(0)
        self._gradients.clear()
        self._images += images

    def deltas(self) -> list[Tensor]:
        """Per axis, Δ of each group, shape (groups,); inf if some consumer did not run."""
        return [
            torch.full_like(sums, torch.inf)
            if self._unseen[i] or i not in self._consumed
            else sums / (2 * self._images)
            for i, sums in enumerate(self._sums)
        ]


class _GateProbe(torch.autograd.Function):
    """The identity; its backward pass computes Σ a ∂L/∂a over all dims but the first two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, collect: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.collect = collect
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)  # sums in half precision are too coarse
        products = x.to(dtype) * gradient.to(dtype)
        ctx.collect(products.flatten(2).sum(2) if x.dim() > 2 else products)
        return gradient, None
