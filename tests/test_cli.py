"""The command line: its output, and its errors."""

from __future__ import annotations

import csv
import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import ROOT, SPACE, CommandLine, small, study_file
from digits import digits
from refusals import refusals
from strategies import refused

import widthsearch
from widthsearch import cli
from widthsearch.api import Study
from widthsearch.bayesopt import pareto
from widthsearch.errors import WidthsearchError
from widthsearch.proposers import BASELINES
from widthsearch.space.loading import load_space
from widthsearch.training.trainer import evaluate
from widthsearch.widths import Widths


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that holds one study that is done, with made-up accuracies."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.run(small(folder))
    return folder / "runs"


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """A copy of these runs, to write into."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def test_space_shows_axes_shares_and_reasons(command: CommandLine) -> None:
    """Every axis with its grid and its share of MACs; every pinned width with its reason."""
    out = command("space", "torchvision:resnet18", "--input", "3x64x64")
    assert "torchvision:resnet18: 12 axes, input 3×64×64" in out
    assert "layer4.1.conv1" in out
    assert "input of the model" in out
    assert "output of the model" in out
    assert "MACs (" in out


def test_names_of_axes_are_whole_where_no_terminal_is(command: CommandLine) -> None:
    """They are what constraints name."""
    out = command("space", "torchvision:mobilenet_v3_small", "--input", "3x64x64")
    space = load_space("torchvision:mobilenet_v3_small", (3, 64, 64))
    assert set(space.names) <= set(out.replace("│", " ").split())
    assert "…" not in out.replace(", …", "")


def test_space_as_json(command: CommandLine) -> None:
    """The same as data."""
    content = command.json("space", SPACE)
    assert content["macs"] == 763520
    assert [axis["name"] for axis in content["axes"]][:2] == ["conv1", "block1.conv1"]
    assert 0 < content["axes"][0]["share_of_macs"] < 1
    assert content["pinned"][0]["reason"] == "output of the model"


def test_space_shows_what_stays_at_the_base(command: CommandLine, tmp_path: Path) -> None:
    """A module given as an object keeps a number that its own constructor computes anew."""
    file = tmp_path / "scaled.py"
    file.write_text(
        "from torch import nn\nfrom widthsearch import SearchSpace\n\n\n"
        "class Scaled(nn.Sequential):\n"
        "    def __init__(self, width=16):\n"
        "        super().__init__(nn.Linear(8, width), nn.Linear(width, 4))\n"
        "        self.scale = width**-0.5\n\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * self.scale\n\n\n"
        "def given():\n    return SearchSpace.from_model(Scaled(), (8,))\n\n\n"
        "def constructed():\n    return SearchSpace.from_model(Scaled, (8,))\n"
    )
    line = "'scale' of Scaled (scaled.py:8) stays at the base's 0.25"
    assert f"kept from the base: {line}" in command("space", f"{file}:given")
    assert command.json("space", f"{file}:given")["leftovers"] == [line]
    assert command.json("space", f"{file}:constructed")["leftovers"] == []


def test_space_is_proved_on_demand(command: CommandLine) -> None:
    """Networks are built and run, and their counts compared."""
    out = command("space", SPACE, "--check", "--device", "meta")
    assert "checked: 5 networks (narrowest, widest, random 1, random 2, random 3)" in out


def test_space_shows_what_a_widths_file_costs(command: CommandLine, tmp_path: Path) -> None:
    """A file that a person may have edited."""
    path = tmp_path / "widths.json"
    load_space(SPACE).save_widths(path, 0.5)
    asked = ("space", SPACE, "--widths", path)
    assert f"{path}: 193k MACs (0.253 of the base), 19.8k parameters (0.255)" in command(*asked)
    content = command.json(*asked)
    assert content["cost"]["macs"] == 193344
    assert content["widths"]["conv1"] == 8
    assert content["on_grid"]
    path.write_text(path.read_text().replace('"conv1": 8', '"conv1": 0'))
    assert "axis 'conv1' takes 1 channel or more, but was given 0" in command.refusal(*asked)


def test_widths_off_the_grid_are_read_with_a_line(command: CommandLine, tmp_path: Path) -> None:
    """Whatever was written is read: widths of a pruned network, or of bounds that were wider."""
    space, path = load_space(SPACE), tmp_path / "widths.json"
    for first, reason in ((7, "takes multiples of 2"), (1000, "takes 2 to 24 channels")):
        vector = (first, *space.base.vector[1:])
        space.save_widths(path, Widths(space.names, vector))
        asked = ("space", SPACE, "--widths", path)
        printed = command(*asked)
        assert f"{path} is off the grid that a search stays on: axis 'conv1' {reason}" in printed
        content = command.json(*asked)
        assert not content["on_grid"]
        assert content["widths"]["conv1"] == first
        assert content["cost"]["macs"] == int(space.macs(vector))


def test_a_study_searches_its_constrained_space(command: CommandLine, tmp_path: Path) -> None:
    """Pinned and bounded from YAML; pins are kept; the trained folder loads without the study."""
    constraints = {"pin": ["block2.*"], "tie": ["block3.*"], "max": {"conv1": 16}}
    study = small(tmp_path, constraints=constraints, trials=3, budgets=[0.8])
    content = command.json("space", tmp_path / "small.yaml")
    assert [(a["name"], a["max_width"]) for a in content["axes"]] == [
        *(("conv1", 16), ("block1.conv1", 24), ("block3.conv1", 96))
    ]
    tiny.run(study)
    trial = study.front()[0]
    assert list(trial.widths) == ["conv1", "block1.conv1", "block3.conv1"]
    widthsearch.train(study, trial, seeds=1, epochs=1, folder=tmp_path / "trained")
    net = widthsearch.load(tmp_path / "trained", SPACE)
    assert net.block3.conv2.out_channels == trial.widths["block3.conv1"]
    with pytest.raises(widthsearch.WidthsearchError, match="keeps its space"):
        tiny.run(small(tmp_path))


def test_pareto_prints_the_front_and_the_baseline(command: CommandLine, runs: Path) -> None:
    """Tables, widths and the hypervolume of both; front.json is written, a picture is not."""
    out = command("pareto", "small", "--runs", runs)
    assert "front of small" in out
    assert re.search("best of uniform.* widths and the base", out)
    assert "by id, in the order conv1, block1.conv1" in out
    assert "7 trials: 7 finished" in out
    assert not (runs / "small" / "front.png").exists()
    assert json.loads((runs / "small" / "front.json").read_text())["study"] == "small"


def test_pareto_draws_the_front_on_request(
    command: CommandLine, copied: Path, tmp_path: Path
) -> None:
    """Into the study's folder, or the file that is named."""
    for picture, file in (
        (copied / "small" / "front.png", ()),
        (tmp_path / "a.png", (tmp_path / "a.png",)),
    ):
        out = command("pareto", "small", "--runs", copied, "--plot", *file)
        assert f"written: {picture}" in out
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_pareto_prints_where_it_cannot_write(command: CommandLine, copied: Path) -> None:
    """And says why, also beside JSON."""
    file = copied / "small" / "front.json"
    file.unlink(missing_ok=True)
    file.mkdir()
    out = command("pareto", "small", "--runs", copied)
    assert "front of small" in out
    assert f"not written: {file}: Is a directory" in out
    assert cli.main(["pareto", "small", "--json", "--runs", str(copied)]) == 0
    captured = command.capsys.readouterr()
    assert json.loads(captured.out)["front"]
    assert f"not written: {file}" in captured.err


