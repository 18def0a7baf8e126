"""The study of tables: expected accuracies, points over uniform widths, and what it prints."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from PIL import Image
from strategies import refused
from torch import nn

from benchmarks import tables
from benchmarks.search import Table
from studies.tables import chains
from studies.tables.accuracies import Expected, Judge, Uniform, rounding
from studies.tables.proposals import Proposals, methods, narrowed, noise, on_table, widened
from studies.tables.run import main
from widthsearch.errors import DataError, SpaceError, StudyError
from widthsearch.proposers import BASELINES, PROPOSERS, Proposal, Setting
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths

ROOT = Path(__file__).parents[1]
TINY = f"{Path(__file__).with_name('tiny.py')}:space"
BASE = np.array([8, 8])


def made(
    widths: Sequence[Sequence[int]], macs: Sequence[int], accuracy: Sequence[Sequence[float]]
) -> Table:
    """A table of these rows."""
    names = tuple(f"width_{a}" for a in range(len(widths[0])))
    array = np.array(macs, np.int64)
    return Table(names, np.array(widths, np.int64), array, array, np.array(accuracy, np.float64))


def tiny_table(trainings: int = 1, noise: float = 0.0) -> Table:
    """All 16 networks of 2, 4, 6 and 8 channels: as accurate as their first axis is wide."""
    widths = tables.grid([[2, 4, 6, 8]] * 2)
    accuracy = 80 + widths[:, :1] + np.random.default_rng(0).normal(0, noise, (16, trainings))
    return made(widths.tolist(), tiny.space().macs(widths).tolist(), accuracy.tolist())


def written(table: Table, path: Path, **changes: str) -> Path:
    """The table as a file; with another name of a column, or another text in its first row."""
    header = [*table.names, "macs", "params"]
    header += [f"accuracy_{s}" for s in range(table.accuracy.shape[1])]
    columns = [*table.widths.T, table.macs, table.params, *table.accuracy.T]
    rows = [list(map(str, row)) for row in zip(*columns, strict=True)]
    for name, text in changes.items():
        if name in header:
            rows[0][header.index(name)] = text
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[changes.get(f"_{n}", n) for n in header], *rows])
    return path


def test_too_few_rows_have_their_mean_as_the_trend() -> None:
    """The example of the module: σ² = 2, v = 1, τ² = 17/3, λ = 0.85."""
    means = np.array([90.0, 92, 94, 96])
    pairs = np.column_stack([means - 1, means + 1])
    expected = Expected.of(made([(2, 2), (2, 4), (4, 2), (4, 4)], [1, 2, 3, 4], pairs.tolist()))
    assert expected.trend == "mean"
    assert expected.noise == pytest.approx(np.ones(4))
    assert expected.spread == pytest.approx(17 / 3)
    assert expected.mean == pytest.approx([90.45, 92.15, 93.85, 95.55])


def test_trainings_without_noise_are_what_they_are() -> None:
    """A missing one takes no part; one training of each row is all noise about the trend."""
    widths, macs = [(2, 2), (2, 4), (4, 2), (4, 4)], [1, 2, 3, 4]
    exact = Expected.of(made(widths, macs, [(1, 1), (5, np.nan), (2, 2), (9, 9)]))
    assert exact.mean.tolist() == [1, 5, 2, 9]
    single = Expected.of(made(widths, macs, [(1,), (5,), (2,), (8,)]))
    assert single.spread == 0
    assert single.mean == pytest.approx([4] * 4)


def cube() -> Table:
    """64 networks of three axes, without accuracies."""
    widths = tables.grid([[2, 4, 6, 8]] * 3)
    return made(widths.tolist(), (widths.prod(axis=1)).tolist(), np.zeros((64, 2)).tolist())


@pytest.mark.parametrize(("beyond", "trend"), [(0.0, "axes"), (3.0, "mean")])
def test_the_trend_predicts_left_out_rows_best(beyond: float, trend: str) -> None:
    """Effects of axes where there are some; only noise has none. Pairs would need 111 rows."""
    table, rng = cube(), np.random.default_rng(0)
    truth = np.log(table.widths).sum(axis=1) if not beyond else rng.normal(0, beyond, 64)
    seen = truth[:, None] + rng.normal(0, 0.1, (64, 2))
    assert Expected.of(replace(table, accuracy=seen)).trend == trend


@pytest.mark.parametrize("beyond", [0.0, 0.05, 0.4])
def test_the_standard_error_is_the_spread_of_the_error(beyond: float) -> None:
    """Over 300 tables with a trend, deviations from it, and noise of their trainings."""
    table, rng = cube(), np.random.default_rng(1)
    rows = np.array([[9, 22, 37, 50]])
    errors, predicted = [], []
    for _ in range(300):
        truth = 3 * np.log(table.widths).sum(axis=1) + rng.normal(0, beyond, 64)
        seen = truth[:, None] + rng.normal(0, 0.2, (64, 2))
        judge = Judge(replace(table, accuracy=seen), np.full(3, 8))
        points = judge.points(rows)
        assert points is not None
        curve = replace(judge.uniform, mean=truth[judge.uniform.rows])
        wanted = (truth[rows[0]] - curve.at(np.log(table.macs[rows[0]]))).mean()
        errors.append(points.gain - wanted)
        predicted.append(points.noise)
    assert np.mean(errors) == pytest.approx(0, abs=3.5 * np.std(errors) / np.sqrt(300))
    ratio = np.sqrt(np.mean(np.square(predicted))) / np.std(errors)
    assert 0.85 < ratio < 1.35  # of 64 rows, what is beyond the trend is known roughly


def by_hand() -> Judge:
    """Uniform widths have 50, and 80 at a hundred times the MACs; others 70 and 62 in between."""
    widths, macs = [(2, 4), (4, 4), (2, 8), (4, 8)], [100, 1000, 1000, 10000]
    return Judge(made(widths, macs, [[50, 50], [70, 70], [62, 62], [80, 80]]), np.array([4, 8]))


def test_points_are_over_uniform_widths_at_equal_macs() -> None:
    """Uniform widths have 65 at 1,000 MACs: a network has 5 points over, another 3 below."""
    judge = by_hand()
    assert judge.uniform.rows.tolist() == [0, 3]
    assert judge.gains == pytest.approx([0, 5, -3, 0])
    points = judge.points(np.array([[1, 2]]))
    assert points is not None
    assert points.gain == pytest.approx(1)
    assert points.by_budget == pytest.approx((5, -3))
    assert (points.noise, points.seeds) == (0, 0)
    assert points.grid == pytest.approx(4)  # √(8² / 2 / 2)
    assert points.se == pytest.approx(4)


def test_seeds_scatter_about_their_mean() -> None:
    """Two seeds with +5 and -3: a standard deviation of 8 / √2, over √2."""
    points = by_hand().points(np.array([[1], [2]]))
    assert points is not None
    assert (points.gain, points.seeds, points.grid) == pytest.approx((1, 4, 0))


def test_rounding_counts_a_repeated_row_once_and_no_trend() -> None:
    """Neighbours that differ by 2 about their mean, and those of a slow trend."""
    assert rounding(np.array([1.0, 1, -1, -1, 1]), np.array([4, 4, 7, 7, 4])) == pytest.approx(
        4 / 2 / 3
    )
    assert rounding(np.linspace(0, 1, 101), np.arange(101)) < 1e-6
    assert rounding(np.ones(3), np.array([2, 2, 2])) == 0


def test_nothing_is_said_beyond_the_uniform_networks() -> None:
    """Such rows have no points, and do not count at their budget."""
    table = by_hand().table
    costly = replace(table, macs=np.array([100, 1000, 20000, 10000]))
    judge = Judge(costly, np.array([4, 8]))
    assert judge.uniform.rows.tolist() == [0, 3]
    assert np.isnan(judge.gains[2])
    points = judge.points(np.array([[1, 2]]))
    assert points is not None
    assert points.gain == pytest.approx(5)
    assert np.isnan(points.by_budget[1])
    assert judge.points(np.array([[2]])) is None


def test_uniform_widths_are_multiples_of_the_base() -> None:
    """Rows of equal MACs are one; a table needs two."""
    table = by_hand().table
    expected = Expected.of(table)
    assert Uniform.of(table, expected, np.array([2, 8])).rows.tolist() == [0, 2, 3]
    with refused(StudyError, "a table must have two networks or more that are multiples", False):
        Uniform.of(replace(table, macs=np.full(4, 5)), expected, np.array([4, 8]))
    with refused(StudyError, "a table must have two networks or more, but has one; add rows"):
        Expected.of(made([(2, 4)], [5], [(1, 2)]))


def test_the_best_is_of_the_networks_between_budgets_and_of_the_methods() -> None:
    """In (500, 1000] MACs the one with 70; above 5,000 that of uniform widths, or a method's."""
    judge = by_hand()
    budgets, none = np.array([1000.0, 10000.0]), np.array([[2, 3]])
    assert judge.best(budgets, none) == pytest.approx([5, 0])
    assert judge.best(budgets, np.array([[2, 1]])) == pytest.approx([5, 5])
    assert judge.best(budgets, none, share=1.0) == pytest.approx([1, 0])
    # Where no network lies between two budgets, it is the nearest below.
    assert judge.best(np.array([2000.0, 2500]), none) == pytest.approx([5, 5])


