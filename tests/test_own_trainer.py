"""Studies with a trainer of the user's own, from their configuration to the trained folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from widthsearch import export
from widthsearch.api import Study
from widthsearch.errors import DataError, StudyError, WidthsearchError
from widthsearch.runner.pickling import SharedData
from widthsearch.study.config import StudyConfig
from widthsearch.training.job import TrainingTrial
from widthsearch.utils.references import load_function

# --- configurations ---


def yielding(network: nn.Module, trial: TrainingTrial) -> Any:
    """Nothing of it runs when it is called."""
    yield trial.report({"accuracy": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {}}, "key 'recipe.epochs' is missing"),
        ({"recipe": {"epochs": 0}}, "recipe.epochs must be greater than or equal to 1, but was 0"),
        ({"recipe": 3}, "recipe must be a mapping of keys to values, but was 3"),
        (
            {"task": "digits"},
            "a study has a task or a trainer, but was given both ('digits' and 'own:train'): a "
            "trainer has its `data`",
        ),
        (
            {"trainer": None, "recipe": {}},
            "data is for an own trainer, but there is none and data is 'own:data': add `trainer`, "
            "or use `task`",
        ),
        (
            {"loss": "own:loss"},
            "loss and batches go together, but loss is 'own:loss' and there is no batches: add it",
        ),
        (
            {"concurrency": "auto"},
            "concurrency 'auto' probes the built-in trainer, but the trainer is 'own:train': give "
            "a number",
        ),
        ({"trainer": 3}, "trainer must be text, but was 3"),
    ],
)
def test_a_wrong_configuration_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Before anything runs."""
    with pytest.raises(StudyError) as caught:
        own.study(tmp_path, **changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"epochs": 4, "faul": 1}}, "unknown key 'recipe.faul'; did you mean 'fault'?"),
        ({"trainer": "own:trains"}, "'own:trains': own has no function 'trains'; did you mean 'tr"),
        ({"trainer": "own:data"}, "a trainer must be a function of (network, trial), but 'own:da"),
        ({"data": "own:date"}, "'own:date': own has no function 'date'; did you mean 'data'?"),
        ({"final_data": "nowhere.py:x"}, "'nowhere.py:x': there is no file 'nowhere.py'"),
        (
            {"data": "own:loss"},
            "data must be a function of (), but 'own:loss' is not: missing a required argument",
        ),
        (
            {"loss": "own:loss", "batches": "own:data"},
            "batches must be a function of (split, seed), but 'own:data' is not: too many pos",
        ),
        (
            {"loss": F.mse_loss, "batches": "own:batches"},
            "a loss must call the network that it is given, but 'torch.nn.functional:mse_loss' is",
        ),
        (
            {"trainer": yielding},
            "a trainer must train when it is called, but 'test_own_trainer:yielding' only returns",
        ),
        (
            {"proposers": ["uniform", "fisher"]},
            "proposer 'fisher' reads data, but study 'own' has a trainer of its own and no loss: "
            "add `loss` and `batches`, or use synflow, uniform, random or a method of your own",
        ),
    ],
)
def test_a_wrong_trainer_or_recipe_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Before a trial begins."""
    with pytest.raises(WidthsearchError) as caught, own.study(tmp_path, **changes).search():
        pass
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "study.db").exists()


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    """Functions become references; the recipe keeps all its keys."""
    config = own.study(tmp_path, recipe={"epochs": 4, "crop": [1, 2]}).config
    (tmp_path / "study.yaml").write_text(config.to_yaml())
    read = StudyConfig.from_yaml(tmp_path / "study.yaml")
    assert (read.trainer, read.data) == ("own:train", "own:data")
    assert read.to_json() == config.to_json()
    assert read.recipe == config.recipe
    assert read.proposers == config.proposers


def test_a_study_keeps_its_trainer_and_data(tmp_path: Path) -> None:
    """Trials of two trainers could not be compared."""
    with own.study(tmp_path).search() as search:
        search.ask()
    with pytest.raises(StudyError, match="a study keeps its trainer, but 'own' was begun with tra"):
        own.study(tmp_path, trainer="own:state").search().__enter__()


def test_methods_without_data_propose(tmp_path: Path) -> None:
    """By default synflow."""
    config = own.study(tmp_path).config
    values = {k: v for k, v in config.to_json().items() if k != "proposers"}
    study = Study(StudyConfig(**values), own.space(), folder=tmp_path)
    messages: list[str] = []
    with study.search(lambda progress: messages.append(progress.message)):
        pass
    assert any(message.startswith("proposer synflow finished") for message in messages)


# --- data ---


def test_data_is_shared_without_a_copy() -> None:
    """Arrays and tensors of any dtype lie in the buffers; other objects are pickled."""
    values = {
        "set": TensorDataset(torch.arange(6.0).reshape(2, 3), torch.tensor([True, False])),
        "bf16": torch.ones(4, 2, dtype=torch.bfloat16).t(),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(2.5),
        "array": np.arange(8, dtype=np.int16).reshape(2, 4),
        "names": ["a", "b"],
    }
    shared = SharedData.of(values, "data")
    found = shared.load()
    for key in ("bf16", "empty", "number"):
        assert found[key].dtype == values[key].dtype  # type: ignore[attr-defined]
        assert torch.equal(found[key], values[key])  # type: ignore[arg-type]
    assert found["names"] == ["a", "b"]
    assert not found["array"].flags.writeable
    addresses = {buffer.ctypes.data for buffer in shared.buffers}
    assert found["array"].ctypes.data in addresses
    assert found["set"].tensors[0].data_ptr() in addresses
    assert torch.equal(found["set"].tensors[0], values["set"].tensors[0])
    assert values["array"].ctypes.data in addresses  # type: ignore[attr-defined]


def test_data_that_fails_or_cannot_be_sent_is_one_line(tmp_path: Path) -> None:
    """With the function's name and its error."""

    def broken() -> None:
        raise OSError("no such\ndisk")

    study = own.study(tmp_path, data=broken)
    with pytest.raises(
        DataError, match=r"^data '\S+broken' failed: OSError: no such \(\S+trainer.py:\d+\)$"
    ):
        study.data()
    with pytest.raises(WidthsearchError, match=r"^the data of 'x' cannot be sent to the workers: "):
        SharedData.of((i for i in range(3)), "the data of 'x'")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: {}["train"], r"failed: KeyError: 'train' \(\S*test_own_trainer.py:\d+\)"),
        (lambda: None, "data must return what the trainer reads, but .* returned None: add a"),
    ],
)
def test_a_fault_of_the_data_is_seen_before_methods_run(
    tmp_path: Path, data: Any, message: str
) -> None:
    """Some methods train for an hour; the run ends before Ray starts."""
    messages: list[str] = []
    with pytest.raises(DataError, match=message):
        own.study(tmp_path, data=data).run(lambda progress: messages.append(progress.message))
    assert not any("uniform" in message or "Ray" in message for message in messages)


