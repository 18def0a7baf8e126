"""The share of MACs that would vanish with a pinned width, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import space_of
from test_generality import Model, Numbers
from torch import Tensor, nn

from widthsearch import space as space_module
from widthsearch.space import SearchSpace


def shares(space: SearchSpace) -> dict[tuple[str, int], int | None]:
    """MACs by pinned width."""
    total = space.cost(1.0).macs
    return {
        (pin.name, pin.size): None if share is None else round(share * total)
        for pin, share in zip(space.pinned, space.pinned_shares, strict=True)
    }


def test_inputs_and_outputs() -> None:
    """The first layer's and the last one's."""
    assert shares(space_of("Plain")) == {
        ("conv1", 3): 27 * 8 * 64,
        ("fc", 10): 16 * 16 * 10,
    }


def test_a_width_that_code_fixes() -> None:
    """What makes it; what reads it beyond the code has a pinned width of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x).view(-1, 16, 64).view(-1, 16, 8, 8)  # 16 in code
        return m.o(m.c(m.b(x)).mean((2, 3)))

    a, b, c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 24, 1)
    space = SearchSpace.from_model(
        lambda: Model(forward, a=a, b=b, c=c, o=nn.Linear(24, 4)), (3, 8, 8)
    )
    assert shares(space) == {
        ("a", 3): 64 * 3 * 16,
        ("a", 16): 64 * 3 * 16,
        ("b", 8): 64 * 16 * 8,
        ("o", 4): 24 * 4,
    }


def test_what_multiplies_nothing_costs_nothing() -> None:
    """A table of which rows are looked up: its layer multiplies, the table does not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x).flatten(2).transpose(1, 2)  # (N, 64, 16)
        bias = m.table[torch.arange(64) % 15].expand(len(x), 64, 16)
        return m.o((x + bias).mean(1) @ m.weight)

    def make() -> nn.Module:
        table, weight = nn.Parameter(torch.randn(15, 16)), nn.Parameter(torch.randn(16, 12))
        return Model(forward, a=nn.Conv2d(3, 16, 1), table=table, weight=weight, o=nn.Linear(12, 4))

    found = shares(SearchSpace.from_model(make, (3, 8, 8)))
    assert found["table", 15] == 0
    assert found["a", 3] == 64 * 3 * 16


def test_heads_times_their_width() -> None:
    """A pinned stream is in attention's products, through numbers that divide it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.n(m.a(x)).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).view(-1, 64, 4, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        x = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return m.o(x.transpose(1, 2).flatten(2).mean(1))

    def make() -> nn.Module:
        q, k, v = (nn.Linear(16, 16) for _ in range(3))
        a, o = nn.Conv2d(3, 24, 1), nn.Linear(16, 4)
        return Model(forward, a=a, n=nn.Conv2d(24, 16, 1), q=q, k=k, v=v, o=o)

    found = shares(SearchSpace.from_model(make, (3, 8, 8)))
    (q,) = [macs for (name, size), macs in found.items() if (name, size) == ("q", 16)]
    assert q is not None
    assert q >= 64 * 16 * 16


def test_around_code_that_needs_numbers() -> None:
    """The width that enters it is the one that makes it."""
    space = SearchSpace.from_model(
        lambda: Model(
            lambda m, x: m.o(m.b(m.n(m.a(x))).mean((2, 3))),
            a=nn.Conv2d(3, 16, 1),
            n=Numbers(),
            b=nn.Conv2d(16, 24, 1),
            o=nn.Linear(24, 4),
        ),
        (3, 8, 8),
    )
    assert shares(space)["a", 16] == 64 * (3 * 16)  # what `n` computes is numbers here
    assert shares(space)["o", 4] == 24 * 4


def test_what_a_user_pinned() -> None:
    """As the axis that it was."""
    whole = space_of("Residual")
    space = whole.constrained(pin="conv1")
    assert space.pinned_shares[:-1] == whole.pinned_shares
    assert space.pinned_shares[-1] == pytest.approx(
        whole.form("macs").share(whole.base.vector)[1], rel=1e-12
    )


def test_unknown_where_a_model_does_not_run_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than a wrong number."""
    monkeypatch.setattr(space_module, "pinned_macs", lambda *_: None)
    space = SearchSpace.from_model(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), (3, 8, 8)
    )
    assert space.pinned_shares == (None, None)
