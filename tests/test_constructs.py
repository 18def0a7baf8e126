"""Constructs of public model code, each in small: followed, and equal to what its class gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from exact_space import IMAGE, Model, bases, exact_space
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.space.search_space import SearchSpace


def equals_its_class(space: SearchSpace, widths: dict[str, int], expected: nn.Module) -> None:
    """The network starts as the one constructed from the same seed, and has its outputs."""
    built = space.build({**dict(space.base), **widths}, seed=1).eval()
    for (name, ours), (other, theirs) in zip(
        built.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs), name
    x = torch.randn(2, *space.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(built(x), expected.eval()(x), rtol=1e-5, atol=1e-6)


def made(make: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """What a function makes from the seed of :func:`equals_its_class`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module: nn.Module = make(*args, **kwargs)
        return module


@dataclass
class Options:
    """A configuration with a number that is no field."""

    width: int
    states: int

    def __post_init__(self) -> None:
        self.inner = 2 * self.width


class Mixer(nn.Module):
    """Two halves of a layer, cut where the configuration says."""

    def __init__(self, options: Options, given: bool) -> None:
        super().__init__()
        self.options = options
        inner = options.inner if given else 2 * options.width
        self.both = nn.Linear(options.width, 2 * inner)
        nn.init.normal_(self.both.weight, std=inner**-0.5)
        self.decay = nn.Parameter(torch.rand(inner, options.states))
        self.out = nn.Linear(inner, options.width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        a, b = self.both(x).split([self.options.inner, self.options.inner], dim=-1)
        return x + self.out(a * b.sigmoid() * self.decay.exp().sum(1))


class Mixers(nn.Sequential):
    """Two of them, of one configuration; ``given``: their constructors read what it computes."""

    def __init__(self, options: Options, given: bool) -> None:
        blocks = [Mixer(options, given) for _ in range(2)]
        super().__init__(nn.Linear(5, options.width), *blocks, nn.Linear(options.width, 3))


@pytest.mark.parametrize("given", [True, False])
def test_a_number_of_a_configuration_that_modules_share_follows_its_width(given: bool) -> None:
    """Also in modules that are given their own copy, because another width of theirs differs."""
    space = exact_space(lambda: Mixers(Options(16, 4), given), (5,))
    assert dict(space.base) == {"0": 16, "1": 32, "1.decay": 4, "2": 4}
    for width, states in ((24, 4), (8, 6)):
        widths = {"0": width, "1": 2 * width, "1.decay": states, "2": states}
        equals_its_class(space, widths, made(Mixers, Options(width, states), given))


def test_a_number_that_a_configuration_computes_reaches_the_constructor() -> None:
    """It starts the layer, so it has to be there before the constructor runs."""
    space = SearchSpace.from_model(lambda: Mixers(Options(16, 4), given=True), (5,), step=1)
    options = Options(16, 4)
    options.inner = 24
    equals_its_class(space, {"1": 24}, made(Mixers, options, given=True))


class Named(nn.Conv2d):
    """A subclass that passes on what it does not name."""

    def __init__(self, in_channels: int, out_channels: int, **more: Any) -> None:
        super().__init__(in_channels, out_channels, padding=more["kernel_size"] // 2, **more)


class Renamed(nn.Conv2d):
    """A subclass with a name of its own for the groups."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, g: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=1, groups=g)


class Depthwise(nn.Sequential):
    """A depthwise layer of such a class."""

    def __init__(self, c: int, more: int, kind: Any) -> None:
        groups = {"g": c} if kind is Renamed else {"groups": c}
        layer = kind(in_channels=c, out_channels=more * c, kernel_size=3, **groups)
        super().__init__(nn.Conv2d(3, c, 1), layer, nn.Conv2d(more * c, 4, 1))


@pytest.mark.parametrize("kind", [Named, Renamed])
@pytest.mark.parametrize("more", [1, 2])
def test_groups_of_a_subclass_of_a_convolution_follow_its_channels(kind: Any, more: int) -> None:
    """They change with channels that torch names, and by themselves they are refused."""
    space = exact_space(lambda: Depthwise(16, more, kind), IMAGE)
    equals_its_class(space, {"0": 6}, made(Depthwise, 6, more, kind))


class Compared(nn.Module):
    """A constructor that compares a width with the outputs of a module that it is given."""

    def __init__(self, backbone: Any, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*backbone) if isinstance(backbone, list) else backbone
        if self.backbone[-1].num_features != width:
            raise ValueError(f"the backbone must have {width} outputs")
        self.token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.head, self.width = nn.Linear(width, 3), width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 2, H, W) to (N, 3)."""
        x = self.backbone(x).mean((2, 3)) + self.token
        return self.head(x * self.width**-0.5)


def given_backbone(inner: int, width: int, listed: bool = False) -> nn.Module:
    """Two convolutions under a head."""
    layers = [nn.Conv2d(2, inner, 3), nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width)]
    return Compared(layers if listed else nn.Sequential(*layers), width)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("base", [(16, 24), (24, 24)])
def test_a_width_that_is_compared_with_a_given_module(base: tuple[int, int], listed: bool) -> None:
    """It follows the width there."""
    space = SearchSpace.from_model(lambda: given_backbone(*base, listed=listed), (2, 8, 8))
    assert not space.leftovers
    constructed = made(given_backbone, 8, 12, listed)
    equals_its_class(space, dict(space.widths_of(constructed)), constructed)


CPU = torch.device("cpu")
DEVICES: dict[str, Any] = {
    "inputs": lambda m, x: m.b(m.a(x.to(CPU))),
    "hidden values": lambda m, x: m.b(m.a(x).cpu().to("cpu", torch.float32)),
    "weights": lambda m, x: m.b(F.linear(x, m.a.weight.to(CPU), m.a.bias.to(device="cpu"))),
    "new tensors": lambda m, x: m.b((h := m.a(x)) * torch.arange(h.shape[-1], device=CPU)),
    "zeros": lambda m, x: m.b((h := m.a(x)) + torch.zeros(h.shape[1:]).to(CPU)),
    "values": lambda m, x: m.b(m.a(x) * float(torch.ones(3).cpu().numpy().sum())),
}


@pytest.mark.parametrize("name", DEVICES)
def test_code_may_name_its_device(name: str) -> None:
    """A trace runs on the meta device, whatever device the code moves its tensors to."""
    space = exact_space(lambda: Model(DEVICES[name], a=nn.Linear(6, 16), b=nn.Linear(16, 3)), (6,))
    assert bases(space) == {"a": (16, 1)}
    report = space.check(vectors=1)
    assert report.masked + report.unknown == 1


class Einsum(nn.Module):
    """Attention by ``einsum``, scaled by a plain number."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(c, 2 * d), nn.Linear(c, 2 * d), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (self.q, self.k, self.v))
        scores = torch.einsum("blhe,bshe->bhls", q, k) * (1 / math.sqrt(q.shape[-1]))
        return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(-2)


def test_a_narrow_width_that_scales_an_einsum_is_free() -> None:
    """Over one channel ``einsum`` makes products that torch does not count."""

    def make(c: int = 12, d: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(5, c), Einsum(c, d), nn.Linear(c, 3))

    space = exact_space(make, (7, 5))
    assert bases(space) == {"0": (12, 1), "1.q": (8, 2), "1.v": (12, 2)}
    equals_its_class(space, {"0": 10, "1.q": 12, "1.v": 10}, made(make, 10, 6))


def test_a_plain_tensor_may_be_repeated_for_each_channel() -> None:
    """It has values and no width; what is made of it has the width that it is repeated for."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        places = m.places.repeat(len(x), 1, x.shape[2])
        rest = m.places[0].expand(-1, x.shape[-1])
        return m.b(torch.gather(x, 1, places) + rest.float())

    def make() -> nn.Module:
        layers = {"a": nn.Linear(6, 16), "b": nn.Linear(16, 3)}
        return Model(forward, **layers, places=torch.tensor([[[2], [0], [1]]]))

    assert bases(exact_space(make, (4, 6), device="cpu")) == {"a": (16, 1)}


class Encoded(nn.Module):
    """A series beside a few features of each of its steps, as one vector."""

    def __init__(self, length: int, ahead: int, features: int, c: int) -> None:
        super().__init__()
        self.length = length
        self.features = nn.Linear(4, features)
        self.encoder = nn.Linear(length + (length + ahead) * features, c)
        self.blocks = nn.Sequential(*[nn.Linear(c, c)] * 0)  # one is made, and thrown away
        self.decoder = nn.Linear(c, ahead)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """(N, length) and (N, length + ahead, 4) to (N, ahead)."""
        features = self.features(steps)
        ahead = features[:, self.length :].mean(2)
        x = torch.cat([x, features.flatten(1)], 1)
        return self.decoder(self.blocks(self.encoder(x))) + ahead


def test_a_number_stays_where_another_one_gives_the_size() -> None:
    """The length of a series enters a layer's size, which is another because of the features."""
    space = SearchSpace.from_model(lambda: Encoded(8, 2, 4, 12), ((8,), (10, 4)), step=1)
    assert bases(space) == {"features": (4, 1), "encoder": (12, 1)}
    expected = made(Encoded, 8, 2, 6, 10)
    built = space.build([6, 10], seed=1)
    assert all(map(torch.equal, built.parameters(), expected.parameters()))
    assert space.leftovers == ()


class Residual(nn.Module):
    """A block whose constructor's arguments have names that others use for themselves."""

    def __init__(self, module: nn.Module, args: int = 1, kwargs: float = 0.5) -> None:
        super().__init__()
        self.module, self.args, self.kwargs = module, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        return self.kwargs * x + self.args * self.module(x)


def test_arguments_of_constructors_may_have_any_names() -> None:
    """Also those of functions that the constructor calls, given by name."""

    def make(c: int = 12) -> nn.Module:
        layer = nn.Linear(c, c)
        layer.load_state_dict(state_dict=layer.state_dict(), strict=True)
        return nn.Sequential(nn.Linear(5, c), Residual(module=layer, kwargs=2.0), nn.Linear(c, 3))

    space = exact_space(make, (5,))
    equals_its_class(space, {"0": 9}, made(make, 9))


class Bells(nn.Module):
    """A weight for each bell-shaped function of each input, flattened for one product."""

    def __init__(self, inputs: int, outputs: int, count: int = 3) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        centres = torch.linspace(-1, 1, count).expand(inputs, -1).contiguous()
        self.register_buffer("centres", centres)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, count) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        assert x.shape[1] == self.inputs
        bells = torch.exp(-(x[..., None] - self.centres).square())
        return F.linear(bells.view(len(x), -1), self.weight.view(self.outputs, -1))


def test_dims_of_a_flattened_weight_are_those_of_what_it_multiplies() -> None:
    """Torch only compares the products of both."""

    def make(a: int = 12, b: int = 20) -> nn.Module:
        return nn.Sequential(Bells(5, a), Bells(a, b), Bells(b, 3))

    space = exact_space(make, (5,))
    assert bases(space) == {"0": (12, 1), "1": (20, 1)}
    equals_its_class(space, {"0": 7, "1": 9}, made(make, 7, 9))
    assert space.check(vectors=1).masked == 2


def test_plain_tensors_run_without_values_of_others() -> None:
    """A check on the meta device has networks with plain tensors, which keep their values."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x) * m.scale[:, None] + m.scale.expand(2, 4)[0, :, None]
        x = x.masked_fill(~m.mask[None, :, None], 0.0)
        return m.b(x + x[:, m.mask].mean() if m.mask.any() else x)

    def make() -> nn.Module:
        plain = {"scale": torch.linspace(0, 1, 4), "mask": torch.tensor([True, False, True, False])}
        return Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3), **plain)

    assert exact_space(make, (4, 6)).check(device="meta").device == "meta"