# --- studies ---

FAULTY = '''
import os
from pathlib import Path

import own
import torch

ONCE, TWICE = (Path(__file__).with_name(name) for name in ("once", "twice"))


def train(network, trial: own.TrainingTrial[own.Steps]):
    """The width decides how it fails after the second epoch."""
    whole = trial.report

    def report(metrics, state):
        if trial.epoch == 2:
            width = network.first.out_features
            if width == 2:
                raise RuntimeError("no kernel for 2 channels\\nreally")
            if width == 3:
                metrics = {"acuracy": 1.0}
            if width == 4:
                metrics = {"accuracy": float("nan")}
            if width == 5 and not ONCE.exists():
                ONCE.touch()
                os._exit(1)
            if width == 6 and not TWICE.exists():
                TWICE.touch()
                raise torch.OutOfMemoryError("no memory is left")
        return whole(metrics, state)

    trial.report = report
    own.train(network, trial)
'''


@pytest.mark.ray
def test_faults_cost_their_trial_alone(shared_ray: None, tmp_path: Path) -> None:
    """An exception, a wrong report and NaN fail it; a dead worker and a lack of memory do not."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    train = load_function(f"{tmp_path / 'faulty.py'}:train")
    (macs,) = {own.space().cost(own.space().base).macs}
    study = own.study(
        tmp_path / "study",
        trainer=train,
        proposers=["own:small"],
        budgets=[own.space().cost([n]).macs / macs for n in (2, 3, 4, 5, 6)],
        baselines=0,
        trials=6,
        concurrency=2,
    )
    (tmp_path / "faulty.py").unlink()  # the workers cannot import it
    messages: list[str] = []
    study.run(lambda progress: messages.append(progress.message))
    trials = {trial.widths["first"]: trial for trial in study.trials()}
    assert str(trials[2].error).startswith("RuntimeError: no kernel for 2 channels (")
    assert "faulty.py:" in str(trials[2].error) and "; the widths are " in str(trials[2].error)
    assert str(trials[3].error).startswith(
        "StudyError: a trainer must report the study's metric 'accuracy', but "
    )
    assert str(trials[4].error).startswith("training diverged in epoch 3: its accuracy is nan")
    for width in (5, 6, 8):
        assert trials[width].state == "finished"
        assert [result.epoch for result in trials[width].curve] == [1, 2, 3, 4]
    assert any("its worker process died; a new one continues" in each for each in messages)
    assert any("ran out of memory; it will be trained again" in each for each in messages)
    assert "Traceback" in (study.folder / "logs" / "run.log").read_text()

    # The dead worker's trial went on from its checkpoint: its curve is that of a whole training.
    trial = trials[5]
    network = own.space().build(trial.widths, seed=trial.seed)
    job = own.job(epochs=4)
    alone: TrainingTrial[Any] = TrainingTrial(
        job, network, own.data(), trial.widths, seed=trial.seed, folder=tmp_path / "alone"
    )
    job.run(network, alone)
    assert [r.loss for r in alone.curve] == [r.loss for r in trial.curve]
    assert alone.curve[-1].metrics == trial.curve[-1].metrics


@pytest.mark.ray
def test_a_study_stops_trials_early_confirms_and_trains_its_pick(
    shared_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All by the one trainer; the final training gets its own data. A run shows its progress."""
    loaded: list[int] = []

    def data() -> Any:
        loaded.append(os.getpid())
        return own.data()

    study = own.study(
        tmp_path / "study",
        trainer="own:train",
        data=data,
        final_data=final_data,
        early_stopping={"kind": "rungs", "first_epoch": 1, "eta": 2},
        objectives=["accuracy", "macs", "latency_ms"],
        latency={"pairs": 4},
        baselines=0,
        trials=10,
        concurrency=2,
    )
    study.run()
    shown = capsys.readouterr()
    assert "10/10 trials, " in shown.err
    assert "trials" not in shown.out
    assert loaded == [os.getpid()]  # once, here
    states = [trial.state for trial in study.trials()]
    assert set(states) == {"finished", "stopped"}
    assert all(trial.latency_ms for trial in study.trials())
    study.confirm(seeds=2, quiet=True)
    assert "trials" not in capsys.readouterr().err
    assert len(study.trials()) > 10
    seen: list[int] = []
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    card = export.train(
        study,
        study.pick("best"),
        seeds=2,
        epochs=2,
        folder=tmp_path / "out",
        on_epoch=lambda _, result: seen.append(result.epoch),
    )
    assert seen == [1, 2, 1, 2]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    assert card["test_accuracy"]["mean"] > 0
    assert card["trainer"] == "own:train"
    assert card["recipe"] == {"epochs": 2, "lr": 0.05, "fault": ""}, "with the defaults"
    written = json.loads((tmp_path / "out" / "card.json").read_text())
    assert written == json.loads(json.dumps(card))
    network = export.load(tmp_path / "out", study.space)
    assert network(torch.zeros(1, 3)).shape == (1, 1)


