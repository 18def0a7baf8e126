"""The one training loop: it trains an epoch a call, and resumes from a checkpoint exactly.

The seed and the number of an epoch alone determine the epoch's random numbers (the order of images,
augmentation, dropout). A checkpoint therefore holds no generator state, and a resumed training
gives the numbers of an uninterrupted one: bit for bit on a CPU with the same number of threads. On
CUDA, cuDNN is restricted to deterministic kernels; other operations of a model may have none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widthsearch.data.config import REPORTED
from widthsearch.data.loaders import DeviceLoader, StreamLoader, loader_of, moved
from widthsearch.data.losses import LOSSES
from widthsearch.data.sources import Split
from widthsearch.data.tasks import AnyTask, OwnTask, Task
from widthsearch.errors import DataError, StudyError, first_line
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.inputs import image_shape, inputs_to_json
from widthsearch.training.cuda_graphs import CudaGraphStep
from widthsearch.training.job import TrainingTrial
from widthsearch.training.recipe import EpochResult, Precision, Recipe
from widthsearch.training.sgd import SgdSteps, StepHook
from widthsearch.utils import devices


class Trainer:
    """Trains a network in place, one epoch a call.

    Args:
        model: Maps images (N, C, H, W) to outputs (N, K); with an own task any network.
        task: The images and targets, or a user's own task. The value of an epoch is its ``measure``
            on the validation split: accuracy in percent, for example, or the loss of an own task.
        recipe: Optimizer, schedule, batch size and precision.
        seed: Seeds the order of images, augmentation and dropout, but not the initial weights.
        device: E.g. ``cpu`` or ``cuda:0``; the model is moved there.
        threads: CPU threads during training; None leaves torch's number.
        hook: Replaces the plain step, see :mod:`widthsearch.training.sgd`.

    Raises:
        DeviceError: The device does not exist.
        DataError: The model cannot process the task's images, or has not the task's outputs.
        StudyError: A batch is larger than the training split.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> trainer = Trainer(model, load_task("digits"), Recipe(epochs=2, batch_size=32), seed=0)
        >>> while not trainer.finished:
        ...     result = trainer.run_epoch()
        >>> result.epoch, result.value > 50
        (2, True)
    """

    def __init__(
        self,
        model: nn.Module,
        task: AnyTask,
        recipe: Recipe,
        *,
        seed: int,
        device: str = "cpu",
        threads: int | None = None,
        hook: StepHook | None = None,
    ) -> None:
        self._device = devices.check_device(device)
        self._recipe, self._seed, self._threads, self._model = recipe, seed, threads, model
        with devices.fixed_threads(threads):
            self._train, self._layout = placed(model, task, recipe, self._device)
        self._validation: Callable[[], dict[str, float]]
        if isinstance(task, OwnTask):
            self._validation = partial(_own_loss, model, task, self._device, recipe.precision)
        else:
            at = self._layout, self._device, recipe.precision, recipe.capture
            self._validation = _Evaluation(model, task, task.validation, *at)
        self._sgd = SgdSteps(model, self._train, recipe, self._device, hook=hook)
        self._curve: list[EpochResult] = []
        self._measure = task.measure

    @property
    def epoch(self) -> int:
        """The number of epochs trained so far."""
        return len(self._curve)

    @property
    def curve(self) -> tuple[EpochResult, ...]:
        """The results of the epochs trained so far."""
        return tuple(self._curve)

    @property
    def finished(self) -> bool:
        """Whether all epochs were trained, or training diverged."""
        diverged = bool(self._curve) and math.isnan(self._curve[-1].value)
        return diverged or self.epoch >= self._recipe.epochs

    @property
    def mode(self) -> str:
        """Precision, memory format, and whether steps run as a CUDA graph or eagerly.

        For example ``bf16, channels_last, graph``, or ``fp32, contiguous, eager (reason)``. A graph
        exists after the first few steps.
        """
        precision = "bf16" if devices.uses_bf16(self._device, self._recipe.precision) else "fp32"
        return f"{precision}, {devices.format_name(self._layout)}, {self._sgd.mode}"

    def run_epoch(self) -> EpochResult:
        """Train for one epoch and evaluate on the validation split.

        Raises:
            StudyError, DataError: The loss is not finite before any step, or has no gradient.
        """
        assert not self.finished
        number, steps = self.epoch + 1, self._train.steps
        first = self.epoch * steps
        rates = [self._recipe.learning_rate(first + i, steps) for i in range(steps)]
        with (
            devices.seeded(self._seed, number, self._device) as generator,
            devices.fixed_threads(self._threads),
            devices.deterministic_cudnn(),
        ):
            started = time.perf_counter()
            loss = self._sgd.run(generator, rates, self.epoch)
            seconds = time.perf_counter() - started
            found = self._validation() if math.isfinite(loss) else {self._measure: math.nan}
        value = found.pop(self._measure)
        self._curve.append(EpochResult(number, loss, value, seconds, self.mode, found))
        return self._curve[-1]

    def state(self) -> dict[str, Any]:
        """All that a trainer of the same arguments needs to continue, beside the curve."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._sgd.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any], curve: Sequence[EpochResult]) -> None:
        """Continue exactly from the state after the last epoch of a curve."""
        self._model.load_state_dict(state["model"])
        self._sgd.load_optimizer(state["optimizer"])
        self._curve = list(curve)


