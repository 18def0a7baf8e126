"""Trained folders: complete or refused, and resumed where training was interrupted."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from widthsearch import export
from widthsearch.api import Study
from widthsearch.data.loaders import DeviceLoader
from widthsearch.errors import StorageError, StudyError, WidthsearchError, WidthsError
from widthsearch.modules.source import source_digest
from widthsearch.space.program import write_program
from widthsearch.space.search_space import SearchSpace
from widthsearch.training import job
from widthsearch.training.recipe import EpochResult
from widthsearch.utils.references import load_function
from widthsearch.widths import Widths


class Silu(tiny.Net):
    """The tensors of the tiny network, and another function of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 4, 4) to (N, 4)."""
        return self.fc(F.silu(self.second(F.silu(self.first(x)))).mean((2, 3)))


def study_of(folder: Path, space: SearchSpace | None = None) -> Study:
    """A study whose base has finished; of a given precision, since a probe goes by the clock."""
    recipe = {"epochs": 4, "batch_size": 32, "precision": "fp32"}
    study = tiny.study(folder / "study", space, recipe=recipe)
    tiny.run(study, trials=1)
    return study


def trained(study: Study, folder: Path, epochs: int = 1, **more: Any) -> list[int]:
    """The epochs that a final training went through."""
    seen: list[int] = []
    more.setdefault("program", False)
    more.setdefault("on_epoch", lambda _number, result: seen.append(result.epoch))
    export.train(study, study.trials()[0], seeds=1, epochs=epochs, folder=folder, **more)
    return seen


def interrupt(_number: int, _result: EpochResult) -> None:
    """What Ctrl-C does after an epoch."""
    raise KeyboardInterrupt


def weights(net: nn.Module) -> torch.Tensor:
    """The first tensor of a network."""
    return next(net.parameters()).detach().clone()


# -- cards -------------------------------------------------------------------------------------

CARDS: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "cannot be read: it is not a mapping"),
    "not JSON": ("{", "cannot be read: Expecting"),
    "no space": ({"space": ...}, "lacks the space's 'reference'; train the pick again"),
    "a space that is none": ({"space": 3}, "lacks the space's 'reference'"),
    "no input": ({"space": {"input": ...}}, "lacks the space's 'input'"),
    "an input that is none": ({"space": {"input": ["a"]}}, "is damaged ("),
    "a reference that is none": ({"space": {"reference": 3}}, "is damaged ("),
    "a reference to nothing": ({"space": {"reference": "no_such.x:y"}}, "cannot be imported"),
    "unknown constraints": ({"space": {"constraints": {"pinn": "x"}}}, "is damaged ("),
    "constraints that break a rule": ({"space": {"constraints": {"step": 0}}}, "`step >= 1` must"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_damaged_card_is_one_line(case: str, tmp_path: Path) -> None:
    """Whatever a person or a full disk made of it."""
    change, message = CARDS[case]
    trained(study_of(tmp_path), tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    card["space"] |= {"reference": "tiny:space", "input": None}
    if isinstance(change, dict):
        for key, value in change.items():
            inner = card[key] | value if isinstance(value, dict) else value
            kept = inner.items() if isinstance(inner, dict) else ()
            card[key] = {k: v for k, v in kept if v is not ...} if kept else inner
        text = json.dumps({k: v for k, v in card.items() if v is not ...})
    else:
        text = change if isinstance(change, str) else json.dumps(change)
    (tmp_path / "card.json").write_text(text)
    given = None if case.startswith("a reference that") else "tiny:space"
    with pytest.raises(WidthsearchError) as error:
        export.load(tmp_path, "no_such.x:y" if "nothing" in case else given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_folder_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the space that is given, or by its reference."""
    study = study_of(tmp_path)
    trained(study, tmp_path)
    with pytest.raises(StudyError, match="without a reference"):
        export.load(tmp_path)
    with pytest.raises(StudyError, match=r"takes a SearchSpace or .* given type 'Net'"):
        export.load(tmp_path, tiny.Net)  # type: ignore[arg-type]
    net = export.load(tmp_path, study.space)
    card = json.loads((tmp_path / "card.json").read_text())
    card["space"]["reference"] = "tiny:space"
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert torch.equal(weights(export.load(tmp_path, "tiny:space")), weights(net))


def test_a_card_says_how_images_are_made_ready(tmp_path: Path) -> None:
    """As training does; classes have names where the task knows them."""
    study = study_of(tmp_path)
    for names in ((), ("ant", "bee", "cat", "dog")):
        task = study.task = replace(study.task, names=names)
        trained(study, tmp_path)
        card = json.loads((tmp_path / "card.json").read_text())
        assert card["classes"] == (list(names) or None)
        how = card["preprocessing"]
        assert how["input_shape"] == list(task.input_shape)
        assert task.test is not None
        ready, _ = DeviceLoader(task.test, task, len(task.test)).plain()
        pixels = torch.from_numpy(task.test.images) / 255
        torch.testing.assert_close(normalize(pixels, how["mean"], how["std"]), ready)


