"""Traces kept on disk: the second time hits, every change misses, what is unknown is not kept."""

from __future__ import annotations

import functools
import importlib.util
import json
import linecache
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import test_generality
import torch
from strategies import MODELS
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import SUPPORTED_NODES, register_pytree_node
from torch.utils.flop_counter import flop_registry

from widthsearch import cache
from widthsearch.cache import cached_trace, key_of
from widthsearch.space import SearchSpace
from widthsearch.trace import Trace, trace

IMAGE = (3, 8, 8)

OPS = """
import os
import torch

SHIFT = 1

def shift(x):
    return x + SHIFT

def unused(x):
    return x - 1
"""

NET = """
import functools
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import cached_ops
from cached_ops import shift as shift_it

SCALE = 2
TABLE = {"scale": [1.0, 1.0]}


class Kind(Enum):
    PLAIN = 1
    OTHER = 2


@dataclass
class Config:
    slope: float = 0.5
    more: list = field(default_factory=list)

    def scaled(self):
        return self.slope * 2


def inner(x):
    return F.relu(x)


def helper(x):
    return inner(x) * SCALE


def wrapped(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) * 1
    return wrapper


def made(amount):
    def closure(x):
        return x * amount
    return closure


def hook(module, args, out):
    return out * 3


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Offset:
    def __get__(self, instance, owner):
        return 5


class Mixin:
    pass


class Slotted:
    __slots__ = ("__hidden", "shown")

    def __init__(self, hidden, shown):
        self.__hidden, self.shown = hidden, shown

    def both(self):
        return self.__hidden + self.shown


T = TypeVar("T")


class Box(Generic[T]):
    def __init__(self, value):
        self.value = value + 11


NumberBox = Box[int]


class Base(nn.Module):
    def finish(self, x):
        return x.mean((2, 3))


class Net(Base):
    flag = False
    offset = Offset()

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 1)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU()
        self.fc = nn.Linear(16, 4)
        self.config = Config()
        self.kind = Kind.PLAIN
        self.leaky = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.closure = made(7)
        self.method = "named"
        self.slotted = Slotted(12, 13)
        self.number = np.int64(16)
        self.conv1.register_forward_hook(hook)
        self.conv2.register_forward_pre_hook(lambda module, args: args[0] + 4)

    @property
    def factor(self):
        return 1 + self.offset

    @wrapped
    def body(self, x, times=1):
        return self.conv2(x) * times

    def named(self, x):
        return x / 2

    def never(self, x):
        return open("nothing")

    def forward(self, x):
        x = helper(self.conv1(x)) if not self.flag else x
        x = cached_ops.shift(shift_it(x)) * math.sqrt(4)
        x = self.leaky(self.closure(x)) * self.factor * self.config.scaled()
        x = getattr(self, self.method)(x) * sum(TABLE["scale"])
        if self.kind is Kind.PLAIN:
            x = Square.apply(x)
        # a remark
        import operator
        x = operator.add(x, self.slotted.both()) * NumberBox(1).value * self.number
        x = self.act(self.norm(self.body(x)))
        return self.fc(self.finish(x))
"""
QUIET_NET = NET.replace("getattr(self, self.method)(x)", "self.named(x)")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was traced, not read."""
    traced: list[str] = []

    def counting(model: nn.Module, inputs: Any) -> Trace:
        traced.append(type(model).__name__)
        return trace(model, inputs)

    monkeypatch.setattr(cache, "trace", counting)
    return traced


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Modules made from text as if in a new process: the same names and files each time."""

    def module(name: str, source: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        linecache.clearcache()
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)
        exec(compile(source, str(path), "exec"), made.__dict__)  # no bytecode is kept
        return made

    def pair(source: str = QUIET_NET, ops: str = OPS) -> Any:
        module("cached_ops", ops)
        return module("cached_net", source)

    return pair


# -- hits --------------------------------------------------------------------------------------


