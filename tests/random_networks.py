"""Random small networks: a sequence of blocks on images, each of another kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Function = Callable[[nn.Module, Tensor], Tensor]


class Scaled(nn.Conv2d):
    """A convolution with an equalised learning rate."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return F.conv2d(x, self.weight * 0.7, self.bias, padding=self.padding)


class Sign(nn.Conv2d):
    """A convolution of one bit a weight, trained by a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        w = self.weight
        return F.conv2d(x, w + (w.sign() - w).detach(), self.bias, padding=self.padding)


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        w = self.weight
        variance, mean = torch.var_mean(w, (1, 2, 3), correction=0, keepdim=True)
        deviation = variance.sqrt()
        return F.conv2d(x, (w - mean) / (deviation + 1e-5), self.bias, padding=self.padding)


class Cast(nn.Conv2d):
    """A convolution that copies its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return F.conv2d(x, self.weight.to(x.dtype).clone(), self.bias, padding=self.padding)


class Quantised(nn.Conv2d):
    """A convolution whose weight is rounded to steps of 1/16 of its largest value."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        w = self.weight
        step = w.detach().abs().amax((1, 2, 3), keepdim=True) / 16 + 1e-8
        rounded = (w / step).round() * step
        return F.conv2d(x, w + (rounded - w).detach(), self.bias, padding=self.padding)


def weight_normed(*args: int, **options: int) -> nn.Module:
    """A convolution with weight norm."""
    return parametrizations.weight_norm(nn.Conv2d(*args, **options))


def old_weight_normed(*args: int, **options: int) -> nn.Module:
    """A convolution with the older weight norm, a hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv2d(*args, **options))


def spectral_normed(*args: int, **options: int) -> nn.Module:
    """A convolution with spectral norm."""
    return parametrizations.spectral_norm(nn.Conv2d(*args, **options))


def old_spectral_normed(*args: int, **options: int) -> nn.Module:
    """A convolution with the older spectral norm, a hook."""
    return nn.utils.spectral_norm(nn.Conv2d(*args, **options))


CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f
    for f in (
        nn.Conv2d, Scaled, Sign, Standardised, Cast, Quantised, weight_normed, old_weight_normed,
        spectral_normed, old_spectral_normed,
    )
}  # fmt: skip