def test_pareto_of_nothing_is_a_line(command: CommandLine, tmp_path: Path) -> None:
    """No empty tables."""
    with small(tmp_path).search() as search:
        search.fail(tiny.ask(search).number, "out of luck")
    asked = ("pareto", "small", "--runs", tmp_path / "runs")
    first, second = command(*asked).splitlines()
    assert first.startswith(
        "No trial of small has finished yet, so there is no front. 1 trial: 1 f"
    )
    assert second.startswith("written: ")
    assert cli.main([*map(str, asked), "--plot"]) == 2
    assert "no trial of 'small' has finished" in command.capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_pareto_as_json_and_csv(command: CommandLine, runs: Path) -> None:
    """The promised keys; the front is non-dominated; base and baselines are named.

    The CSV agrees with it: one row a member, one column an axis.
    """
    content = command.json("pareto", "small", "--runs", runs)
    keys = {"id", "widths", "accuracy", "estimated", "macs", "params", "latency_ms", "origin"}
    assert content["front"]
    for member in [*content["front"], content["base"], *content["baselines"]]:
        assert keys <= set(member)
    points = [[-m["accuracy"], m["macs"]] for m in content["front"]]
    assert pareto.non_dominated(points).all()
    assert content["base"]["origin"] == {"base": True}
    *others, widest = [m["origin"] for m in content["baselines"]]  # fewest MACs first
    assert widest == {"base": True}
    assert {origin["proposer"] for origin in others} <= set(BASELINES)
    assert isinstance(content["gains"], list)
    lines = command("pareto", "small", "--csv", "--runs", runs).splitlines()
    assert "estimated,interval_low,interval_high,trainings" in lines[0]
    assert "latency_ms,latency_ratio," in lines[0]
    rows = csv.DictReader(lines)
    assert [(int(row["id"]), int(row["block3.conv2"])) for row in rows] == [
        (m["id"], m["widths"]["block3.conv2"]) for m in content["front"]
    ]


