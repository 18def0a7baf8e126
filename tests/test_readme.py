"""The README's example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from widthsearch import cli

README = Path(__file__).parent.parent / "README.md"


def blocks(page: Path) -> list[str]:
    """A page's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_proposer_proposes(tmp_path: Path) -> None:
    """A user's own method is found by its file and name."""
    *_, own = blocks(README)
    (tmp_path / "own.py").write_text(own)
    space = f"{README.parent / 'search_spaces' / 'quickstart.py'}:digits_resnet"
    method = f"{tmp_path / 'own.py'}:halves"
    asked = ["propose", space, "--method", method, "--budget", "0.5", "--task", "digits"]
    assert cli.main(asked) == 0


def run(block: str, folder: Path) -> list[str]:
    """The lines that a block prints, as a script in a folder."""
    (folder / "example.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_each_form_of_inputs_is_traced(run_here: Callable[[str], list[str]]) -> None:
    """A tensor, positional and keyword arguments, and a mapping as the one argument."""
    inputs = blocks(README)[2]
    (counts,) = re.findall(r"# (\d+), then (\d+) three times", inputs)
    assert run_here(inputs) == [counts[0], *[counts[1]] * 3]


@pytest.mark.ray
def test_the_own_training_runs(tmp_path: Path) -> None:
    """From the trainer in the script itself to a trained network."""
    (line,) = run(blocks(README)[1], tmp_path)
    assert float(line.split()[0]) < 0.5
    assert (tmp_path / "own" / "card.json").exists()


@pytest.mark.ray
def test_the_python_example_runs(tmp_path: Path) -> None:
    """From a user's own model to a trained network that loads and has learned the task."""
    *front, last = run(blocks(README)[0], tmp_path)[2:]
    accuracy, shape = last.split(maxsplit=1)
    assert float(accuracy) > 90
    assert shape == "torch.Size([1, 10])"
    assert max(float(line.split()[0]) for line in front) > 95
