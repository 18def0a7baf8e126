"""Tracing: couplings of layers, pins with their reasons, and errors that name their place."""

from __future__ import annotations

import pytest
import torch
from strategies import MODELS, space_of
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

from widthsearch.errors import TraceError
from widthsearch.tracing.tracer import trace


def test_a_residual_stream_is_one_axis() -> None:
    """Stem, block output, their norms and consumers share it; its name is its first maker's."""
    stem, inner = trace(MODELS["Residual"](), (3, 8, 8)).axes
    assert (stem.name, stem.base) == ("stem", 16)
    assert stem.layers == ("stem", "bn", "conv1", "conv2", "bn2", "fc")
    assert (inner.name, inner.layers) == ("conv1", ("conv1", "bn1", "conv2"))


def test_a_concatenation_is_a_sum_of_axes() -> None:
    """The norm after it has no axis of its own."""
    traced = trace(MODELS["Concatenated"](), (3, 8, 8))
    assert [axis.name for axis in traced.axes] == ["stem", "grow", "last"]
    assert traced.shapes["bn.weight"] == ({(0,): 1, (1,): 1},)
    assert traced.shapes["last.weight"][1] == {(0,): 1, (1,): 1}


def test_a_flatten_multiplies() -> None:
    """The linear layer reads 16 elements a channel."""
    assert trace(MODELS["Plain"](), (3, 8, 8)).shapes["fc.weight"][1] == {(1,): 16}


def test_a_depthwise_convolution_ties_its_groups() -> None:
    """Its groups, inputs and outputs are one axis."""
    traced = trace(MODELS["Depthwise"](), (3, 8, 8))
    assert traced.attributes == {("depthwise", "groups"): {(1,): 1}}
    assert traced.axes[1].layers == ("expand", "bn1", "depthwise", "bn2", "project")


def test_groups_make_units() -> None:
    """Widths around a convolution in four groups are multiples of four."""
    traced = trace(MODELS["Grouped"](), (3, 8, 8))
    assert [(axis.name, axis.divisor) for axis in traced.axes] == [
        ("stem", 4),
        ("grouped", 4),
        ("last", 1),
    ]


def test_input_and_output_are_pinned_with_reasons() -> None:
    """A width that the task sets is not free."""
    pinned = {(p.name, p.size): p.reason for p in trace(MODELS["Plain"](), (3, 8, 8)).pinned}
    assert pinned == {("conv1", 3): "input of the model", ("fc", 10): "output of the model"}


class Fixed(nn.Module):
    """Code with a literal width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.free = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Hard-codes the first convolution's width."""
        x = self.conv(x).view(-1, 8, 64).view(-1, 8, 8, 8)
        return self.fc(self.free(x).mean((2, 3)))


def test_a_width_that_code_fixes_is_pinned_at_its_line() -> None:
    """The reason is the line; the model is not refused."""
    traced = trace(Fixed(), (3, 8, 8))
    assert [axis.name for axis in traced.axes] == ["free"]
    (reason,) = [p.reason for p in traced.pinned if (p.name, p.size) == ("conv", 8)]
    assert reason.startswith("tests/test_tracer.py:")
    assert "x = self.conv(x).view(-1, 8, 64)" in reason


def test_a_width_that_torch_fixes_is_not_blamed_on_the_caller() -> None:
    """Where no line of the model's own is running there is none to quote."""
    cell = nn.Sequential(nn.Linear(5, 12), nn.GRUCell(12, 16), nn.Linear(16, 8), nn.Linear(8, 4))
    traced = trace(cell, (5,))
    assert [axis.name for axis in traced.axes] == ["2"]
    reasons = {pinned.reason for pinned in traced.pinned if pinned.size in (12, 48)}
    assert {reason.partition(" (")[0] for reason in reasons} == {"torch's own code"}


class Auxiliary(nn.Module):
    """A second head that only training runs, and a layer that nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 10)
        self.aux = nn.Linear(8, 10)
        self.never = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """One output, or two in training."""
        x = self.conv(x).mean((2, 3))
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def test_a_layer_that_shares_its_weight_is_named_beside_its_owner() -> None:
    """A head tied to an embedding: its words are pinned there too, with its share of the MACs."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 8)
            self.fc = nn.Linear(8, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(self.words(x)).relu())

    traced = trace(Tied(), torch.zeros(6, dtype=torch.long))
    (words,) = traced.pinned
    assert (words.name, words.size, words.layers) == ("words", 10, ("words", "head"))
    assert traced.pinned_shares() == [80 / (64 + 80)]
    (stream,) = traced.axes
    assert set(stream.layers) == {"words", "fc", "head"}


def test_layers_that_only_training_runs_are_tied_too() -> None:
    """An auxiliary head has the same axis; it is in the parameters but not in the MACs."""
    traced = trace(Auxiliary(), (3, 8, 8))
    (axis,) = traced.axes
    assert axis.layers == ("conv", "fc", "aux")
    assert traced.macs == {(0,): 3 * 64 + 10}
    assert {p.reason for p in traced.pinned if p.name == "never"} == {"never used in forward"}


