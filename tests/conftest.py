"""Fixtures that several files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from commands import CommandLine
from hypothesis import settings

# A busy machine fails no test. A continuous integration fails by a change, never by chance: there
# hypothesis draws the same examples each time, elsewhere new ones.
settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(capsys)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database that does not exist yet."""
    return f"sqlite:///{tmp_path / 'study.db'}"
