"""Losses of the built-in trainer: labels that may each be true, and values."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from digits import convnet, few
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from strategies import space_of
from torch import Tensor, nn

from widthsearch.api import Study
from widthsearch.data.config import Augmentation, LossName, TaskConfig
from widthsearch.data.losses import LOSSES, average_precision
from widthsearch.data.sources import Split
from widthsearch.data.tasks import Task, task_from_datasets
from widthsearch.errors import DataError, StudyError
from widthsearch.export import train
from widthsearch.proposers import Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.sections import ProposerConfig
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import evaluate, fit

QUICK = Recipe(epochs=4, batch_size=32, lr=0.1, precision="fp32")


@cache
def bits() -> Task:
    """The digits by the four bits of their numbers: labels that may each be true."""
    return _with_targets("bce", lambda labels: (labels[:, None] >> np.arange(4)) & 1)


@cache
def numbers(loss: LossName = "mse") -> Task:
    """The digits as two values: their number, scaled, and its negative."""
    return _with_targets(loss, lambda labels: (labels[:, None] / 4.5 - 1) * np.array([1, -1]))


def _with_targets(loss: LossName, targets: Any) -> Task:
    def converted(split: Split | None) -> Split:
        assert split is not None
        return Split(split.images, targets(split.labels).astype(np.float32))

    task = few()
    halves = {name: converted(getattr(task, name)) for name in ("train", "validation", "test")}
    outputs = halves["train"].labels.shape[1]
    return replace(task, **halves, classes=outputs, names=(), loss_name=loss)


def network(outputs: int, seed: int = 0) -> nn.Module:
    """The small network with another number of outputs."""
    model = convnet(seed)
    model[-1] = nn.Linear(32 * 16, outputs)  # type: ignore[operator]
    return model


# --- numbers ---


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_average_precision_is_that_of_scikit_learn(samples: list[tuple[int, bool]]) -> None:
    """Also where scores are equal; NaN without a positive sample."""
    scores, positive = (np.array(column) for column in zip(*samples, strict=True))
    found = average_precision(scores.astype(np.float32), positive)
    if not positive.any():
        assert math.isnan(found)
    else:
        assert found == pytest.approx(average_precision_score(positive, scores))


@pytest.mark.parametrize("loss", ["bce", "mse", "l1"])
def test_an_evaluation_is_that_of_all_outputs_at_once(loss: LossName) -> None:
    """In batches that do not divide the split; the mean loss of a batch is torch's."""
    task = bits() if loss == "bce" else numbers(loss)
    model = network(task.classes).eval()
    images, targets = next(iter(task.batches("validation", 0)))
    with torch.no_grad():
        outputs = torch.cat([model(x) for x, _ in task.batches("validation", 0)])
    y = task.validation.labels
    value, kept = evaluate(model, task, "validation"), y.shape[1]
    if loss == "bce":
        ours = [average_precision_score(y[:, k], outputs[:, k]) for k in range(kept)]
        assert value == pytest.approx(100 * np.mean(ours))
        right = ((outputs.numpy() > 0) == (y > 0.5)).mean()
        assert LOSSES["bce"].summary(outputs, torch.from_numpy(y))["label_accuracy"] == (
            pytest.approx(100 * right)
        )
    else:
        assert value == pytest.approx(float(np.sqrt(((outputs.numpy() - y) ** 2).mean())))
    criterion: Any = {
        "bce": nn.BCEWithLogitsLoss(),
        "mse": nn.MSELoss(),
        "l1": nn.L1Loss(),
    }[loss]
    with torch.no_grad():
        expected = criterion(model(images), targets)
        assert task.loss(model, (images, targets)).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", ["bce", "mse", "l1"])
def test_networks_learn(loss: LossName) -> None:
    """Far better than chance after a few epochs; further numbers are in the curve."""
    task = bits() if loss == "bce" else numbers(loss)
    chance = evaluate(network(task.classes), task, "validation")
    adamw = Recipe(epochs=8, batch_size=32, optimizer="adamw", lr=0.01, precision="fp32")
    recipe = QUICK if loss == "bce" else adamw
    last = fit(network(task.classes), task, recipe, seed=0)[-1]
    if loss == "bce":
        assert chance < 65 < 80 < last.value
        assert list(last.metrics) == ["label_accuracy"]
    else:
        assert last.value < 0.9 * chance
        assert last.metrics["mae"] < last.value


