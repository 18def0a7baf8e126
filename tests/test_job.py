"""The contract of trainers: reports, checkpoints, resumed trainings, recipes, one-line errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import torch
from torch import nn

from widthsearch.errors import CheckpointError, StorageError, StudyError
from widthsearch.training.job import CHECKPOINT, Job, TrainingTrial
from widthsearch.training.recipe import EpochResult


def network() -> nn.Module:
    """The base network."""
    return own.space().build(own.space().base, seed=0)


def ran(trial: TrainingTrial[Any], of: Job | None = None) -> list[EpochResult]:
    """The curve of a whole training, without its times."""
    (of or own.job()).run(network(), trial)
    return [replace(result, seconds=0) for result in trial.curve]


def refused(trainer: Any, tmp_path: Path) -> str:
    """The error of a training."""
    job = own.job(trainer)
    with pytest.raises(StudyError) as caught:
        job.run(network(), own.trial(tmp_path, job))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reports ---


def test_each_report_is_an_epoch(tmp_path: Path) -> None:
    """The metric and the loss have fields of their own, other numbers are kept by name."""
    curve = ran(own.trial(tmp_path))
    assert [result.epoch for result in curve] == [1, 2, 3]
    for result in curve:
        assert result.loss is not None
        assert result.metrics == {"rmse": result.loss**0.5}
        assert result.value == 100 / (1 + result.loss)


def test_tensors_and_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    """Of one element; anything else is refused."""
    trial = own.trial(tmp_path)
    assert trial.report({"accuracy": torch.tensor(50.0), "f1": np.float32(0.5)}, seconds=2.0)
    assert trial.curve == [EpochResult(1, None, 50.0, 2.0, "", {"f1": 0.5})]
    with pytest.raises(StudyError, match="a mapping of names to numbers, but 'own:train' reported"):
        trial.report(50.0)  # type: ignore[arg-type]
    for value in (torch.ones(2), "high", "3.2", None):
        with pytest.raises(StudyError, match="must report numbers, but 'own:train' reported f1="):
            trial.report({"accuracy": 50.0, "f1": value})


def test_a_metric_that_is_not_finite_ends_the_trial(tmp_path: Path) -> None:
    """The training is a whole one, of a network that diverged."""
    seen: list[bool] = []

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        seen.append(trial.report({"accuracy": float("nan")}))

    trial = own.trial(tmp_path, own.job(train))
    own.job(train).run(network(), trial)
    assert seen == [False]
    assert trial.complete


def test_a_report_needs_the_studys_metric(tmp_path: Path) -> None:
    """The error has the names that were reported."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        trial.report({"acuracy": 1.0, "loss": 2.0})

    assert refused(train, tmp_path) == (
        "a trainer must report the study's metric 'accuracy', but 'own:train' reported acuracy, "
        "loss: add it to each report"
    )


def test_a_trainer_must_report_every_epoch(tmp_path: Path) -> None:
    """One that returns before is refused, with what it reported."""

    def silent(network: nn.Module, trial: TrainingTrial) -> None:
        pass

    def short(network: nn.Module, trial: TrainingTrial) -> None:
        trial.report({"accuracy": 1.0})

    for trainer, count in ((silent, 0), (short, 1)):
        assert refused(trainer, tmp_path).endswith(f"returned after {count} of 3 reports")


def test_a_cost_is_not_reported(tmp_path: Path) -> None:
    """The study knows it."""

    def reporting(network: nn.Module, trial: TrainingTrial[Any]) -> None:
        trial.report({"accuracy": 1.0, "latency_ms": 3.0})

    assert "must leave costs to the study" in refused(reporting, tmp_path)


@pytest.mark.parametrize("name", ["first", "other"])
def test_the_parameters_of_the_network_are_kept(tmp_path: Path, name: str) -> None:
    """A head of another size, or one more: the costs would be another network's."""

    def changing(network: nn.Module, trial: TrainingTrial[Any]) -> None:
        setattr(network, name, nn.Linear(3, 5))
        while trial.report({"accuracy": 1.0}):
            pass

    message = refused(changing, tmp_path)
    assert "must keep the parameters" in message and f"'{name}." in message


def test_a_report_after_the_end_is_refused(tmp_path: Path) -> None:
    """After the last epoch, and after a stop."""

    def deaf(network: nn.Module, trial: TrainingTrial) -> None:
        while True:
            trial.report({"accuracy": 1.0})

    assert "reported again after epoch 3" in refused(deaf, tmp_path)
    trial = own.trial(tmp_path, on_report=lambda result: False)
    with pytest.raises(StudyError, match="reported again after epoch 1"):
        own.job(deaf).run(network(), trial)


def test_the_time_of_an_epoch_is_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured from one report to the next, unless the trainer knows it better."""
    clock = iter([0.0, 1.0, 5.0, 7.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    trial = own.trial(tmp_path)
    trial.report({"accuracy": 1.0})
    trial.report({"accuracy": 1.0})
    assert [result.seconds for result in trial.curve] == [1.0, 2.0]


# --- checkpoints ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a trial that was interrupted after its first epoch."""

    def interrupt(result: EpochResult) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.job().run(network(), own.trial(tmp_path / "saved", on_report=interrupt))
    return tmp_path / "saved"


def test_a_resumed_training_equals_an_uninterrupted_one(saved: Path, tmp_path: Path) -> None:
    """Bit for bit, though no generator's state is in the checkpoint: dropout, draws of batches."""
    trial = own.trial(saved)
    trial.load()
    assert trial.epoch == 1
    assert ran(trial) == ran(own.trial(tmp_path / "whole"))
    assert ran(own.trial(tmp_path / "other", seed=1)) != ran(own.trial(tmp_path / "again"))