class Reads(nn.Module):
    """Forward depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.inner = nn.Sequential(nn.ReLU(), ReadsInside())

    def forward(self, x: Tensor) -> Tensor:
        """Fails in a submodule."""
        return self.inner(self.conv(x))


class ReadsInside(nn.Module):
    """Branches on a value."""

    def forward(self, x: Tensor) -> Tensor:
        """Cannot run without values."""
        return x if x.sum().item() > 0 else -x


def test_a_model_that_reads_values_is_refused_by_name() -> None:
    """The error names model, module, its class, line and operation."""
    with pytest.raises(TraceError) as error:
        trace(Reads(), (3, 8, 8))
    message = str(error.value)
    assert message.startswith(
        "cannot trace Reads: module 'inner.1' (ReadsInside) failed at test_tracer.py:"
    )
    assert "in operation aten.item" in message or "aten._local_scalar_dense" in message


WRONG = {
    "channels": ((1, 8, 8), "input (1, 8, 8): Given groups=1, weight of size [8, 3, 3, 3], "),
    "size": ((3, 9, 9), "mat1 and mat2 shapes cannot be multiplied "),
    "a batch": ((1, 3, 8, 8), "input (1, 3, 8, 8): Expected 3D (unbatched) or 4D (batched) input"),
    "two": (((3, 8, 8), (3, 8, 8)), "forward() takes 2 positional arguments but 3 were given; "),
    "a tensor": (torch.zeros(9), "input 'torch.float32 (9,)': Expected 3D"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_input_that_the_model_does_not_take_has_the_message_of_torch(case: str) -> None:
    """It runs once as it is, on zeros; in meta tensors it cannot."""
    shape, message = WRONG[case]
    with pytest.raises(TraceError) as error:
        trace(MODELS["Plain"](), shape)
    text = str(error.value)
    assert text.startswith("the model fails on its ")
    assert message in text
    assert text.endswith("a shape without the batch, or a tensor where the dtype matters")
    assert "\n" not in text
    with pytest.raises(TraceError, match="cannot trace "):
        trace(MODELS["Plain"]().to("meta"), shape)


def test_a_failed_run_leaves_the_model_unchanged() -> None:
    """Its buffers, its mode and the random state are as they were."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Counts(), nn.Linear(8, 4))
    state = torch.get_rng_state()
    with pytest.raises(TraceError, match="the model fails on its input"):
        trace(model, (3, 8, 5))
    assert model.training
    assert int(model[1].runs) == 0
    assert torch.equal(state, torch.get_rng_state())


class Counts(nn.Module):
    """Counts its runs in a buffer and draws a number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Its input."""
        self.runs += 1
        return x + 0 * torch.rand(())


def test_the_model_is_left_as_it_was() -> None:
    """Neither tensors, nor mode, nor hooks, nor the random state change."""
    model = MODELS["Residual"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, (3, 8, 8))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the middle layer two times."""
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        return self.fc(x.mean((2, 3)))


def test_a_layer_used_twice_is_counted_twice() -> None:
    """Its parameters count once, its MACs each time; its output must fit its input."""
    traced = trace(Shared(), (3, 8, 8))
    assert [axis.name for axis in traced.axes] == ["stem"]
    assert traced.macs[0, 0] == 2 * 9 * 64
    assert traced.params[0, 0] == 9


def test_layer_macs_sum_to_the_whole() -> None:
    """Every MAC belongs to one layer."""
    traced = space_of("Residual").trace
    total: dict[tuple[int, ...], int] = {}
    for poly in traced.layer_macs.values():
        for monomial, c in poly.items():
            total[monomial] = total.get(monomial, 0) + c
    assert total == traced.macs
    assert traced.layer_macs["fc"] == {(0,): 10}


class Windows(nn.Module):
    """Swin V2's attention of four heads in windows of 4×4 tokens: one number, two meanings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 1)
        self.attention = ShiftedWindowAttentionV2(32, [4, 4], [2, 2], 4)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        return self.fc(self.attention(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_heads_are_freed_beside_another_number_of_their_value() -> None:
    """With the window symbolic as well, nothing is freed; the number of heads alone frees."""
    traced = trace(Windows(), (3, 8, 8))
    assert (traced.axes[0].base, traced.axes[0].divisor) == (32, 8)
    assert ("attention", "num_heads") in traced.attributes
    assert ("attention", "window_size[0]") not in traced.attributes


class GroupedExperts(nn.Module):
    """A product of each row with the matrix of its expert, by a fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.experts = nn.Linear(8, 16), nn.Parameter(torch.randn(2, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8) to (N, 8)."""
        ends = torch.tensor([1, len(x)], dtype=torch.int32)
        return torch._grouped_mm(self.layer(x), self.experts, offs=ends)


def test_products_that_torch_does_not_count_are_refused() -> None:
    """In one line, with the line of code and the way out."""
    with pytest.raises(TraceError) as error:
        trace(GroupedExperts(), (8,))
    message = str(error.value)
    assert message.startswith("a model's products must be those that torch counts, but aten._grou")
    assert "test_tracer.py" in message and message.endswith("'batched_mm'`)")
    assert "\n" not in message
