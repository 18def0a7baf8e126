"""Contents for the tensors of a model whose constructors cannot be called again.

That is a module that was given as an object, or a model whose function fails at other sizes. Layers
are filled by their own ``reset_parameters`` where that wrote last, tensors with one value along the
dims that change keep it, and other random contents keep their mean and standard deviation: a number
that a constructor computed from a width is not guessed.

Example:
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> scheme = Scheme.of(model, None)
    >>> wider = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    >>> scheme.apply(wider)
    >>> wider[1].running_var
    tensor([1., 1., 1., 1., 1., 1., 1., 1.])
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widthsearch.errors import SpaceError
from widthsearch.modules.construction import Recorder
from widthsearch.modules.tree import direction_of, is_estimate, join, owner_of, reset, tensors_of

RESET, UNIT, LENGTH = "reset", "unit", "length"


@dataclass(frozen=True)
class Scheme:
    """How each tensor is filled. Each is in one of the mappings.

    Attributes:
        rules: ``reset`` (by the layer), ``unit`` (a random unit vector) or ``length`` (the norms of
            a weight norm's directions).
        values: Contents that are the same for every seed, in the model as given.
        moments: Mean and standard deviation of other contents, which are drawn from a normal
            distribution.
    """

    rules: Mapping[str, str]
    values: Mapping[str, Tensor]
    moments: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, model: nn.Module, recorder: Recorder | None) -> Scheme:
        """The scheme of a model; without the recorder of its constructors, from its values."""
        rules: dict[str, str] = {}
        values: dict[str, Tensor] = {}
        moments: dict[str, tuple[float, float]] = {}
        for module, layer, name, tensor in tensors_of(model):
            key, owner = join(layer, name), owner_of(layer)
            content = tensor.detach()
            origin = recorder.origins.of(tensor) if recorder else None
            last = origin is None or (origin.writer is not None and owner in origin.writer.names)
            layer_of = model.get_submodule(owner)
            resettable = last and callable(getattr(layer_of, "reset_parameters", None))
            directed = direction_of(module, name) is not None
            if is_estimate(module, name):
                rules[key] = UNIT
            elif directed and not is_uniform(content, range(content.dim())):
                rules[key] = LENGTH
            elif (
                tensor.numel() == 0 or tensor.device.type == "meta" or (resettable and not directed)
            ):
                rules[key] = RESET
            elif is_fixed(module, name, tensor, recorder):
                values[key] = content.clone()
            else:
                numbers = content if content.is_complex() else content.float()
                moments[key] = float(numbers.mean().real), float(numbers.std())
        return cls(rules, values, moments)

    @torch.no_grad()
    def apply(self, model: nn.Module, only: Collection[str] | None = None) -> None:
        """Fill tensors of ``model``, drawing from the global random state.

        Layers are reset first, because a reset overwrites all of a layer's tensors; the lengths of
        weight norms come last, because they follow from other tensors.

        Args:
            model: A model with the same tensors, at any sizes.
            only: The tensors to fill; all by default.

        Raises:
            SpaceError: A content has no like at the new shape.
        """
        chosen = [
            (module, layer, join(layer, name), name, tensor)
            for module, layer, name, tensor in tensors_of(model)
            if only is None or join(layer, name) in only
        ]
        owners = (owner_of(layer) for _, layer, key, *_ in chosen if self.rules.get(key) == RESET)
        for owner in dict.fromkeys(owners):
            reset(model, owner)
        for _, _, key, _, tensor in chosen:
            self._fill(key, tensor)
        for module, _, key, name, tensor in chosen:
            if self.rules.get(key) == LENGTH:
                direction = direction_of(module, name)
                assert direction is not None
                tensor.copy_(torch.norm_except_dim(direction[0], 2, direction[1]))

    def _fill(self, key: str, tensor: Tensor) -> None:
        """Fill one tensor, if it needs neither its layer nor other tensors for that."""
        if key in self.values:
            content = self.values[key]
            sizes = zip(content.shape, tensor.shape, strict=True)
            others = [dim for dim, (n, m) in enumerate(sizes) if n != m]
            if not is_uniform(content, others):
                raise SpaceError(
                    f"a content that differs along a width follows it by the model's constructors, "
                    f"but they do not give {key!r} the shape {tuple(tensor.shape)}: choose widths "
                    "that they take (by `step`), or pin the axis"
                )
            for dim in others:
                content = content.narrow(dim, 0, 1)
            tensor.copy_(content.expand(tensor.shape))
        elif key in self.moments:
            tensor.normal_(*self.moments[key])
        elif self.rules.get(key) == UNIT:
            tensor.copy_(nn.functional.normalize(tensor.normal_(), dim=0))


def is_fixed(module: nn.Module, name: str, tensor: Tensor, recorder: Recorder | None) -> bool:
    """Whether a tensor's content is the same for every seed.

    Without a recorder: buffers, frozen parameters, and whatever holds one value everywhere.
    """
    if recorder is not None:
        return not recorder.origins.of(tensor).random
    return not tensor.requires_grad or is_uniform(tensor, range(tensor.dim()))


def is_uniform(content: Tensor, dims: Iterable[int]) -> bool:
    """Whether a content is equal at every position along some dims."""
    if not content.numel():
        return True
    first = content
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return bool((content == first).all())
