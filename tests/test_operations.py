"""Operations: each is followed exactly, or its widths are pinned with a reason.

Each model is traced, built at five random width vectors, and must cost what the space predicts;
networks also run forward and backward on real tensors, since meta-device kernels validate less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_space import IMAGE, TOKENS, Model, bases, exact_space, reasons
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d


class Square(torch.autograd.Function):
    """A custom function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x²."""
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """2x."""
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def conv(**more: Any) -> dict[str, nn.Module]:
    """A stem of 16 channels, and other layers."""
    return {"a": nn.Conv2d(3, 16, 1), **more}


def created(m: Any, x: Tensor) -> Tensor:
    """Creates tensors of other tensors' sizes."""
    x = m.a(x)
    n, c, h, w = x.shape
    row = torch.linspace(-1, 1, w, device=x.device).expand(n, 1, h, w)
    x = torch.cat([x, row], 1) * torch.ones(c + 1, 1, 1, device=x.device)
    grid = F.affine_grid(torch.eye(2, 3, device=x.device).expand(n, 2, 3), x.shape, False)
    return m.o(m.b(F.grid_sample(x, grid, align_corners=False)).mean((2, 3)))


def attention(m: Any, x: Tensor) -> Tensor:
    """Written by hand, with integer attributes of the module."""
    n, _, h, w = x.shape
    q, k, v = m.qkv(x).reshape(n, 3, m.heads, m.head_dim, h * w).unbind(1)
    scores = (q.transpose(-1, -2) @ k) * m.head_dim**-0.5
    x = v @ scores.softmax(-1).transpose(-1, -2)
    return m.o(x.reshape(n, m.dim, h, w).mean((2, 3)))


def fused_attention(m: Any, x: Tensor) -> Tensor:
    """Torch's own function."""
    x = x.flatten(2).transpose(1, 2)
    q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def functional(m: Any, x: Tensor) -> Tensor:
    """Parameters of its own."""
    x = F.conv2d(F.relu_(F.conv2d(x, m.w, m.bias, padding=1)), m.w2, stride=2)
    return torch.einsum("nchw,cd->ndhw", x, m.w3).mean((2, 3)) @ m.w4


def upsampling(m: Any, x: Tensor) -> Tensor:
    """Transposed, shuffled, and normalised in every way."""
    x = m.norm2(m.norm(m.group(m.act(m.t2(m.t(m.a(x)))))))
    return m.o(m.down(m.d(m.up(m.c(x)))))


