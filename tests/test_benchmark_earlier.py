"""The benchmark of earlier studies: what it trains, and searches with and without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import earlier
from benchmarks.search import Table


def test_it_records_where_it_was_ended_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight networks, of which two are there; then searches of each kind of earlier study."""
    monkeypatch.setattr(earlier, "LEVELS", ((2, 4), (2, 4), (2, 4)))
    monkeypatch.setattr(earlier, "EPOCHS", {"accuracy": 1, "cheap": 1})
    monkeypatch.setattr(earlier, "EARLIER", 4)
    monkeypatch.setattr(earlier, "MARKS", (3, 4))
    path = tmp_path / "t.csv"
    earlier.record(path)
    lines = path.read_text().splitlines()
    assert lines[0] == "width_0,width_1,width_2,macs,params,accuracy_0,accuracy_1,cheap_0,cheap_1"
    path.write_text("\n".join(lines[:3]) + "\n")
    earlier.record(path)
    assert path.read_text().splitlines() == lines
    full, cheap = Table.read(path), Table.read(path, "cheap_")
    assert len(full.mean) == 8
    assert np.array_equal(full.accuracy, cheap.accuracy)  # here both recipes are one
    earlier.report(path, runs=2)
    rows = capsys.readouterr().out.splitlines()
    kinds = ["none", "cheap", "shuffled", "negated"]
    tables = [row.split("|")[1:-1] for row in rows if row.startswith("| ")]
    names = [cells[0].strip() for cells in tables]
    assert names == ["earlier study", "---", *kinds, *kinds]
    assert all(3 <= float(cell) <= 4 for cells in tables[6:] for cell in cells[1:])
