"""Random networks as a class with its widths as arguments, for tests that construct them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 6
"""Positions of the sequence that the networks read."""


class Mlp(nn.Module):
    """A residual block behind a layer norm, with a scale per channel."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, w), nn.Linear(w, c)
        self.gamma = nn.Parameter(0.1 * torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C), like all of these."""
        return x + self.gamma * self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """One head, scaled by the root of its width."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.scale = w**-0.5
        self.q, self.k, self.v = nn.Linear(c, w), nn.Linear(c, w), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over positions."""
        a = self.q(x) @ self.k(x).transpose(1, 2) * self.scale
        return x + a.softmax(-1) @ self.v(x)


class Rms(nn.Module):
    """A norm with a number and a parameter of its own."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.scale = torch.tensor(float(c)).sqrt()
        self.g = nn.Parameter(torch.rand(c))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise channels."""
        return F.normalize(x, dim=-1) * self.scale * self.g


class Gated(nn.Module):
    """Two halves of a layer, with the standard deviation written out."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(c, 2 * w), nn.Linear(w, c, bias=False)
        nn.init.normal_(self.both.weight, std=math.sqrt(2 / c))
        nn.init.normal_(self.out.weight, std=0.25 / math.sqrt(w))

    def forward(self, x: Tensor) -> Tensor:
        """Gate one half with the other."""
        a, b = self.both(x).chunk(2, -1)
        return x + self.out(a * b.sigmoid())


class Change(nn.Module):
    """Another width, with a shortcut where the widths differ."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.layer = nn.Linear(c, w)
        self.short = nn.Linear(c, w, bias=False) if c != w else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, W)."""
        return torch.tanh(self.layer(x)) + self.short(x)


class Positions(nn.Module):
    """Fixed sinusoids, divided by a number of channels."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        angle = torch.arange(LENGTH).float()[:, None] * torch.arange(c).float() / c
        self.register_buffer("table", angle.sin())
        self.start = nn.Parameter(torch.linspace(-1, 1, c), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the table."""
        return x + self.table + self.start


class Convs(nn.Module):
    """Convolutions over positions: pointwise, batch norm, depthwise."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(c, w, 1, bias=False), nn.BatchNorm1d(w)
        self.b, self.c = nn.Conv1d(w, w, 3, padding=1, groups=w), nn.Conv1d(w, c, 1)
        nn.init.dirac_(self.c.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions and channels."""
        y = self.b(F.relu(self.norm(self.a(x.transpose(1, 2)))))
        return x + self.c(y).transpose(1, 2)


class Recurrent(nn.Module):
    """A layer whose forget gates start at one, and the rest of its biases at zero."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.r, self.out = nn.LSTM(c, w, batch_first=True), nn.Linear(w, c)
        for name, p in self.r.named_parameters():
            if "bias" in name:
                nn.init.zeros_(p)
                p.data[w : 2 * w] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Along positions."""
        return x + self.out(self.r(x)[0])


class Decay(nn.Module):
    """A rate per channel and state, as state space models start it."""

    def __init__(self, c: int, w: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.log(torch.arange(1, 4).float().repeat(c, 1)))
        self.mix = nn.Parameter(torch.randn(c, 3) * c**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """A sum over states."""
        return x * (self.mix * torch.exp(-torch.exp(self.rate))).sum(1)


@dataclass(frozen=True)
class Options:
    """What :class:`Configured` is made from."""

    channels: int
    hidden: tuple[int, ...]
    slope: float = 0.1


class Configured(nn.Module):
    """Widths in a configuration, and a block in a closure."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        (w,) = options.hidden
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(options.channels, w))
        self.outer = nn.Linear(w, options.channels)
        nn.init.uniform_(self.outer.weight, -1 / w, 1 / w)
        self.block = lambda x: x + self.outer(F.leaky_relu(self.inner(x), self.options.slope))

    def forward(self, x: Tensor) -> Tensor:
        """Run the closure."""
        return self.block(x) * math.sqrt(self.options.channels)


BLOCKS = {
    "mlp": Mlp,
    "attention": Attention,
    "rms": Rms,
    "gated": Gated,
    "change": Change,
    "positions": Positions,
    "convs": Convs,
    "recurrent": Recurrent,
    "decay": Decay,
    "configured": lambda c, w: Configured(Options(c, (w,))),
}


class Composed(nn.Module):
    """Blocks in a row; ``widths`` holds the first stream and one width per block."""

    def __init__(self, plan: tuple[str, ...], widths: tuple[int, ...], own_init: bool) -> None:
        super().__init__()
        c, *rest = widths
        self.stem, self.blocks = nn.Linear(5, c), nn.ModuleList()
        for kind, w in zip(plan, rest, strict=True):
            self.blocks.append(BLOCKS[kind](c, w))
            c = w if kind == "change" else c
        self.head = nn.Linear(c, 3)
        if own_init:
            for module in self.modules():
                if isinstance(module, nn.Linear) and "weight" in module._parameters:
                    nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 5) to (B, 3)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@st.composite
def composed(draw: st.DrawFn) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], bool]:
    """A plan, the base's widths, other widths, and whether the network has an init of its own."""
    plan = tuple(draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5)))
    widths = st.lists(st.integers(4, 24), min_size=len(plan) + 1, max_size=len(plan) + 1)
    return plan, tuple(draw(widths)), tuple(draw(widths)), draw(st.booleans())


def streams(plan: tuple[str, ...], widths: tuple[int, ...]) -> list[bool]:
    """Whether each block that changes the width leaves it as it is."""
    c, *rest = widths
    same = []
    for kind, w in zip(plan, rest, strict=True):
        if kind == "change":
            same.append(c == w)
            c = w
    return same