def final_data() -> Any:
    """Twice the data."""
    x, y = own.data()
    return torch.cat([x, x]), torch.cat([y, y])


def reporting_a_test(network: nn.Module, trial: TrainingTrial[own.Steps]) -> None:
    """Train as ever, and test after the last epoch of a final training."""
    report = trial.report

    def with_test(metrics: Any, state: Any) -> bool:
        last = trial.final and trial.epoch + 1 == trial.epochs
        return report({**metrics, **({"test_accuracy": 12.5} if last else {})}, state)

    trial.report = with_test  # type: ignore[method-assign, assignment]
    own.train(network, trial)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "validation_accuracy"),
        ({"final_data": "test_own_trainer:final_data"}, "test_accuracy"),
        ({"trainer": reporting_a_test}, "test_accuracy"),
    ],
)
def test_a_figure_of_the_validation_split_is_called_so(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    """A test split is that of ``final_data``, or what the trainer reports under that name."""
    study = own.study(tmp_path, **changes)
    with study.search() as search:
        tiny.drive(search, trials=1)
    card = export.train(study, study.trials()[0], seeds=2, epochs=2, folder=tmp_path / "out")
    assert card["split"] == key.split("_")[0]
    assert [name for name in card if name.endswith("_accuracy")] == [key]
    assert (card[key]["mean"] == 12.5) == ("trainer" in changes)


def reporting_nan(network: nn.Module, trial: TrainingTrial[own.Steps]) -> None:
    """The metric of a final training is not a number, whatever the loss is."""
    trial.report({"accuracy": float("nan") if trial.final else 1.0, "loss": 0.5})


def test_a_final_training_without_a_metric_is_one_line(tmp_path: Path) -> None:
    """It names the metric, the loss and the trainer: the learning rate need not be the reason."""
    study = own.study(tmp_path, trainer=reporting_nan)
    with study.search() as search:
        tiny.drive(search, trials=1)
    message = (
        r"accuracy is nan and the loss 0\.5; see how 'test_own_trainer:reporting_nan' computes it"
    )
    with pytest.raises(StudyError, match=message):
        export.train(study, study.trials()[0], seeds=1, epochs=2, folder=tmp_path / "out")


def test_a_final_training_is_resumed(tmp_path: Path) -> None:
    """From its last checkpoint, or with nothing left to train, to the same weights."""

    def train(network: nn.Module, trial: TrainingTrial) -> None:
        assert trial.final
        own.train(network, trial)

    train.__annotations__["trial"] = TrainingTrial[own.Steps]

    def interrupt(number: int, result: Any) -> None:
        raise KeyboardInterrupt

    trials = own.study(tmp_path / "study")
    with trials.search() as search:
        trial = search.ask()
        assert trial is not None
        network = trials.space.build(trial.widths, seed=trial.seed)
        alone: TrainingTrial[Any] = TrainingTrial(
            own.job(epochs=4), network, own.data(), trial.widths, seed=trial.seed, folder=tmp_path
        )
        own.job(epochs=4).run(network, alone)
        search.report(trial.number, alone.curve)
    study = own.study(tmp_path / "study", trainer=train)
    pick = study.trials()[0]
    whole = export.train(study, pick, seeds=1, epochs=2, folder=tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            export.train(
                study, pick, seeds=1, epochs=2, folder=tmp_path / "out", on_epoch=interrupt
            )
    resumed = export.train(study, pick, seeds=1, epochs=2, folder=tmp_path / "out")
    assert resumed["validation_accuracy"] == whole["validation_accuracy"]
    first, second = (
        export.load(tmp_path / name, study.space).state_dict() for name in ("whole", "out")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