def random_parameter(*shape: int) -> nn.Parameter:
    """Small values."""
    return nn.Parameter(torch.randn(shape) / 10)


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, tuple[int, int]]]] = {
    "a custom autograd function": (
        lambda: Model(
            lambda m, x: m.o(Square.apply(m.a(x)).mean((2, 3))), **conv(o=nn.Linear(16, 4))
        ),
        IMAGE,
        {"a": (16, 1)},
    ),
    "chunks": (
        lambda: Model(
            lambda m, x: m.o(torch.mul(*m.a(x).chunk(2, 1)).mean((2, 3))), **conv(o=nn.Linear(8, 4))
        ),
        IMAGE,
        {"a": (16, 2)},
    ),
    "a slice by an integer attribute": (
        lambda: Model(
            lambda m, x: m.o(m.b(m.a(x)[:, m.first :]).mean((2, 3))),
            **conv(b=nn.Conv2d(12, 8, 1), o=nn.Linear(8, 4)),
            first=4,
        ),
        IMAGE,
        {"a": (4, 1), "b": (8, 1), "b.weight": (12, 1)},
    ),
    "a split by integer attributes": (
        lambda: Model(
            lambda m, x: m.o(torch.cat([m.b(y) for y in m.a(x).split(m.parts, 1)], 1).mean((2, 3))),
            **conv(b=nn.Conv2d(8, 8, 1), o=nn.Linear(16, 4)),
            parts=(8, 8),
        ),
        IMAGE,
        {"a": (16, 2), "b": (8, 1)},
    ),
    "tensors made in forward": (
        lambda: Model(created, **conv(b=nn.Conv2d(17, 12, 1), o=nn.Linear(12, 4))),
        IMAGE,
        {"a": (16, 1), "b": (12, 1)},
    ),
    "parameters outside of layers": (
        lambda: Model(
            functional,
            w=random_parameter(16, 3, 3, 3),
            bias=random_parameter(16),
            w2=random_parameter(24, 16, 3, 3),
            w3=random_parameter(24, 12),
            w4=random_parameter(12, 5),
        ),
        IMAGE,
        {"w": (16, 1), "w2": (24, 1), "w4": (12, 1)},
    ),
    "weights sliced in forward": (
        lambda: Model(
            lambda m, x: m.o(F.linear(m.a(x).mean((2, 3)), m.b.weight[:, : x.shape[1] + 13])),
            **conv(b=nn.Linear(16, 12), o=nn.Linear(12, 4)),
        ),
        IMAGE,
        {"b": (12, 1)},
    ),
    "upsampling and norms": (
        lambda: Model(
            upsampling,
            a=nn.Conv2d(3, 16, 3, stride=2, padding=1),
            t=nn.ConvTranspose2d(16, 24, 4, 2, 1),
            t2=nn.ConvTranspose2d(24, 24, 3, 1, 1, groups=24),
            act=nn.PReLU(24),
            group=nn.GroupNorm(4, 24),
            norm=nn.InstanceNorm2d(24, affine=True),
            norm2=nn.InstanceNorm2d(24),
            c=nn.Conv2d(24, 8, 3, padding=1),
            up=nn.PixelShuffle(2),
            d=nn.Conv2d(2, 6, 1),
            down=nn.PixelUnshuffle(2),
            o=nn.Conv2d(24, 4, 1),
        ),
        IMAGE,
        {"a": (16, 1), "t": (24, 4), "c": (8, 4), "d": (6, 1)},
    ),
    "norms without parameters": (
        lambda: Model(
            lambda m, x: m.o(m.rms(m.ln(m.b(m.bn(m.a(x)).mean((2, 3)))))),
            **conv(
                bn=nn.BatchNorm2d(16, affine=False),
                b=nn.Linear(16, 24),
                ln=nn.LayerNorm(24, elementwise_affine=False),
                rms=nn.RMSNorm(24, elementwise_affine=False),
                o=nn.Linear(24, 4),
            ),
        ),
        IMAGE,
        {"a": (16, 1), "b": (24, 1)},
    ),
    "attention by hand": (
        lambda: Model(
            attention, qkv=nn.Conv2d(3, 96, 1), o=nn.Linear(32, 4), heads=4, head_dim=8, dim=32
        ),
        IMAGE,
        {"qkv": (96, 24)},
    ),
    "fused attention": (
        lambda: Model(
            fused_attention,
            q=nn.Linear(3, 32),
            k=nn.Linear(3, 32),
            v=nn.Linear(3, 16),
            o=nn.Linear(16, 4),
        ),
        IMAGE,
        {"q": (32, 4), "v": (16, 4)},
    ),
    "a transformer": (
        lambda: Model(
            lambda m, x, y: m.o(m.t(m.i(x), m.i(y))),
            i=nn.Linear(16, 32),
            t=nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
            o=nn.Linear(32, 4),
        ),
        ((10, 16), (7, 16)),
        {
            "i": (32, 4),
            "t.encoder.layers.0.linear1": (64, 1),
            "t.decoder.layers.0.linear1": (64, 1),
        },
    ),
    "an LSTM": (
        lambda: Model(
            lambda m, x: m.o(m.r(m.e(x))[0][:, -1]),
            e=nn.Embedding(20, 12),
            r=nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True),
            o=nn.Linear(32, 4),
        ),
        TOKENS,
        {"e": (12, 1), "r": (64, 4)},
    ),
    "a GRU": (
        lambda: Model(
            lambda m, x: m.o(m.r(m.e(x))[0][:, -1]),
            e=nn.Embedding(20, 12),
            r=nn.GRU(12, 16, batch_first=True),
            o=nn.Linear(16, 4),
        ),
        TOKENS,
        {"e": (12, 1), "r": (48, 3)},
    ),
    "bags and three dimensions": (
        lambda: Model(
            lambda m, x, y: m.o(torch.cat([m.b(m.a(x).mean((3, 4)).flatten(1)), m.e(y)], 1)),
            a=nn.Conv3d(2, 16, 3),
            b=nn.Linear(16 * 4, 12),
            e=nn.EmbeddingBag(9, 16),
            o=nn.Linear(28, 4),
        ),
        ((2, 6, 6, 6), TOKENS),
        {"a": (16, 1), "b": (12, 1), "e": (16, 1)},
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_operations_that_are_followed(name: str) -> None:
    """These leave widths free."""
    make, inputs, expected = FOLLOWED[name]
    assert bases(exact_space(make, inputs)) == expected


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_a_composite_operation_without_a_python_kernel_is_followed() -> None:
    """``meshgrid`` without ``indexing`` has none: it runs as the views that it is made of."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(*map(torch.arange, x.shape[2:]))
        channels, _ = torch.meshgrid(m.scale, torch.ones(3))
        x = m.a(x * (rows + columns)) * channels[None, :, :1, None]
        return m.o(x.mean((2, 3)))

    def make() -> nn.Module:
        return Model(forward, **conv(o=nn.Linear(16, 4)), scale=nn.Parameter(torch.ones(16)))

    assert bases(exact_space(make, IMAGE)) == {"a": (16, 1)}


def test_plain_tensors_keep_their_values() -> None:
    """They may be read; only tensors that a network computes have no values."""

    def make() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            return m.o((m.a(x) * m.scale).mean((2, 3)) + m.offsets[2].item())

        tensors = {"scale": torch.tensor([2.0]), "offsets": torch.linspace(0, 1, 4)}
        return Model(forward, **conv(o=nn.Linear(16, 4)), **tensors)

    assert bases(exact_space(make, IMAGE, device="cpu")) == {"a": (16, 1)}


class LookUp(nn.Module):
    """Looks a width up in a dictionary, which needs an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(16, 16, 1)
        self.table = {16: 2.0}

    def forward(self, x: Tensor) -> Tensor:
        """Scaled by the table's value."""
        return self.c(x) * self.table[x.shape[1]]


def followed_by(
    function: Callable[[Any, Tensor, Tensor], Tensor],
    channels: int = 16,
    **layers: Callable[[], nn.Module],
) -> Callable[[], nn.Module]:
    """A stem of 16 channels, a function of it and the input, and a layer that reads the result."""

    def make() -> nn.Module:
        made = {name: layer() for name, layer in layers.items()}
        made |= {"b": nn.Conv2d(channels, 24, 1), "o": nn.Linear(24, 4)}
        return Model(lambda m, x: m.o(m.b(function(m, m.a(x), x)).mean((2, 3))), **conv(**made))

    return make


PINNED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "code that needs integers": (
        followed_by(lambda m, y, x: m.n(y), n=LookUp),
        "needs integers at test_operations.py:",
    ),
    "an operation without symbolic sizes": (
        followed_by(lambda m, y, x: torch.fake_quantize_per_tensor_affine(y, 0.1, 0, 0, 255)),
        "takes no symbolic sizes: ",
    ),
    "an operation that checks no sizes": (
        followed_by(
            lambda m, y, x: m.d(y, m.offset(x)),
            channels=8,
            offset=lambda: nn.Conv2d(3, 18, 3, padding=1),
            d=lambda: DeformConv2d(16, 8, 3, padding=1),
        ),
        "torchvision.deform_conv2d.default may check no sizes: ",
    ),
    "channels in a fixed order": (
        followed_by(lambda m, y, x: y[:, torch.arange(15, -1, -1)]),
        "looked up by index: ",
    ),
    "a slice that narrower networks do not have": (
        followed_by(lambda m, y, x: y[:, :16]),
        "tests/test_operations.py:",
    ),
    "as many channels as a choice needs": (
        followed_by(lambda m, y, x: y.topk(8, 1)[0], channels=8),
        "tests/test_operations.py:",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_operations_that_pin_their_widths(name: str) -> None:
    """The model is not refused, and its other widths are free."""
    make, reason = PINNED[name]
    space = exact_space(make, IMAGE, device="cpu")
    assert bases(space) == {"b": (24, 1)}
    assert reason in reasons(space)["a", 16]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_are_pinned_at_their_line(kind: Any) -> None:
    """Their C++ code needs integers; later widths are free."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = None
        for step in m.a(x).unbind(1):
            state = m.cell(step, state)
        return m.o(F.relu(m.b(state[0] if isinstance(state, tuple) else state)))

    def make() -> nn.Module:
        b, o = nn.Linear(16, 24), nn.Linear(24, 4)
        return Model(forward, a=nn.Linear(5, 12), cell=kind(12, 16), b=b, o=o)

    space = exact_space(make, (7, 5), device="cpu")
    assert bases(space) == {"b": (24, 1)}
    found = reasons(space)
    assert {("a", 12), ("b", 16)} <= found.keys()
    gates = {nn.LSTMCell: 64, nn.GRUCell: 48, nn.RNNCell: 16}[kind]
    assert "`state = m.cell(step, state)`" in found["cell", gates]


def test_a_bilinear_layer_has_free_inputs_and_a_pinned_output() -> None:
    """Its two inputs are axes, its output is pinned at its line."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.b(m.bilinear(m.a(x).mean((2, 3)), m.c(x.flatten(1)))))

    def make() -> nn.Module:
        layers = {"a": nn.Conv2d(3, 16, 1), "c": nn.Linear(192, 12), "o": nn.Linear(24, 4)}
        return Model(forward, **layers, bilinear=nn.Bilinear(16, 12, 20), b=nn.Linear(20, 24))

    space = exact_space(make, IMAGE, device="cpu")
    assert bases(space) == {"a": (16, 1), "c": (12, 1), "b": (24, 1)}
    assert "m.bilinear(" in reasons(space)["bilinear", 20]
    net: Any = space.build([8, 24, 16])
    assert (net.bilinear.in1_features, net.bilinear.in2_features) == (8, 24)
