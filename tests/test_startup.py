"""Start-up: reading and tracing import no more than they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import SPACE, small, study_file

HEAVY = ("torch", "torchvision", "ray", "optuna", "sqlalchemy", "scipy", "matplotlib", "sklearn")
HEAVY += ("numpy", "rich", "pydantic", "yaml")


def imported(code: str, *names: str) -> set[str]:
    """Those of some packages that a fresh process imports for a piece of code."""
    code += f"\nimport sys\nprint(*(set({names!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reading_a_study_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    """Its configuration, trials, posterior, front and picks are plain values."""
    tiny.run(tiny.study(tmp_path / "tiny", trials=9))
    code = f"""
from widthsearch import Study
study = Study.load("tiny", {str(tmp_path)!r})
assert study.posterior().surrogate is not None
assert study.pick() in study.front()
"""
    assert imported(code, "torch", "ray", "torchvision", "sklearn", "matplotlib") == set()


def imported_by(*arguments: str) -> set[str]:
    """The heavy packages that a command imports; it must succeed."""
    code = (
        f"import sys\nfrom widthsearch import cli\nsys.stdout, out = sys.stderr, sys.stdout\n"
        f"try:\n    assert cli.main({list(arguments)}) == 0\n"
        f"except SystemExit as stopped:\n    assert stopped.code == 0\nsys.stdout = out"
    )
    return imported(code, *HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pareto", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Neither does importing the package."""
    assert imported_by(*arguments) == set()


def test_printing_a_front_imports_no_torch(tmp_path: Path) -> None:
    """A table, JSON and CSV need the storage and the surrogate; a picture is drawn on request."""
    tiny.run(small(tmp_path, trials=9))
    for form in ([], ["--json"], ["--csv"]):
        found = imported_by("pareto", "small", "--runs", str(tmp_path / "runs"), *form)
        assert found == {"optuna", "sqlalchemy", "scipy", "numpy", "rich", "pydantic", "yaml"}


def test_spaces_and_proposals_import_neither_ray_nor_optuna(tmp_path: Path) -> None:
    """Those of a reference and those of a study's YAML."""
    asked = ("--method", "random", "--budget", "0.5")
    for space in (SPACE, str(study_file(tmp_path))):
        for arguments in (("space", space), ("propose", space, *asked)):
            found = imported_by(*arguments)
            assert "torch" in found
            assert not found & {"ray", "optuna", "sqlalchemy", "matplotlib"}


def test_tracing_imports_neither_ray_nor_optuna() -> None:
    """Nor scikit-learn: a space and its costs need torch and numpy."""
    code = """
from torch import nn
from widthsearch import SearchSpace
space = SearchSpace.from_model(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)), (1, 8, 8))
assert space.cost(space.base).macs > 0
"""
    assert imported(code, "torch", "ray", "optuna", "sklearn", "matplotlib") == {"torch"}
