"""Every private symbol of torch that the package uses, in one place.

Checked on torch 2.11 and 2.14 (``pyproject.toml`` holds the bounds). The symbols and their uses:

- ``_ConvNd``, ``_NormBase``, ``_BatchNorm``: the common bases of torch's convolutions and norms.
- ``_WeightNorm``, ``_SpectralNorm``: parametrisations whose formulas the package knows.
- ``TorchDispatchMode``: sees every operator below autograd; ``_pytree``: walks its arguments.
- ``_foreach_copy_``: copies a list of tensors in few kernels.
- ``_disable_current_modes``: makes a constant on the CPU while modes see only meta tensors.
- ``enable_python_dispatcher``: lets symbolic sizes reach composite operators undecomposed.
- ``_parameters``, ``_buffers``, ``_modules`` and the hooks of a module: the public iterators hide
  None, non-persistent buffers or shared tensors.
- ``_cdata``: the identity of a storage, which several tensors may share.
- ``_cuda_endAllocateToPool``, ``_cuda_releasePool``: to clean up after a failed graph capture.
- ``_check``: a condition of a meta kernel; ``_schema``: the names and returns of an operator.
- ``_tensor_name``: the tensor that a mask of ``torch.nn.utils.prune`` is on.
- the interface of a *symbolic node*: ``SymInt``, ``SymFloat`` and ``SymBool`` are public, but the
  methods that they call on the node inside are not. ``SymbolicNode`` holds the constant answers,
  ``tracing/symbolic_ints.py`` the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import _check as check_sizes
from torch import _foreach_copy_ as foreach_copy_
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch.nn.modules import module as every_module
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNormParametrization
from torch.nn.utils.parametrizations import _WeightNorm as WeightNormParametrization
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only

__all__ = [
    "REGISTERED",
    "BatchNormBase",
    "ConvNd",
    "NormBase",
    "SpectralNormParametrization",
    "SymbolicNode",
    "TorchDispatchMode",
    "WeightNormParametrization",
    "buffers_of",
    "check_sizes",
    "children_of",
    "enable_python_dispatcher",
    "end_allocation_to_pool",
    "foreach_copy_",
    "forward_pre_hooks_of",
    "has_global_hooks",
    "has_hooks",
    "has_tensor_hooks",
    "parameters_of",
    "pruned_tensor",
    "refer_to_own_weights",
    "schema_of",
    "storage_of",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "without_modes",
]

REGISTERED = ("_parameters", "_buffers", "_modules")
"""The attributes of a module that hold its tensors and children."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name; None where None was registered."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by name, persistent or not."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name; assigning to it replaces one."""
    return module._modules


def forward_pre_hooks_of(module: nn.Module) -> Iterator[Any]:
    """The hooks that run before a module's forward; the older weight norms are such hooks."""
    return iter(module._forward_pre_hooks.values())


def pruned_tensor(hook: object) -> str | None:
    """The name of the tensor under a mask of ``torch.nn.utils.prune``; None for other hooks."""
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else None


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward or backward."""
    return any(getattr(module, name) for name in _HOOKS)


def has_global_hooks() -> bool:
    """Whether hooks run around every module's forward or backward."""
    return any(getattr(every_module, f"_global{name}") for name in _HOOKS)


def has_tensor_hooks(tensor: Tensor) -> bool:
    """Whether hooks run on a tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def schema_of(func: Any) -> Any:
    """The schema of an operator: its name, arguments and returns, and whether it writes."""
    return func._schema


def storage_of(tensor: Tensor) -> int:
    """A number that tensors share if they share their memory."""
    return int(tensor.untyped_storage()._cdata)


class _Expression:
    """Stands in for a node's sympy expression: torch asks it for free symbols."""

    free_symbols: frozenset[Any] = frozenset()
    is_number = is_Boolean = is_Symbol = False  # noqa: N815 - sympy's names
    args = ()


class SymbolicNode:
    """The methods of torch's symbolic nodes whose answer is the same for every size.

    Attributes:
        kind: ``int``, ``float`` or ``bool``: the type that the node stands for.

    Example:
        >>> node = SymbolicNode()
        >>> node.is_symbolic(), node.is_constant(), node.clone() is node
        (True, False, True)
    """

    kind = ""
    shape_env = None
    constant = None
    _hint = None
    expr = _Expression()

    def clone(self) -> SymbolicNode:
        """Nodes are immutable."""
        return self

    def str(self) -> str:
        """The node as text."""
        return repr(self)

    _graph_repr = __str__ = str


for _kind in ("int", "float", "bool"):
    setattr(SymbolicNode, f"is_{_kind}", lambda self, kind=_kind: self.kind == kind)
    setattr(SymbolicNode, f"maybe_as_{_kind}", lambda _self: None)
for _name, _answer in {
    "is_nested_int": False,
    "is_symbolic": True,
    "is_constant": False,
    "has_hint": True,
    "nested_int": None,
    "nested_int_coeff": None,
}.items():
    setattr(SymbolicNode, _name, lambda _self, answer=_answer: answer)


def end_allocation_to_pool(device_index: int, pool: Any) -> None:
    """Release the memory pool of a failed CUDA graph capture, unless CUDA has done so."""
    try:
        torch._C._cuda_endAllocateToPool(device_index, pool)
    except RuntimeError:
        return  # already ended
    torch._C._cuda_releasePool(device_index, pool)


def refer_to_own_weights(module: nn.RNNBase) -> None:
    """Point a recurrent layer's weak references at its weights.

    It computes its weights anew where they are others. A copy of a layer with a parametrisation
    has the references of the layer it was copied from.
    """
    held: Any = module
    weights = held._flat_weights
    held._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]