def test_train_writes_a_folder_that_loads(command: CommandLine, runs: Path, tmp_path: Path) -> None:
    """Widths, weights and a card; the loaded network is the trained one."""
    asked = ("train", "small", "--pick", "macs<=2e5", "--seeds", 2, "--epochs", 1)
    out = command(*asked, "--runs", runs, "--out", tmp_path)
    assert "pick of small" in out
    assert " base " in out
    assert "network 2/2, epoch 1: loss " in out
    assert ", accuracy on training images " in out
    assert re.search(
        r"test accuracy \d+\.\d\d ± \d+\.\d\d%, mean ± standard deviation of 2 seeds", out
    )
    assert "--base trains it alike" in out
    card = json.loads((tmp_path / "card.json").read_text())
    content = json.loads((tmp_path / "widths.json").read_text())
    net = widthsearch.load(tmp_path, SPACE)
    assert not net.training
    assert net.conv1.out_channels == content["widths"]["conv1"]
    assert sum(p.numel() for p in net.parameters()) == card["params"]
    assert card["recipe"]["epochs"] == 1
    assert len(card["test_accuracy"]["by_seed"]) == 2
    again = command(*asked, "--runs", runs, "--out", tmp_path)
    assert f"complete: nothing is left to train; remove {tmp_path} to" in again
    assert out.splitlines()[-1] == again.splitlines()[-1]
    accuracy = evaluate(net, digits(), "test", precision=card["recipe"]["precision"])
    assert accuracy == pytest.approx(card["test_accuracy"]["of_weights"])


def test_train_with_one_seed(command: CommandLine, runs: Path, tmp_path: Path) -> None:
    """There is no spread, and the base alone stands in the table when it is the pick."""
    asked = ("train", "small", "--pick", 0, "--seeds", 1, "--epochs", 1)
    out = command(*asked, "--runs", runs, "--out", tmp_path / "picked")
    assert re.search(r"test accuracy \d+\.\d\d%, of one seed\n", out)
    assert out.count(" base ") == 1
    assert "--base" not in out


def test_train_compares_with_a_base_that_is_trained_alike(
    command: CommandLine, runs: Path, tmp_path: Path
) -> None:
    """With the same seeds and epochs; the card keeps its figures, the folder no file of it."""
    asked = ("train", "small", "--pick", "macs<=2e5", "--seeds", 1, "--epochs", 1, "--base")
    out = command(*asked, "--no-program", "--runs", runs, "--out", tmp_path)
    assert "base network 1/1, epoch 1: loss " in out
    card = json.loads((tmp_path / "card.json").read_text())
    alike = card["base_trained_alike"]
    assert alike["by_seed"].keys() == card["test_accuracy"]["by_seed"].keys()
    assert f"the base, trained alike: {alike['mean']:.2f}%" in out
    assert {path.name for path in tmp_path.iterdir()} == {"widths.json", "weights.pt", "card.json"}