def train_classifier(network: nn.Module, trial: TrainingTrial[Recipe]) -> None:
    """The built-in trainer, of the contract in :mod:`widthsearch.training.job`.

    A final training is on the training and validation splits together
    (:meth:`~widthsearch.data.tasks.Task.for_final_training`). There is no held-out split then: the
    accuracy of an epoch is on a part of the training images. The last report has the numbers of the
    test split too, such as ``test_accuracy``.
    """
    task: Task = trial.data
    recipe, device = trial.recipe, str(trial.device)
    trainer = Trainer(network, task, recipe, seed=trial.seed, device=device, threads=trial.threads)
    if (state := trial.resume()) is not None:
        trainer.restore(state, trial.curve)
    while not trainer.finished:
        result = trainer.run_epoch()
        metrics = {task.measure: result.value, "loss": result.loss, **result.metrics}
        if trial.final and result.epoch == trial.epochs:
            tested = _measured(network, task, "test", device, recipe.precision)
            metrics |= {f"test_{name}": value for name, value in tested.items()}
        if not trial.report(metrics, trainer.state, seconds=result.seconds, mode=result.mode):
            return


def fit(
    model: nn.Module,
    task: AnyTask,
    recipe: Recipe,
    *,
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[EpochResult], None] | None = None,
    hook: StepHook | None = None,
) -> tuple[EpochResult, ...]:
    """Train a network by the whole recipe, or until it diverges; returns the learning curve.

    The arguments are those of :class:`Trainer`; ``on_epoch`` is called with each epoch's result.
    """
    trainer = Trainer(model, task, recipe, seed=seed, device=device, hook=hook)
    while not trainer.finished:
        result = trainer.run_epoch()
        if on_epoch is not None:
            on_epoch(result)
    return trainer.curve


def placed(
    model: nn.Module, task: AnyTask, recipe: Recipe, device: torch.device
) -> tuple[DeviceLoader | StreamLoader, torch.memory_format]:
    """Move a network to its device, in its fastest memory format.

    Returns:
        The loader of the training batches, and the memory format.

    Raises:
        DataError: The network does not fit the task's images.
        StudyError: A batch is larger than the training split.
    """
    model.to(device)
    if isinstance(task, OwnTask):
        return StreamLoader(task, device), torch.contiguous_format
    check_recipe(recipe, task)
    with devices.seeded(0, 0, device):
        layout = check_model(model, task, device)
    model.to(memory_format=layout)
    return loader_of(task.train, task, recipe.batch_size, device, layout), layout