def test_the_grid_is_that_of_the_table() -> None:
    """Bounds from the levels, steps that they and the base share; MACs are the space's."""
    space = SearchSpace.from_model(
        nn.Sequential(nn.Linear(4, 60), nn.ReLU(), nn.Linear(60, 48), nn.ReLU(), nn.Linear(48, 2)),
        (4,),
    )
    table = made([(20, 24), (40, 36), (20, 36)], [1, 1, 1], [[1, 1]] * 3)
    table = replace(table, macs=space.macs(table.widths) * 49 // 50)
    constrained, own = on_table(space, table)
    assert [(a.min_width, a.max_width, a.step) for a in constrained.axes] == [
        (20, 60, 20),
        (24, 48, 12),
    ]
    assert own.macs.tolist() == space.macs(table.widths).tolist()
    named = replace(table, names=("width_2", "width_0"), widths=table.widths[:, ::-1])
    assert on_table(space, named)[1].widths.tolist() == own.widths.tolist()


def test_tables_of_other_networks_are_refused() -> None:
    """By the number of axes, by the MACs, and by groups of channels; one line each."""
    table = tiny_table()
    with refused(StudyError, "must be the axes of space 'tiny', but it has 3 of them", False):
        on_table(tiny.space(), cube())
    with refused(StudyError, "the table's MACs must be those of space 'tiny', but of", False):
        on_table(tiny.space(), replace(table, macs=2 * table.macs))
    grouped = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 8, 1)
    )
    space = SearchSpace.from_model(grouped, (1, 6, 6))
    odd = made([(3,) * len(space.axes)], [1], [[1.0]])
    with refused(StudyError, "takes multiples of 4, and the table has 3", False):
        on_table(space, odd)