# -- writing -----------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    """Not after it."""
    (tmp_path / "file").write_text("")
    out, seen = tmp_path / "file" / "out", list[int]()
    with pytest.raises(StorageError) as error:
        trained(study_of(tmp_path), out, on_epoch=lambda _n, result: seen.append(result.epoch))
    assert str(error.value) == (
        f"the folder {str(out)!r} must be writable, but {out} is not: "
        f"{os.strerror(errno.ENOTDIR)}; name another folder, or make this one writable"
    )
    assert seen == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the training goes on from the last checkpoint."""
    study, whole = study_of(tmp_path), job.write_checkpoint

    def write(path: Path, run: Any, state: Any) -> None:
        if len(state["curve"]) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(path, run, state)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr(job, "write_checkpoint", write)
        trained(study, tmp_path / "out", epochs=3)
    assert trained(study, tmp_path / "out", epochs=3) == [2, 3]


def test_what_was_there_stays_until_the_new_network_is_trained(tmp_path: Path) -> None:
    """An interrupted retraining leaves the old folder whole."""
    study = study_of(tmp_path)
    trained(study, tmp_path, epochs=1)
    before = weights(export.load(tmp_path, study.space))

    with pytest.raises(KeyboardInterrupt):
        trained(study, tmp_path, epochs=3, on_epoch=interrupt)
    assert torch.equal(weights(export.load(tmp_path, study.space)), before)
    assert json.loads((tmp_path / "card.json").read_text())["recipe"]["epochs"] == 1


def test_an_old_card_never_stands_beside_new_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the files, the folder is refused; the same command completes it."""
    study, write = study_of(tmp_path), export.write_atomically
    trained(study, tmp_path, epochs=1)

    def killed(path: Path, content: Any) -> None:
        if path.name == export.CARD:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "write_atomically", killed)
        trained(study, tmp_path, epochs=2)
    with pytest.raises(StudyError, match=r"must hold widths.json, weights.pt and card.json"):
        export.load(tmp_path, study.space)
    assert trained(study, tmp_path, epochs=2) == []
    assert json.loads((tmp_path / "card.json").read_text())["recipe"]["epochs"] == 2


# -- code --------------------------------------------------------------------------------------


def test_training_goes_on_with_the_same_code_alone(tmp_path: Path) -> None:
    """Another network with tensors of the same names and shapes starts anew."""
    spaces = [
        SearchSpace.from_model(model, (1, 4, 4), name="tiny", min_width=0.25, step=2)
        for model in (Silu, tiny.Net)
    ]
    assert spaces[0].fingerprint == spaces[1].fingerprint
    for space, epochs in zip(spaces, ([2], [1, 2]), strict=True):
        out = tmp_path / str(len(epochs))
        with pytest.raises(KeyboardInterrupt):
            trained(study_of(tmp_path, spaces[0]), out, epochs=2, on_epoch=interrupt)
        assert trained(study_of(out, space), out, epochs=2) == epochs


def test_a_network_outside_of_bounds_that_were_narrowed_later_is_trained(tmp_path: Path) -> None:
    """And loads: bounds limit a search, and change no network."""
    tiny.run(tiny.study(tmp_path / "study"), trials=6)
    narrowed = tiny.space(min_width=0.875)
    study = tiny.study(tmp_path / "study", narrowed)
    outside = next(t for t in study.trials() if min(t.widths.vector) < narrowed.axes[0].min_width)
    export.train(study, outside, seeds=1, epochs=1, folder=tmp_path / "out")
    loaded = export.load(tmp_path / "out", narrowed)
    assert loaded.first.out_channels == outside.widths["first"]
    with pytest.raises(WidthsError, match="axis 'first' takes 1 channel or more, but was given 0"):
        narrowed.build(Widths(narrowed.names, (0, 8)))


def test_a_complete_folder_is_trained_again_for_another_call_alone(tmp_path: Path) -> None:
    """Other epochs, another model of these tensors, or a missing file."""
    study, card = study_of(tmp_path), tmp_path / "card.json"
    assert trained(study, tmp_path) == [1]
    before = card.read_text()
    assert trained(study, tmp_path) == []
    assert card.read_text() == before
    (tmp_path / "weights.pt").unlink()
    assert trained(study, tmp_path) == [1]
    assert trained(study, tmp_path, epochs=2) == [1, 2]
    silu = SearchSpace.from_model(Silu, (1, 4, 4), name="tiny", min_width=0.25, step=2)
    assert trained(study_of(tmp_path / "silu", silu), tmp_path, epochs=2) == [1, 2]


def test_a_complete_folder_keeps_no_checkpoints(tmp_path: Path) -> None:
    """It holds the widths, the weights, the program and the card."""
    study = study_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trained(study, tmp_path / "out", on_epoch=interrupt)
    assert (tmp_path / "out" / "checkpoints").is_dir()
    trained(study, tmp_path / "out", program=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"widths.json", "weights.pt", "card.json", "model.pt2"}


