"""Module trees: their tensors, the attributes that repeat the tensors' sizes, and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from widthsearch.modules.closures import Closures
from widthsearch.torch_internals import (
    REGISTERED,
    ConvNd,
    NormBase,
    SpectralNormParametrization,
    WeightNormParametrization,
    buffers_of,
    forward_pre_hooks_of,
    parameters_of,
    refer_to_own_weights,
    tree_leaves,
)

_PARAMETRIZATIONS = ".parametrizations."
_PLAIN = int | float | str | None
_SUFFIX: dict[type, str] = {WeightNorm: "_v", SpectralNorm: "_orig"}
"""The suffixes that the older reparametrisations, which are hooks, append to a weight's name."""


def tensors_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Every parameter and buffer once: its module, the module's name, its name and the tensor."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for group in (parameters_of(module), buffers_of(module)):
            for name, tensor in group.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield module, module_name, name, tensor


def aliases_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every further name of a tensor that several modules share, with its first name."""
    first: dict[int, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, tensor in {**parameters_of(module), **buffers_of(module)}.items():
            key = join(module_name, name)
            if tensor is not None and first.setdefault(id(tensor), key) != key:
                yield key, first[id(tensor)]


def holders_of(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """The layers that hold each parameter and buffer, by its id: several where they share it."""
    found: dict[int, dict[str, None]] = {}
    for module_name, module in model.named_modules():
        for tensor in (*parameters_of(module).values(), *buffers_of(module).values()):
            if tensor is not None:
                found.setdefault(id(tensor), {})[owner_of(module_name)] = None
    return {key: tuple(layers) for key, layers in found.items()}


def join(module_name: str, name: str) -> str:
    """The name of a module's tensor in the state dict."""
    return f"{module_name}.{name}" if module_name else name


def owner_of(layer: str) -> str:
    """The layer that a parametrisation belongs to; any other layer unchanged."""
    return f".{layer}".split(_PARAMETRIZATIONS[:-1])[0].removeprefix(".")


def clone(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A copy of ``model`` in which each tensor ``t`` is replaced by ``tensors[id(t)]``.

    Raises:
        TraceError: An attribute holds a module in a way that a copy cannot hold its own.
    """
    closures = Closures(model)
    memo: dict[int, Any] = {**tensors, **closures.memo}
    for module in model.modules():
        held = (value for name, value in vars(module).items() if name not in REGISTERED)
        for value in held_tensors([value for value in held if not isinstance(value, _PLAIN)]):
            if not value.is_leaf:  # deepcopy refuses these
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, memo)
    closures.fill(memo)
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):
            refer_to_own_weights(module)
        for name, suffix in _hooked(module):
            # The hook recomputes this attribute in each forward. It becomes an alias of the
            # parameter, because `reset_parameters` writes to the attribute.
            setattr(module, name, getattr(module, name + suffix).detach())
    return copied


def exchange(model: nn.Module, tensors: Mapping[int, Tensor]) -> None:
    """Replace each tensor ``t`` of a model, wherever it stands, by ``tensors[id(t)]``."""
    for module in model.modules():
        held = {**parameters_of(module), **buffers_of(module)}
        new = {name: tensors[id(t)] for name, t in held.items() if id(t) in tensors}
        for name, tensor in new.items():
            setattr(module, name, tensor)
        if new:
            sync_attributes(module)


def _hooked(module: nn.Module) -> Iterator[tuple[str, str]]:
    for hook in forward_pre_hooks_of(module):
        if type(hook) in _SUFFIX:
            yield hook.name, _SUFFIX[type(hook)]


def weight_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A tensor with the shape of a module's weight, also where a parametrisation computes it."""
    if parametrize.is_parametrized(module, name):
        held: Any = module.parametrizations[name]  # type: ignore[index]
        if isinstance(held[0], WeightNormParametrization):
            return _tensor(held.original1)
        return _tensor(held.original if hasattr(held, "original") else getattr(module, name))
    for hooked, suffix in _hooked(module):
        if hooked == name:
            return _tensor(getattr(module, f"{name}{suffix}"))
    return _tensor(getattr(module, name, None))


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def is_estimate(module: nn.Module, name: str) -> bool:
    """Whether a buffer is spectral norm's running estimate of a singular vector."""
    if isinstance(module, SpectralNormParametrization):
        return name in ("_u", "_v")
    return any(
        isinstance(hook, SpectralNorm) and name in (f"{hook.name}_u", f"{hook.name}_v")
        for hook in forward_pre_hooks_of(module)
    )


def sync_attributes(module: nn.Module) -> None:
    """Set the attributes of torch's layers that repeat their tensors' sizes."""
    if not isinstance(module, SIZED):
        return
    of: Callable[..., Any] = partial(weight_of, module)  # torch's types have no symbolic sizes
    weight = of()
    if isinstance(module, ConvNd):
        own, other = weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = own, other * module.groups
        else:
            module.out_channels, module.in_channels = own, other * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, NormBase):
        sized = weight if weight is not None else module.running_mean
        if sized is not None:
            module.num_features = sized.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.MultiheadAttention):
        out: Any = weight_of(module.out_proj)
        module.embed_dim = out.shape[0]
        module.head_dim = module.embed_dim // module.num_heads
        if of("in_proj_weight") is not None:  # else three of other widths
            module.kdim = module.vdim = module.embed_dim
        else:
            module.kdim = of("k_proj_weight").shape[1]
            module.vdim = of("v_proj_weight").shape[1]
    elif isinstance(module, nn.RNNBase):
        recurrent: Any = module
        recurrent.input_size = of("weight_ih_l0").shape[1]
        if module.proj_size:
            recurrent.proj_size, recurrent.hidden_size = of("weight_hr_l0").shape
        else:
            recurrent.hidden_size = of("weight_hh_l0").shape[1]
    elif isinstance(module, nn.RNNCellBase):
        module.input_size = of("weight_ih").shape[1]
        module.hidden_size = of("weight_hh").shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def is_synced(module: nn.Module) -> bool:
    """Whether :func:`sync_attributes` sets all of a module's sizes from its tensors."""
    torchs_own = type(module).__module__.startswith("torch.nn.")
    sized = any(parameter is not None for parameter in parameters_of(module).values())
    return sized and (torchs_own or isinstance(module, SIZED))


