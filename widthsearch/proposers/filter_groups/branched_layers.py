"""The branched layer, and networks with and without it.

A :class:`BranchedConv2d` gathers the inputs of each branch, convolves branch by branch, and places
the outputs. For example, a layer of 4 input and 4 output channels with the branches
``filters=(0, 3), inputs=(1, 2)`` and ``filters=(1,), inputs=(0,)`` concatenates the outputs of two
convolutions, for channels 0, 3 and 1, appends a zero, and selects positions 0, 2, 3, 1: channel 2,
which no branch makes, is the zero behind the last position.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.modules.tree import sync_attributes
from widthsearch.proposers.filter_groups.architecture import Branch, BranchedArchitecture
from widthsearch.torch_internals import children_of


class BranchedConv2d(nn.Module):
    """A convolution as parallel branches.

    At the sizes at construction, branches read and make the given channels. At other sizes (of a
    :func:`~widthsearch.proposers.filter_groups.branched_space.branched` space) the channels follow
    from the sizes alone: branch b of B reads n of the C channels from ``b · C / B`` on, wrapping
    around; the filters make the channels in order, evenly spread if there are fewer filters than
    channels; if there are more, evenly spaced filters count.

    Args:
        conv: The plain layer; sets kernel, stride, padding, dilation, dtype and bias.
        in_channels: Input channels of the layer.
        out_channels: Output channels of the layer; a channel that no branch makes is zero (plus
            bias).
        given: The branches.
        device: The device of the tensors, whose values are undefined.

    Example:
        >>> branches = [Branch((0, 3), (1, 2)), Branch((1,), (0,))]
        >>> layer = BranchedConv2d(nn.Conv2d(4, 4, 1, bias=False), 4, 4, branches)
        >>> for parameter in layer.parameters():
        ...     _ = nn.init.ones_(parameter)
        >>> layer(torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1, 1)).flatten().tolist()
        [110.0, 1.0, 0.0, 110.0]
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        conv: nn.Conv2d,
        in_channels: int,
        out_channels: int,
        given: Sequence[Branch],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.given = tuple(given)
        names = "kernel_size", "stride", "padding", "dilation", "padding_mode"
        like: dict[str, Any] = {name: getattr(conv, name) for name in names}
        like |= {"device": "meta", "dtype": conv.weight.dtype, "bias": False}
        self.branches = nn.ModuleList(
            nn.Conv2d(len(branch.inputs), len(branch.filters), **like) for branch in given
        )
        self.branches.requires_grad_(conv.weight.requires_grad)
        self.register_parameter("bias", None)
        if conv.bias is not None:
            values = torch.empty(out_channels, dtype=conv.bias.dtype, device="meta")
            self.bias = nn.Parameter(values, requires_grad=conv.bias.requires_grad)
        self.to_empty(device=device)
        self._given_for = self._sizes()
        self._places: dict[Any, tuple[list[Tensor | None], Tensor | None]] = {}

    def reset_parameters(self) -> None:
        """Initialise the bias as torch's convolutions do; branches have their own method."""
        if self.bias is not None:
            bound = (self.in_channels * self._convs()[0].weight[0, 0].numel()) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def _convs(self) -> list[nn.Conv2d]:
        return list(self.branches)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W')."""
        size: tuple[Any, ...] = x.shape
        if isinstance(size[1], torch.SymInt):  # tracing: which channels meet is not known
            # The dependency graph does not know which channel of a sorted tensor is where either.
            x = x.sort(1).values
            reads = [x.new_empty((size[0], b.in_channels, *size[2:])) for b in self._convs()]
            parts = [b(x).sort(1).values for b, x in zip(self._convs(), reads, strict=True)]
            y = x.new_empty((size[0], self.out_channels, *parts[0].shape[2:]))
        else:
            gathers, source = self._indices(x.device)
            parts = [
                branch(x if gather is None else x.index_select(1, gather))
                for branch, gather in zip(self._convs(), gathers, strict=True)
            ]
            y = torch.cat(parts, 1)
            if source is not None:
                y = nn.functional.pad(y, (0, 0, 0, 0, 0, 1)).index_select(1, source)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    def extra_repr(self) -> str:
        """The sizes; the branches are listed as submodules."""
        return f"{self.in_channels}, {self.out_channels}"

    def current(self) -> tuple[Branch, ...]:
        """The channels of each branch at the present sizes; a filter that does not count has -1."""
        sizes = self._sizes()
        if sizes == self._given_for:
            return self.given
        total, inputs, outputs = sum(f for f, _ in sizes[2:]), *sizes[:2]
        out, made = [], 0
        for number, (filters, count) in enumerate(sizes[2:]):
            start = number * inputs // (len(sizes) - 2)
            reads = [(start + i) % inputs for i in range(count)]
            if total <= outputs:
                makes = [(made + i) * outputs // total for i in range(filters)]
            else:
                wanted = {j * total // outputs: j for j in range(outputs)}
                makes = [wanted.get(made + i, -1) for i in range(filters)]
            made += filters
            out.append(Branch(tuple(makes), tuple(reads)))
        return tuple(out)

    def _sizes(self) -> tuple[Any, ...]:
        pairs = [tuple(branch.weight.shape[:2]) for branch in self._convs()]
        return self.in_channels, self.out_channels, *pairs

    def _indices(self, device: torch.device) -> tuple[list[Tensor | None], Tensor | None]:
        """The inputs of each branch, and the position of each output channel in the concatenation.

        None stands for all channels in order. A channel that no branch makes has the position
        behind the last one.
        """
        key = device, self._sizes()
        if key not in self._places:
            everything = tuple(range(self.in_channels))
            branches = self.current()
            makes = [channel for branch in branches for channel in branch.filters]
            source = [len(makes)] * self.out_channels
            for position, channel in enumerate(makes):
                if channel >= 0:
                    source[channel] = position
            in_order = makes == list(range(self.out_channels))
            with torch.inference_mode(False):  # the indices must serve later training, too
                gathers = [
                    None if b.inputs == everything else torch.tensor(b.inputs, device=device)
                    for b in branches
                ]
                placed = None if in_order else torch.tensor(source, device=device)
            self._places = {key: (gathers, placed)}
        return self._places[key]


@torch.no_grad()
def with_branches(model: nn.Module, architecture: BranchedArchitecture) -> nn.Module:
    """A copy of a plain network with branches, which keep their weights.

    The copy computes the function of the network with all other weights of those layers at zero.

    Args:
        model: A network of the plain space at the architecture's widths.
        architecture: The branches.
    """
    out = copy.deepcopy(model)
    for layer, branches in architecture.layers.items():
        conv = out.get_submodule(layer)
        assert isinstance(conv, nn.Conv2d)
        weights = [conv.weight[list(b.filters)][:, list(b.inputs)] for b in branches]
        replace_module(out, conv, _branched(conv, branches, weights))
    return out


@torch.no_grad()
def without_branches(model: nn.Module) -> nn.Module:
    """A copy with plain layers that computes the same, with zeros outside of the branches."""
    out = copy.deepcopy(model)
    for layer in [m for m in out.modules() if isinstance(m, BranchedConv2d)]:
        first = layer._convs()[0]
        weight = first.weight.new_zeros(layer.out_channels, layer.in_channels, *first.kernel_size)
        for part, branch in zip(layer._convs(), layer.current(), strict=True):
            kept = [i for i, channel in enumerate(branch.filters) if channel >= 0]
            rows = weight.new_zeros(len(kept), *weight.shape[1:])
            inputs = torch.tensor(branch.inputs, device=weight.device)
            rows.index_add_(1, inputs, part.weight[kept])
            weight[[branch.filters[i] for i in kept]] = rows
        replace_module(out, layer, _plain(layer, weight))
    return out


@torch.no_grad()
def deploy(model: nn.Module) -> nn.Module:
    """A copy for inference, in which branches that read the same channels are merged.

    A layer with a single branch of all channels becomes a plain ``Conv2d``. Outputs are the same up
    to rounding, MACs are the same.
    """
    out = copy.deepcopy(model)
    for layer in [m for m in out.modules() if isinstance(m, BranchedConv2d)]:
        buckets: dict[tuple[int, ...], list[tuple[Branch, Tensor]]] = {}
        for part, branch in zip(layer._convs(), layer.current(), strict=True):
            buckets.setdefault(branch.inputs, []).append((branch, part.weight))
        merged: list[Branch] = []
        weights: list[Tensor] = []
        for inputs, parts in buckets.items():
            filters = [channel for branch, _ in parts for channel in branch.filters]
            order = sorted(range(len(filters)), key=filters.__getitem__)
            merged.append(Branch(tuple(sorted(filters)), inputs))
            weights.append(torch.cat([weight for _, weight in parts])[order])
        everything = Branch(tuple(range(layer.out_channels)), tuple(range(layer.in_channels)))
        whole = merged == [everything]
        new = _plain(layer, weights[0]) if whole else _branched(layer, merged, weights)
        replace_module(out, layer, new)
    return out


def _branched(
    layer: nn.Conv2d | BranchedConv2d, branches: Sequence[Branch], weights: Sequence[Tensor]
) -> BranchedConv2d:
    """A copy of a layer with other branches, of these weights."""
    conv = _plain(layer, weights[0]) if isinstance(layer, BranchedConv2d) else layer
    sizes = layer.in_channels, layer.out_channels
    new = BranchedConv2d(conv, *sizes, branches, conv.weight.device)
    for part, weight in zip(new._convs(), weights, strict=True):
        part.weight.copy_(weight)
    if new.bias is not None:
        assert conv.bias is not None
        new.bias.copy_(conv.bias)
    return new.train(layer.training)


def _plain(layer: BranchedConv2d, weight: Tensor) -> nn.Conv2d:
    """The plain layer of a branched one, with another weight."""
    conv = copy.deepcopy(layer._convs()[0])
    conv.weight, conv.bias = nn.Parameter(weight), layer.bias
    sync_attributes(conv)
    return conv


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a submodule at all of its places."""
    for module in list(model.modules()):
        for name, child in children_of(module).items():
            if child is old:
                children_of(module)[name] = new
