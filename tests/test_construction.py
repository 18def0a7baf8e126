"""Constructor calls: recorded, solved for the sizes that they are to give, and made again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.extraction import widths_of
from widthsearch.errors import SpaceError
from widthsearch.modules.arguments import alike, integers, with_integers
from widthsearch.modules.construction import record
from widthsearch.space.search_space import SearchSpace


@dataclass(frozen=True)
class Options:
    """A frozen configuration."""

    widths: tuple[int, ...]
    bias: bool = True


def test_integers_are_found_and_exchanged_in_copies() -> None:
    """In sequences, mappings, dataclasses and namespaces; what holds none is shared."""
    value = {
        "a": [1, (2, "x")],
        "b": Options((3, 4)),
        "c": SimpleNamespace(d=5, e=True),
        "f": F.relu,
    }
    found = dict(integers(value))
    assert sorted(found.values()) == [1, 2, 3, 4, 5]
    other = with_integers(value, {path: n + 10 for path, n in found.items() if n > 2})
    assert sorted(n for _, n in integers(other)) == [1, 2, 13, 14, 15]
    assert dict(integers(value)) == found
    assert other["a"] is value["a"]
    assert other["b"] == Options((13, 14))


def test_only_arguments_that_are_surely_equal_are_alike() -> None:
    """Modules and tensors may have been changed since."""
    layer = nn.Identity()
    assert alike(
        [1, {"a": None}, partial(F.relu, inplace=True)],
        [1, {"a": None}, partial(F.relu, inplace=True)],
    )
    assert not alike([1], [2])
    assert not alike(1, 1.0)
    assert not alike((layer,), (layer,))


class Layers(nn.Module):
    """Copies of one layer."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        self.all = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


def test_calls_form_a_tree_with_the_names_of_their_modules() -> None:
    """Copies are calls too, and what a model drops has no name; the random state is kept."""
    state = torch.get_rng_state()
    model, recorder = record(lambda: Layers(nn.Sequential(nn.Linear(3, 4)), 2))
    assert torch.equal(state, torch.get_rng_state())
    assert recorder.complete
    assert isinstance(model, Layers)
    calls = [(call.kind.split(".")[-1], call.copied, call.names) for call in recorder.root.walk()]
    assert calls == [
        ("", False, []),
        ("Linear", False, []),
        ("Sequential", False, []),
        ("Layers", False, [""]),
        ("ModuleList", False, ["all"]),
        ("Sequential", True, ["all.0"]),
        ("Linear", True, ["all.0.0"]),
        ("Sequential", True, ["all.1"]),
        ("Linear", True, ["all.1.0"]),
    ]


def test_classes_are_as_they_were_afterwards() -> None:
    """Neither constructors nor copying stay wrapped, also where the function fails."""
    before = nn.Linear.__init__, vars(nn.Module).get("__init_subclass__")

    def fails() -> nn.Module:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        record(fails)
    record(lambda: nn.Linear(2, 3))
    assert (nn.Linear.__init__, vars(nn.Module).get("__init_subclass__")) == before
    assert nn.Linear not in copy._deepcopy_dispatch  # type: ignore[attr-defined]


class Compared(nn.Module):
    """A shortcut where its widths differ, a flag, and a list that it changes."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        c, w = widths
        self.same = c == w
        self.short = nn.Identity() if self.same else nn.Linear(c, w, bias=False)
        self.layer = nn.Linear(c, w)
        widths[0] = w

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) to (B, W)."""
        return self.short(x) + self.layer(x) * (1 if self.same else 2)