def test_outputs_that_are_not_finite_have_no_number() -> None:
    """All numbers of the epoch are NaN."""
    model = network(2)
    with torch.no_grad():
        model[-1].bias[0] = math.inf  # type: ignore[index, union-attr, operator]
    assert math.isnan(evaluate(model, numbers(), "validation"))


# --- studies ---


@pytest.mark.parametrize(
    ("loss", "name", "goal", "ends"),
    [
        ("cross_entropy", "accuracy", "maximize", (0, 100)),
        ("bce", "map", "maximize", (0, 100)),
        ("mse", "rmse", "minimize", (0, math.inf)),
        ("l1", "rmse", "minimize", (0, math.inf)),
    ],
)
def test_the_metric_follows_the_loss(loss: str, name: str, goal: str, ends: Any) -> None:
    """By default; one that is given stays, and the configuration reads back as it was."""
    task = {"name": "mine:data", "loss": loss}
    config = StudyConfig(name="a", trials=1, task=task)
    assert (config.metric.name, config.metric.goal, config.metric.ends) == (name, goal, ends)
    assert config.objectives == (name, "macs")
    assert StudyConfig(**config.to_json()) == config
    given = StudyConfig(name="a", trials=1, task=task, metric={"name": "mae", "goal": "minimize"})
    assert given.objectives == ("mae", "macs")


def test_a_metric_that_the_loss_does_not_report_is_refused(tmp_path: Path) -> None:
    """Before anything is trained; so is label smoothing."""
    metric = {"name": "rmse", "goal": "minimize"}
    with pytest.raises(StudyError, match="reports accuracy and loss for task 'tiny', but the stu"):
        tiny.study(tmp_path, metric=metric).run()
    recipe = replace(QUICK, label_smoothing=0.1)
    with pytest.raises(StudyError, match="label_smoothing is for classes, but task 'digits' has"):
        fit(network(4), bits(), recipe, seed=0)