class Block(nn.Module):
    """Some layers, and a function of them and an image."""

    def __init__(self, function: Function, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same, or to another number of channels."""
        return self.function(self, x)


def _half(x: Tensor) -> tuple[Tensor, Tensor]:
    c = x.shape[1] // 2
    return x[:, :c], x[:, c:]


class Mixed(nn.ModuleDict):
    """Convolutions of several kernels, each of a part of the channels (Tan and Le 2019, MixConv).

    Parts are equal but for the first, which has what is left over.
    """

    def __init__(self, c: int, out: int, parts: int, depthwise: bool = False) -> None:
        super().__init__()

        def split(n: int) -> list[int]:
            return [n // parts + n % parts, *[n // parts] * (parts - 1)]

        self.splits = split(c)
        for i, (a, b) in enumerate(zip(self.splits, split(out), strict=True)):
            groups = a if depthwise else 1
            self[str(i)] = nn.Conv2d(a, b, 2 * i + 1, padding=i, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same, or to another number of channels."""
        parts = zip(self.values(), x.split(self.splits, 1), strict=True)
        return torch.cat([conv(part) for conv, part in parts], 1)


def _shifted(_: nn.Module, x: Tensor) -> Tensor:
    fold = x.shape[1] // 4
    out = torch.zeros_like(x)
    out[:, :fold, :-1] = x[:, :fold, 1:]
    out[:, fold : 2 * fold, 1:] = x[:, fold : 2 * fold, :-1]
    out[:, 2 * fold :] = x[:, 2 * fold :]
    return out


def _layer_norm_by_hand(_: nn.Module, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-5).sqrt()


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(_tokens(x)).chunk(3, -1)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return x + m.out(scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def _heads(m: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    qkv = m.qkv(_tokens(x)).reshape(n, h * w, 3, 2, c // 2)
    y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    return x + m.out(y.transpose(1, 2).reshape(n, h * w, c)).transpose(1, 2).reshape(x.shape)


def _module_attention(m: nn.Module, x: Tensor) -> Tensor:
    t = _tokens(x)
    return x + m.mha(t, t, t)[0].transpose(1, 2).reshape(x.shape)


def _across_channels(layer: Callable[[int], nn.Module]) -> Callable[..., nn.Module]:
    def make(c: int, _conv: object) -> nn.Module:
        return Block(lambda m, x: m.norm(x.transpose(1, 3)).transpose(1, 3), norm=layer(c))

    return make


def _plain(function: Function) -> Callable[..., nn.Module]:
    return lambda _c, _conv: Block(function)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "convolution": lambda c, conv: conv(c, c, 3, padding=1),
    "residual": lambda c, conv: Block(
        lambda m, x: x + m.b(F.relu(m.a(x))), a=conv(c, 12, 1), b=conv(12, c, 3, padding=1)
    ),
    "grown": lambda c, conv: Block(
        lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=conv(c, 8, 1), b=nn.Conv2d(c + 8, c, 1)
    ),
    "swapped halves": _plain(lambda _, x: torch.cat(_half(x)[::-1], 1)),
    "half passes": lambda c, conv: Block(
        lambda m, x: torch.cat([m.a(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1),
        a=conv(c // 2, c // 2, 3, padding=1),
    ),
    "paths": _plain(
        lambda _, x: torch.cat(
            [F.max_pool2d(_half(x)[0], 3, 1, 1), F.avg_pool2d(_half(x)[1], 3, 1, 1)], 1
        )
    ),
    "two readers": lambda c, conv: Block(
        lambda m, x: m.a(_half(x)[0]) + m.b(_half(x)[1]), a=conv(c // 2, c, 1), b=conv(c // 2, c, 1)
    ),
    "gated": lambda c, conv: Block(lambda m, x: F.glu(m.a(x), 1), a=conv(c, 2 * c, 1)),
    "mixed": lambda c, _conv: nn.Sequential(
        Mixed(c, 12, 2), Mixed(12, 12, 3, depthwise=True), Mixed(12, c, 2)
    ),
    "shifted": _plain(_shifted),
    "every other": _plain(lambda _, x: torch.cat([x[:, ::2], x[:, 1::2]], 1)),
    "rolled": _plain(lambda _, x: x.roll(1, 1)),
    "shuffled": lambda _c, _conv: nn.ChannelShuffle(4),
    "grouped": lambda c, _conv: nn.Conv2d(c, c, 3, padding=1, groups=4),
    "depthwise": lambda c, conv: Block(
        lambda m, x: m.b(m.a(x)), a=nn.Conv2d(c, c, 3, padding=1, groups=c), b=conv(c, c, 1)
    ),
    "blurred": _plain(
        lambda _, x: F.conv2d(
            x, x.new_ones(3, 3).expand(x.shape[1], 1, 3, 3) / 9, padding=1, groups=x.shape[1]
        )
    ),
    "squeezed": lambda c, _conv: Block(
        lambda m, x: x * m.b(F.relu(m.a(x.mean((2, 3))))).sigmoid()[..., None, None],
        a=nn.Linear(c, c // 4),
        b=nn.Linear(c // 4, c),
    ),
    "attention": lambda c, _conv: Block(_attention, qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c)),
    "heads": lambda c, _conv: Block(_heads, qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c)),
    "module attention": lambda c, _conv: Block(
        _module_attention, mha=nn.MultiheadAttention(c, 2, batch_first=True)
    ),
    "product": lambda c, _conv: Block(
        lambda m, x: torch.einsum("nchw,dc->ndhw", x, m.w), w=nn.Parameter(torch.randn(c, c) / 4)
    ),
    "batch norm": lambda c, _conv: nn.BatchNorm2d(c),
    "instance norm": lambda c, _conv: nn.InstanceNorm2d(c, affine=True),
    "group norm": lambda c, _conv: nn.GroupNorm(4, c),
    "plain group norm": lambda c, _conv: nn.GroupNorm(2, c, affine=False),
    "layer norm": _across_channels(nn.LayerNorm),
    "plain layer norm": _plain(
        lambda _, x: F.layer_norm(x.transpose(1, 3), (x.shape[1],)).transpose(1, 3)
    ),
    "RMS norm": _across_channels(nn.RMSNorm),
    "layer norm by hand": _plain(_layer_norm_by_hand),
    "softmax": _plain(lambda _, x: x.softmax(1)),
    "normalised": _plain(lambda _, x: F.normalize(x, dim=1)),
    "sum": _plain(lambda _, x: x.cumsum(1) / 4),
    "spread": _plain(lambda _, x: x / (x.var(1, keepdim=True) + 1).sqrt()),
    "pooled channels": _plain(lambda _, x: x * (x.amax(1, keepdim=True) + x.mean(1, True)).tanh()),
    "sorted": _plain(lambda _, x: x.sort(1)[0]),
}


class Network(nn.Module):
    """A stem, blocks with activations, and a classifier with a hidden layer."""

    def __init__(self, convolution: str, blocks: Sequence[str]) -> None:
        super().__init__()
        conv = CONVOLUTIONS[convolution]
        self.stem = conv(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(BLOCKS[name](16, conv) for name in blocks)
        self.hidden = nn.Linear(16, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 6, 6) to (N, 5)."""
        x = self.stem(x)
        for block in self.blocks:
            x = F.gelu(block(x))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))
