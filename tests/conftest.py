"""Fixtures that several files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import CommandLine
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # a busy machine fails no test
settings.load_profile("patient")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(capsys)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database that does not exist yet."""
    return f"sqlite:///{tmp_path / 'study.db'}"
