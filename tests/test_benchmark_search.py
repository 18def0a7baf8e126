"""The search benchmark: the score by hand, any table, what it prints."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.search import Filling, Table, run, runs

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
    assert table.score([0, 1, 2, 3], [51, 70, 62, 80])["volume"] == pytest.approx(1.0)
    half = (62 - 51) * 0.5 / full
    assert table.score([0, 1, 2], [51, 60, 65])["volume"] == pytest.approx(half)
    assert table.score([2], [0.0])["volume"] == pytest.approx(half)
    assert table.score([0, 3], [51, 80])["volume"] == 0


def test_points_are_over_uniform_widths_of_equal_macs(by_hand: Path) -> None:
    """Uniform are the narrowest and the widest network, 51 and 80, and between them 65.5."""
    table = Table.read(by_hand)
    assert table.uniform.tolist() == pytest.approx([51, 65.5, 65.5, 80])
    assert table.score([0, 1, 3], [51, 70, 80])["points"] == pytest.approx((0 + 4.5 + 0) / 3)
    assert table.score([0, 1, 2, 3], [51, 60, 65, 80])["points"] == pytest.approx(-3.5 / 3)


def test_fillings_take_a_network_of_each_slice_of_macs(tmp_path: Path) -> None:
    """Uniform has the nearest to a multiple of the widest, balanced the greatest Σ log w."""
    widths = [(4, 8), (8, 4), (2, 32), (8, 16), (1, 1), (16, 16)]
    macs = [100, 110, 120, 990, 10, 1000]
    path = tmp_path / "t.csv"
    lines = [f"{a},{b},{m},{m},50" for (a, b), m in zip(widths, macs, strict=True)]
    path.write_text("\n".join(["width_0,width_1,macs,params,accuracy_0", *lines]))
    table = Table.read(path)
    chosen = {name: Filling(table, name, 0, 4) for name in ("uniform", "balanced")}
    # In slices of 10 to 31.6, 100 to 316, 316 to 1000 MACs; the widest network is (16, 32).
    assert sorted(chosen["uniform"].rows) == [0, 3, 4]
    assert sorted(chosen["balanced"].rows) == [2, 4, 5]
    assert chosen["uniform"].ask() is not None
    assert len(chosen["uniform"].rows) == 2


def test_results_in_the_file_are_not_computed_again(tmp_path: Path) -> None:
    """The missing number of trials is, and joins the file."""
    path, rows = made_up(tmp_path / "t.csv", ([4, 8, 16], [8, 16, 24])), tmp_path / "rows.jsonl"
    table = Table.read(path)
    row = {"table": "t", "sampler": "uniform", "seed": 3, "trials": 2, "scores": {"volume": 7.0}}
    rows.write_text(json.dumps(row) + "\n")
    for _ in range(2):
        (found,) = runs(table, path, "uniform", [3], [2, 4], rows)
        assert found[2] == {"volume": 7.0}
        assert 0 < found[4]["volume"] <= 1
        assert len(rows.read_text().splitlines()) == 2


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
    assert uneven.rows(np.array([[4, 24], [4, 20], [2, 5]])).tolist() == [3, 3, 0]


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
    scores = dict(run(table, "width", 0, (12, 40)))
    assert scores[12]["volume"] < scores[40]["volume"] <= 1
    assert scores[40]["volume"] > 0.9
    assert scores[40]["coverage"] > 0.85
    assert 0 < scores[40]["interval"] <= scores[40]["interval_score"] < scores[12]["interval_score"]
    assert scores == dict(run(table, "width", 0, (12, 40)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # of linear_operator
def test_botorch_finds_the_front_or_says_how_to_install_it(tmp_path: Path) -> None:
    """One line with the command; where it is installed, its first networks are random."""
    table = Table.read(made_up(tmp_path / "t.csv", ([4, 8, 16], [8, 16, 24, 32])))
    if importlib.util.find_spec("botorch") is None:
        with pytest.raises(SystemExit, match=r"python -m pip install 'widthsearch\[benchmark\]'"):
            next(run(table, "botorch", 0, [4]))
        return
    ((_, scores),) = run(table, "botorch", 0, [9])
    assert 0.5 < scores["volume"] <= 1


def test_it_prints_the_table_and_json(tmp_path: Path) -> None:
    """As users call it."""
    path = made_up(tmp_path / "t.csv", ([4, 8, 16], [8, 16, 24, 32]))
    command = [sys.executable, "-m", "benchmarks.search", "--table", str(path), "--runs", "2"]
    command += ["--trials", "3", "10", "--samplers", "width", "uniform", "tpe", "nsga2", "random"]
    table = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    lines = table.stdout.splitlines()
    assert lines[0] == "| sampler | score | 3 trials | 10 trials |"
    cells = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines[2:]]
    assert [score for name, score in cells if name == "WidthSampler"] == [
        "volume",
        "points",
        "coverage",
        "interval",
        "interval_score",
        "seconds",
    ]
    assert [name for name, score in cells if score == "volume"] == [
        "WidthSampler",
        "uniform widths, no search",
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
    assert list(result["samplers"]) == ["width", "uniform", "tpe", "nsga2", "random"]
    for scores in result["samplers"].values():
        assert list(scores) == ["3", "10"]
        volumes = [cell["volume"] for cell in scores.values()]
        assert all(0 <= cell["mean"] <= 1 and cell["std"] >= 0 for cell in volumes)


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
