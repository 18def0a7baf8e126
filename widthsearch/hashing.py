"""A hash of all that a run of a model can read: its sizes, its values, the code that it reaches.

The walk starts at the model and follows, by value, what code can get at: the attributes of objects;
the globals, closures and defaults that a function names; of a class, every member that some name in
reachable code may mean. torch and the pure part of the standard library go by their versions; what
a program has put into torch's own namespaces is followed like any code.

What cannot be followed has no hash (:class:`NoHash`): files, clocks, the environment, compiled code
of others, modules that are passed about. So equal hashes mean equal runs; equal runs may have
unequal hashes.
"""

from __future__ import annotations

import builtins
import dis
import functools
import hashlib
import importlib.util
import linecache
import logging
import re
import sys
import types
import typing
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import Buffer
from torch.utils._pytree import SUPPORTED_NODES

from widthsearch.libraries import NoHash, check_pure, is_library, module_of, words


class _Plain(str):
    """Text that stands for itself in the encoding, without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


_ATOMS = (type(None), bool, int, float, complex, bytes, type(...), type(NotImplemented))
_SPELT = (torch.dtype, torch.device, torch.layout, torch.memory_format, range)
_C_FUNCTIONS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
)
_DATA = frozenset((*_ATOMS, str, tuple, list, dict, set, frozenset, OrderedDict, defaultdict))
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_CONTAINERS = (object, dict, OrderedDict, list, tuple, set, frozenset, int, float, str, bytes)
_TRANSPARENT = words("abc collections.abc contextlib dataclasses enum numbers typing")
"""Modules of the standard library whose classes are Python's own: objects show all their state."""
_NAMESPACES = words("aten prims torchvision")
"""Whose operators may be called by ``torch.ops``; others may be a program's own."""
_CONSTRUCTORS = words(
    "__class_getitem__ __init__ __init_subclass__ __new__ __post_init__ __set_name__"
)
_CONSTRUCTING = words("__class__ __new__ _make fromkeys replace type")
"""Names by which code may construct an object of a class that it does not name."""
_BY_ANY_NAME = words(
    "__dict__ __getattribute__ attrgetter dir getattr hasattr methodcaller setattr vars"
)
"""Names by which code may reach a member that it does not name."""
_UNREAD = words(
    """__abstractmethods__ __annotate__ __annotate_func__ __annotations__ __annotations_cache__
    __doc__ __firstlineno__ __orig_bases__ __parameters__ __static_attributes__ __weakref__"""
)
"""Members of a class that are not followed."""
_TOLD = words("__dict__ __module__ __qualname__ _abc_impl")
"""Members of a class that are seen to elsewhere."""
_REFLECTING = _UNREAD | words(
    """__builtins__ __closure__ __code__ __globals__ __loader__ __spec__ __subclasses__ cr_frame
    f_back gi_frame get_type_hints tb_frame"""
)
"""Names by which code may reach what no walk does."""
_OF_MODULES = frozenset(vars(nn.Module()))
_MADE_BY_CLASS = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_COMPARISONS = ("IS_OP", "COMPARE_OP")
_LOADS = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_FROM_DICT_OR_GLOBALS": "global",
    "LOAD_DEREF": "closure",
    "LOAD_CLASSDEREF": "closure",
    "LOAD_FROM_DICT_OR_DEREF": "closure",
}
_Load = tuple[str, str, tuple[str, ...]]
"""A global or closure variable, or an imported module, with the attributes that are taken of it at
once. The kind is ``global``, ``closure``, ``import`` (the name begins with a dot for each level),
``present`` (an import of the module itself) or ``whole`` (the same where its use is not seen)."""


# -- code --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _reads(code: types.CodeType) -> tuple[tuple[_Load, ...], frozenset[str]]:
    """What a code object takes from outside, and its names, without the code objects within it."""
    found: dict[_Load, None] = {}
    imported: dict[str, str] = {}  # local variables that are modules
    names = set(code.co_names) - {"__class__"}
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for i, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            name = "." * steps[i - 2].argval + step.argval
            if steps[i - 1].argval is not None:
                found.update({("import", name, (part,)): None for part in steps[i - 1].argval})
            elif steps[i + 1].opname == "STORE_FAST" and "." not in name:
                imported[steps[i + 1].argval] = name
                found["present", name, ()] = None
            else:
                found["whole", name, ()] = None
    for i, step in enumerate(steps):
        after = takewhile(lambda a: a.opname in _ATTRIBUTES, islice(steps, i + 1, None))
        attributes = tuple(a.argval for a in after)
        if step.opname in _LOADS:
            found[_LOADS[step.opname], step.argval, attributes] = None
        elif step.argval == "__class__":
            if not _is_looked_at(steps[i + 1 : i + 4]):
                names.add("__class__")
        elif step.opname.startswith("LOAD_FAST"):
            several = isinstance(step.argval, tuple)  # one instruction for two variables
            for variable in step.argval if several else (step.argval,):
                if variable in imported:
                    found["import", imported[variable], () if several else attributes] = None
    return tuple(found), frozenset(names)