MOVED = """
import sys

import torch

module = torch.export.load("model.pt2").module()
x = torch.load("x.pt", weights_only=True)
assert torch.allclose(module(x), torch.load("y.pt", weights_only=True), atol=1e-5)
assert module(x[:1]).shape == (1, 4)
assert not {"tiny", "widthsearch"} & {*sys.modules}
"""


def test_a_folder_that_moves_runs_without_code(tmp_path: Path) -> None:
    """Its program gives the network's outputs for any batch; nothing in it names a place."""
    study = study_of(tmp_path)
    trained(study, tmp_path / "out", program=True)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["program"] == {"batch": "any", "reason": ""}
    assert [row["epoch"] for row in card["curve"]] == [1]
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    x = torch.randn(3, 1, 4, 4)
    torch.save(x, moved / "x.pt")
    torch.save(export.load(moved, study.space)(x).detach(), moved / "y.pt")
    ran = subprocess.run(
        [sys.executable, "-c", MOVED], cwd=moved, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


NETS = """
from torch import nn
from widthsearch import SearchSpace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.first(x).relu().mean((2, 3)))


def space():
    return SearchSpace.from_model(Net, (1, 4, 4))
"""


def test_a_network_is_of_the_class_that_its_file_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card names the file without its place; the class is the one that ``import`` gives."""
    (tmp_path / "moving_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = tiny.config(space=f"{tmp_path / 'moving_nets.py'}:space", trials=1)
    study = Study(config, task=tiny.task(), folder=tmp_path / "study")
    tiny.run(study)
    trained(study, tmp_path / "out")
    text = (tmp_path / "out" / "card.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["space"]["reference"] == "moving_nets.py:space"
    with pytest.raises(StudyError, match=r"load\(folder, space='moving_nets.py:space'\)"):
        export.load(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    network = export.load("out", "moving_nets.py:space")
    assert type(network) is importlib.import_module("moving_nets").Net
    with pytest.raises(WidthsError, match=r"load\(folder, space=...\) takes the space that it wa"):
        export.load("out", tiny.space())


def test_a_network_that_does_not_export_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the folder is whole, and an old program is gone."""

    def refuse(*given: Any, **named: Any) -> None:
        raise RuntimeError("no such operator\nand more")

    study = study_of(tmp_path)
    trained(study, tmp_path / "out", program=True)
    monkeypatch.setattr(torch.export, "export", refuse)
    trained(study, tmp_path / "out", epochs=2, program=True)
    reason = "RuntimeError: no such operator"
    messages = [each.getMessage() for each in caplog.records if each.name.startswith("widthsearch")]
    assert messages == [f"model.pt2 is not written: torch.export: {reason}"]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["program"] == {"batch": None, "reason": reason}
    assert not (tmp_path / "out" / "model.pt2").exists()
    export.load(tmp_path / "out", study.space)


class Recurrent(nn.Module):
    """A recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 8, batch_first=True)
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, 3) to (N, 1)."""
        return self.last(self.gru(x)[0][:, -1])


def test_a_recurrent_network_exports_without_a_warning(tmp_path: Path) -> None:
    """torch warns of its list of weights; a warning is an error in tests."""
    space = SearchSpace.from_model(Recurrent, (4, 3))
    made = write_program(space, space.build(0.5).eval(), tmp_path / "model.pt2")
    assert (made.batch, made.reason) == ("any", "")


def test_a_card_has_the_studys_estimates_for_the_pick_and_the_base(tmp_path: Path) -> None:
    """The base is None until the study has trained it."""
    study = study_of(tmp_path)
    tiny.run(study, trials=1)
    posterior, (base, pick) = study.posterior(), study.trials()
    export.train(study, pick, seeds=1, epochs=1, folder=tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["macs"] == pick.cost.macs
    assert card["estimated"]["accuracy"] == posterior.value(pick)
    assert card["base"]["macs"] == base.cost.macs != pick.cost.macs
    assert card["base"]["estimated"]["accuracy"] == posterior.value(base)


def test_source_digest_covers_code_alone(tmp_path: Path) -> None:
    """Neither values, seeds nor comments count; None where there is no source."""
    space = tiny.space()
    digest = source_digest(space.build(1.0, seed=0))
    assert digest == source_digest(space.build(0.5, seed=1))
    assert digest not in (None, source_digest(Silu()))
    source = (
        "from torch import nn\n\n\nclass Relu(nn.Module):\n"
        "    def forward(self, x):  # a remark\n        return x.relu()\n"
    )
    digests = []
    for i, text in enumerate(
        (source, source.replace("  # a remark", "\n"), source + "\n    y = 1")
    ):
        file = tmp_path / f"net{i}.py"
        file.write_text(text)
        digests.append(source_digest(load_function(f"{file}:Relu")()))
    assert digests[0] == digests[1] != digests[2]
    moved: dict[str, Any] = {"__name__": "shell"}
    exec(source, moved)
    assert source_digest(moved["Relu"]()) is None
