"""Tasks of the user's own: the contract of loss and batches, several inputs, and studies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import torch
from conformance import OWN, small_task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from widthsearch import cli
from widthsearch.data.loaders import StreamLoader
from widthsearch.data.tasks import AnyTask, OwnTask
from widthsearch.errors import DataError, StudyError, WidthsearchError
from widthsearch.proposers import Setting, proposer_class
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.training.sgd import SgdSteps
from widthsearch.training.trainer import evaluate, fit

TASK = OwnTask(own.loss, own.batches, "own:loss")


def net() -> nn.Module:
    """The base network of the small regression."""
    return own.space().build(own.space().base, seed=0)


def no_gradient(network: nn.Module, batch: Any) -> Tensor:
    """A loss that is cut from the network."""
    return own.loss(network, batch).detach()


def constant(network: nn.Module, batch: Any) -> Tensor:
    """A loss of another network."""
    return own.loss(own.Net(), batch)


def not_a_number(network: nn.Module, batch: Any) -> Tensor:
    """A loss that is not finite from the start."""
    return own.loss(network, batch) * torch.nan


def steep(network: nn.Module, batch: Any) -> Tensor:
    """A finite loss whose gradient is not: the root of zero."""
    return own.loss(network, batch) + (0 * network(batch["x"])).sqrt().mean()


def one_pass(found: Iterator[Any]) -> Any:
    """A function of batches that returns the same iterator at each call."""
    return lambda split, seed: found


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda network, batch: network(batch["x"]),
            r"a loss must be a tensor of one number, but 'own:loss' returned a tensor of shape "
            r"\(24, 1\) and torch.float32; return the mean over the batch",
        ),
        (lambda network, batch: 0.5, "'own:loss' returned 0.5; return the mean"),
        (lambda network, batch: None, "'own:loss' returned None; return the mean"),
        (lambda network, batch: np.ones(()), r"'own:loss' returned an array of shape \(\) and"),
        (lambda network, batch: (own.loss(network, batch), 0), "'own:loss' returned a tuple; "),
        (
            lambda network, batch: own.loss(network, batch) * 1j,
            r"'own:loss' returned a tensor of shape \(\) and torch.complex64; return the mean",
        ),
        (
            no_gradient,
            r"a loss must have a gradient, but 'own:loss' returned a tensor of shape \(\) and "
            "torch.float32 without one; compute it from the outputs of the network",
        ),
        (
            lambda network, batch: (network(batch["x"]) > 0).sum(),
            r"a loss must have a gradient, but 'own:loss' returned .* torch.int64 without one",
        ),
        (constant, "a loss must depend on the parameters of its network, but none has a gradient"),
    ],
)
def test_a_loss_that_breaks_the_contract_is_refused(loss: Any, message: str) -> None:
    """In one line that names the function and what it must return."""
    with pytest.raises(DataError, match=message) as caught:
        fit(net(), replace(TASK, loss_function=loss), OWN, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda split, seed: [], "must have a batch of 'train' at each call, but '.*' had none"),
        (
            lambda split, seed: own.batches(split, 0) if seed == 0 else (),
            "must have a batch of 'train' at each call, but '.*' had none; return a new list",
        ),
        (one_pass(own.batches("train", 0)), "a batch of 'train' at each call, but '.*' had none"),
        (
            lambda split, seed: own.batches(split, 0) if split == "train" else (),
            "must have a batch of 'validation' at each call, but '.*' had none",
        ),
        (
            lambda split, seed: None,
            "`batches` must return the batches of a pass, as a list or by `yield`, but "
            "'test_own_tasks:<lambda>' returned None",
        ),
        (lambda split, seed: own.data, "'test_own_tasks:<lambda>' returned a function"),
        (lambda split, seed: own.data()[0], r"returned a tensor of shape \(64, 3\)"),
        (lambda split, seed: {"x": own.data()[0]}, "<lambda>' returned a dict"),
        (lambda split, seed: TensorDataset(*own.data()), "<lambda>' returned a TensorDataset"),
        (
            lambda split, seed: ["text"],
            "a batch must be tensors, or tuples, .*, but `batches` has one of str",
        ),
        (lambda split, seed: [()], "but `batches` has one of tuple of nothing"),
        (
            lambda split, seed: [{"x": np.ones((2, 3)), "y": np.ones((2, 1))}],
            "`batches` has one of dict of ndarray; convert arrays by torch.from_numpy",
        ),
        (lambda split, seed: [torch.ones(())], "`batches` has one of tensors without dims"),
        (lambda split, seed: [torch.ones(0, 3)], "`batches` has one of no sample; leave it out"),
    ],
)
def test_batches_that_break_the_contract_are_refused(batches: Any, message: str) -> None:
    """In one line that names the function and what it must return."""
    with pytest.raises(DataError, match=message) as caught:
        fit(net(), replace(TASK, batch_function=batches), OWN, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_function": lambda batch: 0}, r"loss must be a function of \(network, batch\), but"),
        ({"loss_function": None}, "but 'own:loss' is not: it is None"),
        (
            {"loss_function": F.mse_loss},
            "but 'torch.nn.functional:mse_loss' is torch's, of outputs",
        ),
        ({"loss_function": nn.MSELoss()}, "but 'torch.nn.modules.loss:MSELoss' is torch's, of out"),
        ({"batch_function": own.data}, r"batches must be a function of \(split, seed\), but"),
    ],
)
def test_functions_of_other_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    """When the task is made."""
    with pytest.raises(DataError, match=message):
        replace(TASK, **changes)


QUICK: dict[str, dict[str, Any]] = {
    "sensitivity": {},
    "slimming": {"trainings": 1},
    "activation_density": {"max_steps": 1},
    "fisher": {"every": 2},
    "magnitude": {"every": 2},
    "taylor": {"every": 2},
}
"""The methods that need gradients of an own loss, with fields that make them quick."""


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (no_gradient, "a loss must have a gradient, but 'own:loss'"),
        (constant, "the loss does not depend on the network|a loss must depend on the parameters"),
        (not_a_number, "must be finite, but are not|its loss is nan for the first batch, before"),
    ],
)
def test_every_method_names_the_fault_of_a_loss(method: str, loss: Any, message: str) -> None:
    """Before any step the learning rate is not the reason."""
    task, setting = replace(TASK, loss_function=loss), Setting(recipe=OWN, lowest=0.5)
    with pytest.raises(WidthsearchError, match=message) as caught:
        proposer_class(method)(**QUICK[method])(own.space(), task, setting)
    assert "lower" not in str(caught.value)


def test_a_gradient_that_is_not_finite_at_the_start_is_named() -> None:
    """The first loss is finite, and the weights after one step are not."""
    with pytest.raises(StudyError, match=r"the gradient of '\w+\.\w+' is not finite for the first"):
        fit(net(), replace(TASK, loss_function=steep), OWN, seed=0)


def test_a_validation_loss_that_is_not_finite_is_told_from_divergence() -> None:
    """The message has the loss of both splits."""

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return own.loss(network, batch) * (1 if network.training else torch.nan)

    task = replace(TASK, loss_function=loss)
    message = r"in epoch 1 its loss was [\d.]+ on 'train' and not finite on 'validation'; see"
    with pytest.raises(StudyError, match=message):
        proposer_class("fisher")(every=1)(own.space(), task, Setting(recipe=OWN))


def test_methods_that_do_not_train_count_no_batches() -> None:
    """A pass may then be endless; a stream of a DataLoader has no length."""

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(own.data()[0].split(16))

    assert (
        StreamLoader(replace(TASK, batch_function=lambda *_: DataLoader(Stream(), None))).steps == 4
    )
    endless = replace(TASK, batch_function=lambda split, seed: cycle(own.batches(split, seed)))
    assert proposer_class("sensitivity")()(own.space(), endless, Setting()).trajectory


def test_label_smoothing_is_refused() -> None:
    """An own loss has no labels that the package knows."""
    with pytest.raises(DataError, match="`label_smoothing` is for tasks of images and labels"):
        fit(net(), TASK, replace(OWN, label_smoothing=0.1), seed=0)


def test_training_lowers_the_loss_reproducibly() -> None:
    """The value of an epoch is the mean loss on the validation split."""
    recipe = replace(OWN, epochs=20)
    model = net()
    curve = fit(model, TASK, recipe, seed=0)
    again = fit(net(), TASK, recipe, seed=0)
    assert [r.value for r in curve] == [r.value for r in again]
    assert curve[-1].loss < curve[0].loss
    with torch.no_grad():
        (batch,) = own.batches("validation", 0)
        expected = own.loss(model.eval(), batch).item()
    assert curve[-1].value == evaluate(model, TASK, "validation") == pytest.approx(expected)


def test_steps_are_those_of_a_literal_loop() -> None:
    """Pass after pass, each by a seed of the generator's, to the end of the stretch."""
    orders: list[tuple[str, int]] = []

    def batches(split: str, seed: int) -> Iterator[dict[str, Tensor]]:
        orders.append((split, seed))
        return own.batches(split, seed)

    model, plain = net(), net().train()
    recipe = replace(OWN, momentum=0.0, nesterov=False, weight_decay=0.0)
    loader = StreamLoader(replace(TASK, batch_function=batches))
    assert loader.steps == 2
    sgd = SgdSteps(model, loader, recipe, torch.device("cpu"), steps=3)
    torch.manual_seed(0)
    sgd.run(torch.Generator().manual_seed(1), [0.1] * 3)
    (_, first), (_, second) = orders[1:]
    torch.manual_seed(0)
    for batch in [*own.batches("train", first), *own.batches("train", second)][:3]:
        own.loss(plain, batch).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs)


