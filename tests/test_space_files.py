"""Files of spaces and of widths: they load where they belong, and are refused elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusals
from strategies import MODELS, Residual, refused, space_of, spaces, widths_of
from torch import nn

from widthsearch.errors import SpaceError, WidthsError
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing import traced_model
from widthsearch.tracing.inputs import sample
from widthsearch.widths import Widths


@given(st.data(), spaces)
def test_widths_files_load_where_they_were_saved(data: st.DataObject, space: SearchSpace) -> None:
    """Any widths on the grid, as JSON with the space's name and fingerprint."""
    widths = space.widths(data.draw(widths_of(space)))
    with TemporaryDirectory() as folder:
        path = Path(folder, "widths.json")
        space.save_widths(path, widths)
        assert space.load_widths(path) == widths
        content = json.loads(path.read_text())
        assert [file.name for file in path.parent.iterdir()] == ["widths.json"]
    assert content == {
        "space": space.name,
        "fingerprint": space.fingerprint,
        "base": dict(space.base),
        "widths": dict(widths),
    }


def test_widths_of_another_space_are_refused(tmp_path: Path) -> None:
    """The message names the first difference."""
    path = tmp_path / "widths.json"
    own = space_of("Residual")
    own.save_widths(path, 0.5)
    wide = SearchSpace.from_model(wider, (3, 8, 8), name="Residual")
    named = SearchSpace.from_model(Residual, (3, 8, 8), name="other")
    for space, difference in {
        space_of("Plain"): "it has no axis 'stem'",
        own.constrained(pin="conv1"): "it has no axis 'conv1'",
        wide: "the base of axis 'conv1' is 32 in the file and 48 in it",
        named: "their names differ, though their axes are alike",
    }.items():
        message = (
            f"widths must be loaded into their own space, but {str(path)!r} is of 'Residual' (2 "
            f"axes) and the space given is {space.name!r} ({len(space.axes)} axes): {difference}"
        )
        with refused(WidthsError, message):
            space.load_widths(path)
    own.constrained(pin="conv1").save_widths(path, 0.5)
    with pytest.raises(WidthsError, match="the file has no axis 'conv1'"):
        own.load_widths(path)
    with pytest.raises(WidthsError, match="other axes are tied to theirs, or the same widths cost"):
        own.constrained(tie="*").load_widths(path)


def wider() -> nn.Module:
    """The same names, another base."""
    model = Residual()
    model.conv1 = nn.Conv2d(16, 48, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(48)
    model.conv2 = nn.Conv2d(48, 16, 3, padding=1, bias=False)
    return model


@refusals("widths_file")
def test_a_hand_edited_widths_file_is_checked(values: Any, message: str, tmp_path: Path) -> None:
    """One line that names the file and the error; a value of None is left out."""
    space, path = space_of("Residual"), tmp_path / "widths.json"
    space.save_widths(path, 0.5)
    text = values
    if isinstance(values, dict):
        content = json.loads(path.read_text()) | values
        text = json.dumps({k: v for k, v in content.items() if v is not None})
    path.write_text(text)
    with refused(WidthsError, message, whole=False):
        space.load_widths(path)
    with refused(WidthsError, str(path), whole=False):
        space.load_widths(path)


def test_widths_off_the_grid_are_loaded_on_request(tmp_path: Path) -> None:
    """The refusal says how."""
    space, path = space_of("Residual"), tmp_path / "widths.json"
    odd = Widths(space.names, (5, 9))
    space.save_widths(path, odd)
    with refused(WidthsError, "off the grid: load_widths(path, on_grid=False)", whole=False):
        space.load_widths(path)
    assert space.load_widths(path, on_grid=False) == odd


def test_a_missing_widths_file_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(WidthsError, match="cannot be read: No such file or directory"):
        space_of("Residual").load_widths(tmp_path / "none.json")


# -- spaces ----------------------------------------------------------------------------------


def token_model() -> nn.Module:
    """A model of token ids: an embedding, and two linear layers."""
    return nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 16), nn.Linear(16, 4))