class Row(nn.Module):
    """Two of them."""

    def __init__(self, a: int = 8, b: int = 12) -> None:
        super().__init__()
        state = [a, b]
        self.stem, self.one = nn.Linear(5, a), Compared(state)
        self.two, self.head = Compared([state[0], b]), nn.Linear(b, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 5) to (B, 3)."""
        return self.head(torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(x)))))))


def test_decisions_stay_the_bases_where_widths_become_equal() -> None:
    """The trace holds for a shortcut; a network of two equal widths has it too."""
    space = SearchSpace.from_model(Row, (5,))
    a, b = (axis.name for axis in space.axes)
    net: Any = space.build({a: 8, b: 8}, seed=0)
    assert isinstance(net.one.short, nn.Linear)
    assert isinstance(net.two.short, nn.Identity)
    assert (net.one.same, net.two.same) == (False, True)
    torch.manual_seed(0)
    expected = Row(6, 10).state_dict()
    built = space.build({a: 6, b: 10}, seed=0).state_dict()
    assert all(torch.equal(built[key], value) for key, value in expected.items())


class Part(nn.Sequential):
    """A layer, perhaps with an activation."""

    def __init__(self, a: int, b: int, active: bool) -> None:
        super().__init__(nn.Linear(a, b), *([nn.ReLU()] if active else []))


class Inverted(nn.Sequential):
    """An inverted residual block, which expands nothing where its widths are equal."""

    def __init__(self, c: int, e: int) -> None:
        first = [Part(c, e, True)] if c != e else []
        super().__init__(*first, Part(e, e, True), Part(e, c, False))


def test_a_decision_that_shows_within_another_call_stays_the_bases() -> None:
    """Without the first part the last one stands where a part with an activation is expected."""
    space = SearchSpace.from_model(
        lambda: nn.Sequential(nn.Linear(5, 8), Inverted(8, 12), nn.Linear(8, 3)), (5,)
    )
    net: Any = space.build([8] * len(space.axes), seed=0)
    assert [len(part) for part in net[1]] == [2, 2, 1]
    assert net[1][0][0].weight.shape == (8, 8)


class Rounded(nn.Sequential):
    """A width that is rounded to a multiple of a number, which is no width."""

    def __init__(self, width: int = 24, to: int = 8) -> None:
        width = (width + to // 2) // to * to
        super().__init__(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def test_a_number_that_widths_are_rounded_to_follows_none() -> None:
    """Another number changes the width as an offset would, but not twice by the same slope."""
    space = SearchSpace.from_model(Rounded, (5,))
    assert [space.build([w], seed=0)[0].out_features for w in (4, 12, 16, 48)] == [4, 12, 16, 48]


class Heads(nn.Module):
    """As many heads as fit."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.heads = d // 8
        self.stem, self.qkv, self.head = nn.Linear(6, d), nn.Linear(d, 3 * d), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 6) to (B, 5)."""
        x = self.stem(x)
        b, n, c = x.shape
        parts = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        x = ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        return self.head(x.mean(1))


def test_integers_that_constructors_derive_are_followed() -> None:
    """The number of heads is a multiple of the width in costs and networks alike."""
    space = SearchSpace.from_model(Heads, (7, 6))
    assert [(axis.base, axis.divisor) for axis in space.trace.axes] == [(32, 8)]
    net: Any = space.build([48], seed=0)
    assert net.heads == 6
    space.check()


class Factors(nn.Module):
    """Attention whose width is a product of two arguments, of which forward reads one."""

    def __init__(self, heads: int = 4, head_dim: int = 8, read: str = "heads") -> None:
        super().__init__()
        self.heads, self.head_dim, self.read = heads, head_dim, read
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(6, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, 6)

    def split(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, heads, L, C / heads)."""
        if self.read == "heads":
            return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, 6) to the same."""
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("read", ["heads", "head_dim"])
def test_of_two_factors_of_a_width_the_one_follows_it_that_forward_does_not_read(read: str) -> None:
    """The other stays at the base's value, as the trace has it."""
    space = SearchSpace.from_model(partial(Factors, read=read), (5, 6))
    width = 48  # of queries, keys and values together
    given = {"heads": 2} if read == "head_dim" else {"head_dim": 4}
    built = space.build([width], seed=1)
    torch.manual_seed(1)
    constructed = Factors(**given, read=read)
    assert (built.heads, built.head_dim, built.scale) == (
        constructed.heads,
        constructed.head_dim,
        constructed.scale,
    )
    x = torch.randn(2, 5, 6)
    assert torch.equal(built(x), constructed(x)) and not space.leftovers


def passing(forward: Any) -> Any:
    """A decorator."""

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapped


class Decorated(nn.Module):
    """A decorated forward, which reads a number that follows the stream and not the heads."""

    def __init__(self, stream: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.head_dim = stream // heads
        self.inner, self.first = nn.Linear(stream, heads * self.head_dim), nn.Linear(6, stream)
        self.last = nn.Linear(heads * self.head_dim, 3)

    @passing
    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) to (N, 3)."""
        x = self.inner(torch.tanh(self.first(x))).unflatten(1, (-1, self.head_dim))
        return self.last(x.softmax(1).flatten(1))


def test_numbers_that_a_decorated_forward_reads_are_known() -> None:
    """The head's width is the trace's, at any width of the stream."""
    space = SearchSpace.from_model(Decorated, (6,))
    space.check(vectors=2)
    built = space.build([axis.min_width for axis in space.axes])
    assert built.inner.out_features % built.head_dim == 0


def test_a_class_that_the_function_defines() -> None:
    """Each call of the function makes the class anew."""

    def make() -> nn.Module:
        class Local(nn.Module):
            def __init__(self, d: int = 16) -> None:
                super().__init__()
                self.scale, self.a, self.b = d**-0.5, nn.Linear(4, d), nn.Linear(d, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x) * self.scale)

        return Local()

    net: Any = SearchSpace.from_model(make, (4,)).build({"a": 4}, seed=0)
    assert net.scale == 0.5
    assert (net.a.out_features, net.b.in_features) == (4, 4)


class Copied(nn.Module):
    """torch's encoder copies one layer; the copies' widths are free one by one."""

    def __init__(self, d: int = 16, h: int = 24) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, 2, h, batch_first=True)
        self.stem, self.head = nn.Linear(6, d), nn.Linear(d, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 6) to (B, 5)."""
        return self.head(self.encoder(self.stem(x)).mean(1))


class Clones(nn.Module):
    """Copies of a container whose layers were made before it."""

    def __init__(self, d: int = 16, h: int = 24) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, d))
        nn.init.zeros_(block[2].bias)
        self.stem, self.head = nn.Linear(6, d), nn.Linear(d, 5)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6) to (B, 5)."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("made", "inputs", "inner"),
    [(Copied, (7, 6), "encoder.layers.{}.linear1"), (Clones, (6,), "blocks.{}.0")],
)
def test_copies_start_alike(made: Any, inputs: tuple[int, ...], inner: str) -> None:
    """As ``copy.deepcopy`` has it where their widths are those of the copied layer."""
    space = SearchSpace.from_model(made, inputs)
    torch.manual_seed(0)
    expected = made(24, 40)
    built = space.model.build(widths_of(space.model, expected).vector, seed=0).state_dict()
    assert all(torch.equal(built[key], value) for key, value in expected.state_dict().items())
    other: Any = space.build({inner.format(0): 16}, seed=0)
    one, two = (other.get_submodule(inner.format(i)) for i in range(2))
    assert (one.out_features, two.out_features) == (16, 24)


class Even(nn.Module):
    """Refuses odd widths."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        if d % 2:
            raise ValueError(f"d must be even, but is {d}")
        self.a, self.b = nn.Linear(4, d), nn.Linear(d, 3)
        self.register_buffer("phase", torch.linspace(0, 1, d // 2).repeat(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) to (B, 3)."""
        return self.b(self.a(x) + self.phase)


def test_widths_that_a_constructor_refuses_are_named() -> None:
    """One line: the rule, the class, its own message and the way out."""
    space = SearchSpace.from_model(Even, (4,), step=1)
    assert space.build([6], seed=0).phase.shape == (6,)
    with pytest.raises(
        SpaceError, match=r"refuse these widths: .*Even: .* or pin the axis"
    ) as error:
        space.build([7], seed=0)
    assert "\n" not in str(error.value)


class Literal(nn.Module):
    """Numbers that no argument gives."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 32**-0.5
        self.stem, self.qk, self.head = nn.Linear(6, 16), nn.Linear(16, 64), nn.Linear(16, 5)
        self.start = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 6) to (B, 5)."""
        x = self.stem(x) + self.start
        q, k = self.qk(x).chunk(2, -1)
        return self.head(((q @ k.transpose(1, 2) * self.scale).softmax(-1) @ x).mean(1))


