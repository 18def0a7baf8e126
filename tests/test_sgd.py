"""Steps of SGD: the same numbers as a literal loop, and hooks that change what a step does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conformance import small_task
from strategies import space_of
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.data.loaders import DeviceLoader
from widthsearch.data.tasks import Augmentation, Task
from widthsearch.training.recipe import Recipe
from widthsearch.training.sgd import SgdSteps, StepHook, after_backward, parameter_groups, sgd_step
from widthsearch.training.trainer import Trainer, fit

RECIPE = Recipe(epochs=2, batch_size=40, lr=0.05, label_smoothing=0.1)
RATES = [0.1, 0.05, 0.02, 0.01, 0.1]  # two whole batches a pass: two passes and a half
CPU = torch.device("cpu")


def augmented_task() -> Task:
    """The small task with shifts, mirroring and cutout."""
    return replace(small_task(), augmentation=Augmentation(2, flip=True, cutout=3))


def network() -> nn.Module:
    """A small residual network."""
    space = space_of("Residual")
    return space.build(space.base, seed=0)


def trained(
    hook: StepHook | None = None, model: nn.Module | None = None
) -> tuple[nn.Module, float]:
    """A network after one run of five steps, and the mean loss."""
    model, task = model or network(), augmented_task()
    loader = DeviceLoader(task.train, task, RECIPE.batch_size)
    sgd = SgdSteps(model, loader, RECIPE, CPU, steps=len(RATES), hook=hook)
    return model, sgd.run(torch.Generator().manual_seed(1), RATES)


def test_steps_are_those_of_a_literal_loop() -> None:
    """Bit for bit, over more than one pass over the images."""
    model, task = network().train(), augmented_task()
    loader = DeviceLoader(task.train, task, RECIPE.batch_size)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(
        parameter_groups(model, RECIPE.weight_decay), momentum=0.9, nesterov=True, fused=True
    )
    losses: list[float] = []
    while len(losses) < len(RATES):
        drawn = loader.draws(generator)[:, : loader.steps * loader.batch_size]
        for columns in drawn.split(loader.batch_size, dim=1)[: len(RATES) - len(losses)]:
            images, labels = loader.augmented(columns)
            for group in optimizer.param_groups:
                group["lr"] = RATES[len(losses)]
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    found, mean = trained()
    assert mean == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_a_hook_replaces_the_step() -> None:
    """The plain step as a hook gives the same network, and a hook that never steps none other."""
    plain, loss = trained()
    hooked, hooked_loss = trained(sgd_step)
    assert hooked_loss == loss
    assert all(map(torch.equal, plain.parameters(), hooked.parameters()))

    def idle(optimizer: torch.optim.Optimizer, backward: object) -> Tensor:
        return torch.tensor(2.0)

    still, reported = trained(idle)
    assert reported == 2.0
    assert all(map(torch.equal, still.parameters(), network().parameters()))


def test_a_hook_sees_the_gradients_before_the_weights_change() -> None:
    """Gradients that it sets to zero leave only weight decay; it runs once a step."""
    model = network()
    weight, calls = model.get_parameter("fc.bias"), []

    def erase() -> None:
        calls.append(weight.grad.abs().max().item())  # type: ignore[union-attr]
        for parameter in model.parameters():
            parameter.grad.zero_()  # type: ignore[union-attr]

    before = weight.detach().clone()
    trained(after_backward(erase), model)
    assert len(calls) == len(RATES)
    assert min(calls) > 0
    assert torch.equal(weight, before)


def test_the_trainer_passes_its_hook_on() -> None:
    """A hook with the plain step trains the same curve; one that erases gradients another."""
    curves = [
        [r.loss for r in fit(network(), small_task(), RECIPE, seed=0, hook=hook)]
        for hook in (None, sgd_step)
    ]
    assert curves[0] == curves[1]
    model = network()
    erased = fit(model, small_task(), RECIPE, seed=0, hook=after_backward(model.zero_grad))
    assert [r.loss for r in erased] != curves[0]


@pytest.mark.gpu
def test_steps_with_a_hook_are_not_captured() -> None:
    """On a GPU plain steps become a CUDA graph, those with a hook stay eager."""
    task = small_task()
    modes = {}
    for hook in (None, sgd_step):
        trainer = Trainer(
            network(), task, replace(RECIPE, batch_size=20), seed=0, device="cuda", hook=hook
        )
        modes[hook] = trainer.run_epoch().mode.rpartition(", ")[2]
    assert modes == {None: "graph", sgd_step: "eager"}