SPACES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "residual": (Residual, (3, 8, 8), {}),
    "grouped, tied and pinned": (
        MODELS["Grouped"],
        (3, 8, 8),
        {"tie": [["stem", "grouped"]], "pin": "last", "step": {"stem": 8}},
    ),
    "tokens": (token_model, (torch.zeros(7, dtype=torch.long),), {"max_width": 1.0}),
}


@pytest.mark.parametrize("case", SPACES)
def test_a_loaded_space_equals_the_saved_one(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trace, axes, ties, costs and networks; the model is constructed once, and does not run."""
    make, inputs, constraints = SPACES[case]
    space = SearchSpace.from_model(make, inputs, name=case, **constraints)
    space.save(tmp_path / "space.json")
    made: list[nn.Module] = []

    def make_model() -> nn.Module:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(traced_model, "trace", None)
    loaded = SearchSpace.load(tmp_path / "space.json", make_model)
    assert len(made) == 1
    for a, b in ((loaded, space), (loaded.unconstrained, space.unconstrained)):
        assert (a.name, a.axes, a.trace, a.fingerprint) == (b.name, b.axes, b.trace, b.fingerprint)
    assert sample(loaded.input_shape, 2)[0].dtype == sample(space.input_shape, 2)[0].dtype
    assert loaded.constrained(align=16).axes == space.constrained(align=16).axes
    halves = [s.build(0.5, seed=0).state_dict() for s in (loaded, space)]
    assert all(torch.equal(halves[0][key], halves[1][key]) for key in halves[1])
    assert loaded.check(vectors=0).device == "cpu"


def test_a_space_of_another_model_is_refused(tmp_path: Path) -> None:
    """The message names the first tensor that differs."""
    path = tmp_path / "space.json"
    space_of("Residual").save(path)
    for make, difference in {
        wider: "its tensor 'conv1.weight' has shape (32, 16, 3, 3) in the trace and shape (48, 16, "
        "3, 3) in the model",
        MODELS["Plain"]: "its tensor 'stem.weight' has shape (16, 3, 3, 3) in the trace and no "
        "tensor in the model",
    }.items():
        with refused(SpaceError, f"{str(path)!r} is a space of another model: {difference}"):
            SearchSpace.load(path, make)


def test_a_space_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """Missing, cut off, edited, or of another format: each in one line with the way out."""
    path = tmp_path / "space.json"
    space_of("Plain").save(path)
    text = path.read_text()
    damaged = f"{str(path)!r} is damaged: save the space again"
    for content, message in {
        text[:-30]: damaged,
        text.replace('"conv1"', '"conv9"', 1): damaged,
        "[]": damaged,
        text.replace('"format": 1', '"format": 2', 1): "must have format 1, but "
        f"{str(path)!r} has 2: save the space again with this version of widthsearch",
    }.items():
        path.write_text(content)
        with refused(SpaceError, message, whole=False):
            SearchSpace.load(path, MODELS["Plain"])
    with pytest.raises(SpaceError, match="cannot be read: No such file or directory"):
        SearchSpace.load(tmp_path / "none.json", MODELS["Plain"])


@pytest.mark.parametrize("edit", ["a shape of a later state", "the base of an axis"])
def test_an_edited_file_with_the_digest_of_its_content_is_refused(
    edit: str, tmp_path: Path
) -> None:
    """Each state's shapes are the model's at the base, and its axes those of its trace."""
    path, space = tmp_path / "space.json", space_of("Plain")
    space.constrained(pin=space.axes[0].name).save(path)
    file = json.loads(path.read_text())
    state = file["content"]["states"][1]
    if edit == "a shape of a later state":
        state["trace"]["shapes"][0][1] = [[0]]
    else:
        state["axes"][0]["base"] -= state["axes"][0]["step"]
    text = json.dumps(file["content"], sort_keys=True)
    file["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(file))
    with pytest.raises(SpaceError, match=r"is damaged|is a space of another model"):
        SearchSpace.load(path, MODELS["Plain"])
