"""Spaces and functions by reference: found once, refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from strategies import refused

from widthsearch.errors import SpaceError
from widthsearch.space.loading import load_space
from widthsearch.utils.references import load_function


def test_spaces_are_found_by_reference(tmp_path: Path) -> None:
    """A file's function, loaded and traced once."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\nfrom widthsearch import SearchSpace\n"
        "def tiny():\n"
        "    return SearchSpace.from_model(\n"
        "        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)),\n"
        "        (3, 8, 8), name='tiny',\n"
        "    )\n"
        "def needs(width): ...\n"
        "def gives(): return 3\n"
    )
    space = load_space(f"{file}:tiny")
    assert space.names == ("0",)
    assert load_space(f"{file}:tiny") is space
    for reference, message in {
        f"{file}:tinny": f"{file} has no function 'tinny'; did you mean 'tiny'?",
        f"{file}:needs": "must need no arguments, but needs width",
        f"{file}:gives": "must return a SearchSpace, but returned int",
        f"{tmp_path}/other.py:tiny": "there is no file",
        "no_such_package.spaces:tiny": "cannot be imported: ModuleNotFoundError",
        "torchvision:resnet19": "did you mean 'resnet18'?",
        "resnet18": "path/to/file.py:function`; did you mean 'torchvision:resnet18'?",
        "resnet19": "'resnet19' must be `package.module:function` or `path/to/file.py:function`",
    }.items():
        with refused(SpaceError, message, whole=False):
            load_space(reference)


def test_an_input_shape_goes_with_torchvision_alone() -> None:
    """Other references set their own."""
    with pytest.raises(SpaceError, match="goes with `torchvision:NAME` alone"):
        load_space("search_spaces/quickstart.py:digits_resnet", (1, 8, 8))
    with pytest.raises(SpaceError, match="did you mean 'torchvision:resnet18'"):
        load_space("resnet18", (3, 32, 32))


EXITS = {
    "at its top": "import sys\nsys.exit(3)\ndef space(): ...\n",
    "in its function": "def space():\n    raise SystemExit('no')\n",
}


@pytest.mark.parametrize("where", EXITS)
def test_code_that_exits_is_an_error_like_any_other(where: str, tmp_path: Path) -> None:
    """It must not end the process that asked for the space."""
    file = tmp_path / "exits.py"
    file.write_text(EXITS[where])
    with refused(SpaceError, "SystemExit: ", whole=False):
        load_space(f"{file}:space")


def test_a_module_that_exits_is_an_error_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file that does."""
    (tmp_path / "exits_too.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpaceError, match="cannot be imported: SystemExit"):
        load_function("exits_too:space")


def test_a_file_has_the_name_by_which_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its classes are the user's own; another file or content gets a module of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    package = tmp_path / "named_package"
    for folder in (package, tmp_path / "other"):
        folder.mkdir()
        (folder / "named_file.py").write_text("def f(): return 1\n")
    first = load_function(f"{package / 'named_file.py'}:f")
    assert (first.__module__, load_function("named_file:f")) == ("named_file", first)
    other = load_function(f"{tmp_path / 'other' / 'named_file.py'}:f")
    assert other.__module__.startswith("_widthsearch_named_file_")
    (package / "named_file.py").write_text("def f(): return 22\n")
    assert load_function(f"{package / 'named_file.py'}:f")() == 22
    assert load_function("named_file:f") is first
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("from named_package import named_file\nf = named_file.f\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function(f"{package / 'inner.py'}:f").__module__ == "named_package.named_file"
    assert "named_package.inner" in sys.modules
