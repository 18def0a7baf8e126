"""The contract of a trainer: a function ``train(network, trial)``, the built-in one or the user's.

::

    def train(network, trial):
        train_set, val_set = trial.data
        optimizer = torch.optim.Adam(network.parameters())
        if (state := trial.resume()) is not None:
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
        for epoch in range(trial.epoch, trial.epochs):
            ...  # train for one epoch, and evaluate
            if not trial.report({"accuracy": 71.2, "loss": 0.4}, state=lambda: {...}):
                return

A report ends an epoch: it extends the learning curve, replaces the checkpoint, and waits until the
study has decided whether the trial continues. torch's, numpy's and Python's generators are seeded
anew for each epoch, from the trial's seed and the epoch's number. So a training that continues from
a checkpoint draws the numbers of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin

import torch
from pydantic import TypeAdapter
from torch import nn

from widthsearch.bayesopt.metric import COSTS
from widthsearch.errors import CheckpointError, StudyError, first_line, writing
from widthsearch.training.checkpoints import read_checkpoint, write_checkpoint
from widthsearch.training.recipe import EpochResult, OwnRecipe, plain_number, recipe_values
from widthsearch.utils import devices
from widthsearch.utils.validation import filled
from widthsearch.widths import Widths

R = TypeVar("R")

CHECKPOINT = "training.ckpt"
"""The name of a trial's checkpoint in its folder."""

_ROWS = TypeAdapter(list[tuple[int, float | None, float, float, str, dict[str, float]]])
"""The results of epochs in a checkpoint."""

State = Mapping[str, Any]
"""Tensors, numbers, texts, and lists and mappings of those: the content of a checkpoint."""


@dataclass(frozen=True)
class Job:
    """A trainer with its recipe: how the networks of a study are trained.

    Attributes:
        trainer: The function ``train(network, trial)``.
        name: Its name in messages.
        recipe: The ``recipe`` of its trials.
        epochs: The number of reports of each training.
        metric: The name of the number that every report must have.
        identity: JSON values that two runs of one training have in common; a checkpoint is refused
            where they differ.

    Example:
        >>> def train(network, trial):
        ...     for epoch in range(trial.epoch, trial.epochs):
        ...         if not trial.report({"accuracy": 50.0 + epoch}):
        ...             return
        >>> job, net = Job(train, "mine", recipe={"epochs": 2}, epochs=2), nn.Linear(4, 4)
        >>> widths = Widths(("fc",), (4,))
        >>> trial = TrainingTrial(job, net, None, widths, seed=0, folder=Path("unused"))
        >>> job.run(net, trial)
        >>> [result.value for result in trial.curve]
        [50.0, 51.0]
    """

    trainer: Callable[[nn.Module, TrainingTrial[Any]], object]
    name: str
    recipe: Any
    epochs: int
    metric: str = "accuracy"
    identity: Mapping[str, Any] = field(default_factory=dict)

    def lasting(self, epochs: int) -> Job:
        """The job with another number of epochs, which its recipe has too where it has any."""
        recipe: Any = self.recipe
        if isinstance(recipe, Mapping):
            recipe = {**recipe, "epochs": epochs}
        elif hasattr(recipe, "epochs"):
            recipe = dataclasses.replace(recipe, epochs=epochs)
        identity = {**self.identity, "epochs": epochs}
        return dataclasses.replace(self, recipe=recipe, epochs=epochs, identity=identity)

    def run(self, network: nn.Module, trial: TrainingTrial[Any]) -> None:
        """Train a network until its trial has ended.

        Raises:
            StudyError: The trainer breaks the contract. Any exception of its own is passed on.
        """
        before = _parameters(network)
        trial.begin_epoch()
        self.trainer(network, trial)
        trial.check_resumed()
        if not trial.ended:
            raise StudyError(
                f"a trainer must report once an epoch until report() returns False, but "
                f"{self.name!r} returned after {trial.epoch} of {self.epochs} reports"
            )
        if changed := before.items() ^ _parameters(network).items():
            name = min(changed)[0]
            raise StudyError(
                "a trainer must keep the parameters of its network, whose costs are known, but "
                f"{self.name!r} changed the shape of {name!r}, or added or removed it: train a "
                "copy, or change the model itself"
            )


def _parameters(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}


