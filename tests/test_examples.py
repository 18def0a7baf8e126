"""The worked examples in miniature: their YAML, their trainer, and every method on their loss."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from widthsearch import export
from widthsearch.api import Study
from widthsearch.data.tasks import OwnTask
from widthsearch.errors import WidthsearchError
from widthsearch.proposers import PROPOSERS, Setting, proposer_class
from widthsearch.study.config import StudyConfig
from widthsearch.study.job import own_task, study_job
from widthsearch.tracing.inputs import sample
from widthsearch.training.job import TrainingTrial
from widthsearch.training.recipe import Recipe

ROOT = Path(__file__).parent.parent

EXAMPLES = {
    "audio": (1, 6),
    "keypoints": (1, 2, 16, 16),
    "segmentation": (1, 3, 32, 32),
    "tabular": (1,),
    "text": (1, 64, 128),
}
"""The shape of a network's output for one sample."""

CANNOT = {
    **{
        (name, "filter_groups"): "filter groups need an ungrouped Conv2d"
        for name in ("audio", "tabular", "text")
    },
}
"""Why a method cannot propose."""

QUICK: dict[str, dict[str, Any]] = {
    "activation_density": {"max_steps": 1},
    "filter_groups": {"groups": 2, "members": 2, "penalty": 1.0},
    "fisher": {"every": 1},
    "magnitude": {"every": 1},
    "naswot": {"candidates": 2, "members": 2},
    "slimming": {"trainings": 1},
    "synflow": {"rounds": 4},
    "taylor": {"every": 1},
}
"""Fields with which a method is quick."""


def miniature(name: str, folder: Path, **changes: Any) -> Study:
    """The study of an example, with one epoch a training."""
    values = yaml.safe_load((ROOT / "examples" / name / "study.yaml").read_text())
    recipe = {**values["recipe"], "epochs": 1}
    return Study(StudyConfig(**{**values, "recipe": recipe, **changes}), folder=folder)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_method_proposes_or_says_why_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two batches a pass."""
    monkeypatch.chdir(ROOT)
    study = miniature(name, tmp_path)
    whole = own_task(study.config)
    assert whole is not None
    task = OwnTask(whole.loss, lambda split, seed: list(islice(whole.batches(split, seed), 2)))
    setting = Setting(recipe=Recipe(epochs=1, lr=0.01, precision="fp32"), lowest=0.9)
    for method in PROPOSERS:
        proposer = proposer_class(method)(**QUICK.get(method, {}))
        if reason := CANNOT.get((name, method)):
            with pytest.raises(WidthsearchError, match=reason):
                proposer(study.space, task, setting)
        else:
            assert len(proposer(study.space, task, setting).trajectory) >= 2


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_its_base_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch by the example's trainer, reported to the study by hand."""
    monkeypatch.chdir(ROOT)
    assert len((ROOT / "examples" / name / f"{name}.py").read_text().splitlines()) <= 120
    study = miniature(name, tmp_path)
    job = study_job(study.config)
    with study.search(engine=lambda *_: iter(())) as search:
        asked = search.ask()
        assert asked is not None
        network = study.space.build(asked.widths, seed=asked.seed)
        trial: TrainingTrial[Any] = TrainingTrial(
            job, network, study.data(), asked.widths, seed=asked.seed, folder=tmp_path / "trial"
        )
        job.run(network, trial)
        search.report(asked.number, trial.curve)
    (trained,) = (each for each in study.trials() if each.state == "finished")
    assert list(trained.widths.vector) == list(study.space.base.vector)
    assert math.isfinite(trained.curve[-1].value)
    one = sample(study.space.input_shape, 1, "cpu")
    assert network.eval()(one).shape == EXAMPLES[name]


@pytest.mark.ray
def test_an_example_runs(shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Ray, from the YAML and a method that reads the example's batches to a trained folder."""
    monkeypatch.chdir(ROOT)
    changes: dict[str, Any] = {"trials": 3, "budgets": [0.05, 0.1], "proposers": ["sensitivity"]}
    study = miniature("segmentation", tmp_path / "study", **changes)
    study.run()
    assert [trial.state for trial in study.trials()] == ["finished"] * 3
    assert study.failures == {}
    export.train(study, study.pick("knee"), seeds=1, epochs=1, folder=tmp_path / "out")
    network = export.load(tmp_path / "out", study.config.space)
    assert network(torch.zeros(1, 1, 32, 32)).shape == EXAMPLES["segmentation"]
