"""torch and the standard library, as far as a hash of code (``hashing.py``) must know them.

Which of their functions depend on their arguments alone; what a program has put into torch's
namespaces; and the state that torch runs under.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


class NoHash(Exception):  # noqa: N818 - what it means depends on who asked
    """Something that a run may read cannot be told by value; says what."""


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_PURE = words(
    """__future__ _abc _collections _collections_abc _functools _operator _warnings abc bisect cmath
    collections contextlib copy dataclasses enum functools heapq itertools math numbers operator re
    string textwrap types typing typing_extensions warnings"""
)
"""Modules of the standard library whose functions depend on their arguments alone."""
_IMPURE_BUILTINS = words("__import__ breakpoint compile eval exec globals hash help id input open")
_PURE_TORCH = tuple(
    f"torch.{name}."
    for name in words(
        """_C._fft _C._get_tracing_state _C._linalg _C._log_api_usage_once _C._nn _C._special
        _C.get_autocast_cpu_dtype _C.get_autocast_dtype _C.get_autocast_gpu_dtype
        _C.get_default_dtype _C.is_autocast_cpu_enabled _C.is_autocast_enabled _C.is_grad_enabled
        _C.is_inference_mode_enabled _compile _jit_internal _ops _tensor _VF amp autograd compiler
        fft functional jit._trace.is_tracing jit.annotate linalg nn overrides special types
        utils._contextlib utils._pytree utils.checkpoint utils.hooks"""
    )
)
"""Parts of torch that depend on their arguments and :func:`settings` alone."""
_IMPURE_TORCH = tuple(
    f"torch.{name}."
    for name in words(
        """compile from_file get_num_interop_threads get_num_threads get_rng_state initial_seed load
        nn.parallel nn.SyncBatchNorm save seed"""
    )
)
_TORCHS = words("torch torchgen functorch")
_FOUND = {
    name: f"{Path(spec.origin).parent.resolve()}{os.sep}"
    for name in sorted(_TORCHS)
    if (spec := importlib.util.find_spec(name)) and spec.origin
}
_STDLIB = f"{Path(sysconfig.get_paths()['stdlib']).resolve()}{os.sep}"


@functools.cache
def module_of(filename: str) -> str | None:
    """The name of the module in a file of torch or the standard library; None for other files."""
    if filename.startswith("<"):
        return filename[8:-1] if filename.startswith("<frozen ") else None
    if Path(filename).name == "typing_extensions.py":
        return "typing_extensions"
    resolved = str(Path(filename).resolve())
    for package, root in (*_FOUND.items(), ("", _STDLIB)):
        inside = resolved.removeprefix(root)
        if inside != resolved and "-packages" not in inside:
            parts = (package, *Path(inside).with_suffix("").parts)
            return ".".join(part for part in parts if part not in ("", "__init__"))
    return None


def is_library(module: str) -> bool:
    """Whether a module is torch's or the standard library's, and not one of a program's own."""
    if module in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and module_of(file) is not None


def check_pure(module: str, name: str) -> None:
    """Refuse a function or class of a library that may read more than its arguments.

    Raises:
        NoHash: It is one.
    """
    full, package = f"{module}.{name}.", module.partition(".")[0]
    if package in _TORCHS:
        pure = module == "torch" or full.startswith(_PURE_TORCH)
        pure = pure and not full.startswith(_IMPURE_TORCH)
    elif module == "builtins":
        pure = name not in _IMPURE_BUILTINS
    else:
        pure = package in _PURE
    if not pure:
        raise NoHash(f"{module}.{name} may depend on more than its arguments")


# -- torch's own -------------------------------------------------------------------------------

_LOOKED_THROUGH = tuple(
    f"torch.{name}"
    for name in words(
        """_C._nn _decomp _meta_registrations _ops _prims _refs _tensor autograd functional nn
        overrides utils._py utils.flop_counter"""
    )
)
"""Beside ``torch`` itself, the parts of it that a run without values goes through."""
_KERNELS = ("/Meta", "/CompositeImplicitAutograd", "/CompositeExplicitAutograd", "/Python")