def _is_looked_at(after: list[dis.Instruction]) -> bool:
    """Whether an object's class is named or compared, by the instructions after it is taken."""
    first, _, third = [*after, *after[-1:] * 2][:3]
    named = first.opname in _ATTRIBUTES and first.argval in ("__name__", "__qualname__")
    both = any(step.argval == "__class__" for step in after[:2]) and third.opname in _COMPARISONS
    return named or both or first.opname in _COMPARISONS


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _with_nested(value)


def _place(code: types.CodeType) -> tuple[Any, ...]:
    """Where code stands, and its lines: what a trace quotes of them."""
    lines = [line for *_, line in code.co_lines() if line] or [1]
    text = linecache.getlines(code.co_filename)[min(lines) - 1 : max(lines)]
    file = code.co_filename.replace("\\", "/").split("/")[-2:]
    return file, code.co_firstlineno, code.co_linetable, text


def _at_home(module: str | None, qualname: str) -> Any:
    """What is found under a qualified name; None if there is nothing."""
    found: Any = sys.modules.get(module or "")
    for part in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found


def _check_shown(cls: type) -> None:
    """Refuse classes whose objects may have a state that Python does not show.

    Raises:
        NoHash: It is one.
    """
    module = str(cls.__module__)
    if is_library(module):
        if module.startswith("torch.") and not module.startswith("torch._C"):
            return
        if module not in _TRANSPARENT:
            raise NoHash(f"an object of class {module}.{cls.__qualname__}")
    file = getattr(sys.modules.get(module), "__file__", None) or ".py"
    slots = vars(cls).get("__slots__", ())
    own = cls.__basicsize__ - (cls.__base__ or object).__basicsize__
    plain = own <= 8 * (len((slots,) if isinstance(slots, str) else tuple(slots)) + 1)
    of_c = type(cls).__module__ in ("pybind11_builtins", "nanobind")
    if not (plain and cls.__flags__ & _MADE_BY_CLASS and file.endswith(".py")) or of_c:
        raise NoHash(f"class {module}.{cls.__qualname__} is compiled")


def _virtual_subclasses(cls: type) -> Any:
    from _abc import _get_dump  # type: ignore[import-not-found]  # CPython's own

    return _get_dump(cls)[0]


# -- the walk ----------------------------------------------------------------------------------


def hash_of_code(model: nn.Module) -> str | None:
    """A hash of what a model does, but for the values of its tensors; None if it cannot be told.

    Where the code stands, its comments and its modules' names do not count.
    """
    try:
        return Walk({}, code_alone=True).digest(model)
    except Exception:  # noqa: BLE001  objects of others may do anything when looked at
        return None


