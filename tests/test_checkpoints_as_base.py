"""A user's own checkpoint as the base of the methods that otherwise train one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import RECIPE, setting, small_task
from strategies import space_of

from widthsearch.errors import StudyError
from widthsearch.proposers.fisher import Fisher
from widthsearch.proposers.magnitude import Magnitude
from widthsearch.proposers.slimming import Slimming
from widthsearch.proposers.taylor import Taylor
from widthsearch.proposers.tuning import load_weights
from widthsearch.training.trainer import fit


def saved(folder: Path, wrap: str = "") -> tuple[Path, Any]:
    """A checkpoint of a trained base network, and the network."""
    space = space_of("Residual")
    model = space.build(space.base, seed=5)
    fit(model, small_task(), RECIPE, seed=5)
    state: Any = model.state_dict()
    if wrap:
        state = {wrap: {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save(state, folder / "base.pt")
    return folder / "base.pt", model


@pytest.mark.parametrize("wrap", ["", "state_dict", "model"])
def test_a_checkpoint_has_the_tensors_of_the_base(tmp_path: Path, wrap: str) -> None:
    """Parameters and buffers, also those of a data-parallel network in a training state."""
    path, model = saved(tmp_path, wrap)
    other = space_of("Residual").build(1.0, seed=0)
    load_weights(other, str(path))
    for (name, value), wanted in zip(
        other.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, wanted), name


METHODS: Sequence[Any] = (
    Fisher(every=1),
    Magnitude(every=1),
    Taylor(every=1),
    Taylor(every=1, schedule="turns"),
    Slimming(sparsity=0.01),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_start_from_a_checkpoint(tmp_path: Path, method: Any) -> None:
    """The base is not trained; only slimming goes on from it, by sparse training."""
    path, _ = saved(tmp_path)
    lines: list[str] = []
    space, started = space_of("Residual"), replace(method, weights=str(path))
    proposal = started(space, small_task(), replace(setting(), report=lines.append))
    assert proposal.provenance["weights"] == str(path)
    trained = any(line.startswith("base: epoch") for line in lines)
    assert trained == isinstance(method, Slimming)
    members = proposal.provenance["members"]
    if isinstance(members, list):  # by turns: the training so far, in epochs of the base
        assert members[0]["epochs"] < 1


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """In one line, with the way out."""
    space = space_of("Residual")
    model: Any = space.build(1.0, seed=0)
    with pytest.raises(StudyError, match=r"cannot be read: .*No such file.*; write it with"):
        load_weights(model, str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(StudyError, match=r"must be a checkpoint of tensors, but .*text.pt'"):
        load_weights(model, str(tmp_path / "text.pt"))
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(StudyError, match=r"must hold tensors by name, but .* holds a list"):
        load_weights(model, str(tmp_path / "list.pt"))
    torch.save(space.build(0.5).state_dict(), tmp_path / "narrow.pt")
    message = r"'stem.weight' has the shape \(16, 3, 3, 3\), but has the shape \(8, 3, 3, 3\) in"
    with pytest.raises(StudyError, match=message):
        load_weights(model, str(tmp_path / "narrow.pt"))
    torch.save({"stem.weight": model.stem.weight.detach()}, tmp_path / "part.pt")
    with pytest.raises(StudyError, match=r"'bn.weight' has the shape \(16,\), but is none in"):
        load_weights(model, str(tmp_path / "part.pt"))