def test_a_narrower_network_has_the_same_grid() -> None:
    """Half of all widths, steps and bounds; a proposal of it is doubled."""
    space = tiny.space().constrained(step=4, min_width=0.5, max_width=1.0)
    small, by = narrowed(space, 2)
    assert by == 2
    assert [(a.base, a.min_width, a.max_width, a.step) for a in small.axes] == [(4, 2, 4, 2)] * 2
    member = Widths(small.names, (4, 2))
    wide = widened(space, Proposal("mine", (member,), {}, profile=member), 2)
    assert (wide.trajectory[0].vector, wide.profile and wide.profile.vector) == ((8, 4), (8, 4))
    assert narrowed(space) == (space, 1)  # it is small already
    with refused(SpaceError, "`--narrow` must divide the steps of all axes, that is 4, but was 3"):
        narrowed(space, 3)


def test_large_networks_are_narrowed_until_they_are_small() -> None:
    """Half of these widths have less than 100 million MACs."""
    net = nn.Sequential(
        *(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 256), (256, 256), (256, 128), (128, 10)))
    )
    space = SearchSpace.from_model(net, (3, 16, 16), min_width=0.5, max_width=1.0, step=64)
    small, by = narrowed(space)
    assert by == 2
    assert small.cost(small.base).macs <= 100e6 < space.cost(space.base).macs