SIZED = (
    *(ConvNd, NormBase, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm),
    *(nn.RMSNorm, nn.GroupNorm, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.PReLU),
)
"""Torch's layers that repeat their tensors' sizes in attributes."""


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution of several groups of one input channel each."""
    convolution = isinstance(module, ConvNd)
    return convolution and 1 < module.groups == module.in_channels  # type: ignore[operator, return-value]


def sizes_in(module: nn.Module, *others: type) -> Iterator[tuple[str, Any]]:
    """Every integer among a module's plain attributes: ``name``, or ``name[i]`` in a sequence.

    Args:
        module: The module.
        others: Further types of integers (symbolic ones).
    """
    return _integers_in(vars(module), *others)


def _integers_in(attributes: Mapping[str, Any], *others: type) -> Iterator[tuple[str, Any]]:
    kinds = (int, *others)
    for name, value in attributes.items():
        if type(value) in kinds:
            yield name, value
        elif type(value) in (tuple, list, torch.Size):
            for i, item in enumerate(value):
                if type(item) in kinds:
                    yield f"{name}[{i}]", item


def sizes_held_by(module: nn.Module) -> Iterator[tuple[int, str, int]]:
    """The same for objects among a module's attributes, e.g. ``config.hidden_size``.

    Yields:
        The object's id, as several modules may hold it; the name; the integer.
    """
    for name, held in vars(module).items():
        if isinstance(held, dict) and not name.startswith("_"):
            attributes = {f"{name}.{key}": v for key, v in held.items() if isinstance(key, str)}
        elif not hasattr(held, "__dict__") or isinstance(held, nn.Module | Tensor | type):
            continue
        else:
            attributes = {f"{name}.{key}": value for key, value in vars(held).items()}
        for place, value in _integers_in(attributes):
            yield id(held), place, value


def set_size(model: nn.Module, layer: str, attribute: str, value: Any) -> None:
    """Set an attribute by the name that :func:`sizes_in` or :func:`sizes_held_by` gives it."""
    name, _, index = attribute.partition("[")
    holder, _, name = name.rpartition(".")
    owner: Any = model.get_submodule(layer)
    attributes = vars(owner)
    if holder:
        attributes = owner = getattr(owner, holder)
        if not isinstance(owner, dict):
            attributes = vars(owner)
    if index:
        sequence = attributes[name]
        items = list(sequence)
        items[int(index[:-1])] = value
        value = items if isinstance(sequence, list) else tuple(items)
    if isinstance(owner, nn.Module):
        setattr(owner, name, value)
    else:
        attributes[name] = value  # not setattr: the object may be frozen


def own_configurations(model: nn.Module, places: Iterable[tuple[str, str]]) -> None:
    """Give a model copies of the objects that hold its sizes, for the user may hold them too.

    Args:
        model: The model; its modules that share an object share the copy.
        places: Layers and the names of their attributes, e.g. ``config.hidden_size``.
    """
    held = {
        id(holder): copy.copy(holder)
        for layer, name in places
        if "." in name
        for holder in [getattr(model.get_submodule(layer), name.rpartition(".")[0])]
    }
    for module in model.modules() if held else ():
        for name, value in list(vars(module).items()):
            if id(value) in held:
                setattr(module, name, held[id(value)])


def sharing(model: nn.Module, place: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """A place as :func:`own_configurations` takes them, and those of all that share its object.

    Where a constructor is given other widths for some modules, they no longer share it.
    """
    layer, attribute = place
    holder, _, own = attribute.rpartition(".")
    yield place
    held = getattr(model.get_submodule(layer), holder) if holder else None
    for other, module in model.named_modules() if holder else ():
        for name, value in vars(module).items():
            if value is held and (other, name) != (layer, holder):
                yield other, f"{name}.{own}"


@torch.no_grad()
def reset(model: nn.Module, layer: str) -> None:
    """Call a layer's own ``reset_parameters``, also if its weights are parametrised."""
    module: Any = model.get_submodule(owner_of(layer))
    if not callable(getattr(module, "reset_parameters", None)):
        return
    if not parametrize.is_parametrized(module):
        module.reset_parameters()
    else:
        plain: Any = type(module).__bases__[0]
        # Parametrised weights are computed, and cannot be written to: reset a copy of the layer
        # with plain weights, then assign these through the parametrisations.
        shadow = plain.__new__(plain)
        shadow.__dict__ = dict(vars(module))
        held = module.parametrizations
        fresh = {name: nn.Parameter(torch.empty_like(getattr(module, name))) for name in held}
        shadow._parameters = {**parameters_of(module), **fresh}
        shadow.reset_parameters()
        for name, value in fresh.items():
            setattr(module, name, value.detach())


