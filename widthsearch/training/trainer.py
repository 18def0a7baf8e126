"""The one training loop, step by step: an epoch at a time, saved and resumed exactly.

An epoch's randomness (the order of images, augmentation, dropout) is a function of the run's seed
and the epoch's number alone. So a checkpoint holds no generator, and a resumed run gives the
numbers of an uninterrupted one: bit for bit on a CPU with the same number of threads. On CUDA,
cuDNN is held to deterministic kernels; another operation that a model calls may have none.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widthsearch.data.tasks import DeviceLoader, Task
from widthsearch.errors import DataError
from widthsearch.training.checkpoints import read_checkpoint, write_checkpoint
from widthsearch.training.cuda_graphs import CudaGraphStep
from widthsearch.training.recipe import EpochResult, Precision, Recipe
from widthsearch.utils.devices import (
    autocast,
    check_device,
    deterministic_cudnn,
    fixed_threads,
    format_name,
    pick_memory_format,
    seeded,
)

CHECKPOINT = "training.ckpt"
"""The file that a run writes into the folder it is given."""


class Trainer:
    """A network being trained, an epoch a call; the network that is given is the one that learns.

    Args:
        model: Takes (N, C, H, W) and gives logits (N, classes or more).
        task: What it learns.
        recipe: How it learns.
        seed: For the order of images, augmentation and dropout. The initialisation is the model's.
        device: Where, e.g. ``cpu`` or ``cuda:0``; the model is moved there.
        threads: CPU threads while it trains; None leaves torch's number.
        code: What tells the model's code from other code: checkpoints are of the same alone.

    Raises:
        DeviceError: The device is not there.
        DataError: The model cannot take the task's images, or gives no logit for some class.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        *,
        seed: int,
        device: str = "cpu",
        threads: int | None = None,
        code: str | None = None,
    ) -> None:
        self._device = check_device(device)
        self._recipe, self._seed, self._threads = recipe, seed, threads
        self._model = model.to(self._device)
        with seeded(seed, 0, self._device), fixed_threads(threads):
            layout = check_model(model, task, self._device)
        self._layout = layout
        self._model.to(memory_format=layout)
        self._cast = autocast(self._device, recipe.precision)
        self._train = DeviceLoader(task.train, task, recipe.batch_size, self._device, layout)
        self._validation = _Evaluation(
            model,
            _whole_split(task, "validation", self._device, layout),
            self._cast,
            self._device,
            recipe.capture,
        )
        # What a step reads and writes stays where it is, so that a CUDA graph can repeat the step.
        images = self._train.steps * self._train.batch_size
        self._batch = torch.arange(self._train.batch_size, device=self._device)
        self._draws = torch.zeros(6, images, dtype=torch.int64, device=self._device)
        self._rates = torch.zeros(self._train.steps, device=self._device)
        self._rate = torch.tensor(recipe.lr, dtype=torch.float32, device=self._device)
        self._at = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._optimizer = torch.optim.SGD(
            parameter_groups(model, recipe.weight_decay),
            lr=self._rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            fused=True,
        )
        self._steps = CudaGraphStep(model, self._device, recipe.capture)
        self._curve: list[EpochResult] = []
        shapes = [(k, list(v.shape), str(v.dtype)) for k, v in model.state_dict().items()]
        self._identity = {
            "recipe": asdict(recipe),
            "seed": seed,
            "task": [task.name, len(task.train), len(task.validation), *task.input_shape],
            "model": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
            **({} if code is None else {"code": code}),
        }

    @property
    def epoch(self) -> int:
        """How many epochs were trained."""
        return len(self._curve)

    @property
    def curve(self) -> tuple[EpochResult, ...]:
        """The result of each epoch that was trained."""
        return tuple(self._curve)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left: all were trained, or training diverged."""
        diverged = bool(self._curve) and math.isnan(self._curve[-1].accuracy)
        return diverged or self.epoch >= self._recipe.epochs

    @property
    def mode(self) -> str:
        """How it trains: precision, memory format, and whether steps are a CUDA graph or eager.

        For example ``bf16, channels_last, graph``, or ``fp32, contiguous, eager (why not as a
        graph)``. A graph is there after the first few steps.
        """
        precision = "bf16" if self._cast._enabled else "fp32"
        return f"{precision}, {format_name(self._layout)}, {self._steps.mode}"

    def run_epoch(self) -> EpochResult:
        """Train for one epoch and evaluate on the validation split."""
        assert not self.finished
        number = self.epoch + 1
        with (
            seeded(self._seed, number, self._device) as generator,
            fixed_threads(self._threads),
            deterministic_cudnn(),
        ):
            started = time.perf_counter()
            loss = self._train_epoch(generator)
            seconds = time.perf_counter() - started
            accuracy = self._validation() if math.isfinite(loss) else math.nan
        self._curve.append(EpochResult(number, loss, accuracy, seconds, self.mode))
        return self._curve[-1]

    def _train_epoch(self, generator: torch.Generator) -> float:
        """One pass over the training split; the mean loss. The host waits for the device once."""
        steps = self._train.steps
        first = self.epoch * steps
        rates = [self._recipe.learning_rate(first + i, steps) for i in range(steps)]
        draws = self._train.draws(generator, self.epoch)
        self._draws.copy_(draws[:, : self._draws.shape[1]])
        self._rates.copy_(torch.tensor(rates))
        self._at.zero_()
        self._loss.zero_()
        self._model.train()
        self._steps.run(self._step, steps)
        self._optimizer.zero_grad()  # a graph's gradients would keep its memory
        return self._loss.item() / steps

    def _step(self) -> None:
        """The next step: batch, learning rate, forward, loss, backward, optimizer."""
        columns = self._at * self._train.batch_size + self._batch
        images, labels = self._train.augmented(self._draws.index_select(1, columns))
        self._rate.copy_(self._rates.index_select(0, self._at).squeeze())
        with self._cast:
            logits = self._model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self._recipe.label_smoothing)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._loss.add_(loss.detach())
        self._at.add_(1)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into the folder; the last one stays until the new one is whole."""
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "curve": [list(astuple(result)) for result in self._curve],
        }
        write_checkpoint(folder / CHECKPOINT, self._identity, state)

    def load(self, folder: Path) -> None:
        """Go on from the folder's checkpoint as if never interrupted.

        Raises:
            CheckpointError: It is not there, is damaged, or is of another run; this run is then as
                it was.
        """
        state = read_checkpoint(folder / CHECKPOINT, self._identity, self._device)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        self._steps.forget()  # momentum lies elsewhere now
        self._curve = [EpochResult(*result) for result in state["curve"]]


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[EpochResult], None] | None = None,
) -> tuple[EpochResult, ...]:
    """Train a network by the whole recipe, or until it diverges; returns the curve.

    The arguments are those of :class:`Trainer`; ``on_epoch`` is called with each result.
    """
    run = Trainer(model, task, recipe, seed=seed, device=device)
    while not run.finished:
        result = run.run_epoch()
        if on_epoch is not None:
            on_epoch(result)
    return run.curve


