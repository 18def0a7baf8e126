"""The configuration: valid, or an error of one line that names place, rule and value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refusals

from widthsearch.errors import StudyError
from widthsearch.study.config import StudyConfig
from widthsearch.study.sections import Rungs
from widthsearch.training.recipe import recipe_values

FULL = """
name: quickstart
space: search_spaces/quickstart.py:digits_resnet
input: [3, 32, 32]
task: digits
recipe: {epochs: 10, batch_size: 64, lr: 1e-1}
proposers: [sensitivity, {method: random}]
budgets: [0.1, 2]
objectives: [accuracy, macs, latency_ms]
latency: {device: cpu, batch_size: 1, threads: 1}
early_stopping: {kind: rungs, first_epoch: 3, eta: 3}
constraints: {pin: [conv1], min: {"block3.*": 0.5, block2.conv1: 8}, max: 1, align: cpu}
trials: 28
concurrency: 2
resources: {cpu: 1, gpu: 0.5}
device: cuda
seed: 3
storage: null
ray_address: null
"""


def test_a_full_study_file_is_read(tmp_path: Path) -> None:
    """Names become mappings, ``1e-1`` (a string, to YAML) a number."""
    path = tmp_path / "quickstart.yaml"
    path.write_text(FULL)

    config = StudyConfig.from_yaml(path)

    assert config.task is not None
    assert config.task.name == "digits"
    assert config.recipe.lr == 0.1
    assert [proposer.method for proposer in config.proposers] == ["sensitivity", "random"]
    assert config.budgets == (0.1, 2.0)
    assert config.constraints.min == {"block3.*": 0.5, "block2.conv1": 8}
    assert config.constraints.max == 1.0
    assert config.early_stopping == Rungs(first_epoch=3, eta=3)
    assert config.resources.gpu == 0.5
    assert config.latency is not None


def test_numbers_may_have_an_exponent(tmp_path: Path) -> None:
    """As people write them: 6e5, which YAML 1.1 takes for a text; a text in quotes stays one."""
    path = tmp_path / "study.yaml"
    text = "trials: 3\ntrainer: own:train\nrecipe: {epochs: 2, lr: 1e-3, tag: '1e-3'}\n"
    path.write_text("name: mine\nlimits: {macs: [2e4, 6e5]}\n" + text)
    config = StudyConfig.from_yaml(path)
    assert config.limits["macs"] == (2e4, 6e5)
    assert recipe_values(config.recipe) == {"epochs": 2, "lr": 0.001, "tag": "1e-3"}
    path.write_text(config.to_yaml())
    assert StudyConfig.from_yaml(path) == config
    wrong = {"[6e5, 2e4]": "[600000.0, 20000.0]", "6e5": "600000.0", "'12'": "'12'"}
    for limit, shown in wrong.items():
        path.write_text(f"name: mine\ntrials: 3\nlimits: {{macs: {limit}}}\n")
        with pytest.raises(StudyError) as caught:
            StudyConfig.from_yaml(path)
        rule = "limits.macs must be [min, max] with min < max (null: no bound), but was"
        assert f"{rule} {shown}; write `limits: {{macs: [0, 2e6]}}`" in str(caught.value)


def test_a_limit_outside_the_metrics_range_is_refused() -> None:
    """No network could be within it; the ends of the range may be."""
    for limit in ((100.5, None), (None, -1)):
        with pytest.raises(
            StudyError, match=r"must leave a part of the metric's range, \[0, 100\]"
        ):
            StudyConfig(name="mine", trials=3, limits={"accuracy": limit})
    assert StudyConfig(name="mine", trials=3, limits={"accuracy": (100, None)}).limits


def test_it_goes_through_json_and_yaml_unchanged(tmp_path: Path) -> None:
    """The stored values read back as the same configuration."""
    path = tmp_path / "quickstart.yaml"
    path.write_text(FULL)
    config = StudyConfig.from_yaml(path)
    assert StudyConfig(**config.to_json()) == config
    path.write_text(config.to_yaml())
    assert StudyConfig.from_yaml(path) == config


def test_defaults() -> None:
    """A name and a number of trials suffice."""
    config = StudyConfig(name="a", trials=3)
    assert config.objectives == ("accuracy", "macs")
    assert config.early_stopping is None


@refusals("study")
def test_an_invalid_configuration_is_an_error_of_one_line(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The same from Python and, with the file's name before it, from YAML."""
    values = {"name": "a", "trials": 3, **values}
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(StudyError) as caught:
        StudyConfig(**values)
    assert str(caught.value) == message

    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(StudyError) as caught:
        StudyConfig.from_yaml(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batchsize": 3}, "unknown key 'proposers.1.batchsize'; did you mean 'batch_size'?"),
        ({"batch_size": "x"}, "proposers.1.batch_size must be a whole number, but was 'x'"),
    ],
)
def test_a_proposers_fields_are_checked_when_it_is_made(
    fields: dict[str, object], message: str
) -> None:
    """Its configuration is read without importing the method."""
    proposer = StudyConfig(
        name="a", trials=3, proposers=["uniform", {"method": "sensitivity", **fields}]
    ).proposers[1]
    with pytest.raises(StudyError) as caught:
        proposer.make("proposers.1")
    assert str(caught.value) == message


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """The message has the system's reason."""
    with pytest.raises(StudyError, match="cannot be read: No such file or directory"):
        StudyConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"is not safe YAML: expected ',' or '\]', .* \(line 1, column 6\)"),
        ("- a", "must be a mapping of keys to values"),
        ("", "must be a mapping of keys to values"),
        ("!!python/object/apply:os.getcwd []", "is not safe YAML: could not determine a constr"),
        ("name: a\0b", "is not safe YAML: unacceptable character #x0000"),
        ("name: 2026-13-45", "is not safe YAML: month must be in 1..12"),
        ("[" * 2000, "is not safe YAML: maximum recursion depth"),
    ],
)
def test_a_file_that_is_no_study_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    """One line; and YAML's tags run no code."""
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=message) as caught:
        StudyConfig.from_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["a.py:b", ".", "épochs."])
def test_an_unknown_key_may_hold_dots(key: str) -> None:
    """It is not taken for a path of keys."""
    with pytest.raises(StudyError, match=re.escape(f"unknown key 'recipe.{key}'")):
        StudyConfig(name="mine", task="digits", recipe={key: None})
    with pytest.raises(StudyError, match=re.escape(f"unknown key '{key}'")):
        StudyConfig(name="mine", task="digits", **{key: None})