def put_into_torch() -> list[tuple[str, str, Any]]:
    """What a program has put into torch's namespaces: ``(where, name, value)``, in that order.

    What is torch's own but goes by another name than its own, or with arguments, is among them, as
    text.
    """
    found: dict[tuple[str, str], Any] = {}
    seen: set[type] = set()

    def look(where: str, namespace: Mapping[str, Any]) -> None:
        for name, value in list(namespace.items()):
            kind = type(value)
            if (kind in _NAMED or issubclass(kind, type)) and value.__name__ != name:
                found[where, name] = f"{value.__module__}.{value.__qualname__}"
            if kind in _FUNCTIONS_IN:
                if not all(map(_is_torchs, _FUNCTIONS_IN[kind](value))):
                    found[where, name] = value
                elif kind is functools.partial:
                    found[where, name] = re.sub(" at 0x[0-9a-f]+", "", repr(value))
            elif issubclass(kind, type):
                module = str(value.__module__)
                if module.startswith("torch"):
                    if value not in seen:
                        seen.add(value)
                        look(f"{module}.{value.__qualname__}", vars(value))
                elif not _is_beside(module):
                    found[where, name] = value
            elif not _is_beside(kind.__module__):
                found[where, name] = value

    for name, module in list(sys.modules.items()):
        if (name == "torch" or name.startswith(_LOOKED_THROUGH)) and module is not None:
            look(name, vars(module))
    for operator, formula in flop_registry.items():
        if not _is_torchs(formula):
            found["flop_registry", str(operator)] = formula
    return [(*place, found[place]) for place in sorted(found)]


_NAMED = (types.FunctionType, types.BuiltinFunctionType)
_FUNCTIONS_IN: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    types.FunctionType: lambda value: (value,),
    types.MethodType: lambda value: (value.__func__,),
    functools.partial: lambda value: (value.func,),
    property: lambda value: (value.fget, value.fset),
    staticmethod: lambda value: (value.__func__,),
    classmethod: lambda value: (value.__func__,),
}


@functools.cache
def _is_beside(module: Any) -> bool:
    """Whether a module is one that torch itself takes things from."""
    return (
        not isinstance(module, str)
        or module.startswith(("torch", "sympy", "triton", "typing_extensions", "numpy", "pybind11"))
        or is_library(module)
    )


def _is_torchs(function: Any) -> bool:
    """Whether a function is torch's, and what it wraps is too."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and not _comes_with_torch(code.co_filename, function.__module__):
            return False
        function = getattr(function, "__dict__", {}).get("__wrapped__")
    return True


@functools.cache
def _comes_with_torch(filename: str, module: str | None) -> bool:
    if filename.startswith("<"):  # made by a dataclass or a named tuple
        return module is not None and (is_library(module) or module.startswith("namedtuple_"))
    return module_of(filename) is not None or "sympy" in Path(filename).parts


def settings() -> tuple[Any, ...]:
    """The versions, and the state of torch, that a run without values depends on.

    Raises:
        NoHash: Something stands between a program and torch's operations.
    """
    hooks = vars(torch.nn.modules.module)
    registered = vars(torch._meta_registrations).values()
    own = [lib._op_impls for lib in registered if isinstance(lib, torch.library.Library)]
    distributed = torch.distributed
    between = {
        "hooks of all modules": any(
            hooks[name] for name in hooks if name.startswith("_global_") and "_hooks" in name
        ),
        "a mode of torch's functions": torch._C._len_torch_function_stack() > 0,
        "a mode of dispatch": torch._C._len_torch_dispatch_stack() > 0,
        "a transform of functions": torch._C._functorch.peek_interpreter_stack() is not None,
        "torch.jit.trace": torch._C._get_tracing_state() is not None,
        "torch as sources, without a version of its own,": "-packages" not in _FOUND["torch"],
        "torch.distributed": distributed.is_available() and distributed.is_initialized(),
        "a kernel of a program's own": any(
            name.startswith("aten/") and name.endswith(_KERNELS) and not any(name in o for o in own)
            for name in torch.library._impls
        ),
    }
    for what, there in between.items():
        if there:
            raise NoHash(f"{what} is in use")
    cuda: Any = torch.backends.cuda
    devices = ("cpu", "cuda")
    return (
        (sys.version, sys.platform, platform.machine(), sys.flags.optimize),
        (str(torch.__version__), torch.version.git_version),
        (str(torch.get_default_dtype()), str(torch.get_default_device())),
        (torch.are_deterministic_algorithms_enabled(), torch.is_inference_mode_enabled()),
        [(torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))) for d in devices],
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        (cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(), torch.cuda.is_available()),
        (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled),
        [str(entry) for entry in warnings.filters if entry[0] == "error"],
    )