class Walk:
    """Encodes objects by value, each once, in the order in which they are met.

    Args:
        sized: For the id of tensors of whose values a run sees nothing, what it does see.
        code_alone: Leave out the values of all tensors, and where code stands.
    """

    def __init__(self, sized: Mapping[int, Any], *, code_alone: bool = False) -> None:
        self._sized, self._code_alone = sized, code_alone
        self._sha = hashlib.sha256()
        self._index: dict[int, int] = {}
        self._met: list[Any] = []  # held, so that no other object gets its id
        self._names: set[str] = set()  # in code
        self._words: set[str] = set()  # in data
        self._called: set[int] = set()
        self._classes: list[tuple[int, type, set[str]]] = []

    def digest(self, *values: Any) -> str:
        """The hash of some values.

        Raises:
            NoHash: Something cannot be told by value.
        """
        self._write(tuple(map(self.token, values)))
        done = 0
        while True:
            while done < len(self._met):
                self._write((done, *self._content(self._met[done])))
                done += 1
            if not self._members():
                return self._sha.hexdigest()

    def _write(self, encoded: tuple[Any, ...]) -> None:
        self._sha.update(f"{encoded!r}\n".encode("utf-8", "surrogatepass"))

    def token(self, value: Any) -> Any:
        """What stands for a value: itself where it is plain, else its number."""
        kind = type(value)
        if kind is str:
            self._words.add(value)
            return value
        if kind in _ATOMS:
            return value
        if kind is tuple:
            return tuple(map(self.token, value))
        if kind in _SPELT:
            return _Plain(f"{kind.__name__}:{value!r}")
        if issubclass(kind, type):
            self._called.update(map(id, value.__mro__))
        return self._number(value)

    def _number(self, value: Any) -> _Plain:
        if id(value) not in self._index:
            self._index[id(value)] = len(self._met)
            self._met.append(value)
        return _Plain(f"@{self._index[id(value)]}")

    def _all(self, values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(map(self.token, values))

    def _items(self, mapping: Mapping[Any, Any]) -> tuple[Any, ...]:
        return tuple((self.token(key), self.token(value)) for key, value in mapping.items())

    def _sorted(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """Members of a set, in an order of their own."""

        def key(value: Any) -> str:
            if isinstance(value, type):
                return f"{value.__module__}.{value.__qualname__}"
            if isinstance(value, str | None | int | float | bytes):
                return repr(value)
            if type(value) in (tuple, frozenset):
                return repr(sorted(map(key, value)))
            raise NoHash(f"a set of {type(value).__name__}")

        return self._all(sorted(values, key=key))

    def _content(self, value: Any) -> tuple[Any, ...]:
        kind = type(value)
        if kind in _ENCODERS:
            return kind.__name__, *_ENCODERS[kind](self, value)
        if issubclass(kind, type):
            return self._class(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, types.ModuleType):
            raise NoHash(f"module {value.__name__} is passed about")
        if isinstance(value, _C_FUNCTIONS):
            return self._c_function(value)
        if isinstance(value, _SLOTS):
            return kind.__name__, value.__qualname__
        if kind.__module__ in ("typing", "types") and is_library(kind.__module__):
            if " at 0x" in repr(value):
                raise NoHash(f"the type {value!r}")
            of = getattr(value, "__origin__", None), getattr(value, "__args__", ())
            return kind.__name__, repr(value), *self._all(of)
        if isinstance(value, np.generic):
            return kind.__name__, *self._array(np.asarray(value))
        if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return self._operator(str(value))
        return self._object(value)

    # -- data --------------------------------------------------------------------------------

    def _tensor(self, tensor: Tensor) -> tuple[Any, ...]:
        if type(tensor) not in (Tensor, nn.Parameter, Buffer):
            raise NoHash(f"a tensor of class {type(tensor).__name__}")
        about = type(tensor).__name__, str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad
        if id(tensor) in self._sized:
            return *about, self.token(self._sized[id(tensor)])
        if self._code_alone:
            return about
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise NoHash(f"a tensor with layout {tensor.layout}")
        state = tensor.stride(), str(tensor.device), self._items(vars(tensor))
        if tensor.device.type == "meta":
            return *about, *state
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return *about, *state, hashlib.sha256(values.tobytes()).hexdigest()

    def _array(self, array: Any) -> tuple[Any, ...]:
        if array.dtype.hasobject:
            raise NoHash("an array of objects")
        values = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return array.dtype.str, array.shape, values

    def _object(self, value: Any) -> tuple[Any, ...]:
        cls = type(value)
        for base in cls.__mro__:
            if base not in _CONTAINERS:
                _check_shown(base)
        encoded: list[Any] = ["object", self._number(cls)]
        for base, encode in _BASES.items():
            if isinstance(value, base):
                encoded.append(encode(self, value))
                break
        state = getattr(value, "__dict__", {})
        if isinstance(value, nn.Module):
            state = {name: held for name, held in state.items() if held or name not in _OF_MODULES}
            hooked = [name for name in state if name in _OF_MODULES and "_hooks" in name]
            numbers = sorted({n for name in hooked for n in state[name]})
            for name in hooked:  # by numbers from a counter of the process
                state[name] = {numbers.index(n): hook for n, hook in state[name].items()}
        encoded.append(self._items(state))
        for base in cls.__mro__:
            slots = vars(base).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if slot[:2] == "__" != slot[-2:]:
                    slot = f"_{base.__name__.lstrip('_')}{slot}"
                if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                    encoded.append((slot, self.token(getattr(value, slot))))
        return tuple(encoded)

    # -- functions ---------------------------------------------------------------------------

    def _c_function(self, function: Any) -> tuple[Any, ...]:
        owner = getattr(function, "__self__", None)
        cls = getattr(function, "__objclass__", None)
        name = function.__name__
        if isinstance(owner, types.ModuleType):
            check_pure(owner.__name__, name)
            return "c function", owner.__name__, name
        if cls is None and (owner is None or type(owner).__name__ == "_VariableFunctionsClass"):
            check_pure(str(function.__module__), name)
            return "c function", str(function.__module__), name
        of = self.token(owner) if cls is None and not isinstance(owner, type) else None
        return "c function", name, of or self._number(cls or owner)

    def _operator(self, name: str) -> tuple[Any, ...]:
        if name.partition(".")[0] not in _NAMESPACES:
            raise NoHash(f"the operator {name} may be a program's own")
        return "operator", name, getattr(sys.modules.get("torchvision"), "__version__", None)

    def _function(self, function: types.FunctionType) -> tuple[Any, ...]:
        code = function.__code__
        library = module_of(code.co_filename)
        name = f"{function.__module__}.{function.__qualname__}"
        if library is not None:
            check_pure(library, code.co_name)
            if _at_home(function.__module__, function.__qualname__) is function:
                return library, name
        cells: dict[str, Any] = {}
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                cells[variable] = cell.cell_contents
            except ValueError:
                raise NoHash(f"{name} has no {variable} yet") from None
        encoded = (
            self.token(function.__defaults__),
            self._items(function.__kwdefaults__ or {}),
            self._items(vars(function)),
        )
        if library is not None:
            return library, code.co_qualname, *encoded, self._items(cells)
        read: dict[str, Any] = {}
        for part in _with_nested(code):
            loads, names = _reads(part)
            if found := _REFLECTING & names:
                raise NoHash(f"{name} reads {min(found)}")
            self._names |= names
            for kind, variable, attributes in loads:
                place = " ".join((kind, variable, *attributes))
                if place not in read and (kind != "closure" or variable in cells):
                    read[place] = self._read(function, cells, kind, variable, attributes)
        return self.token(code), *encoded, tuple(read.items())

    def _read(
        self,
        function: types.FunctionType,
        cells: Mapping[str, Any],
        kind: str,
        name: str,
        attributes: tuple[str, ...],
    ) -> Any:
        """What stands for a value that code takes from outside; modules are gone through."""
        known = function.__globals__
        if kind == "whole":
            raise NoHash(f"{function.__qualname__} imports {name}")
        if kind in ("import", "present"):
            name = importlib.util.resolve_name(name, known.get("__package__"))
            if name not in sys.modules:
                raise NoHash(f"{function.__qualname__} imports {name}, which is not loaded yet")
            if kind == "present":
                return _Plain(kind)
            value: Any = sys.modules[name]
        elif kind == "closure":
            value = cells[name]
        elif name in known:
            value = known[name]
        else:
            known = known.get("__builtins__", builtins)
            known = known if isinstance(known, dict) else vars(known)
            if name not in known:
                return _Plain("absent")
            value = known[name]
        for i, attribute in enumerate(attributes):
            if not isinstance(value, types.ModuleType):
                break
            if value is torch.ops:
                return self._operator(".".join(attributes[i:]))
            if attribute not in vars(value):
                raise NoHash(f"{value.__name__}.{attribute}, which is not there yet")
            value = vars(value)[attribute]
        if name == "__class__" and "super" in function.__code__.co_names:
            return self._number(value)
        return self.token(value)

    def _code(self, code: types.CodeType) -> tuple[Any, ...]:
        return (
            (code.co_name, code.co_qualname, code.co_flags, code.co_code, code.co_exceptiontable),
            tuple(
                ("frozenset", self._sorted(v)) if isinstance(v, frozenset) else self.token(v)
                for v in code.co_consts
            ),
            (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars),
            (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
            None if self._code_alone else _place(code),
        )

    # -- classes -----------------------------------------------------------------------------

    def _class(self, cls: type) -> tuple[Any, ...]:
        where = str(cls.__module__), cls.__qualname__
        bases = tuple(map(self._number, cls.__bases__))
        known = _at_home(*where) is cls or not cls.__flags__ & _MADE_BY_CLASS
        if is_library(where[0]) and known:
            if not where[0].startswith("torch._C"):
                check_pure(*where)
            # What else a program gives torch's classes is found by `put_into_torch`.
            data = {k: v for k, v in vars(cls).items() if type(v) in _DATA and k[:2] != "__"}
            return "class", *where, bases, self._items(data) if where[0][:5] == "torch" else None
        _check_shown(cls)
        if "_abc_impl" in vars(cls) and _virtual_subclasses(cls):
            raise NoHash(f"{cls.__name__} has virtual subclasses")
        self._classes.append((self._index[id(cls)], cls, set()))
        node = SUPPORTED_NODES.get(cls)  # how torch looks for tensors in its objects
        flattening = None if node is None else self._all((node.flatten_fn, node.unflatten_fn))
        named = where[1:] if self._code_alone else where
        return "class", named, bases, self._number(type(cls)), flattening

    def _members(self) -> bool:
        """Encode the members of classes that have become reachable; whether there were any."""
        by_any_name = bool(_BY_ANY_NAME & self._names)
        constructing = bool(_CONSTRUCTING & self._names)
        found = False
        for index, cls, encoded in list(self._classes):
            for name, value in list(vars(cls).items()):
                if name in encoded or name in _UNREAD or name in _TOLD:
                    continue
                if name in _CONSTRUCTORS:
                    reachable = constructing or id(cls) in self._called
                else:
                    reachable = (
                        by_any_name
                        or name in self._names
                        or name in self._words
                        or (name.startswith("__") and name.endswith("__"))
                        or any(name in vars(base) for base in cls.__mro__[1:])
                    )
                if reachable:
                    encoded.add(name)
                    found = True
                    self._write(("member", index, name, self.token(value)))
        return found


class _Named(typing.NamedTuple):
    field: int


_BASES: dict[type, Callable[[Walk, Any], Any]] = {
    dict: lambda walk, v: tuple((walk.token(k), walk.token(x)) for k, x in dict.items(v)),
    list: lambda walk, v: walk._all(list.__iter__(v)),
    tuple: lambda walk, v: walk._all(tuple.__iter__(v)),
    set: lambda walk, v: walk._sorted(set.__iter__(v)),
    frozenset: lambda walk, v: walk._sorted(frozenset.__iter__(v)),
    int: lambda walk, v: int.__index__(v),
    float: lambda walk, v: float.__float__(v),
    str: lambda walk, v: walk.token(str.__str__(v)),
    bytes: lambda walk, v: bytes.__bytes__(v),
}
"""What an object of a subclass holds beside its attributes."""
_ENCODERS: dict[type, Callable[[Walk, Any], Any]] = {
    list: Walk._all,
    torch.Size: lambda walk, v: map(int, v),
    deque: lambda walk, v: (v.maxlen, *walk._all(v)),
    dict: Walk._items,
    OrderedDict: Walk._items,
    types.MappingProxyType: Walk._items,
    defaultdict: lambda walk, v: (walk.token(v.default_factory), *walk._items(v)),
    types.SimpleNamespace: lambda walk, v: walk._items(vars(v)),
    set: Walk._sorted,
    frozenset: Walk._sorted,
    slice: lambda walk, v: walk._all((v.start, v.stop, v.step)),
    re.Pattern: lambda walk, v: (v.pattern, v.flags),
    np.ndarray: Walk._array,
    logging.Logger: lambda walk, v: (v.name, v.disabled, v.getEffectiveLevel()),
    weakref.ref: lambda walk, v: (walk.token(v()),),
    types.FunctionType: Walk._function,
    types.CodeType: Walk._code,
    types.MethodType: lambda walk, v: walk._all((v.__func__, v.__self__)),
    functools.partial: lambda walk, v: (
        *walk._all((v.func, v.args)),
        walk._items(v.keywords),
        walk._items(vars(v)),
    ),
    functools.partialmethod: lambda walk, v: walk._items(vars(v)),
    functools.cached_property: lambda walk, v: (walk.token(v.func), v.attrname),
    property: lambda walk, v: walk._all((v.fget, v.fset, v.fdel)),
    staticmethod: lambda walk, v: (walk.token(v.__func__),),
    classmethod: lambda walk, v: (walk.token(v.__func__),),
    type(vars(_Named)["field"]): lambda walk, v: v.__reduce__()[1],
}
"""Per type of object, what it holds."""
