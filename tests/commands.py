"""What tests of the command line share: a small study, and a command's output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from widthsearch import cli
from widthsearch.api import Study

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


def small(folder: Path, **changes: Any) -> Study:
    """The study of that YAML, among the runs in the same folder."""
    return Study.load(study_file(folder, **changes), folder / "runs")


class CommandLine:
    """Runs commands, and reads what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> str:
        """What a command prints; it must succeed."""
        code = cli.main([*map(str, arguments)])
        captured = self.capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    def json(self, *arguments: object) -> Any:
        """The JSON that a command prints."""
        return json.loads(self(*arguments, "--json"))

    def refusal(self, *arguments: object) -> str:
        """The error of a command that is refused: one line and exit code 2."""
        assert cli.main([*map(str, arguments)]) == 2
        error = self.capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error
