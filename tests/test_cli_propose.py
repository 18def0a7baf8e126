"""The commands ``propose`` and ``profile``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import SPACE, CommandLine, small, study_file
from refusals import refusals

from widthsearch.latency.profiles import load_profile
from widthsearch.space.loading import load_space


def test_propose_meets_a_share_or_a_number_of_macs(command: CommandLine) -> None:
    """From below, with exact costs."""
    space = load_space(SPACE)
    asked = ("propose", SPACE, "--method", "uniform", "--budget")
    share = command.json(*asked, 0.5)
    assert share["cost"]["macs"] <= 0.5 * share["base"]["macs"]
    assert share["cost"]["macs"] == space.cost(share["widths"]).macs
    absolute = command.json(*asked, share["base"]["macs"] * 0.5)
    assert absolute["widths"] == share["widths"]
    wider = command.json(*asked, 2)
    assert share["base"]["macs"] < wider["cost"]["macs"] <= 2 * share["base"]["macs"]


def test_propose_needs_no_task_for_a_method_without_data(command: CommandLine) -> None:
    """The input's shape is the space's: a task changes nothing."""
    asked = ("propose", SPACE, "--method", "synflow", "--set", "rounds=5", "--budget", 0.5)
    assert command.json(*asked) == command.json(*asked, "--task", "digits")


def test_propose_passes_task_fields_and_seed(command: CommandLine) -> None:
    """The data, a field and the seed arrive in the method."""
    asked = ("propose", SPACE, "--method", "sensitivity", "--budget", 0.4, "--task", "digits")
    asked += ("--set", "batch_size=32", "--seed", 3)
    first = command.json(*asked)
    assert first["proposal"]["provenance"]["batch_size"] == 32
    assert first["proposal"]["provenance"]["seed"] == 3
    assert first == command.json(*asked)


def test_propose_takes_a_studys_space_task_and_recipe(command: CommandLine, tmp_path: Path) -> None:
    """Its constraints too."""
    pinned = next(iter(load_space(SPACE).names))
    file = study_file(tmp_path, constraints={"pin": [pinned]}, seed=5)
    content = command.json("propose", file, "--method", "sensitivity", "--budget", 0.4)
    assert pinned not in content["widths"]
    assert content["proposal"]["provenance"]["seed"] == 5


def test_a_torchvision_model_has_the_classes_of_the_task(
    command: CommandLine, tmp_path: Path
) -> None:
    """Ten outputs in place of ImageNet's thousand, as in a study of that task."""
    file = tmp_path / "images.py"
    file.write_text(
        "import torch\ndef sets():\n"
        "    items = [(torch.full((3, 32, 32), i / 40), i % 10) for i in range(40)]\n"
        "    return items, items[:10]\n"
    )
    space = "torchvision:resnet18"
    asked = ("propose", space, "--input", "3x32x32", "--method", "uniform", "--budget", 0.5)
    content = command.json(*asked, "--task", f"{file}:sets")
    small = load_space(space, (3, 32, 32), 10)
    assert content["base"]["macs"] == small.cost(small.base).macs


@refusals("propose")
def test_propose_refuses_in_one_line(
    values: str, message: str, command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bad input is one line and exit code 2; a method that reads data has not read it then."""
    monkeypatch.setenv("WIDTHSEARCH_CACHE", str(tmp_path))
    asked = ("propose", SPACE, "--budget", 0.5, "--method", *values.split())
    assert message in command.refusal(*asked)


def test_propose_shows_and_writes_widths(command: CommandLine, tmp_path: Path) -> None:
    """Bars in the terminal, a widths file that its space reads; a picture on request only."""
    out, picture = tmp_path / "widths.json", tmp_path / "widths.png"
    asked = ("propose", SPACE, "--method", "random", "--budget", "0.3", "--out", str(out))
    shown = command(*asked)
    space = load_space(SPACE)
    widths = space.load_widths(out)
    assert all(name in shown for name in space.names)
    assert space.cost(widths).macs <= 0.3 * space.cost(space.base).macs
    assert not picture.exists()
    command(*asked, "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_propose_prints_names_that_constraints_accept(command: CommandLine, tmp_path: Path) -> None:
    """The names are the space's also where all of them begin alike."""
    file = tmp_path / "nested.py"
    file.write_text(
        "from torch import nn\nfrom widthsearch import SearchSpace\n\n\n"
        "def nested():\n"
        "    layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))\n"
        "    return SearchSpace.from_model(nn.Sequential(layers), (1, 8, 8))\n"
    )
    asked = ("propose", f"{file}:nested", "--method", "uniform", "--budget", "0.5")
    first = command(*asked).splitlines()[4].split()[0]
    assert load_space(f"{file}:nested").constrained(pin=first).names == ("0.1",)


def test_profile_measures_once_and_prints_where_width_is_free(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call measures nothing anew; a study with that latency finds it."""
    monkeypatch.setenv("WIDTHSEARCH_CACHE", str(tmp_path))
    asked = ("profile", SPACE, "--vectors", "4", "--pairs", "4", "--batch-size", "2")
    first = command(*asked)
    assert "predicted latency" in first
    (file,) = (tmp_path / "latency").iterdir()
    before = json.loads(file.read_text())
    assert len(before["vectors"]) == 4
    command(*asked)
    assert json.loads(file.read_text())["ms"] == before["ms"]
    latency = {"batch_size": 2, "pairs": 40}
    study = small(tmp_path, objectives=["accuracy", "macs", "latency_ms"], latency=latency)
    assert study.config.latency is not None
    assert load_profile(study.space, study.config.latency) is not None
    by_latency = ("--method", "synflow", "--budget", "0.5", "--set", "per=latency")
    advice = f"run `widthsearch profile {SPACE}` first"
    assert advice in command.refusal("propose", SPACE, *by_latency)
    command("propose", tmp_path / "small.yaml", *by_latency)
    command.refusal("profile", SPACE, "--vectors", 0)
    command.refusal("profile", SPACE, "--backend", "fast")
