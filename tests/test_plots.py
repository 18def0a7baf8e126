"""Width bars in a terminal and as a PNG, and the picture of a front."""

from __future__ import annotations

import io
import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from strategies import space_of
from torch import nn

from widthsearch.report import width_bars
from widthsearch.report.console import print_tables
from widthsearch.report.front_plot import draw_front
from widthsearch.space.cost import Cost
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.posterior import MetricPosterior
from widthsearch.widths import Widths


def shown(space: SearchSpace, widths: Widths, width: int = 80) -> list[str]:
    """The lines of a terminal of that width, without the empty ones."""
    console = Console(file=io.StringIO(), width=width)
    print_tables(console, width_bars.width_bars(space, widths))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.strip() for line in text.splitlines() if line.strip()]


@cache
def deep(stages: int) -> SearchSpace:
    """Twelve widths a stage, the last of each narrower."""

    def make() -> nn.Module:
        net = nn.Sequential()
        inputs = 3
        for i in range(stages):
            stage = nn.Sequential()
            for j in range(12):
                outputs = 8 if j == 11 else 16
                stage.add_module(f"layer{j}", nn.Conv2d(inputs, outputs, 1))
                inputs = outputs
            net.add_module(f"stage{i}", stage)
        net.add_module("head", nn.Conv2d(inputs, 10, 1))
        return net

    return SearchSpace.from_model(lambda: nn.Sequential(make()), (3, 4, 4), step=4)


def test_each_axis_has_a_line() -> None:
    """Name, before, after, share kept, bar; the widest fills its room."""
    space = space_of("Residual")
    title, head, _, stem, inner = shown(space, space.widths({"stem": 4}))
    assert title == "Residual: widths"
    assert head.split() == ["axis", "before", "after", "kept", "width"]
    assert stem.split() == ["stem", "16", "4", "25%", "██▊░░░░░░░░"]
    assert inner.split() == ["conv1", "32", "32", "100%", "█" * 22]


def test_wider_than_before_is_marked() -> None:
    """Solid up to the base, and what is new."""
    space = space_of("Residual")
    *_, inner = shown(space, space.widths({"conv1": 64}))
    assert inner.split() == ["conv1", "32", "64", "200%", "█" * 11 + "▓" * 11]


def test_bars_by_hand() -> None:
    """Eighths of a cell; something is always there."""
    assert width_bars.bar(8, 3.5, 8, room=8) == "███▌░░░░"
    assert width_bars.bar(8, 8, 8, room=8) == "████████"
    assert width_bars.bar(4, 8, 8, room=8) == "████▓▓▓▓"
    assert width_bars.bar(8, 1, 800, room=8) == "▏"


@given(st.integers(1, 999), st.integers(1, 999), st.integers(0, 999))
def test_bars_fit(before: int, after: int, more: int) -> None:
    """Never wider than the room, never empty."""
    widest = max(before, after) + more
    assert 1 <= len(width_bars.bar(before, after, widest, room=20)) <= 20


def test_many_axes_share_lines_by_stage() -> None:
    """A stage's axes of one width: how many, the range that is left, the mean share."""
    space = deep(6)
    assert len(space.axes) == 72
    widths = {name: 4 for name in space.names if ".stage1." in name}
    widths["0.stage1.layer0"] = 16
    lines = shown(space, space.widths(widths))
    assert lines[1].split() == ["stage", "axes", "before", "after", "kept", "width"]
    assert len(lines) == 3 + 2 * 6
    assert lines[5].split()[:5] == ["0.stage1.*", "11", "16", "4–16", "32%"]
    assert lines[6].split()[:5] == ["0.stage1.*", "1", "8", "4", "50%"]


@pytest.mark.parametrize("stages", [1, 5, 6])
def test_lines_fit_a_terminal(stages: int) -> None:
    """80 columns, no line broken."""
    space = deep(stages)
    lines = shown(space, space.widths(0.5))
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert len(lines) - 3 == (2 * stages if stages == 6 else 12 * stages)


@pytest.mark.parametrize("width", [44, 80])
def test_names_are_printed_whole(width: int) -> None:
    """A printed name is an axis that constraints accept, in however narrow a terminal."""
    space = deep(5)
    assert [line.split()[0] for line in shown(space, space.base, width)[3:]] == list(space.names)