def test_loading_says_what_is_missing_or_does_not_fit(runs: Path, tmp_path: Path) -> None:
    """A folder, a file of it, or the tensor of another shape, whose name torch has in line two."""
    for folder in (tmp_path / "none", Path(__file__)):
        with refused(WidthsearchError, f"no folder {str(folder)!r} (looked in ", whole=False):
            widthsearch.load(folder)
    with refused(WidthsearchError, "give one that `widthsearch train` wrote, or", whole=False):
        widthsearch.load(tmp_path)
    study = Study.load("small", runs)
    widthsearch.train(study, study.front()[0], seeds=1, epochs=1, folder=tmp_path, program=False)
    file = tmp_path / "weights.pt"
    state = torch.load(file)
    for name, changed, reason in (
        ("fc.bias", torch.zeros(3), "size mismatch for fc.bias: copying a param with shape torch"),
        ("other", torch.zeros(3), 'Unexpected key(s) in state_dict: "other"; give the space that'),
    ):
        torch.save({**state, name: changed}, file)
        with refused(WidthsearchError, f"state_dict for DigitsResNet: {reason}", whole=False):
            widthsearch.load(tmp_path, SPACE)


def test_loading_refuses_another_space_and_other_weights(runs: Path, tmp_path: Path) -> None:
    """The message says what differs; a weights file that holds code is not run."""
    study = Study.load("small", runs)
    widthsearch.train(study, study.front()[0], seeds=1, epochs=1, folder=tmp_path)
    with pytest.raises(widthsearch.WidthsearchError) as error:
        widthsearch.load(tmp_path, tiny.space())
    message = str(error.value)
    assert "is of 'digits_resnet' (6 axes) and the space given is 'tiny' (2 axes)" in message
    assert "it has no axis 'conv1'" in message
    torch.save({"conv1.weight": print}, tmp_path / "weights.pt")
    with pytest.raises(widthsearch.WidthsearchError, match="cannot be loaded"):
        widthsearch.load(tmp_path, SPACE)
    (tmp_path / "weights.pt").write_bytes(b"nonsense")
    with pytest.raises(widthsearch.WidthsearchError, match="cannot be loaded"):
        widthsearch.load(tmp_path, SPACE)
    content = json.loads((tmp_path / "widths.json").read_text())
    content["widths"]["conv1"] = 0
    (tmp_path / "widths.json").write_text(json.dumps(content))
    with pytest.raises(
        widthsearch.WidthsearchError, match="axis 'conv1' takes 1 channel or more, but"
    ):
        widthsearch.load(tmp_path, SPACE)


@refusals("run")
def test_bad_input_is_one_line_and_exit_code_2(
    values: dict[str, Any], message: str, command: CommandLine, tmp_path: Path
) -> None:
    """The culprit by name, no traceback."""
    file = study_file(tmp_path, **values)
    assert message in command.refusal("run", file, "--runs", tmp_path / "runs")


@refusals("command")
def test_bad_arguments_are_one_line_too(
    values: str, message: str, command: CommandLine, runs: Path
) -> None:
    """Every command refuses alike."""
    where = [] if values.startswith("space") else ["--runs", runs]
    assert message in command.refusal(*values.split(), *where)


@pytest.mark.parametrize(
    "arguments",
    [["spaec"], ["space", "x:y", "--input", "3,4"], [], ["pareto", "x", "--json", "--csv"]],
)
def test_a_bad_command_line_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse's own errors as well."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_names_the_command_that_resumes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    """Exit code 130, and the command to type."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "run", interrupted)
    assert cli.main(["run", "small", "--runs", str(runs)]) == 130
    assert "resume with: widthsearch run small" in capsys.readouterr().err