def test_noise_has_classes_in_turn_or_targets_to_regress() -> None:
    """Standard normal inputs from the seed; the loss follows from the output."""
    task = noise(tiny.space(), 64)
    (x,), (again,), (other,) = (task.batches("train", seed) for seed in (0, 0, 1))
    assert x.shape == (64, 1, 4, 4)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert abs(float(x.std()) - 1) < 0.1
    net = tiny.Net()
    classes = torch.arange(64) % 4
    assert task.loss(net, x) == nn.functional.cross_entropy(net(x), classes)
    one = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    assert 0 < task.loss(one, x).item() < 10


def test_every_method_and_baseline_has_its_name() -> None:
    """With its defaults; variants come after it."""
    names = list(methods())
    assert set(PROPOSERS) <= set(names)
    assert names.index("taper") + 1 == names.index("taper -1")


def proposals(space: SearchSpace, table: Table, budgets: Sequence[float]) -> Proposals:
    """Those of two seeds."""
    return Proposals(space, table, budgets, 2, lambda seed: Setting(seed=seed, lowest=0.1))


def test_proposals_are_rows_within_the_budget() -> None:
    """In every family of every method without training; a gap has the nearest row."""
    space, table = on_table(tiny.space(), tiny_table(2))
    budgets = [0.3 * table.macs.max(), 0.6 * table.macs.max()]
    chosen = {n: m for n, m in methods().items() if not getattr(m, "trains", True)}
    skipped: dict[str, str] = {}
    found = dict(proposals(space, table, budgets).rows(chosen, skipped.__setitem__))
    assert not skipped
    assert {"uniform", "synflow", "synflow, copycat", "synflow, power"} <= set(found)
    assert {"sensitivity+synflow, mixture", "balanced, copycat"} <= set(found)
    assert "uniform, copycat" not in found  # its profile is the same at all sizes
    for name, proposed in found.items():
        assert proposed.rows.shape == (50 if name == "random" else 2, 2)
        assert (table.macs[proposed.rows] <= budgets).all()
        assert proposed.exact == 1
    row = int(found["uniform"].rows[0, 1])
    kept = np.arange(16) != row
    fewer = Table(table.names, *(c[kept] for c in columns(table)))
    gap = dict(proposals(space, fewer, budgets).rows({"uniform": chosen["uniform"]}, print))
    assert gap["uniform"].exact < 1
    near = fewer.widths[gap["uniform"].rows[0, 1]]
    assert np.abs(np.log(near / table.widths[row])).sum() <= np.log(2)


def columns(table: Table) -> tuple[NDArray[np.float64], ...]:
    """The arrays of a table."""
    return table.widths, table.macs, table.params, table.accuracy


