"""The blocks of `docs/own-loop.md` run one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_readme import blocks, run

PAGE = Path(__file__).parent.parent / "docs" / "own-loop.md"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_page_runs(tmp_path: Path) -> None:
    """Each way of searching prints a front of networks that have learned something."""
    shared, sampler, loop = blocks(PAGE)
    for block in (sampler, loop):
        lines = run(f"{shared}\n{block}", tmp_path)
        assert 2 <= len(lines) <= 10
