"""The search benchmark: the score by hand, any table, what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.search import Table, run

ROOT = Path(__file__).parents[1]
BY_HAND = """width_0,width_1,macs,params,accuracy_0,accuracy_1
2,4,100,10,50,52
4,4,1000,20,70,
2,8,1000,20,60,64
4,8,10000,40,81,79
"""


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """Four networks; log MACs are 0, ½, ½ and 1; mean accuracies 51, 70, 62, 80."""
    path = tmp_path / "table.csv"
    path.write_text(BY_HAND)
    return path


def test_scores_are_hypervolumes_by_mean_accuracy(by_hand: Path) -> None:
    """Over the lowest mean and the highest MACs; members are chosen by estimated accuracy."""
    table = Table.read(by_hand)
    assert table.mean.tolist() == [51, 70, 62, 80]
    full = (70 - 51) * 0.5  # the narrowest is the lowest, the widest the dearest
    assert table.volume(range(4)) == pytest.approx(full)
    assert table.score([0, 1, 2, 3], [51, 70, 62, 80]) == pytest.approx(1.0)
    assert table.score([0, 1, 2], [51, 60, 65]) == pytest.approx((62 - 51) * 0.5 / full)
    assert table.score([2], [0.0]) == pytest.approx((62 - 51) * 0.5 / full)
    assert table.score([0, 3], [51, 80]) == 0


def test_axes_are_what_the_table_has(by_hand: Path, tmp_path: Path) -> None:
    """Its levels; where they are uneven or rows are missing, a suggestion has a nearest row."""
    table = Table.read(by_hand)
    assert [list(axis.grid) for axis in table.axes] == [[2, 4], [4, 8]]
    assert table.whole
    path = tmp_path / "uneven.csv"
    path.write_text(BY_HAND.replace("4,8,10000", "4,24,10000"))
    uneven = Table.read(path)
    assert list(uneven.axes[1].grid) == [4, 8, 12, 16, 20, 24]
    assert not uneven.whole
    assert uneven.row([4, 24]) == 3
    assert uneven.row([4, 20]) == 3
    assert uneven.row([2, 5]) == 0


def made_up(path: Path, levels: tuple[list[int], ...]) -> Path:
    """A table of a space with noise, three seeds."""
    rng = np.random.default_rng(0)
    widths = np.stack([m.reshape(-1) for m in np.meshgrid(*levels, indexing="ij")], axis=1)
    widths = widths[rng.random(len(widths)) < 0.9]
    macs = 10 * (widths[:, :-1] * widths[:, 1:]).sum(axis=1)
    accuracy = 60 + 4 * np.log(widths).sum(axis=1)[:, None] + rng.normal(0, 0.5, (len(widths), 3))
    names = [f"width_{i}" for i in range(len(levels))]
    header = ",".join([*names, "macs", "params", "accuracy_0", "accuracy_1", "accuracy_2"])
    rows = np.column_stack([widths, macs, macs // 5, accuracy])
    np.savetxt(path, rows, delimiter=",", header=header, comments="", fmt="%.6g")
    return path


def test_more_trials_find_more_of_the_front(tmp_path: Path) -> None:
    """On a table with gaps and uneven levels; the same seed gives the same scores."""
    table = Table.read(made_up(tmp_path / "t.csv", ([4, 6, 8, 16, 32],) * 3))
    scores = run(table, "width", 0, (12, 40))
    assert scores[12] < scores[40] <= 1
    assert scores[40] > 0.9
    assert scores == run(table, "width", 0, (12, 40))


def test_it_prints_the_table_and_json(tmp_path: Path) -> None:
    """As users call it."""
    path = made_up(tmp_path / "t.csv", ([4, 8, 16], [8, 16, 24, 32]))
    command = [sys.executable, "-m", "benchmarks.search", "--table", str(path), "--runs", "2"]
    command += ["--trials", "3", "10", "--samplers", "width", "tpe", "nsga2", "random"]
    table = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    lines = table.stdout.splitlines()
    assert lines[0] == "| sampler | 3 trials | 10 trials | seconds a run |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "WidthSampler",
        "Optuna TPE (multivariate)",
        "Optuna NSGA-II",
        "random",
    ]
    as_json = subprocess.run(
        [*command, "--json"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    result = json.loads(as_json.stdout)
    assert result["full"] == pytest.approx(
        Table.read(path).volume(range(len(Table.read(path).mean)))
    )
    assert list(result["samplers"]) == ["width", "tpe", "nsga2", "random"]
    for cells in result["samplers"].values():
        assert list(cells) == ["3", "10"]
        assert all(0 <= cell["mean"] <= 1 and cell["std"] >= 0 for cell in cells.values())


def test_tables_by_formulas_cost_what_their_networks_do() -> None:
    """One layer of 8 channels on 4 × 4: 3·8·9·16 MACs and 8·10; batch norm has two a channel."""
    macs, params = tables.costs(np.array([[8], [16]]), (4,))
    assert macs.tolist() == [3 * 8 * 9 * 16 + 80, 3 * 16 * 9 * 16 + 160]
    assert params.tolist() == [3 * 8 * 9 + 16 + 80, 3 * 16 * 9 + 32 + 160]


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_tables_by_formulas_are_the_same_every_time(name: str) -> None:
    """Every width vector once, an accuracy a seed, all of it drawn from a fixed seed."""
    widths, sides, accuracy = tables.TABLES[name]()
    assert widths.shape == (len(accuracy), len(sides))
    assert len(np.unique(widths, axis=0)) == len(widths)
    assert accuracy.shape[1] >= 2
    assert 0 < accuracy.min() < accuracy.max() < 110
    assert np.array_equal(tables.TABLES[name]()[2], accuracy)
