"""The worked examples run in miniature: from their YAML to a trained folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from widthsearch import export
from widthsearch.api import Study
from widthsearch.study.config import StudyConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.ray
@pytest.mark.parametrize(("name", "outputs"), [("segmentation", (1, 3, 32, 32))])
def test_an_example_runs(
    name: str, outputs: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch each of the base and two more networks."""
    monkeypatch.chdir(ROOT)
    folder = ROOT / "examples" / name
    assert len((folder / f"{name}.py").read_text().splitlines()) <= 120
    values = yaml.safe_load((folder / "study.yaml").read_text())
    values |= {"trials": 3, "recipe": {**values["recipe"], "epochs": 1}, "budgets": [0.05, 0.1]}
    study = Study(StudyConfig(**values), folder=tmp_path / "study")
    study.run()
    assert [trial.state for trial in study.trials()] == ["finished"] * 3
    assert study.failures == {}
    export.train(study, study.pick("knee"), seeds=1, epochs=1, folder=tmp_path / "out")
    network = export.load(tmp_path / "out")
    sample = torch.zeros(1, *study.space.input_shape)  # type: ignore[misc]
    assert network(sample).shape == outputs