def test_the_second_time_is_read(load: Any, runs: list[str], folder: Path) -> None:
    """By a model that is made anew; the trace is the same value."""
    first = cached_trace(load().Net(), IMAGE)
    second = cached_trace(load().Net(), IMAGE)
    assert first == second == trace(load().Net(), IMAGE)
    assert runs == ["Net"]
    assert len(list(folder.iterdir())) == 1


def test_spaces_read_their_traces(runs: list[str]) -> None:
    """By default; a space can be made without."""
    a, b = (SearchSpace.from_model(MODELS["Residual"], IMAGE) for _ in range(2))
    assert runs == ["Residual"]
    assert a.trace == b.trace
    assert a.build(0.5, seed=0).state_dict().keys() == b.build(0.5, seed=0).state_dict().keys()
    c = SearchSpace.from_model(MODELS["Residual"], IMAGE, cache=False)
    assert runs == ["Residual"]
    assert c.trace == a.trace


GENERAL = {
    **{name: (make, IMAGE) for name, make in MODELS.items()},
    **{name: case[:2] for name, case in test_generality.FOLLOWED.items()},
    **{name: (case[0], IMAGE) for name, case in test_generality.PINNED.items()},
}


@pytest.mark.parametrize("name", GENERAL)
def test_what_is_read_is_what_was_traced(name: str, runs: list[str]) -> None:
    """Whatever is in the trace: axes, reasons, shapes, attributes, polynomials, in their order."""
    make, inputs = GENERAL[name]
    model = make()
    fresh = trace(model, inputs)
    assert key_of(model, inputs) is not None
    cached_trace(model, inputs)
    read = cached_trace(model, inputs)
    assert len(runs) == 1
    assert read == fresh
    assert list(read.shapes) == list(fresh.shapes)


def test_own_code_is_in_the_key() -> None:
    """All files that these files import."""
    imported = set()
    for name in cache.OWN:
        source = Path(cache.__file__).with_name(f"{name}.py").read_text()
        imported |= set(re.findall(r"^\s*from widthsearch\.(\w+) import", source, re.MULTILINE))
        assert not re.search(r"^\s*(import widthsearch|from widthsearch import)", source, re.M)
    assert imported <= set(cache.OWN)
    assert {"trace", "running", "symbolic"} <= imported


def test_a_new_process_reads_it(tmp_path: Path, load: Any) -> None:
    """Nothing in a key is of one process: no address, no order of a set, no counter."""
    load()
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import random; [object() for _ in range(random.randrange(1000))]\n"
        "from torch import nn; [nn.Linear(1, 1).register_forward_hook(print) for _ in range(3)]\n"
        "import cached_net, torchvision\n"
        "from widthsearch.cache import key_of\n"
        "print(key_of(cached_net.Net(), (3, 8, 8)))\n"
        "print(key_of(torchvision.models.swin_v2_t(), (3, 64, 64)))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(keys) == 1
    assert "None" not in keys.pop()


# -- misses ------------------------------------------------------------------------------------