def test_what_stays_at_the_bases_value_is_listed() -> None:
    """A literal scale; of a module given as an object, a random content too."""
    line = Literal.__init__.__code__.co_firstlineno
    scale = f"'scale' of Literal (test_construction.py:{line + 2}) stays at the base's 0.176777"
    assert [str(each) for each in SearchSpace.from_model(Literal, (7, 6)).leftovers] == [scale]
    given = [str(each) for each in SearchSpace.from_model(Literal(), (7, 6)).leftovers]
    assert given[-1] == scale
    assert given[0].startswith(f"'start' of Literal (test_construction.py:{line + 4}) starts with")
    net: Any = SearchSpace.from_model(Literal, (7, 6)).build({"stem": 8}, seed=0)
    assert (net.start >= 0).all() and (net.start <= 1).all()  # as the constructor has it


class Literals(nn.Module):
    """Numbers in a mapping, which the constructor makes itself."""

    def __init__(self, options: dict[str, int] | None = None) -> None:
        super().__init__()
        self.options = options or {"width": 16}
        self.a, self.b = nn.Linear(6, self.options["width"]), nn.Linear(self.options["width"], 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) to (N, 3)."""
        return self.b(self.a(x) / self.options["width"])


class Read(nn.Module):
    """A constructor that reads values, and may refuse widths."""

    def __init__(self, width: int = 16, most: int = 1000) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)
        nn.init.orthogonal_(self.a.weight)
        self.gain = self.a.weight.norm(dim=0).mean().item() * width**-0.5
        if width > most:
            raise ValueError("too wide")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) to (N, 3)."""
        return self.b(self.a(x)) * self.gain


def test_numbers_in_a_mapping_that_no_argument_gives_are_listed() -> None:
    """And follow the widths where an argument gives them."""
    (left,) = SearchSpace.from_model(Literals, (6,)).leftovers
    assert str(left).startswith("'options.width' of Literals (test_construction.py:")
    assert str(left).endswith("stays at the base's 16")
    space = SearchSpace.from_model(lambda: Literals({"width": 16}), (6,))
    assert not space.leftovers
    built: Any = space.build([8])
    assert built.options == {"width": 8}


def test_constructors_that_read_values_are_called_at_other_widths() -> None:
    """A number stays where the class refuses every other width."""
    space = SearchSpace.from_model(Read, (6,))
    built: Any = space.build([8], seed=2)
    torch.manual_seed(2)
    constructed = Read(8)
    assert built.gain == constructed.gain and torch.equal(built.a.weight, constructed.a.weight)
    assert not space.leftovers
    (left,) = SearchSpace.from_model(partial(Read, most=16), (6,)).leftovers
    assert str(left).startswith("'gain' of Read") and str(left).endswith("stays at the base's 0.25")


def test_a_function_that_cannot_be_called_again_is_listed() -> None:
    """Its networks are copies."""
    calls: list[int] = []

    def longer() -> nn.Module:
        calls.append(1)
        return nn.Sequential(nn.Linear(6, 16), *[nn.ReLU() for _ in calls], nn.Linear(16, 3))

    (left,) = SearchSpace.from_model(longer, (6,)).leftovers
    assert "'__init__' of Sequential" in str(left)
    assert "is not called: networks are copies, since " in str(left)


class Normed(nn.Module):
    """One argument gives two widths, and the number of groups of a norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)
        self.norm, self.last = nn.GroupNorm(width, width), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 2, 4, 4)."""
        return self.last(self.norm(self.b(torch.relu(self.a(x)))))


def test_a_group_for_each_channel_stays_one_for_each() -> None:
    """Also where the other width is another one."""
    space = SearchSpace.from_model(Normed, (3, 8, 8))
    assert [axis.divisor for axis in space.trace.axes] == [1, 1]
    net: Any = space.build([24, 6])
    assert (net.norm.num_groups, net.norm.num_channels) == (6, 6)
    space.check(vectors=1)
