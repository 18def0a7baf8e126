"""Inputs, shared tensors and reparametrisations: each is followed exactly, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from exact_space import IMAGE, TOKENS, Model, bases, exact_space, reasons
from strategies import refused
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from widthsearch.errors import TraceError
from widthsearch.modules.tree import direction_of, tensors_of
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.inputs import as_inputs
from widthsearch.tracing.tracer import trace

# -- inputs and outputs ------------------------------------------------------------------------


def test_several_inputs() -> None:
    """A tuple of shapes is one a positional argument; outputs may be nested."""

    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        z = m.a(x).mean(1) + m.b(y)
        return {"out": m.c(z), "other": [z.sum(), None]}

    def make() -> nn.Module:
        return Model(forward, a=nn.Linear(6, 16), b=nn.Linear(5, 16), c=nn.Linear(16, 3))

    assert bases(exact_space(make, ((4, 6), (5,)))) == {"a": (16, 1)}


def test_inputs_by_name_and_of_other_types() -> None:
    """A mapping is keyword arguments; a tensor says its dtype."""

    def forward(m: Any, *, image: Tensor, tokens: Tensor) -> Tensor:
        both = torch.cat([m.a(image).mean((2, 3)), m.e(tokens).mean(1)], 1)
        return m.c(F.relu(m.b(both)))

    def make() -> nn.Module:
        a, e = nn.Conv2d(3, 16, 3), nn.Embedding(20, 16)
        return Model(forward, a=a, e=e, b=nn.Linear(32, 24), c=nn.Linear(24, 3))

    space = exact_space(make, {"image": IMAGE, "tokens": TOKENS})
    assert bases(space) == {"a": (16, 1), "e": (16, 1), "b": (24, 1)}
    assert reasons(space)["e", 20].startswith("looked up by index: ")


def test_a_dictionary_as_one_argument() -> None:
    """Inputs nest."""

    def forward(m: Any, batch: dict[str, Tensor]) -> Tensor:
        return m.c(m.a(batch["image"]).mean((2, 3)) + m.b(batch["other"]))

    def make() -> nn.Module:
        return Model(forward, a=nn.Conv2d(3, 16, 3), b=nn.Linear(5, 16), c=nn.Linear(16, 3))

    assert bases(exact_space(make, ({"image": IMAGE, "other": (5,)},))) == {"a": (16, 1)}


def test_one_shape_stays_as_it_is() -> None:
    """Lists, numpy integers and tuples are one shape; a tensor keeps its values."""
    assert as_inputs([3, 8, 8]) == (3, 8, 8)
    assert as_inputs({"x": [3]}) == {"x": (3,)}
    assert torch.equal(as_inputs(torch.arange(3)), torch.arange(3))


# -- sharing and reparametrisation -------------------------------------------------------------


def test_a_parameter_used_by_two_layers_counts_once() -> None:
    """It stays shared in a built network."""

    def make() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            return m.o(F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))).mean((2, 3)))

        b, c = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        c.weight = b.weight
        return Model(forward, a=nn.Conv2d(3, 16, 1), b=b, c=c, o=nn.Linear(16, 4))

    space = exact_space(make, IMAGE)
    assert bases(space) == {"a": (16, 1)}
    net: Any = space.build(0.5)
    assert net.b.weight is net.c.weight


def test_tied_embeddings() -> None:
    """The vocabulary is pinned, the embedding is an axis."""

    def make() -> nn.Module:
        def forward(m: Any, tokens: Tensor) -> Tensor:
            x = m.e(tokens)
            return m.head(x + m.g(F.gelu(m.f(x))))

        e, head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        head.weight = e.weight
        return Model(forward, e=e, f=nn.Linear(16, 32), g=nn.Linear(32, 16), head=head)

    space = exact_space(make, TOKENS)
    assert sorted(bases(space).values()) == [(16, 1), (32, 1)]
    assert ("e", 50) in reasons(space)
    net: Any = space.build(0.5)
    assert net.e.weight is net.head.weight
    assert net.e.embedding_dim == net.head.in_features == 8


def reparametrised(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Every layer's weight is computed from other tensors."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3)))

    a, b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3)
    return Model(forward, a=wrap(a), b=wrap(b), o=wrap(nn.Linear(24, 10)))


REPARAMETRISATIONS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm, older": torch.nn.utils.weight_norm,
    "spectral norm, older": torch.nn.utils.spectral_norm,
}


@pytest.fixture
def quiet() -> Iterator[None]:
    """torch deprecates its older weight norm, which models still use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.mark.parametrize("name", REPARAMETRISATIONS)
