"""What tests of the command line share: a small study, and a command's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from widthsearch import cli

ROOT = Path(__file__).parent.parent
SPACE = f"{ROOT / 'search_spaces' / 'quickstart.py'}:digits_resnet"


def study_file(folder: Path, **changes: Any) -> Path:
    """A study's YAML in a folder."""
    values: dict[str, Any] = {
        "name": "small",
        "space": SPACE,
        "task": "digits",
        "recipe": {"epochs": 2},
        "proposers": ["uniform", "random"],
        "budgets": [0.1, 0.3],
        "objectives": ["accuracy", "macs"],
        "trials": 7,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints; it must succeed."""
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out