def _own_loss(
    model: nn.Module, task: OwnTask, device: torch.device, precision: Precision = "auto"
) -> dict[str, float]:
    """The mean loss over the batches of the validation split; NaN if it is not finite."""
    training = model.training
    model.eval()
    with torch.no_grad(), devices.autocast(device, precision):
        losses = [
            task.loss(model, moved(batch, device)).item() for batch in task.batches("validation", 0)
        ]
    model.train(training)
    if not losses:
        raise task.without_batches("validation")
    mean = math.fsum(losses) / len(losses)
    return {task.measure: mean if math.isfinite(mean) else math.nan}


def evaluate(
    model: nn.Module,
    task: AnyTask,
    split: Literal["validation", "test"],
    device: str = "cpu",
    precision: Precision = "auto",
) -> float:
    """The task's ``measure`` on a split; NaN if an output is not finite.

    With classes it is top-1 accuracy in percent, with an own task the mean loss on the validation
    split. The model is moved to the device.

    Raises:
        DeviceError: The device does not exist.
        DataError: The task has no such split, or the model does not fit the task.
    """
    return _measured(model, task, split, device, precision)[task.measure]


def _measured(
    model: nn.Module,
    task: AnyTask,
    split: Literal["validation", "test"],
    device: str,
    precision: Precision,
) -> dict[str, float]:
    """All numbers of an evaluation by name, see :func:`evaluate`."""
    place = devices.check_device(device)
    if isinstance(task, OwnTask):
        assert split == "validation", "an own task has no test split"
        with devices.seeded(0, 0, place):
            return _own_loss(model.to(place), task, place, precision)
    images = task.validation if split == "validation" else task.test
    if images is None:
        raise DataError(
            f"task {task.name!r} has no test split here, because a search removes it; load the "
            "task again"
        )
    model.to(place)
    with devices.seeded(0, 0, place), devices.deterministic_cudnn():
        layout = check_model(model, task, place)
        return _Evaluation(model, task, images, layout, place, precision)()


def check_model(model: nn.Module, task: Task, device: torch.device) -> torch.memory_format:
    """Check a network on two blank images, and return the memory format it should run in.

    Raises:
        DataError: The model cannot process the task's images, or has too few outputs.
    """
    blank = torch.zeros(2, *task.input_shape, device=device)
    training = model.training
    try:
        layout = devices.pick_memory_format(model, blank)
        model.eval()
        with torch.no_grad():
            logits = model(blank.to(memory_format=layout))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"a network must process the task's images, but fails on those of {task.name!r}, "
            f"{task.input_shape}: {first_line(error)}"
        ) from error
    finally:
        model.train(training)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if isinstance(shape, str) or len(shape) != 2 or shape[1] != task.classes:
        kind = "values" if task.minimized else "logits"
        raise DataError(
            f"a network must return {kind} of shape (N, {task.classes}) for task {task.name!r}, "
            f"but for 2 images it returns {shape}; give its last layer {task.classes} outputs, or "
            "the study a `trainer` of your own in place of the task"
        )
    return layout


def check_input_shape(space: SearchSpace, task: Task) -> None:
    """Check that a space was traced at the shape of a task's images, for which its costs hold.

    Raises:
        DataError: It was traced at another shape, at several inputs, or at integers.
    """
    traced = image_shape(space.input_shape)
    if traced == task.input_shape:
        return
    shape = ", ".join(map(str, task.input_shape))
    if traced is None:
        way = "a study takes one image-like input: make the space with one input of that shape"
    elif len(traced) == len(task.input_shape) and traced[0] != task.input_shape[0]:
        way = (
            f"the model takes {traced[0]} channels and the task's images have "
            f"{task.input_shape[0]}: use another task, or a model of as many channels as the images"
        )
    else:
        way = f"set `input: [{shape}]` for a torchvision model, or make the space with that shape"
    raise DataError(
        f"a space must be traced at the shape of the task's images, but {space.name!r} was traced "
        f"at {inputs_to_json(space.input_shape)} and the images of {task.name!r} are ({shape}); "
        f"{way}"
    )


