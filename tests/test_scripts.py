"""The scripts of benchmarks and studies, which no other test runs as a whole."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "studies")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import(script: str) -> None:
    """Every name that a script imports exists."""
    if script == "benchmarks.botorch_search":
        pytest.importorskip("botorch", reason="needs botorch: pip install '.[benchmark]'")
    importlib.import_module(script)
