"""Code that branches on values of the sample, which no width affects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_space import Model, bases, exact_space
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.channels.dependency_graph import build_dependency_graph
from widthsearch.errors import TraceError
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.inputs import as_inputs, inputs_from_json, inputs_to_json, sample

SAMPLE = {"ids": torch.arange(6) % 4, "mask": torch.tensor([1, 1, 1, 1, 0, 0])}
Read = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
READS: dict[str, Read] = {
    "all": lambda m, h, ids, mask: h if mask.all() else h * mask[..., None],
    "item": lambda m, h, ids, mask: h[:, : int(mask.sum().item())],
    "max": lambda m, h, ids, mask: h + ids.max().item(),
    "tolist": lambda m, h, ids, mask: h[:, : sum(mask[0].tolist())],
    "equal": lambda m, h, ids, mask: h if torch.equal(ids, mask) else h + 1,
    "arange": lambda m, h, ids, mask: h if (torch.arange(h.shape[1]) >= 0).all() else h.sum(),
    "constant": lambda m, h, ids, mask: h if torch.tensor([1, 2]).sum() == 3 else h.sum(),
    "chosen": lambda m, h, ids, mask: h[mask.bool()],
    "nonzero": lambda m, h, ids, mask: h[:, mask[0].nonzero()[:, 0]],
    "written": lambda m, h, ids, mask: h if _written(mask).any() else h.sum(),
    "on the CPU": lambda m, h, ids, mask: h.cpu()[:, : int(mask.sum().cpu())].to(h.device),
}


def _written(mask: Tensor) -> Tensor:
    out = torch.zeros_like(mask)
    out[:, 2:] = mask[:, 2:]
    return out


def reader(read: Read) -> Callable[[], nn.Module]:
    """An embedding whose output ``read`` changes, two layers and a mean over the tokens."""
    return lambda: Model(
        lambda m, ids, mask: m.o(F.relu(m.f(read(m, m.e(ids), ids, mask)))).flatten(0, -2).mean(0),
        e=nn.Embedding(4, 16),
        f=nn.Linear(16, 24),
        o=nn.Linear(24, 3),
    )


@pytest.mark.parametrize("name", READS)
def test_values_of_the_sample_are_known(name: str) -> None:
    """Costs are those of the sample's branch and lengths; channels are found in the same way."""
    space = exact_space(reader(READS[name]), SAMPLE)
    assert bases(space) == {"f": (24, 1), "e": (16, 1)} or bases(space) == {
        "e": (16, 1),
        "f": (24, 1),
    }
    assert space.check().device == "cpu"
    assert not build_dependency_graph(space.model, space.base).unknown


def test_the_sample_decides_the_branch() -> None:
    """Two of six tokens are masked, so four reach the layers."""
    space = SearchSpace.from_model(reader(READS["item"]), SAMPLE)
    assert space.cost(space.base).macs == 4 * (16 * 24 + 24 * 3)


REFUSED: dict[str, Read] = {
    "a weight": lambda m, h, ids, mask: h if m.f.weight.sum() > 0 else -h,
    "hidden values": lambda m, h, ids, mask: h if h.norm() > 1 else -h,
    "a width": lambda m, h, ids, mask: h[:, : int(torch.arange(h.shape[-1]).max().item()) % 5],
    "written by a weight": lambda m, h, ids, mask: h if _spoiled(m, mask).any() else -h,
}


def _spoiled(m: Any, mask: Tensor) -> Tensor:
    out = torch.zeros(6)
    out[:3] = m.f.weight[0, :3]
    return out


@pytest.mark.parametrize("name", REFUSED)
def test_a_branch_on_a_weight_or_a_width_is_refused_at_its_line(name: str) -> None:
    """Their values differ between networks."""
    with pytest.raises(TraceError, match=r"failed at test_sample_values.py:\d+"):
        SearchSpace.from_model(reader(REFUSED[name]), SAMPLE)


def test_a_sample_survives_a_file(tmp_path: Path) -> None:
    """Values are saved with the space; a batch repeats them."""
    inputs = as_inputs({**SAMPLE, "image": (3, 2, 2), "scale": torch.tensor([0.5, float("inf")])})
    read = inputs_from_json(inputs_to_json(inputs))
    assert read["image"] == (3, 2, 2)
    for name in ("ids", "mask", "scale"):
        assert torch.equal(read[name], inputs[name])
        assert read[name].dtype == inputs[name].dtype
        assert torch.equal(sample(read, 2, "cpu")[name][1], inputs[name])
    space = SearchSpace.from_model(reader(READS["item"]), SAMPLE)
    space.save(tmp_path / "space.json")
    assert SearchSpace.load(tmp_path / "space.json", reader(READS["item"])).check()