class TrainingTrial(Generic[R]):
    """The training of one network, as its trainer sees it.

    ``TrainingTrial[MyRecipe]`` as the annotation of a trainer's second parameter names the
    dataclass that checks and holds the study's recipe.

    Args:
        job: The trainer and its recipe.
        network: The network, for the identity of its checkpoints; it is not kept.
        data: The data.
        widths: The network's widths.
        seed: The trial's seed.
        folder: The folder of the trial's files; it is made when it is needed.
        device: The device of the network.
        threads: The number of CPU threads.
        final: Whether this is a final training.
        weights: An identifier of the weights that the network starts from; None for new ones. A
            checkpoint of other ones is refused.
        code: An identifier of the network's code; a checkpoint of other code is refused.
        on_report: Called with the result of each epoch; returns whether the trial continues.

    Attributes:
        data: The result of the study's ``data`` function, or None without one; for the built-in
            trainer a :class:`~widthsearch.data.tasks.Task`. All trials of a machine share the
            memory of its arrays and CPU tensors: copy what you change.
        recipe: The study's recipe: an instance of the dataclass that the annotation names, or else
            a mapping.
        epochs: The number of reports of a whole training.
        widths: The network's widths.
        seed: The trial's seed.
        device: The device of the network.
        threads: The number of CPU threads.
        final: Whether this is the final training of a chosen network, and not a trial of a search.
        curve: One result per epoch so far.
        on_report: See above.

    Example:
        >>> @dataclass
        ... class MyRecipe:
        ...     lr: float
        >>> def train(network: nn.Module, trial: TrainingTrial[MyRecipe]) -> None:
        ...     inputs, targets = trial.data
        ...     optimizer = torch.optim.SGD(network.parameters(), trial.recipe.lr)
        ...     if (saved := trial.resume()) is not None:
        ...         network.load_state_dict(saved)
        ...     for epoch in range(trial.epoch, trial.epochs):
        ...         loss = (network(inputs) - targets).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         if not trial.report({"accuracy": -loss}, state=network.state_dict):
        ...             return
    """

    def __init__(
        self,
        job: Job,
        network: nn.Module,
        data: Any,
        widths: Widths,
        *,
        seed: int,
        folder: Path,
        device: torch.device | str = "cpu",
        threads: int = 1,
        final: bool = False,
        weights: str | None = None,
        code: str | None = None,
        on_report: Callable[[EpochResult], bool] = lambda result: True,
    ) -> None:
        self.data, self.widths, self.seed = data, widths, seed
        self.recipe: R = job.recipe
        self.epochs = job.epochs
        self.device, self.threads, self.final = torch.device(device), threads, final
        self.curve: list[EpochResult] = []
        self.on_report = on_report
        self._job, self._folder = job, folder
        shapes = [(k, list(v.shape), str(v.dtype)) for k, v in network.state_dict().items()]
        self._identity = {
            **job.identity,
            "seed": seed,
            "model": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
            **({} if weights is None else {"weights": weights}),
            **({} if code is None else {"code": code}),
        }
        self._state: Any = None
        self._must_resume = self._stopped = False
        self._since = time.perf_counter()

    @property
    def epoch(self) -> int:
        """The number of epochs that have been reported: the first one to train, from 0."""
        return len(self.curve)

    @property
    def folder(self) -> Path:
        """A folder for the trainer's own files, which is removed when the trial has ended."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    @property
    def complete(self) -> bool:
        """Whether all epochs were reported, or the metric was not finite."""
        diverged = bool(self.curve) and not math.isfinite(self.curve[-1].value)
        return diverged or self.epoch >= self.epochs

    @property
    def ended(self) -> bool:
        """Whether the trial is complete or was stopped: nothing more may be reported."""
        return self._stopped or self.complete

    def load(self) -> None:
        """Go back to the last checkpoint: to its curve and its state.

        Raises:
            CheckpointError: The checkpoint is missing, damaged or of another training.
        """
        saved = read_checkpoint(self._folder / CHECKPOINT, self._identity, self.device)
        try:
            self.curve = [EpochResult(*row) for row in _ROWS.validate_python(saved["curve"])]
            self._state, self._must_resume = saved["state"], True
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"a checkpoint must hold a curve and a state, but {self._folder / CHECKPOINT} does "
                "not; restart the run"
            ) from error

    def check_resumed(self) -> None:
        """Check that the state of the last checkpoint was asked for.

        Raises:
            StudyError: It was not: new weights would go on with the old curve.
        """
        if self._must_resume:
            raise StudyError(
                f"a trainer that saves a state must take it up, but {self._job.name!r} went on "
                f"from epoch {self.epoch} and did not call trial.resume()"
            )

    def resume(self) -> Any:
        """The state that the last checkpoint holds, with its tensors on the trial's device.

        Returns:
            None for a training from the start, and after the first report.
        """
        self._must_resume = False
        return self._state

    def report(
        self,
        metrics: Mapping[str, Any],
        state: Callable[[], State] | None = None,
        *,
        seconds: float | None = None,
        mode: str = "",
    ) -> bool:
        """End an epoch.

        Args:
            metrics: Numbers by name. The study's metric must be among them, and no cost; all are
                recorded in the learning curve. A metric that is not finite ends the trial as
                diverged.
            state: Returns all that the training needs to continue, for a checkpoint: tensors,
                numbers, texts, and lists and mappings of those. Without it, a trial that is
                interrupted starts again.
            seconds: The time of the epoch without evaluation; by default the time since the last
                report.
            mode: How the epoch was run, in a word or two, for the record.

        Returns:
            Whether the trial continues; the trainer must return where it does not.

        Raises:
            StudyError: The metrics are not numbers, lack the study's or have a cost among them, the
                state cannot be loaded again or was not taken up, or the trial has ended.
        """
        seconds = time.perf_counter() - self._since if seconds is None else seconds
        if self.ended:
            raise StudyError(
                f"a trainer must return once report() has returned False, but {self._job.name!r} "
                f"reported again after epoch {self.epoch}"
            )
        self.check_resumed()
        if state is not None and not callable(state):
            raise StudyError(
                "`state` must be a function without arguments that returns the state, but trainer "
                f"{self._job.name!r} gave {type(state).__name__}: write state=lambda: {{...}}"
            )
        self._state = None
        if not isinstance(metrics, Mapping):
            raise StudyError(
                f"a report must be a mapping of names to numbers, but {self._job.name!r} reported "
                f"{metrics!r}"
            )
        numbers = {str(name): self._number(name, value) for name, value in metrics.items()}
        if (metric := self._job.metric) not in numbers:
            raise StudyError(
                f"a trainer must report the study's metric {metric!r}, but {self._job.name!r} "
                f"reported {', '.join(numbers) or 'nothing'}: add it to each report"
            )
        if costs := [name for name in numbers if name in COSTS]:
            raise StudyError(
                "a trainer must leave costs to the study, which knows them, but "
                f"{self._job.name!r} reported {costs[0]!r}: name it otherwise"
            )
        value, loss = numbers.pop(metric), numbers.pop("loss", None)
        self.curve.append(EpochResult(self.epoch + 1, loss, value, seconds, mode, numbers))
        if state is not None:
            if (content := state()) is None:  # resume() returns it, which means: from the start
                raise StudyError(
                    "`state` must return all that a training needs to continue, but that of "
                    f"trainer {self._job.name!r} returned None: add a `return`, or leave it out"
                )
            self._save(content)
        self._stopped = not self.on_report(self.curve[-1])
        self.begin_epoch()
        return not self.ended

    def begin_epoch(self) -> None:
        """Seed all generators for the next epoch, and start its time."""
        devices.reseed(self.seed, self.epoch)
        self._since = time.perf_counter()

    def _number(self, name: object, value: Any) -> float:
        try:
            return plain_number(value)
        except (TypeError, ValueError, RuntimeError):
            raise StudyError(
                f"a trainer must report numbers, but {self._job.name!r} reported {name}={value!r}"
            ) from None

    def _save(self, state: State) -> None:
        """Replace the checkpoint; the first one is loaded again, so that a bad state is seen."""
        first = not (path := self._folder / CHECKPOINT).exists()
        rows = [list(astuple(result)) for result in self.curve]
        try:
            with writing(self._folder):
                write_checkpoint(path, self._identity, {"curve": rows, "state": state})
            if first:
                read_checkpoint(path, self._identity, torch.device("cpu"))
        except (CheckpointError, pickle.PicklingError, AttributeError, TypeError) as error:
            if first:
                path.unlink(missing_ok=True)
            raise StudyError(
                "a state must consist of tensors, numbers, texts, and lists and mappings of those, "
                f"but that of trainer {self._job.name!r} does not: "
                f"{first_line(error.__cause__ or error)}"
            ) from None


def own_job(
    trainer: Callable[..., Any], name: str, recipe: OwnRecipe, metric: str, identity: State
) -> Job:
    """The job of a user's own trainer, with its recipe checked.

    Args:
        trainer: The function.
        name: Its reference.
        recipe: The study's recipe.
        metric: The study's metric.
        identity: See :class:`Job`.

    Raises:
        StudyError: The trainer does not take (network, trial), or the recipe does not fit the
            dataclass that its annotation names.

    Example:
        >>> @dataclass(frozen=True)
        ... class Cropped:
        ...     crop: int = 32
        >>> def train(network, trial: TrainingTrial[Cropped]): ...
        >>> own_job(train, "mine", OwnRecipe(epochs=3, crop=48), "accuracy", {}).recipe
        Cropped(crop=48)
        >>> own_job(train, "mine", OwnRecipe(epochs=3, corp=48), "accuracy", {})
        Traceback (most recent call last):
        widthsearch.errors.StudyError: unknown key 'recipe.corp'; did you mean 'crop'?
    """
    try:
        bound = inspect.signature(trainer, eval_str=True).bind(None, None)
    except (TypeError, ValueError, NameError) as error:
        raise StudyError(
            f"a trainer must be a function of (network, trial), but {name!r} is not: "
            f"{first_line(error)}"
        ) from None
    if inspect.isgeneratorfunction(trainer) or inspect.iscoroutinefunction(trainer):
        raise StudyError(
            f"a trainer must train when it is called, but {name!r} only returns a generator or a "
            "coroutine: use neither `yield` nor `async`"
        )
    annotation = bound.signature.parameters[list(bound.arguments)[-1]].annotation
    values = recipe_values(recipe)
    checked: Any = values
    if get_origin(annotation) is TrainingTrial:
        (named,) = get_args(annotation)
        if dataclasses.is_dataclass(named):
            fields = {field.name for field in dataclasses.fields(named)}
            own = {k: v for k, v in values.items() if k != "epochs" or k in fields}
            checked = filled(named, own, "recipe")
    return Job(trainer, name, checked, recipe.epochs, metric, identity)