def test_final_trainings_test_every_number(tmp_path: Path) -> None:
    """A study by RMSE is trained in full: the card has the metric on the test split."""

    class Pixels(nn.Module):
        """One hidden layer."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(64, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            """(N, 1, 8, 8) to (N, 2)."""
            return self.last(self.hidden(x.flatten(1)).relu())

    space = SearchSpace.from_model(Pixels, (1, 8, 8), name="pixels")
    recipe = replace(QUICK, epochs=1, lr=0.02)
    config = StudyConfig(
        name="a",
        trials=1,
        recipe=recipe,
        proposers=["uniform"],
        metric={"name": "mae", "goal": "minimize"},
    )
    study = Study(config, space, numbers(), folder=tmp_path)
    with study.search() as search:
        trial = tiny.ask(search)
        curve = fit(study.space.build(trial.widths, seed=trial.seed), numbers(), recipe, seed=0)
        kept = replace(curve[-1], value=curve[-1].metrics["mae"], metrics={})
        search.report(trial.number, [kept])
    card = train(study, study.pick("best"), seeds=1, folder=tmp_path / "out")
    assert 0 < card["test_mae"]["mean"] < 2


METHODS: dict[str, dict[str, Any]] = {
    "sensitivity": {"floor": 0.5},
    "slimming": {"recipe": {"epochs": 1, "batch_size": 32}, "floor": 0.5},
    "activation_density": {"max_steps": 4},
    "filter_groups": {"groups": 2, "members": 3},
    "fisher": {"every": 1},
    "magnitude": {"every": 1},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", ["bce", "l1"])
def test_methods_that_read_data_use_the_tasks_loss(method: str, loss: LossName) -> None:
    """Each proposes, and none computes a cross-entropy."""
    space = space_of("Residual")
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
        targets = (images[:, :1].mean((2, 3)) > 127) == (np.arange(10) % 2)
        return Split(images, targets.astype(np.float32))

    means = (0.5,) * 3, (0.25,) * 3
    task = Task("small", split(64), split(32), None, 10, *means, Augmentation(), loss_name=loss)
    recipe = Recipe(epochs=1, batch_size=32, lr=0.01, precision="fp32")
    setting = Setting(recipe=recipe, lowest=0.5)
    with pytest.MonkeyPatch.context() as patch:

        def refused(*_: Any, **__: Any) -> Tensor:
            raise AssertionError("a cross-entropy of targets that are no classes")

        patch.setattr(torch.nn.functional, "cross_entropy", refused)
        proposal = ProposerConfig.of(method, METHODS[method]).make()(space, task, setting)
    assert len(proposal.trajectory) > 1


# --- datasets ---


def items(targets: list[Any]) -> list[tuple[Tensor, Any]]:
    """Images with these targets."""
    images = torch.randint(256, (len(targets), 1, 4, 4), dtype=torch.uint8)
    return list(zip(images, targets, strict=True))


def test_targets_of_datasets() -> None:
    """Vectors, numbers, tensors; the validation split is drawn by the seed."""
    labels = [[1, 0, 1], torch.tensor([0.0, 1.0, 0.0]), np.array([True, True, False])] * 4
    config = TaskConfig("mine:data", loss="bce", validation=0.25)
    task = task_from_datasets(items(labels), items(labels), config)
    assert (task.classes, len(task.train), len(task.validation)) == (3, 9, 3)
    assert task.train.labels.dtype == np.float32
    assert (task.measure, task.minimized, task.shown(51.5)) == ("map", False, "map 51.5%")
    config = TaskConfig("mine:data", loss="l1")
    task = task_from_datasets(items([0.5, 2, torch.tensor(3.0)]), items([1.0]), config)
    assert task.classes == 1
    assert sorted(np.concatenate([task.train.labels, task.validation.labels])) == [0.5, 2, 3]
    assert (task.measure, task.minimized, task.shown(0.25)) == ("rmse", True, "rmse 0.25")


@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        ("bce", [[1, 0], [0, 2]], r"labels are vectors of 0 and 1, .* item 1 breaks .*: labels \["),
        ("bce", [1, 0], r"vectors of 0 and 1, all of one length, but item 0 breaks this rule"),
        ("bce", [[1, 0], [1]], "item 1 breaks this rule: 1 values, and the first has 2"),
        ("mse", [1.0, math.nan], r"finite numbers or vectors of them, .* item 1 breaks"),
        ("mse", [1.0, "red"], "finite numbers or vectors of them, .* item 1 breaks this rule"),
        ("mse", [[[1.0]], [[1.0]]], r"a target of shape \(1, 1\); give the study a `trainer`"),
        ("l1", [torch.ones(4, 4)] * 2, r"a target of shape \(4, 4\); give the study a `trainer`"),
        ("bce", [torch.ones(4, 4)] * 2, r"a target of shape \(4, 4\); give the study a `trainer`"),
        (
            "cross_entropy",
            [torch.ones(4, 4, dtype=torch.long)] * 2,
            r"a target of shape \(4, 4\); give the study a `trainer`",
        ),
        ("bce", [[1, 0], [1, 0]], "every label needs an image of train that has it, .* none of la"),
        (
            "cross_entropy",
            [0, 0.5],
            "labels are integers from 0, but item 1 breaks this rule: label 0.5; give the task the "
            "loss of other labels, bce, mse or l1",
        ),
        ("cross_entropy", [0, -1], "labels are integers from 0, but item 1 .*: label -1"),
    ],
)
def test_targets_that_do_not_fit_the_loss(loss: LossName, targets: Any, message: str) -> None:
    """One line with the item."""
    config = TaskConfig("mine:data", loss=loss)
    with pytest.raises(DataError, match=message) as caught:
        task_from_datasets(items(targets), items(targets), config)
    assert "\n" not in str(caught.value)
    assert "\\n" not in str(caught.value)


def test_halves_that_do_not_fit_each_other() -> None:
    """Targets of two lengths, a single image, and labels that validation does not have."""
    config = TaskConfig("mine:data", loss="mse")
    with pytest.raises(DataError, match=r"targets of one length, .* have 1 and 2"):
        task_from_datasets(items([1.0, 2.0]), items([[1.0, 2.0]]), config)
    with pytest.raises(DataError, match="train needs 2 images or more, but task 'mine:data' has"):
        task_from_datasets(items([1.0]), items([1.0]), config)
    config = TaskConfig("mine:data", loss="bce", validation=0.1)
    sparse = [[1]] + [[0]] * 19
    with pytest.raises(DataError, match="some image must have a label, but the 2 that task"):
        task_from_datasets(items(sparse), items(sparse), config)


def test_tasks_with_classes_have_no_other_loss() -> None:
    """The digits, CIFAR-10 and image folders have a class each."""
    with pytest.raises(DataError, match=r"loss is for datasets of your own, .* loss='bce'"):
        TaskConfig("digits", loss="bce")
    with pytest.raises(DataError, match=r"a network must return values of shape \(N, 2\)"):
        fit(network(3), numbers(), QUICK, seed=0)


def test_a_loss_that_is_no_text_is_refused() -> None:
    """In one line, before a metric follows from it."""
    with pytest.raises(StudyError, match="loss"):
        StudyConfig(name="mine", task={"name": "digits", "loss": ["bce"]})