def test_a_method_that_cannot_propose_is_left_out_with_its_reason() -> None:
    """Without activations naswot has no score."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    space = SearchSpace.from_model(net, (4,), step=2, min_width=0.25, max_width=1.0)
    widths = tables.grid([[2, 4, 6, 8]] * 2)
    table = made(widths.tolist(), space.macs(widths).tolist(), np.ones((16, 1)).tolist())
    skipped: dict[str, str] = {}
    chosen = {name: methods()[name] for name in ("naswot", "uniform")}
    found = dict(proposals(space, table, [80.0]).rows(chosen, skipped.__setitem__))
    assert list(found) == ["uniform"]
    assert skipped["naswot"].startswith("naswot reads the signs of activations")


def test_json_has_every_method_and_the_best(tmp_path: Path) -> None:
    """As users call it: one object on standard output, and nothing else."""
    path = written(tiny_table(2, noise=0.1), tmp_path / "t.csv")
    command = [sys.executable, "-m", "studies.tables.run", "--table", str(path), "--space", TINY]
    command += ["--seeds", "2", "--budgets", "4", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    result = json.loads(done.stdout)
    assert list(result) == ["methods", "best"]
    assert {*BASELINES, "sensitivity", "synflow, power", "naswot"} <= set(result["methods"])
    for value in result["methods"].values():
        assert {"gain", "se"} <= set(value)
        assert value["se"] >= 0
        assert value["gain"] == pytest.approx(np.mean(list(value["by_share"].values())))
        assert result["best"] >= value["gain"] - 1e-9
    assert "fisher is left out: it trains the base network" in done.stderr


def test_the_table_shows_bands_and_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first axis alone counts: to keep it wide is better than uniform widths."""
    path = written(tiny_table(2), tmp_path / "t.csv")
    chosen = ["--methods", "uniform", "taper", "taper 1", "fisher"]
    assert main(["--table", str(path), "--space", TINY, *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines if "|" in line
    }
    assert "2 seeds" not in lines[0]
    assert float(cells["taper"].split()[0]) > 0.3 > -0.3 > float(cells["taper 1"].split()[0])
    assert float(cells["best network"]) >= float(cells["taper"].split()[0])
    assert lines[-1].startswith("left out: fisher: it trains the base network")


def test_methods_that_train_are_judged_with_images_and_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dark and bright images in a folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 4)):
        for label in range(2):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (4, 4, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom widthsearch import SearchSpace\n"
        "def space():\n"
        "    convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8))]\n"
        "    net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.AvgPool2d(4),\n"
        "                        nn.Flatten(), nn.Linear(8, 2))\n"
        "    return SearchSpace.from_model(net, (3, 4, 4))\n"
    )
    reference = f"{tmp_path / 'net.py'}:space"
    space = load_space(reference)
    table = tiny_table()
    table = replace(table, macs=space.macs(table.widths))
    options = ["--table", str(written(table, tmp_path / "t.csv")), "--json", "--seeds", "1"]
    options += ["--space", reference, "--methods", "sensitivity", "taylor"]
    folder = ["--folder", str(tmp_path / "images"), "--images", "64"]
    assert main([*options, *folder, "--epochs", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert {"sensitivity", "taylor", "sensitivity+taylor, mixture"} <= set(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy_0": "nan"}, "'accuracy_0' must be a number, or empty without a training, but"),
        ({"accuracy_0": "good"}, "'accuracy_0' must be a number, or empty without a training, but"),
        ({"width_1": "nan"}, "'width_1' must be a number from 1 on, but line 2 of"),
        ({"macs": ""}, "'macs' must be a number from 1 on, but line 2 of"),
        ({"_macs": "flops"}, "a table must have columns macs*, but"),
        ({"_width_1": "depth"}, "but it has 1 of them and the space 2: first (8), second (8)"),
        ({"macs": "7"}, "the table's MACs must be those of space 'tiny', but of the widths [2, 2]"),
    ],
)
def test_a_wrong_table_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    """On standard error, with exit code 2."""
    path = written(tiny_table(), tmp_path / "t.csv", **changes)
    assert main(["--table", str(path), "--space", TINY, "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "no.csv"], "a table must be a CSV file, but 'no.csv' is not: No such file"),
        (["--table", str(ROOT)], f"but '{ROOT}' is not: Is a directory"),
        (["--space", "nowhere.py:space"], "there is no file 'nowhere.py'"),
        (["--methods", "unifrom"], "but was 'unifrom'; did you mean 'uniform'?"),
        (["--methods", "fisher"], "all are left out: fisher because it trains the base network"),
        (["--narrow", "3"], "`--narrow` must divide the steps of all axes, that is 2, but was 3"),
        (["--folder", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """A missing file, space, method or folder."""
    path = written(tiny_table(), tmp_path / "t.csv")
    assert main(["--table", str(path), "--space", TINY, *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_empty_files_and_ragged_lines_are_refused(tmp_path: Path) -> None:
    """With the line; rows without any training are left out, and some must be left."""
    path = tmp_path / "t.csv"
    for content, message in {
        "": "a table must have columns width_*, but",
        "width_0,macs,params,accuracy_0\n1,2,3\n": "each line must have 4 cells, but line 2 of",
        "width_0,macs,params,accuracy_0\n1,2,3,\n": "a table must have a trained network, but",
    }.items():
        path.write_text(content)
        with refused(DataError, message, False):
            Table.read(path)
    path.write_text("width_0,macs,params,accuracy_0\n1,2,3,\n\n2,4,6,50\n")
    assert Table.read(path).widths.tolist() == [[2]]


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_chains_are_the_networks_of_the_tables_by_formulas(name: str) -> None:
    """MACs and parameters of rows drawn at random."""
    space: SearchSpace = getattr(chains, name)()
    widths, sides, _ = tables.TABLES[name]()
    some = np.random.default_rng(0).permutation(widths)[:200]
    macs, params = tables.costs(some, sides)
    assert space.base.vector == tuple(widths.max(axis=0))
    assert np.array_equal(space.macs(some), macs)
    assert np.array_equal(space.params(some), params)