EDITS = {
    "forward": ("return self.fc(self.finish(x))", "return self.fc(self.finish(x)) * 2"),
    "an operator in forward": ("helper(self.conv1(x))", "helper(-self.conv1(x))"),
    "a helper": ("return inner(x) * SCALE", "return inner(x) + SCALE"),
    "a helper's helper": ("return F.relu(x)", "return F.gelu(x)"),
    "a global": ("SCALE = 2", "SCALE = 3"),
    "a global container": ('{"scale": [1.0, 1.0]}', '{"scale": [1.0, 2.0]}'),
    "a class attribute": ("flag = False", "flag = True"),
    "a base class": ("return x.mean((2, 3))", "return x.amax((2, 3))"),
    "the bases": ("class Net(Base)", "class Net(Base, Mixin)"),
    "a property": ("return 1 + self.offset", "return 2 + self.offset"),
    "a descriptor": ("return 5", "return 6"),
    "a decorator": ("return function(*args) * 1", "return function(*args) * 2"),
    "a decorated method": ("self.conv2(x) * times", "self.conv2(x) + times"),
    "a default": ("times=1", "times=2"),
    "a closure's variable": ("made(7)", "made(8)"),
    "a closure's code": ("return x * amount", "return x + amount"),
    "a partial's argument": ("negative_slope=0.1", "negative_slope=0.2"),
    "a partial's function": ("F.leaky_relu, negative", "F.celu, negative"),
    "a hook": ("return out * 3", "return out * 4"),
    "a lambda": ("args[0] + 4", "args[0] + 5"),
    "which hook": ("register_forward_pre_hook(lambda", "register_forward_hook(lambda"),
    "a dataclass's default": ("slope: float = 0.5", "slope: float = 0.6"),
    "a method of an attribute": ("return self.slope * 2", "return self.slope * 3"),
    "an enumeration": ("PLAIN = 1", "PLAIN = 3"),
    "an attribute": ("self.kind = Kind.PLAIN", "self.kind = Kind.OTHER"),
    "an autograd function": ("return x * x", "return x + x"),
    "a library's function": ("math.sqrt(4)", "math.cbrt(4)"),
    "a layer's option": ("nn.Conv2d(16, 16, 1)", "nn.Conv2d(16, 16, 1, stride=2)"),
    "a layer's class": ("nn.ReLU()", "nn.GELU()"),
    "a shape": ("nn.Conv2d(3, 16, 1)", "nn.Conv2d(3, 16, 3)"),
    "the dtype": ("nn.Linear(16, 4)", "nn.Linear(16, 4).double()"),
    "a function of a module imported in forward": ("operator.add(x", "operator.sub(x"),
    "a hidden slot": ("Slotted(12, 13)", "Slotted(14, 13)"),
    "a slot": ("Slotted(12, 13)", "Slotted(12, 14)"),
    "a class behind a generic alias": ("value + 11", "value + 15"),
    "a number of numpy": ("np.int64(16)", "np.int64(17)"),
    "a number's type": ("np.int64(16)", "np.int32(16)"),
    "an import": ("from cached_ops import shift as", "from cached_ops import unused as"),
    "a remark that a trace may quote": ("# a remark", "# remark"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_model_is_seen(edit: str, load: Any) -> None:
    """Of anything that forward reaches, in whatever way."""
    before, after = EDITS[edit]
    assert QUIET_NET.count(before) == 1
    kept = key_of(load().Net(), IMAGE)
    assert kept == key_of(load(QUIET_NET).Net(), IMAGE) is not None
    assert key_of(load(QUIET_NET.replace(before, after)).Net(), IMAGE) not in (kept, None)


def test_a_member_that_is_chosen_by_its_name_is_seen(load: Any) -> None:
    """``getattr`` may reach any member: then every member counts, and one of them opens a file."""
    assert key_of(load(NET).Net(), IMAGE) is None
    source = NET.replace('open("nothing")', "x")
    kept = key_of(load(source).Net(), IMAGE)
    assert kept is not None
    assert key_of(load(source.replace("return x / 2", "return x / 3")).Net(), IMAGE) != kept


@pytest.mark.parametrize("edit", ["return x + SHIFT", "SHIFT = 1"])
def test_an_edit_of_a_module_that_it_uses_is_seen(edit: str, load: Any) -> None:
    """By attribute of the module, or imported from it."""
    kept = key_of(load().Net(), IMAGE)
    assert key_of(load(ops=OPS.replace(edit, edit + " + 1")).Net(), IMAGE) not in (kept, None)
    assert key_of(load(ops=OPS.replace("return x - 1", "return x")).Net(), IMAGE) == kept


def own_relu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """Another function."""
    return x * 0.5


class Callable_:  # noqa: N801
    """A function that is an object."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Another function."""
        return args[0] + 1


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Any, Any], object]] = {
    "a module's function": lambda p, m, net: p.setattr(
        sys.modules["cached_ops"], "shift", own_relu
    ),
    "a container in a module": lambda p, m, net: p.setitem(m.TABLE, "scale", [3.0]),
    "a class's method": lambda p, m, net: p.setattr(
        m.Base, "finish", lambda self, x: x[:, :, 0, 0]
    ),
    "the model's own method": lambda p, m, net: p.setattr(
        net, "forward", MethodType(lambda self, x: self.fc(self.conv1(x).mean((2, 3))), net)
    ),
    "a submodule": lambda p, m, net: p.setitem(net._modules, "act", nn.Tanh()),
    "a function of torch": lambda p, m, net: p.setattr(F, "relu", own_relu),
    "a function of torch that is an object": lambda p, m, net: p.setattr(F, "relu", Callable_()),
    "two functions of torch exchanged": lambda p, m, net: p.setattr(torch, "relu", torch.sigmoid),
    "two of torch's Python functions": lambda p, m, net: p.setattr(F, "relu", F.gelu),
    "a function of torch with an argument": lambda p, m, net: p.setattr(
        F, "relu", functools.partial(F.relu, inplace=True)
    ),
    "a method of torch's layer": lambda p, m, net: p.setattr(
        nn.ReLU, "forward", lambda self, x: x * 2
    ),
    "a method of torch's base class": lambda p, m, net: p.setattr(
        nn.Module, "__call__", lambda self, *args: self.forward(*args)
    ),
    "a method that tensors did not have": lambda p, m, net: p.setattr(
        torch.Tensor, "halved", lambda self: self / 2, raising=False
    ),
    "a property of tensors": lambda p, m, net: p.setattr(
        torch.Tensor, "halved", property(lambda self: self / 2), raising=False
    ),
    "a built-in function": lambda p, m, net: p.setattr("builtins.sum", lambda values: 1),
    "a hook": lambda p, m, net: net.fc.register_forward_hook(lambda *args: args[2] * 2),
    "what a hook is called with": lambda p, m, net: net.fc.register_forward_hook(
        m.hook, always_call=True
    ),
    "an attribute of torch's base class": lambda p, m, net: p.setattr(
        nn.Module, "options", {"fast": True}, raising=False
    ),
    "a formula for FLOPs": lambda p, m, net: p.setitem(
        flop_registry, torch.ops.aten.mm, lambda *args, **kwargs: 2
    ),
    "a parameter that two layers share": lambda p, m, net: p.setitem(
        net.conv2._parameters, "bias", net.norm.bias
    ),
    "a buffer with content": lambda p, m, net: net.norm.running_mean.copy_(torch.arange(16.0)),
    "a parameter that is not trained": lambda p, m, net: net.fc.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_running_is_seen(
    change: str, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an edit of any file."""
    module = load()
    net = module.Net()
    before = key_of(net, IMAGE)
    assert before == key_of(net, IMAGE) is not None
    with monkeypatch.context() as patch:
        CHANGES[change](patch, module, net)
        assert key_of(net, IMAGE) not in (before, None)


def test_how_outputs_are_taken_apart_is_seen() -> None:
    """torch finds the tensors in an object of a class that was registered."""

    class Output:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

    def forward(m: Any, x: torch.Tensor) -> Output:
        return Output(m.a(x))

    model = test_generality.Model(forward, a=nn.Conv2d(3, 4, 1))
    before = key_of(model, IMAGE)
    register_pytree_node(Output, lambda o: ([o.value], None), lambda values, _: Output(*values))
    try:
        assert key_of(model, IMAGE) not in (before, None)
    finally:
        SUPPORTED_NODES.pop(Output)


def test_another_input_is_seen() -> None:
    """Its shape, its dtype, its name."""
    model = MODELS["Residual"]()
    inputs = [IMAGE, (3, 16, 16), torch.zeros(IMAGE), torch.zeros(IMAGE).long(), {"x": IMAGE}]
    keys = [key_of(model, x) for x in inputs]
    assert None not in keys
    assert len(set(keys)) == len(inputs)


def test_the_state_of_torch_is_seen() -> None:
    """What changes how a model runs without values."""
    model = MODELS["Residual"]()
    before = key_of(model, IMAGE)
    torch.set_default_dtype(torch.float64)
    try:
        assert key_of(model, IMAGE) not in (before, None)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu"):
        assert key_of(model, IMAGE) not in (before, None)
    with torch.device("meta"):
        assert key_of(model, IMAGE) is None  # a mode
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert key_of(model, IMAGE) is None
    finally:
        handle.remove()
    assert key_of(model, IMAGE) == before


# -- what is not kept --------------------------------------------------------------------------

UNKNOWN = {
    "the environment": ("math.sqrt(4)", "float(os.environ.get('X', 1))", "import os"),
    "the environment, by a function": ("math.sqrt(4)", "len(os.getenv('HOME'))", "import os"),
    "the environment, imported": ("math.sqrt(4)", "len(environ)", "from os import environ"),
    "the environment, by another module": ("math.sqrt(4)", "len(cached_ops.os.environ)", ""),
    "a file": ("math.sqrt(4)", "len(open('x').read())", ""),
    "a path": ("math.sqrt(4)", "len(Path('x').read_text())", "from pathlib import Path"),
    "a clock": ("math.sqrt(4)", "time.time()", "import time"),
    "chance": ("math.sqrt(4)", "random.random()", "import random"),
    "chance, by numpy": ("math.sqrt(4)", "np.random.rand()", ""),
    "an import by name": ("math.sqrt(4)", "__import__('cached_ops').SHIFT", ""),
    "importlib": ("math.sqrt(4)", "import_module('cached_ops').SHIFT", "from importlib import *"),
    "sys.modules": ("math.sqrt(4)", "sys.modules['cached_ops'].SHIFT", "import sys"),
    "an evaluated text": ("math.sqrt(4)", "eval('SCALE')", ""),
    "globals": ("math.sqrt(4)", "globals()['SCALE']", ""),
    "globals of a function": ("math.sqrt(4)", "helper.__globals__['SCALE']", ""),
    "a frame": ("math.sqrt(4)", "sys._getframe().f_back.f_lineno", "import sys"),
    "a module that is passed about": ("cached_ops.shift(", "getattr(cached_ops, 'shift')(", ""),
    "a memory": ("def inner", "@functools.cache\ndef inner", ""),
    "a counter": ("SCALE = 2", "COUNT = itertools.count()", "import itertools\nSCALE = 2"),
    "a file of torch": ("math.sqrt(4)", "torch.load('x')", ""),
    "the device": ("math.sqrt(4)", "torch.cuda.device_count()", ""),
    "the number of threads": ("math.sqrt(4)", "torch.get_num_threads()", ""),
    "compiled code": ("def inner", "@torch.jit.script\ndef inner", ""),
    "a module that is imported in forward": (
        "        # a remark",
        "        import json; x = x * len(json.dumps(1))",
        "",
    ),
    "a module that is not loaded yet": ("        # a remark", "        import cached_late", ""),
    "a module that is imported late": (
        "        # a remark",
        "        for i in range(2):\n            if i: x = x + len(late.dumps(1))\n"
        "            import json; late = json",
        "",
    ),
    "a part of a module": ("        # a remark", "        import os.path as path", ""),
    "a lock": (
        "self.method = ",
        "self.lock = threading.Lock(); self.method = ",
        "import threading",
    ),
    "a generator": ("self.method = ", "self.values = (i for i in (1, 2)); self.method = ", ""),
    "numpy's generator": (
        "self.method = ",
        "self.rng = np.random.default_rng(); self.method = ",
        "",
    ),
    "a module": ("self.method = ", "self.ops = cached_ops; self.method = ", ""),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_unknown_is_not_kept(name: str, load: Any) -> None:
    """Nothing that a run may read escapes the key: rather there is none."""
    before, after, imports = UNKNOWN[name]
    assert QUIET_NET.count(before) == 1
    source = imports + QUIET_NET.replace(before, after)
    if name == "a counter":
        source = source.replace("* SCALE", "* SCALE + next(COUNT)")
    assert key_of(load(source).Net(), IMAGE) is None


def test_a_refusal_is_no_error(load: Any, runs: list[str], folder: Path) -> None:
    """The model is traced every time, and the log says why."""
    source = "import os" + QUIET_NET.replace("math.sqrt(4)", "len(os.environ)")
    for _ in range(2):
        cached_trace(load(source).Net(), IMAGE)
    assert runs == ["Net", "Net"]
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_programs_own_operators_are_not_kept() -> None:
    """Their code is not Python's to show."""
    twice = torch.library.custom_op(
        "widthsearch_tests::twice", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    twice.register_fake(torch.empty_like)
    for call in (twice, lambda x: torch.ops.widthsearch_tests.twice(x)):
        model = test_generality.Model(lambda m, x: m.f(m.a(x)), a=nn.Conv2d(3, 4, 1), f=call)
        assert key_of(model, IMAGE) is None
    known = test_generality.Model(lambda m, x: torch.ops.aten.relu(m.a(x)), a=nn.Conv2d(3, 4, 1))
    assert key_of(known, IMAGE) is not None


def test_objects_that_cannot_be_looked_at_are_no_error() -> None:
    """Objects of others may raise anything."""

    class Odd:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

    model = MODELS["Plain"]()
    vars(model)["odd"] = Odd()
    assert key_of(model, IMAGE) is None
    vars(model)["odd"] = threading.local()
    assert key_of(model, IMAGE) is None


# -- files -------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "changed": lambda content: content.replace(b'"macs":[[', b'"macs":[[1'),
    "not text": lambda content: b"\xff" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_anew(damage: str, runs: list[str], folder: Path) -> None:
    """And is whole again."""
    model = MODELS["Residual"]()
    first = cached_trace(model, IMAGE)
    (entry,) = folder.iterdir()
    content = entry.read_bytes()
    assert DAMAGE[damage](content) != content
    entry.write_bytes(DAMAGE[damage](content))
    assert cached_trace(model, IMAGE) == first
    assert len(runs) == 2
    assert entry.read_bytes() == content


def test_entries_are_plain_json(folder: Path) -> None:
    """Nothing is unpickled."""
    cached_trace(MODELS["Residual"](), IMAGE)
    (entry,) = folder.iterdir()
    content = json.loads(entry.read_bytes().partition(b"\n")[2])
    assert [axis[0] for axis in content["axes"]] == ["stem", "conv1"]


def test_the_folder_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not read for longest goes first."""
    monkeypatch.setattr(cache, "ENTRIES", 2)
    sides = (8, 16, 24)
    for i, side in enumerate(sides[:2]):
        cached_trace(MODELS["Residual"](), (3, side, side))
        newest = max(folder.iterdir(), key=lambda file: file.stat().st_mtime)
        os.utime(newest, (1000 + i, 1000 + i))
    cached_trace(MODELS["Residual"](), (3, 8, 8))  # read: the other is the oldest now
    cached_trace(MODELS["Residual"](), (3, 24, 24))
    kept = {file.stem for file in folder.iterdir()}
    assert kept == {key_of(MODELS["Residual"](), (3, side, side)) for side in (8, 24)}


def test_without_a_folder_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    """It cannot be made, or is not wanted."""
    model = MODELS["Residual"]()
    (tmp_path / "file").write_text("")
    for value in (str(tmp_path / "file"), ""):
        monkeypatch.setenv(cache.VARIABLE, value)
        assert cached_trace(model, IMAGE) == trace(model, IMAGE)
    assert len(runs) == 2
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder("traces") == tmp_path / "xdg" / "widthsearch" / "traces"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder("traces") == tmp_path / ".cache" / "widthsearch" / "traces"