def check_recipe(recipe: Recipe, task: Task) -> None:
    """Check that a recipe fits a task.

    Raises:
        StudyError: The training split has not one whole batch, or there is label smoothing without
            classes.
    """
    if recipe.label_smoothing and task.loss_name != "cross_entropy":
        raise StudyError(
            f"label_smoothing is for classes, but task {task.name!r} has the loss "
            f"{task.loss_name} and the recipe label_smoothing={recipe.label_smoothing:g}; leave it "
            "out"
        )
    if recipe.batch_size > len(task.train):
        raise StudyError(
            f"`batch_size <= training images` must hold, but the recipe has batch_size="
            f"{recipe.batch_size} and task {task.name!r} has {len(task.train)} training images; "
            "lower the recipe's batch_size"
        )


def evaluation_batch(task: Task, device_type: str) -> int:
    """The batch size of an evaluation: enough pixels for a GPU, few enough for a CPU's caches.

    ResNet-20 on 32×32, fp32, one core: 1,580 images/s in batches of 32, 480 in batches of 2,048.
    """
    pixels = 2**16 if device_type == "cpu" else 2**21
    return max(8, pixels // math.prod(task.input_shape[1:]))


class _Evaluation:
    """Computes the numbers of a task's loss on a split at each call, such as accuracy."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        split: Split,
        layout: torch.memory_format,
        device: torch.device,
        precision: Precision,
        capture: bool = False,
    ) -> None:
        self._model, self._cast = model, devices.autocast(device, precision)
        batch_size = evaluation_batch(task, device.type)
        self._loader = loader_of(split, task, batch_size, device, layout)
        self._batch = torch.arange(self._loader.batch_size, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss, self._names = LOSSES[task.loss_name], REPORTED[task.loss_name]
        self._targets = torch.from_numpy(split.labels)
        classes = task.loss_name == "cross_entropy"  # a record is then whether it is right
        self._records = torch.zeros(
            len(split),
            1 if classes else task.classes,
            dtype=torch.bool if classes else torch.float32,
            device=device,
        )
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._steps = CudaGraphStep(model, device, capture)

    def __call__(self) -> dict[str, float]:
        """The numbers by name; NaN if an output is not finite."""
        model, loader = self._model, self._loader
        self._at.zero_()
        self._finite.fill_(True)
        training = model.training
        model.eval()
        with torch.inference_mode():
            if loader.resident:
                self._steps.run(self._step, loader.steps)
                if rest := len(loader) % loader.batch_size:
                    self._keep(len(loader) - rest + self._batch[:rest])
            else:
                begun = 0
                for images, targets in loader.plain_batches(torch.arange(len(loader))):
                    rows = torch.arange(begun, begun + len(images), device=self._at.device)
                    self._record(rows, images, targets)
                    begun += len(images)
        model.train(training)
        if not self._finite.item():
            return dict.fromkeys(self._names, math.nan)
        return self._loss.summary(self._records, self._targets)

    def _step(self) -> None:
        """Evaluate the next whole batch."""
        self._keep(self._at * self._loader.batch_size + self._batch)
        self._at.add_(1)

    def _keep(self, chosen: Tensor) -> None:
        """Record the images with these indices."""
        self._record(chosen, *self._loader.plain(chosen))

    def _record(self, chosen: Tensor, images: Tensor, targets: Tensor) -> None:
        with self._cast:  # entered here: autocast's cache of cast weights must not outlive a step
            outputs = self._model(images)
        self._records.index_copy_(0, chosen, self._loss.record(outputs, targets))
        self._finite.logical_and_(outputs.isfinite().all())