def evaluate(
    model: nn.Module,
    task: Task,
    split: Literal["validation", "test"],
    device: str = "cpu",
    precision: Precision = "auto",
) -> float:
    """Top-1 accuracy on a split in percent; NaN if a logit is not finite. Moves the model there.

    Raises:
        DeviceError: The device is not there.
        DataError: The task has no such split, or the model does not fit it.
    """
    place = check_device(device)
    model.to(place)
    with seeded(0, 0, place), deterministic_cudnn():
        layout = check_model(model, task, place)
        loader = _whole_split(task, split, place, layout)
        return _Evaluation(model, loader, autocast(place, precision), place)()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """A network's trainable parameters, decayed (two dimensions or more) and not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def check_model(model: nn.Module, task: Task, device: torch.device) -> torch.memory_format:
    """Run the network on two blank images; the memory format to run it in."""
    blank = torch.zeros(2, *task.input_shape, device=device)
    training = model.training
    try:
        layout = pick_memory_format(model, blank)
        model.eval()
        with torch.no_grad():
            logits = model(blank.to(memory_format=layout))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"a network must take the task's images, but fails on those of {task.name!r}, "
            f"{task.input_shape}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train(training)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if isinstance(shape, str) or len(shape) != 2 or shape[1] < task.classes:
        raise DataError(
            f"a network must give logits of shape (N, {task.classes}) for task {task.name!r}, but "
            f"for 2 images it gives {shape}; give its last layer {task.classes} outputs"
        )
    return layout


def _whole_split(
    task: Task,
    name: Literal["validation", "test"],
    device: torch.device,
    layout: torch.memory_format,
) -> DeviceLoader:
    split = task.validation if name == "validation" else task.test
    if split is None:
        raise DataError(
            f"task {task.name!r} has no test split here, for a search gets none; load the task anew"
        )
    # As many pixels at once as keep a GPU busy; on a CPU as few as stay in its caches (ResNet-20 on
    # 32×32, fp32, one core: 1,580 images a second in batches of 32, 480 in batches of 2,048).
    return DeviceLoader(split, task, evaluation_batch(task, device.type), device, layout)


def evaluation_batch(task: Task, device_type: str) -> int:
    """How many images are evaluated at once."""
    pixels = 2**16 if device_type == "cpu" else 2**21
    return max(8, pixels // math.prod(task.input_shape[1:]))


class _Evaluation:
    """Top-1 accuracy of a network on a split, as often as it is called."""

    def __init__(
        self,
        model: nn.Module,
        loader: DeviceLoader,
        cast: torch.autocast,
        device: torch.device,
        capture: bool = False,
    ) -> None:
        self._model, self._loader, self._cast = model, loader, cast
        self._batch = torch.arange(loader.batch_size, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._steps = CudaGraphStep(model, device, capture)

    def __call__(self) -> float:
        """In percent; NaN if a logit is not finite."""
        model, loader = self._model, self._loader
        self._at.zero_()
        self._hits.zero_()
        self._finite.fill_(True)
        training = model.training
        model.eval()
        with torch.inference_mode():
            self._steps.run(self._step, loader.steps)
            if rest := len(loader) % loader.batch_size:
                self._count(len(loader) - rest + self._batch[:rest])
        model.train(training)
        return 100 * self._hits.item() / len(loader) if self._finite.item() else math.nan

    def _step(self) -> None:
        """The next whole batch."""
        self._count(self._at * self._loader.batch_size + self._batch)
        self._at.add_(1)

    def _count(self, chosen: Tensor) -> None:
        images, labels = self._loader.plain(chosen)
        with self._cast:  # here, for what it casts once must not outlive a captured step
            logits = self._model(images)
        self._hits.add_((logits.argmax(dim=1) == labels).sum())
        self._finite.logical_and_(logits.isfinite().all())