def test_a_stage_is_printed_as_a_glob_that_constraints_accept() -> None:
    """One line stands for the axes that the glob matches."""
    space = deep(6)
    stage = shown(space, space.base)[5].split()[0]
    assert stage == "0.stage1.*"
    assert len(space.constrained(pin=stage).axes) == 72 - 12


@pytest.mark.parametrize("stages", [1, 4])
def test_the_png_shows_the_widths(stages: int, tmp_path: Path) -> None:
    """Bars or steps: a PNG, the same for the same widths and another for others."""
    space = deep(stages)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, widths in zip(files, (0.5, 0.5, 1.0), strict=True):
        width_bars.save_width_bars(space, space.widths(widths), file)
    half, again, whole = (file.read_bytes() for file in files)
    assert half.startswith(b"\x89PNG\r\n\x1a\n")
    assert half == again
    assert half != whole


def test_a_png_that_cannot_be_written(tmp_path: Path) -> None:
    """Is the system's error, which names the file."""
    space = space_of("Plain")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        width_bars.save_width_bars(space, space.base, tmp_path / "nowhere" / "a.png")


@pytest.mark.parametrize("objectives", [["accuracy", "macs"], ["accuracy", "macs", "params"]])
def test_the_picture_shows_the_front_of_the_study(objectives: list[str], tmp_path: Path) -> None:
    """One panel a cost with the IDs of the front, both baselines, and labels that fit."""
    sizes = {"budgets": [0.1, 0.25, 0.5], "baselines": 0.5}
    study = tiny.study(tmp_path, trials=14, objectives=objectives, **sizes)
    tiny.run(study)
    posterior = study.posterior()
    figure = draw_front(study, posterior)
    front = study.front()
    figure.draw_without_rendering()
    assert len(figure.axes) == len(objectives) - 1
    for axes, cost in zip(figure.axes, objectives[1:], strict=True):
        assert [text.get_text() for text in axes.texts] == [str(t.number) for t in front]
        drawn = {bars.get_label(): bars.lines[0] for bars in axes.containers}
        doubtful = [t for t in front if (posterior[t].dominated or 0.0) > 0.5]
        expected = {
            "uniform, estimated": None,
            "other baselines, estimated": None,
            "front, estimated": [t for t in front if t not in doubtful],
            "front, P(dominated) > ½ (?)": doubtful,
        }
        assert set(drawn) == {name for name, members in expected.items() if members != []}
        for name, line in drawn.items():
            if (members := expected[name]) is not None:
                assert line.get_xydata().tolist() == [
                    [getattr(t.cost, cost), posterior.value(t)] for t in members
                ]
                assert line.get_fillstyle() == ("none" if members is doubtful else "full")
        ticks = axes.xaxis.get_ticklabels(which="both")
        low, high = axes.get_xlim()
        shown = [t for t in ticks if t.get_text() and low <= t.get_position()[0] <= high]
        ends = sorted((t.get_window_extent().x0, t.get_window_extent().x1) for t in shown)
        assert len(ends) >= 2
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(ends))
    label, title = figure.axes[0].yaxis.label, figure._suptitle
    assert title is not None
    assert label.get_window_extent().y1 < title.get_window_extent().y0


def test_the_ids_of_a_crowded_front_can_be_read(tmp_path: Path) -> None:
    """No two cover each other, doubtful members are hollow, the legend covers no panel."""
    study = tiny.study(tmp_path, trials=1)
    vectors = itertools.product(range(2, 17, 2), range(2, 11, 4))
    rng, trials = np.random.default_rng(0), []
    for i, vector in enumerate(vectors):
        cost = Cost(1000 + 20 * i, 1, 1)
        value = 90 + 0.05 * i + 0.3 * rng.normal()
        trials.append(tiny.finished(i, tiny.widths(*vector), value, cost=cost))
    posterior = MetricPosterior(trials, study.spaces, ("accuracy", "macs"))
    figure = draw_front(study, posterior)
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    hollow = [t for t in posterior.front() if (posterior[t].dominated or 0.0) > 0.5]
    drawn = {bars.get_label(): bars.lines[0] for bars in axes.containers}
    assert len(drawn["front, P(dominated) > ½ (?)"].get_xydata()) == len(hollow) > 0
    rooms = [text.get_window_extent() for text in axes.texts]
    assert len(rooms) >= 12
    assert not any(a.overlaps(b) for a, b in itertools.combinations(rooms, 2))
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
