"""Start-up: reading and tracing import no more than they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny

from widthsearch.api import Study


def imported(code: str, *names: str) -> set[str]:
    """Those of some packages that a fresh process imports for a piece of code."""
    code += f"\nimport sys\nprint(*(set({names!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reading_a_study_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    """Its configuration, trials, posterior, front and picks are plain values."""
    study = Study(tiny.config(trials=9), tiny.space(), tiny.task(), folder=tmp_path / "tiny")
    with study.search() as search:
        tiny.drive(search)
    code = f"""
from widthsearch import Study
study = Study.load("tiny", {str(tmp_path)!r})
assert study.posterior().surrogate is not None
assert study.pick() in study.front()
"""
    assert imported(code, "torch", "ray", "torchvision", "sklearn", "matplotlib") == set()


def test_tracing_imports_neither_ray_nor_optuna() -> None:
    """Nor scikit-learn: a space and its costs need torch and numpy."""
    code = """
from torch import nn
from widthsearch import SearchSpace
space = SearchSpace.from_model(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)), (1, 8, 8))
assert space.cost(space.base).macs > 0
"""
    assert imported(code, "torch", "ray", "optuna", "sklearn", "matplotlib") == {"torch"}