@pytest.mark.parametrize("constructed", [True, False])
def test_norms_of_weights_are_followed(name: str, constructed: bool, quiet: None) -> None:
    """Shapes, attributes, and initialisation: weights of the layer's own scale at every width."""

    def make() -> nn.Module:
        return reparametrised(REPARAMETRISATIONS[name])

    space = exact_space(make if constructed else make(), IMAGE)
    assert bases(space) == {"a": (16, 1), "b": (24, 1)}
    net: Any = space.build([8, 40], seed=0)
    assert (net.b.in_channels, net.b.out_channels, net.o.in_features) == (8, 40, 40)
    for module, _, tensor_name, tensor in tensors_of(net):
        assert bool(torch.isfinite(tensor).all())
        if (of := direction_of(module, tensor_name)) is not None:
            assert torch.allclose(tensor, torch.norm_except_dim(of[0], 2, of[1]))
    if "weight norm" in name:
        net(torch.zeros(1, *IMAGE))
        bound = 1 / (9 * 8) ** 0.5  # nn.Conv2d's own default
        assert net.b.weight.abs().max().item() == pytest.approx(bound, rel=0.05)


class Halved(nn.Module):
    """A parametrisation without a name in torch."""

    def forward(self, weight: Tensor) -> Tensor:
        """Any shape to the same."""
        return weight * 0.5


def halved(layer: nn.Module, name: str) -> nn.Module:
    """A layer with such a weight."""
    return parametrize.register_parametrization(layer, name, Halved())


def _recurrent(m: Any, x: Tensor) -> Tensor:
    return m.o(m.r(m.a(x))[0].mean(1))


def _attended(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.o(m.r(x, x, x)[0].mean(1))


PARAMETRISED: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
    "weight norm of hidden weights": (
        _recurrent,
        lambda: parametrizations.weight_norm(nn.GRU(8, 10, batch_first=True), "weight_hh_l0"),
    ),
    "weight norm, LSTM": (
        _recurrent,
        lambda: parametrizations.weight_norm(nn.LSTM(8, 10, batch_first=True), "weight_hh_l0"),
    ),
    "halved": (_recurrent, lambda: halved(nn.GRU(8, 10, batch_first=True), "weight_ih_l0")),
    "attention": (_attended, lambda: halved(nn.MultiheadAttention(10, 2), "in_proj_weight")),
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_layers_of_several_weights_with_a_parametrisation(name: str) -> None:
    """Their attributes follow, the networks are the class's, and masks are cuts."""
    forward, layer = PARAMETRISED[name]
    inputs = 10 if name == "attention" else 8

    def make() -> nn.Module:
        return Model(forward, a=nn.Linear(5, inputs), r=layer(), o=nn.Linear(10, 2))

    space = SearchSpace.from_model(make, (6, 5))
    report = space.check(vectors=1)
    assert report.masked == len(space.axes) >= 1
    assert not report.unknown


def test_parametrisations_that_cannot_be_followed_are_pinned() -> None:
    """An orthogonal weight is computed with a basis of a fixed size."""
    traced = trace(reparametrised(parametrizations.orthogonal), IMAGE)
    assert traced.axes == ()
    assert all(p.reason for p in traced.pinned)


def test_lazy_modules_are_refused_by_name() -> None:
    """They have no sizes yet; the message names the way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LazyConv2d(8, 1))
    message = (
        "a model's tensors must have sizes, but module '1' (LazyConv2d) has none before its first "
        "run: run the model once on a sample where it is made"
    )
    with refused(TraceError, message):
        trace(model, IMAGE)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "compiled": (lambda: torch.jit.script(nn.Linear(6, 8)), "compiled by torch.jit"),
    "spread": (lambda: nn.DataParallel(nn.Linear(6, 8)), "give its `.module`"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(6, 8), "weight", 0.5), "prune.remove("),
}


@pytest.mark.parametrize("name", REFUSED)
def test_modules_that_cannot_be_made_at_other_widths_are_refused_by_name(name: str) -> None:
    """The message names the module and the way out."""
    make, way_out = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(make(), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(TraceError) as error:
        trace(model, (6,))
    assert "module '0' (" in str(error.value)
    assert way_out in str(error.value)
