"""Width vectors in files that a study names, and networks that Torch-Pruning has pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from strategies import refused
from torch import Tensor, nn

from widthsearch.api import Study
from widthsearch.errors import WidthsError
from widthsearch.report.tables import origin_text
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.safe_yaml import load_yaml
from widthsearch.widths import Widths


def saved(path: Path, *vector: int) -> str:
    """A file of widths of the tiny space."""
    tiny.space().save_widths(path, Widths(tiny.space().names, vector))
    return str(path)


def test_given_widths_come_after_the_base(tmp_path: Path) -> None:
    """Each with its file as the origin, off the grid too; then baselines and proposals."""
    files = [saved(tmp_path / "half.json", 4, 4), saved(tmp_path / "odd.json", 5, 15)]
    study = tiny.study(tmp_path / "study", widths=files, trials=5)
    tiny.run(study, trials=2)
    tiny.run(study)
    base, half, odd, *others = study.trials()
    assert base.origin == {"base": True}
    assert (half.widths.vector, half.origin) == ((4, 4), {"given": files[0]})
    assert (odd.widths.vector, origin_text(odd.origin)) == ((5, 15), "odd.json")
    assert all("proposer" in trial.origin for trial in others)


def test_a_study_searches_on_from_widths_off_the_grid(tmp_path: Path) -> None:
    """They are observations like any other; a suggestion is on the grid."""
    files = [saved(tmp_path / f"{n}.json", n, n) for n in (3, 5, 7, 9)]
    study = tiny.study(tmp_path / "study", widths=files, baselines=0, proposers=[], trials=14)
    tiny.run(study)
    found = [trial for trial in study.trials() if "sampler" in trial.origin]
    assert len(found) == 9
    assert all(tiny.space().widths(dict(trial.widths)) == trial.widths for trial in found)


def test_given_widths_are_of_the_studys_space(tmp_path: Path) -> None:
    """Else one line with the file; of several spaces, each file is of the one that it names."""
    file = saved(tmp_path / "half.json", 4, 4)
    other = tiny.space("other")
    with refused(WidthsError, f"but {file!r} is of 'tiny' (2 axes) and", whole=False):
        tiny.run(tiny.study(tmp_path / "alone", other, widths=[file]))
    assert not (tmp_path / "alone").exists()
    both = tiny.study(tmp_path / "both", [other, tiny.space()], widths=[file], trials=3)
    tiny.run(both)
    assert [trial.space for trial in both.trials()] == ["other", "tiny", "tiny"]


def test_given_widths_outside_of_the_limits_are_left_out(tmp_path: Path) -> None:
    """As all other networks; a message names the file."""
    file = saved(tmp_path / "wide.json", 16, 16)
    study = tiny.study(tmp_path / "study", widths=[file], limits={"macs": [0, 1e4]}, trials=3)
    messages = [each.message for each in tiny.run(study)]
    assert f"the widths in {file} are left out: their costs are outside the limits (macs [0, " in (
        "\n".join(messages)
    )
    assert all(trial.widths.vector != (16, 16) for trial in study.trials())


def test_given_widths_above_the_bounds_are_trained_knowingly(tmp_path: Path) -> None:
    """They are refused before anything is written; the way out works as it is written."""
    file = saved(tmp_path / "wide.json", 4, 1001)
    study = tiny.study(tmp_path / "study", widths=[file])
    message = r"1001 channels of axis 'second', whose bound is 16: leave the file out, or raise"
    with pytest.raises(WidthsError, match=message) as caught:
        tiny.run(study)
    assert not (tmp_path / "study").exists()
    raised = load_yaml(str(caught.value).split("`")[1])
    assert raised == {"constraints": {"max": {"second": 1002}}}
    study = tiny.study(tmp_path / "study", widths=[file], **raised)
    tiny.run(study, trials=2)
    assert study.trials()[1].widths.vector == (4, 1001)


def test_widths_that_a_complete_study_is_given_need_trials(tmp_path: Path) -> None:
    """A line says so, with a number that suffices; hours that are over are named as well."""
    tiny.run(tiny.study(tmp_path / "study", trials=3, hours=9))
    files = [saved(tmp_path / f"{n}.json", n, n) for n in (3, 5, 8)]  # the last one is the base
    late = "the study does not train the widths in"
    few = "trials are too few; set `trials: 5` or more"

    def warned(**changes: Any) -> tuple[Study, list[str]]:
        study = tiny.study(tmp_path / "study", widths=files, **{"hours": 9, **changes})
        progress = tiny.run(study)
        return study, [each.message for each in progress if each.level == "warning"]

    assert warned(trials=3)[1] == [f"{late} {files[0]}, {files[1]}: its 3 {few}"]
    (line,) = warned(trials=5, hours=1e-9)[1]
    assert line.endswith(f"{files[1]}: its 1e-09 hours are over; give it more `hours`")
    some, lines = warned(trials=4)
    assert lines == [f"{late} {files[1]}: its 4 {few}"]
    assert some.trials()[3].widths.vector == (3, 3)
    whole, lines = warned(trials=5)
    assert not lines
    assert whole.trials()[4].origin == {"given": files[1]}


def test_given_widths_need_a_trial_for_each_start(tmp_path: Path) -> None:
    """Two of each network."""
    torch.save(tiny.space().build(tiny.space().base).state_dict(), tmp_path / "base.pt")
    starts = {"start": ["scratch", "extract"], "weights": str(tmp_path / "base.pt")}
    tiny.run(tiny.study(tmp_path / "study", trials=4, **starts))
    file = saved(tmp_path / "odd.json", 3, 5)
    study = tiny.study(tmp_path / "study", trials=4, widths=[file], **starts)
    (line,) = [each.message for each in tiny.run(study) if each.level == "warning"]
    assert line.endswith("its 4 trials are too few; set `trials: 6` or more")
    study = tiny.study(tmp_path / "study", trials=6, widths=[file], **starts)
    tiny.run(study)
    assert [t.widths.vector for t in study.trials()[4:]] == [(3, 5), (3, 5)]


class Residual(nn.Module):
    """A stem, and a residual block with batch norm, for the tiny task."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 4) to (N, 4)."""
        x = self.stem(x).relu()
        x = (x + self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.fc(x.mean((2, 3)))


def pruned(network: Any, x: torch.Tensor) -> dict[str, list[int]]:
    """Prune half of a network's channels by Torch-Pruning; returns those that it has kept."""
    prune = pytest.importorskip("torch_pruning", reason="needs torch-pruning, a test extra")
    axes = {network.stem: "stem", network.conv1: "conv1"}
    pruner = prune.pruner.MetaPruner(
        network,
        x,
        importance=prune.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[network.fc],
    )
    keep: dict[str, list[int]] = {}
    for group in pruner.step(interactive=True):
        for dependency, gone in group:
            layer = dependency.target.module
            if layer in axes and dependency.handler == prune.prune_conv_out_channels:
                keep[axes[layer]] = sorted(set(range(layer.out_channels)) - set(gone))
        group.prune()
    return keep


def test_a_network_that_torch_pruning_has_pruned_joins_a_study(tmp_path: Path) -> None:
    """Its widths are read, extraction of its channels gives its outputs, and a study trains it."""
    space = SearchSpace.from_model(Residual, (1, 4, 4))
    network, x = space.build(space.base, seed=0).eval(), torch.randn(8, 1, 4, 4)
    other: Any = space.build(space.base, seed=0).eval()
    keep = pruned(other, x)
    widths = space.widths_of(other)
    assert dict(widths) == {name: len(kept) for name, kept in keep.items()}
    assert dict(widths) == {"stem": 8, "conv1": 16}
    with torch.no_grad():
        expected = other(x)
        assert torch.equal(space.extract(network, keep)(x), expected)
        assert not torch.allclose(network(x), expected, rtol=1e-3)
    space.save_widths(tmp_path / "pruned.json", widths)
    study = tiny.study(tmp_path / "study", space, widths=[str(tmp_path / "pruned.json")], trials=2)
    with study.search() as search:
        assert tiny.ask(search).origin == {"base": True}
        assert tiny.ask(search).widths == widths
