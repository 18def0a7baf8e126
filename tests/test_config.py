"""The configuration: valid, or an error of one line that names place, rule and value."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from widthsearch.errors import StudyError
from widthsearch.study.config import Rungs, StudyConfig

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


WRONG = {
    "{trails: 3}": "unknown key 'trails'; did you mean 'trials'?",
    "{recipe: {epoch: 3}}": "unknown key 'recipe.epoch'; did you mean 'epochs'?",
    "{constraints: {pins: [conv1]}}": "unknown key 'constraints.pins'; did you mean 'pin'?",
    "{constraints: {min: 1.5}}": (
        "constraints: `0 < min <= 1` must hold (multiples of an axis's base width), but min is 1.5"
    ),
    "{resources: {zzz: 3}}": "unknown key 'resources.zzz'; known are cpu, gpu",
    "{trials: null}": "key 'trials' is missing",
    "{trials: many}": "trials must be a whole number, but was 'many'",
    "{budgets: 0.5}": "budgets must be a list, but was 0.5",
    "{budgets: []}": "budgets must have at least 1 item, but was []",
    "{input: [3, 8, 8, 1]}": (
        "input must have at most 3 items, but was [3, 8, 8, 1]; write `input: [3, 32, 32]` "
        "(channels, height, width)"
    ),
    "{recipe: 3}": "recipe must be a mapping of keys to values, but was 3",
    "{early_stopping: never}": (
        "early_stopping must have the kind 'front' or 'rungs', but was {'kind': 'never'}"
    ),
    "{limits: {flops: [0, 1]}}": (
        "limits.flops must be 'macs', 'params' or 'latency_ms', but was 'flops'; write `limits: "
        "{macs: [0, 2e6]}`"
    ),
    "{limits: {macs: 2000000.0}}": (
        "limits.macs must be [min, max] with 0 <= min < max, but was 2000000.0; write `limits: "
        "{macs: [0, 2e6]}`"
    ),
    "{limits: {macs: [5, 5]}}": (
        "limits.macs must be [min, max] with 0 <= min < max, but was [5, 5]; write `limits: "
        "{macs: [0, 2e6]}`"
    ),
    "{limits: {latency_ms: [0, 1]}}": (
        "a limit of latency_ms needs it among the objectives, but they are [accuracy, macs]: add "
        "it, or leave the limit out"
    ),
    "{task: {folder: images}}": (
        "key 'task.name' is missing; write `task: digits`, or `task: {name: image_folder, folder:"
        " path}`"
    ),
    "{task: [digits]}": (
        "task must be a mapping of keys to values, but was ['digits']; write `task: digits`, or "
        "`task: {name: image_folder, folder: path}`"
    ),
    "{task: {name: digits, validation: 1.5}}": "task.validation must be less than 1, but was 1.5",
    "{objectives: [accuracy], early_stopping: front}": (
        "early_stopping needs a cost among the objectives, but they are [accuracy]: add macs, or "
        "leave early_stopping out"
    ),
    "{constraints: {pin: 3}}": "constraints.pin must be text or a list, but was 3",
    "{constraints: {step: {'conv[12]': x}}}": (
        "constraints.step.conv[12] must be a whole number, but was 'x'"
    ),
    "{concurrency: 0}": "concurrency must be 1 or more, or auto, but was 0",
    "{budgets: [0.5, -1]}": "budgets.1 must be greater than 0, but was -1",
    "{recipe: {epochs: 0}}": "recipe.epochs must be greater than or equal to 1, but was 0",
    "{recipe: {schedule: cos}}": (
        "recipe.schedule must be 'cosine', 'one_cycle' or 'constant', but was 'cos'"
    ),
    "{objectives: [accuracy, flops]}": (
        "objectives.1 must be 'accuracy', 'macs', 'params' or 'latency_ms', but was 'flops'"
    ),
    "{objectives: [macs]}": "objectives must hold accuracy and no name twice, but are [macs]",
    "{objectives: [accuracy, macs, macs]}": (
        "objectives must hold accuracy and no name twice, but are [accuracy, macs, macs]"
    ),
    "{latency: {threads: 2}}": (
        "latency is measured where it is an objective, but objectives are [accuracy, macs]: add "
        "latency_ms, or leave the latency section out"
    ),
    "{proposers: [sensitivty]}": (
        "proposers.0 must name a proposer or be `module:name`, but was 'sensitivty'; did you mean"
        " 'sensitivity'?"
    ),
    "{recipe: {epochs: 3}, early_stopping: {kind: rungs, first_epoch: 3}}": (
        "early_stopping.first_epoch must be less than recipe.epochs, but they are 3 and 3"
    ),
    "{recipe: {epochs: 3}, early_stopping: {first_epoch: 3}}": (
        "early_stopping.first_epoch must be less than recipe.epochs, but they are 3 and 3"
    ),
    "{early_stopping: {eta: 3}}": (
        "unknown key 'early_stopping.front.eta'; known are chance, finished, first_epoch, kind"
    ),
    "{device: cuda}": (
        "device 'cuda' needs resources.gpu above 0, but it is 0: 0.5 lets two trials share one GPU"
    ),
    "{device: 'cuda:1', resources: {gpu: 1}}": (
        "device must be cpu or cuda, since Ray assigns the GPUs to trials, but is 'cuda:1': set "
        "CUDA_VISIBLE_DEVICES to use some GPUs only"
    ),
    "{resources: {gpu: 2}}": (
        "resources.gpu must be at most 1, but was 2: a trial trains on one GPU; 0.5 lets two "
        "share one"
    ),
    "{resources: {cpu: 1.5}}": (
        "resources.cpu must be a share of one or a whole number, but was 1.5"
    ),
    "{name: ../up}": (
        "name must be letters, digits, '.', '_' and '-', and begin with a letter or digit, but "
        "was '../up'"
    ),
}
"""Changes of a study file, as YAML, and the error of each."""


@pytest.mark.parametrize(("changes", "message"), WRONG.items())
def test_an_invalid_configuration_is_an_error_of_one_line(
    changes: str, message: str, tmp_path: Path
) -> None:
    """The same from Python and, with the file's name before it, from YAML."""
    values = {"name": "a", "trials": 3, **yaml.safe_load(changes)}
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


def test_rungs_are_a_power_apart() -> None:
    """None is at the last epoch, where nothing is left to stop."""
    assert Rungs(first_epoch=3, eta=3).rungs(epochs=28) == (3, 9, 27)
    assert Rungs(first_epoch=3, eta=3).rungs(epochs=27) == (3, 9)