def test_a_run_without_a_front_names_no_training(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where no trial is within the limits there is nothing to pick."""
    monkeypatch.setattr(Study, "run", lambda study, *_, **__: tiny.run(study, lambda *_: 50.0))
    for limit, hint in ((99, False), (5, True)):
        limits = {"accuracy": [limit, None]}
        file = study_file(tmp_path, name=f"of{limit}", trials=2, limits=limits)
        printed = command("run", file, "--runs", tmp_path / "runs")
        assert ("next: widthsearch train" in printed) == hint
        assert ("within the limits: train more, or change `limits`" in printed) != hint


def test_every_command_is_in_the_readme() -> None:
    """With each of its options."""
    readme = (ROOT / "README.md").read_text()
    parser = cli._parser()
    (commands,) = [a.choices for a in parser._actions if a.dest == "command" or a.choices]
    assert commands
    for name, command in commands.items():
        assert f"`widthsearch {name}" in readme
        assert command.description
        for action in command._actions:
            assert action.help
            if action.option_strings and action.dest not in ("help", "runs"):
                assert action.option_strings[0] in readme
        rows = re.findall(rf"^\| `widthsearch {name} (.*?)` \|", readme, re.MULTILINE)
        shown = [set(re.findall(r"--[a-z-]+", row)) for row in rows]
        known = {action.option_strings[0] for action in command._actions if action.option_strings}
        assert set().union(*shown) <= known
        assert not any(a <= b for i, a in enumerate(shown) for b in shown[:i] + shown[i + 1 :])


def test_the_package_runs_as_a_module() -> None:
    """As the command does."""
    asked = [sys.executable, "-m", "widthsearch", "--version"]
    done = subprocess.run(asked, check=True, capture_output=True, text=True)
    assert done.stdout == f"widthsearch {widthsearch.__version__}\n"


def test_public_names_are_there() -> None:
    """__all__ is what the package gives, and dir() shows it."""
    for name in widthsearch.__all__:
        assert getattr(widthsearch, name) is not None
    assert dir(widthsearch) == sorted(widthsearch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = widthsearch.nonsense


def test_networks_that_cost_something_else_are_another_space(
    command: CommandLine, tmp_path: Path
) -> None:
    """The same axes do not make the same networks."""
    code = (
        "from torch import nn\nfrom widthsearch import SearchSpace\n"
        "def tiny():\n"
        "    return SearchSpace.from_model(\n"
        "        lambda: nn.Sequential(nn.Conv2d(1, 8, K, padding=K // 2),"
        " nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)), (1, 8, 8), name='t')\n"
    )
    space = tmp_path / "space.py"
    space.write_text("K = 3\n" + code)
    tiny.run(small(tmp_path, space=f"{space}:tiny", trials=2, budgets=[0.5]))
    space.write_text("K = 5\n" + code)
    error = command.refusal("run", tmp_path / "small.yaml", "--runs", tmp_path / "runs")
    assert "'small' was begun with 't' (1 axes, 4,688 MACs) and is now" in error


def test_a_function_that_raises_is_one_line(command: CommandLine, tmp_path: Path) -> None:
    """Of a space or of a task."""
    (tmp_path / "boom.py").write_text("def boom():\n    raise FileNotFoundError('no data')\n")
    boom = f"{tmp_path / 'boom.py'}:boom"
    file = study_file(tmp_path, task=boom)
    for asked in (("space", boom), ("run", file, "--runs", tmp_path / "runs")):
        error = command.refusal(*asked)
        assert "boom:boom" in error or "failed: FileNotFoundError: no data" in error


@pytest.mark.ray
def test_confirm_trains_the_front_again(
    shared_ray: None, command: CommandLine, copied: Path
) -> None:
    """And prints it with how often each was trained."""
    out = command("confirm", "small", "--seeds", 2, "--runs", copied)
    assert "front of small" in out
    assert any("confirms" in trial.origin for trial in Study.load("small", copied).trials())
    assert "(2×)" in out
    refused = command.refusal("confirm", "small", "--seeds", 1, "--runs", copied)
    assert "`seeds >= 2` must hold" in refused


def test_a_full_disk_is_one_line(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a command meets it; faults of the code have a traceback."""

    def full(options: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr("widthsearch.commands.pareto", full)
    assert command.refusal("pareto", "small") == (
        "error: [Errno 28] No space left on device: '/somewhere'; fix this and run again\n"
    )


def test_a_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beside the runs may have a study's name, and its YAML; as a path it is itself."""
    monkeypatch.chdir(tmp_path)
    for folder in (Path("tiny"), Path("runs/tiny")):
        folder.mkdir(parents=True)
        (folder / "study.yaml").write_text("{name: tiny, trials: 3}")
    found = [Study.load(of).folder for of in ("tiny", "./tiny", "tiny/", Path("tiny"))]
    assert found == [Path("runs/tiny"), *[Path("tiny")] * 3]