class TwoInputs(nn.Module):
    """An image beside some numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.numbers = nn.Linear(3, 8)
        self.last = nn.Linear(16, 1)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        """(N, 1, 6, 6) and (N, 3) to (N, 1)."""
        seen = self.conv(image).relu().mean((2, 3))
        return self.last(torch.cat([seen, self.numbers(numbers).relu()], 1))


def pairs(split: str, seed: int) -> Iterable[tuple[dict[str, Tensor], Tensor]]:
    """Two batches of eight: a mapping of inputs, and what to predict of them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        x = torch.randn(8, 1, 6, 6, generator=generator)
        numbers = torch.randn(8, 3, generator=generator)
        yield {"image": x, "numbers": numbers}, x.mean((1, 2, 3)) + numbers[:, 0]


@pytest.mark.parametrize("method", ["sensitivity", "fisher", "slimming", "activation_density"])
def test_a_network_of_several_inputs_is_pruned(method: str) -> None:
    """The loss calls the network with the inputs that it takes."""
    inputs = {"image": (1, 6, 6), "numbers": (3,)}
    space = SearchSpace.from_model(TwoInputs, inputs)

    def loss(network: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        return F.mse_loss(network(**batch[0]).squeeze(1), batch[1])

    fields = {"every": 1} if method == "fisher" else {}
    asked = Setting(recipe=OWN, lowest=0.5)
    proposal = proposer_class(method)(**fields)(space, OwnTask(loss, pairs), asked)
    assert len(proposal.trajectory) >= 2


@pytest.mark.parametrize("task", [small_task(), TASK], ids=["images", "own"])
def test_a_method_reads_every_task_alike(task: AnyTask) -> None:
    """A method of a user's own needs loss and batches only, of an image task too."""
    model = net() if task is TASK else nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    for split in ("train", "validation"):
        first, again = (list(task.batches(split, seed)) for seed in (0, 0))
        assert len(first) == len(again) > 0
        assert task.loss(model.eval(), first[0]).item() == task.loss(model, again[0]).item() > 0
    images = small_task()
    labels = torch.cat([y for _, y in images.batches("train", 3)])
    assert sorted(labels.tolist()) == sorted(images.train.labels.tolist())
    assert labels.tolist() != images.train.labels.tolist()


def test_a_study_asks_methods_that_read_data(tmp_path: Path) -> None:
    """Methods that train do so by SGD for the recipe's epochs."""
    given: dict[str, Any] = {"loss": "own:loss", "batches": own.batches}
    methods = ["sensitivity", {"method": "fisher", "every": 1}]
    study = own.study(tmp_path, **given, proposers=methods)
    with study.search() as search:
        assert search.ask() is not None
    assert study.failures == {}
    assert study.config.method_recipe == replace(OWN, epochs=4)


def test_a_study_with_a_loss_asks_sensitivity_by_default() -> None:
    """As one with a task; without a loss it is synflow, which reads no data."""
    named: dict[str, Any] = {"name": "own", "trials": 1, "trainer": "own:train"}
    named["recipe"] = {"epochs": 1}
    given = StudyConfig(**named, loss="own:loss", batches="own:batches")
    assert [method.method for method in given.proposers] == ["sensitivity"]
    assert [method.method for method in StudyConfig(**named).proposers] == ["synflow"]


def test_the_command_proposes_for_a_study_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`propose` takes the loss and the batches of the study's YAML."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    study = "examples/tabular/study.yaml"
    asked = ["propose", study, "--method", "sensitivity", "--budget", "0.5", "--json"]
    assert cli.main(asked) == 0
    assert '"sensitivity"' in capsys.readouterr().out
