"""The blocks of `docs/own-loop.md` run one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_readme import blocks

PAGE = Path(__file__).parent.parent / "docs" / "own-loop.md"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_page_runs(run_here: Callable[[str], list[str]]) -> None:
    """Each way of searching prints a front of networks that have learned something."""
    shared, sampler, loop = blocks(PAGE)
    for block in (sampler, loop):
        lines = run_here(f"{shared}\n{block}")
        assert 2 <= len(lines) <= 10
