"""Steps of a recipe's optimizer on a task's batches: shared by training, fine-tuning and group
learning.

A *step hook* replaces what one step does with its batch, :func:`sgd_step`. It gets the optimizer
and a function ``backward`` that runs the batch forward and backward. Most hooks only act on the
gradients (:func:`after_backward`): network slimming adds those of a penalty, Fisher pruning reads
them. Group learning runs each batch twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.data.loaders import DeviceLoader, StreamLoader
from widthsearch.errors import DataError, StudyError
from widthsearch.training.cuda_graphs import CudaGraphStep
from widthsearch.training.optimizers import has_tensor_rate, make_optimizer, why_no_graph
from widthsearch.training.recipe import Recipe
from widthsearch.utils.devices import autocast

Backward = Callable[[], Tensor]
"""Adds the gradients of the step's batch to those of the parameters; returns its mean loss, ()."""

StepHook = Callable[[torch.optim.Optimizer, Backward], Tensor]
"""Performs one step, calling ``backward`` as often as it needs; returns the loss to report."""


def after_backward(action: Callable[[], object]) -> StepHook:
    """A hook that acts on the gradients of each batch before the weights change."""

    def step(optimizer: torch.optim.Optimizer, backward: Backward) -> Tensor:
        optimizer.zero_grad()
        loss = backward()
        action()
        optimizer.step()
        return loss

    return step


sgd_step = after_backward(lambda: None)
"""The plain step: gradients of one batch, one optimizer step."""


class SgdSteps:
    """Steps on a task's loss, so many a call; on a GPU, plain steps run as one CUDA graph.

    Args:
        model: The network, on its device.
        loader: The training batches.
        recipe: The optimizer, weight decay, clipping, label smoothing and precision.
        device: The device of the network.
        steps: Steps of each :meth:`run`; None for one pass over the batches.
        hook: Replaces :func:`sgd_step`. Python code between kernels is lost in a CUDA graph, so
            that steps with a hook run eagerly.

    Attributes:
        optimizer: Its state lasts over runs.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> task, recipe = load_task("digits"), Recipe(batch_size=64)
        >>> loader = DeviceLoader(task.train, task, recipe.batch_size)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> norms = []
        >>> hook = after_backward(lambda: norms.append(model[1].weight.grad.norm().item()))
        >>> sgd = SgdSteps(model, loader, recipe, torch.device("cpu"), steps=20, hook=hook)
        >>> first, second = (sgd.run(torch.Generator().manual_seed(i), [0.1] * 20) for i in (0, 1))
        >>> second < first, len(norms)
        (True, 40)
    """

    def __init__(
        self,
        model: nn.Module,
        loader: DeviceLoader | StreamLoader,
        recipe: Recipe,
        device: torch.device,
        *,
        steps: int | None = None,
        hook: StepHook | None = None,
    ) -> None:
        self._model, self._loader, self._hook = model, loader, hook or sgd_step
        self._cast = autocast(device, recipe.precision)
        self._smoothing = recipe.label_smoothing
        self._count = steps or loader.steps
        # A CUDA graph repeats a step at fixed addresses: steps read and write these tensors only.
        self._rates = torch.zeros(self._count, device=device)
        self._rate = torch.tensor(recipe.lr, dtype=torch.float32, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        groups = parameter_groups(model, recipe.weight_decay)
        self.optimizer = make_optimizer(groups, recipe, self._rate)
        self._numbers: Iterator[float] | None = None  # the rates, where they are no tensor
        self._fault_at_start: str | None = None  # "" without one; None before the first batch
        capture = recipe.capture and hook is None and loader.resident
        self._graph = CudaGraphStep(model, device, capture, why_no_graph(self.optimizer))

    @property
    def mode(self) -> str:
        """See :attr:`CudaGraphStep.mode`."""
        return self._graph.mode

    def run(
        self, generator: torch.Generator, rates: Sequence[float], epoch: int | None = None
    ) -> float:
        """Train for the number of steps given at construction; returns the mean loss.

        The host waits for the device only once, at the end.

        Args:
            generator: Draws the order of samples and the augmentation, on the CPU.
            rates: The learning rate of each step.
            epoch: As in :meth:`DeviceLoader.draws`.

        Raises:
            StudyError: The loss is not finite, and was not at the first batch, or its gradients.
            DataError: The loss does not depend on the network.
        """
        assert len(rates) == self._count
        self._loader.begin(self._count, generator, epoch)
        self._rates.copy_(torch.tensor(rates))
        self._numbers = None if has_tensor_rate(self.optimizer) else iter(rates)
        self._at.zero_()
        self._loss.zero_()
        self._model.train()
        self._graph.run(self._step, self._count)
        self.optimizer.zero_grad()  # gradients in the graph's memory would keep it alive
        mean = self._loss.item() / self._count
        if self._fault_at_start and not math.isfinite(mean):
            raise StudyError(
                f"a network must begin with a finite loss, but {self._fault_at_start} for the "
                "first batch, before any step, whatever lr is: see the loss, the batch and the "
                "network's outputs for it"
            )
        return mean

    def load_optimizer(self, state: dict[str, object]) -> None:
        """Continue with the state of another optimizer, see ``optimizer.state_dict()``."""
        self.optimizer.load_state_dict(state)
        self._fault_at_start = ""  # the start was that optimizer's
        if has_tensor_rate(self.optimizer):
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate
        self._graph.forget()  # the optimizer's state has new addresses

    def _step(self) -> None:
        """One step on the next batch; all state is in tensors, see ``__init__``."""
        batch: Any = self._loader.batch(self._at)
        self._rate.copy_(self._rates.index_select(0, self._at).squeeze())
        if self._numbers is not None:
            rate = next(self._numbers)
            for group in self.optimizer.param_groups:
                group["lr"] = rate

        def backward() -> Tensor:
            with self._cast:
                loss = self._loader.loss(self._model, batch, self._smoothing)
            if loss.requires_grad:
                torch.autograd.backward(loss)
            if self._fault_at_start is None:  # never in a CUDA graph, which waits for no value
                self._fault_at_start = _fault_at_start(self._model, loss)
            return loss.detach()

        self._loss.add_(self._hook(self.optimizer, backward))
        self._at.add_(1)


def _fault_at_start(model: nn.Module, loss: Tensor) -> str:
    """What is not finite of the first batch, after its backward pass, in words; "" for nothing.

    Raises:
        DataError: No parameter has a gradient.
    """
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    if not gradients:
        raise DataError(
            "a loss must depend on the parameters of its network, but none has a gradient: compute "
            "the loss from the outputs of the network that it is given, and train some parameter"
        )
    if not loss.isfinite():
        return f"its loss is {loss.item()}"
    broken = (k for k, gradient in gradients.items() if not gradient.isfinite().all())
    return next((f"the gradient of {k!r} is not finite" for k in broken), "")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: decayed (two dimensions or more) and not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