def direction_of(module: nn.Module, name: str) -> tuple[Tensor, int] | None:
    """The directions that belong to a weight norm's lengths, and their dim; None for others."""
    if isinstance(module, parametrize.ParametrizationList) and isinstance(
        module[0], WeightNormParametrization
    ):
        held: Any = module
        return (held.original1, held[0].dim) if name == "original0" else None
    for hook in forward_pre_hooks_of(module):
        if isinstance(hook, WeightNorm) and name == f"{hook.name}_g":
            return getattr(module, f"{hook.name}_v"), hook.dim
    return None


def held_tensors(out: Any) -> list[Tensor]:
    """The tensors that an object holds, say a model's output; also within classes of the user's.

    Example:
        >>> from types import SimpleNamespace
        >>> out = SimpleNamespace(logits=torch.zeros(2), rest=[(torch.ones(1), None), {"n": 3}])
        >>> held_tensors(out)
        [tensor([0., 0.]), tensor([1.])]
    """
    found: list[Tensor] = []
    seen: dict[int, Any] = {}  # an object may hold itself

    def visit(tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif not isinstance(leaf, nn.Module | type) and id(leaf) not in seen:
                seen[id(leaf)] = leaf
                if isinstance(leaf, Mapping):
                    visit(list(leaf.values()))
                elif isinstance(leaf, list | tuple):
                    visit(list(leaf))
                slots = getattr(type(leaf), "__slots__", ())
                names = [slots] if isinstance(slots, str) else list(slots)
                visit([getattr(leaf, name, None) for name in names])
                visit(list(getattr(leaf, "__dict__", {}).values()))

    visit(out)
    return found