def test_a_state_must_be_taken_up(saved: Path) -> None:
    """Else new weights would go on with the old curve, or pass for the trained ones at its end."""
    trial = own.trial(saved)
    trial.load()
    with pytest.raises(StudyError, match="went on from epoch 1 and did not call"):
        trial.report({"accuracy": 1.0})
    trial.epochs = 1
    with pytest.raises(StudyError, match="went on from epoch 1 and did not call"):
        own.job(lambda network, trial: None).run(network(), trial)


def test_a_state_that_could_not_be_loaded_is_refused_at_once(tmp_path: Path) -> None:
    """Only tensors and plain values are ever unpickled."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        trial.report({"accuracy": 1.0}, lambda: {"path": tmp_path})

    rule = (
        "a state must consist of tensors, numbers, texts, and lists and mappings of those, but "
        "that of trainer 'own:train' does not: "
    )
    assert refused(train, tmp_path).startswith(f"{rule}it holds pathlib")
    assert not (tmp_path / CHECKPOINT).exists()

    def local(network: nn.Module, trial: TrainingTrial) -> None:
        trial.report({"accuracy": 1.0}, lambda: {"function": lambda: 3})

    assert refused(local, tmp_path).startswith(f"{rule}Can't ")
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    """A resumed training could not tell it from a start, and would go on with new weights."""

    def forgets(network: nn.Module, trial: TrainingTrial) -> None:
        trial.report({"accuracy": 1.0}, lambda: None)  # type: ignore[arg-type, return-value]

    assert "that of trainer 'own:train' returned None: add a `return`" in refused(forgets, tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_state_must_be_a_function(tmp_path: Path) -> None:
    """The state itself in its place is named, and no checkpoint is written."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        trial.report({"accuracy": 1.0}, network.state_dict())  # type: ignore[arg-type]

    assert refused(train, tmp_path) == (
        "`state` must be a function without arguments that returns the state, but trainer "
        "'own:train' gave OrderedDict: write state=lambda: {...}"
    )
    assert not (tmp_path / CHECKPOINT).exists()


def flip_a_bit(content: bytes) -> bytes:
    """The content with one bit flipped in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: b"",
        lambda content: b"\n" + content,
        lambda content: b"[1]\n" + content,
        flip_a_bit,
    ],
)
def test_a_damaged_checkpoint_is_refused(saved: Path, spoil: Any) -> None:
    """Truncated, overwritten or with one bit flipped: refused, and the trial is unchanged."""
    file = saved / CHECKPOINT
    file.write_bytes(spoil(file.read_bytes()))
    trial = own.trial(saved)
    with pytest.raises(CheckpointError, match=r"training\.ckpt is damaged; restart the run"):
        trial.load()
    assert (trial.epoch, trial.resume()) == (0, None)


def test_a_checkpoint_of_another_training_is_refused(saved: Path) -> None:
    """The error names the difference and both values."""
    job = own.job()
    other = replace(job, identity={"recipe": {"lr": 0.1}})
    narrow = TrainingTrial(
        job, own.space().build(0.5, seed=0), None, own.space().base, seed=0, folder=saved
    )
    for trial, message in (
        (own.trial(saved, seed=3), "run.seed=0 where this one has 3"),
        (own.trial(saved, other), r"run\.recipe=None where this one has \{'lr': 0\.1\}"),
        (own.trial(saved, code="new"), "run.code=None where this one has 'new'"),
        (narrow, r"run\.model='\w+' where"),
        (own.trial(saved / "none"), "No such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trial.load()
        assert trial.epoch == 0


def test_a_checkpoint_is_replaced_atomically(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a write fails, the previous checkpoint is intact."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    trial = own.trial(saved)
    trial.load()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            ran(trial)
    again = own.trial(saved)
    again.load()
    assert again.epoch == 1


# --- recipes ---


def test_a_recipe_is_checked_by_the_dataclass_of_the_annotation() -> None:
    """Unknown keys, types and missing fields are one line; epochs may be a field or not."""

    @dataclass
    class Needs:
        epochs: int
        crop: tuple[int, int]

    def train(network: nn.Module, trial: TrainingTrial[Needs]) -> None: ...

    train.__annotations__["trial"] = TrainingTrial[Needs]  # a local class has no global name
    assert own.job(train, crop=[8, 8]).recipe == Needs(3, (8, 8))
    assert own.job(lr=1).recipe == own.Steps(lr=1.0)
    for recipe, message in (
        ({}, "key 'recipe.crop' is missing"),
        ({"crop": 8}, "recipe.crop must be a list, but was 8"),
        ({"corp": [8, 8]}, "unknown key 'recipe.corp'; did you mean 'crop'?"),
    ):
        with pytest.raises(StudyError) as caught:
            own.job(train, **recipe)
        assert str(caught.value) == message


def test_a_recipe_without_an_annotation_is_a_mapping() -> None:
    """With every key that the study has."""

    def train(network: nn.Module, trial: TrainingTrial) -> None: ...

    assert own.job(train, crop=[1]).recipe == {"epochs": 3, "crop": [1]}


@pytest.mark.parametrize("trainer", [lambda network: None, 3, own.Steps()])
def test_a_trainer_is_a_function_of_network_and_trial(trainer: Any) -> None:
    """Whatever else is given is refused."""
    with pytest.raises(StudyError, match=r"must be a function of \(network, trial\), but 'own:tr"):
        own.job(trainer)
