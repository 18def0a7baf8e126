"""The recipe of a training and the result of each epoch. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from widthsearch.errors import StudyError, first_line
from widthsearch.utils.validation import validated_dataclass

Precision = Literal["auto", "fp32", "bf16"]
"""``bf16`` is autocast; ``auto`` is bf16 on a CUDA device that has it in hardware, else fp32."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
}
"""The defaults of a recipe that depend on its optimizer, by the optimizer's name."""

_OF_OPTIMIZER: Any = None
"""The default of a key that is filled by ``_DEFAULTS``."""


@validated_dataclass("recipe")
class Recipe:
    """How the built-in trainer trains a network.

    Keys whose default depends on the optimizer have that of SGD, or of AdamW (torch's own). Any
    other optimizer needs ``lr``, and its weight decay is 0 by default.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Images per step: at least 2, at most the size of the training split. Each epoch
            skips the remainder that fills no batch, different images each time.
        optimizer: ``sgd``, ``adamw``, or any class of ``torch.optim`` that trains by gradients
            alone; with arguments as ``{"name": "RMSprop", "alpha": 0.9}``. Upper and lower case are
            the same. The name and the arguments are checked before a study runs, see
            ``training/optimizers.py``.
        lr: The peak learning rate; by default 0.1 for SGD and 0.001 for AdamW.
        momentum: The momentum of SGD, by default 0.9; None with another optimizer, which has
            momentum among its arguments if at all.
        nesterov: Whether SGD uses Nesterov momentum, by default true; None with another optimizer.
        weight_decay: As the optimizer applies it: an L2 penalty with SGD (by default 5e-4),
            decoupled from the gradients with AdamW (0.01). It is for parameters with two dimensions
            or more; BatchNorm parameters and biases have none.
        clip_norm: The greatest norm of all gradients together: larger ones are scaled down to it
            before each step. None does not clip.
        schedule: After a linear warm-up the learning rate decays to zero along half a cosine
            (``cosine``) or a line (``one_cycle``; the momentum is constant), or remains
            (``constant``).
        warmup_epochs: The length of the warm-up; None means 30% of the epochs with ``one_cycle``
            and 10% with the other schedules.
        label_smoothing: The share of each label that is spread over all classes.
        precision: ``bf16`` is autocast; ``auto`` is bf16 on a CUDA device with bf16 hardware, else
            fp32. A study on a CPU probes once which is faster (see ``training/autotune.py``).
        capture: Whether to run steps as a CUDA graph, on a GPU and where the network allows it.

    Raises:
        StudyError: A value breaks a rule.

    Example:
        >>> recipe = Recipe(epochs=2, lr=1.0, warmup_epochs=0.5)
        >>> [round(recipe.learning_rate(step, steps_per_epoch=4), 2) for step in range(8)]
        [0.33, 0.67, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
        >>> Recipe(label_smoothing=1)
        Traceback (most recent call last):
        widthsearch.errors.StudyError: recipe.label_smoothing must be less than 1, but was 1
    """

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=128, ge=2)
    lr: float = Field(default=_OF_OPTIMIZER, gt=0, allow_inf_nan=False)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    nesterov: bool | None = None
    weight_decay: float = Field(default=_OF_OPTIMIZER, ge=0, allow_inf_nan=False)
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    warmup_epochs: float | None = Field(default=None, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Precision = "auto"
    capture: bool = True
    optimizer: str | dict[str, Any] = "sgd"
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._fill_defaults()
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "momentum must be greater than 0 with nesterov, but was 0; set nesterov to false"
            )
        if not self.warmup < self.epochs:
            raise ValueError(
                f"warmup_epochs must be less than epochs, but they are {self.warmup_epochs:g} and "
                f"{self.epochs}"
            )
        return self

    def _fill_defaults(self) -> None:
        """Fill the keys whose default depends on the optimizer."""
        name = self.optimizer_name
        if not name:
            raise ValueError(
                "optimizer must be a name, or have one, such as {name: RMSprop, alpha: 0.9}, but "
                f"was {self.optimizer!r}"
            )
        if not self.is_sgd:
            for key in ("momentum", "nesterov"):
                if (value := getattr(self, key)) is not None:
                    raise ValueError(
                        f"{key} is for the optimizer sgd, but was {value!r} with {name!r}: leave "
                        "it out, or write it among the optimizer's arguments"
                    )
        defaults = _DEFAULTS.get(name.lower(), {"weight_decay": 0.0})
        for key in ("lr", "momentum", "nesterov", "weight_decay"):
            if getattr(self, key) is None:
                object.__setattr__(self, key, defaults.get(key))
        if self.lr is None:
            raise ValueError(
                f"lr must be given with the optimizer {name!r}; only sgd and adamw have a default"
            )

    @property
    def optimizer_name(self) -> str:
        """The optimizer's name as it was given; empty where it has none."""
        named = self.optimizer
        found = named.get("name") if isinstance(named, dict) else named
        return found if isinstance(found, str) else ""

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """The arguments that were given with the optimizer's name."""
        named = self.optimizer if isinstance(self.optimizer, dict) else {}
        return {key: value for key, value in named.items() if key != "name"}

    @property
    def is_sgd(self) -> bool:
        """Whether the optimizer is SGD, which takes momentum from the recipe."""
        return self.optimizer_name.lower() == "sgd"

    @property
    def warmup(self) -> float:
        """The length of the warm-up in epochs."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return self.epochs * (0.3 if self.schedule == "one_cycle" else 0.1)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step.

        With W steps of warm-up it is ``lr (step + 1) / (W + 1)`` before step W and ``lr`` at step
        W. It then decays so that the step after the last one would have 0, or remains.

        Args:
            step: The step's number, from 0 over all epochs.
            steps_per_epoch: The number of steps per epoch.
        """
        total = self.epochs * steps_per_epoch
        warm = round(self.warmup * steps_per_epoch)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return self.lr
        left = (total - step) / (total - warm)
        if self.schedule == "cosine":
            return self.lr * (1 - math.cos(math.pi * left)) / 2
        return self.lr * left


class OwnRecipe(BaseModel):
    """The recipe of a study with a trainer of the user's own: any keys beside ``epochs``.

    Attributes:
        epochs: The number of reports of each training.

    Example:
        >>> recipe_values(OwnRecipe(epochs=3, crop=[48, 64]))
        {'epochs': 3, 'crop': [48, 64]}
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    epochs: int = Field(ge=1)


def recipe_values(recipe: Recipe | OwnRecipe, epochs: int | None = None) -> dict[str, Any]:
    """A recipe as JSON values by its keys, with another number of epochs where one is given."""
    values = asdict(recipe) if isinstance(recipe, Recipe) else recipe.model_dump(mode="json")
    return values if epochs is None else {**values, "epochs": epochs}


@dataclass(frozen=True)
class EpochResult:
    """The result of one epoch of training.

    Attributes:
        epoch: The epoch's number, from 1.
        loss: The mean training loss, with label smoothing; None if a trainer reports none.
        value: The study's metric: of the built-in trainer top-1 accuracy on the validation split
            in percent; NaN if training diverged.
        seconds: Wall time of training, without evaluation where the trainer knows it.
        mode: Precision and execution of the steps, see :attr:`Trainer.mode`; empty if unknown.
        metrics: The further numbers that the trainer reported, by name.

    Example:
        >>> EpochResult(1, loss=0.4, value=91.5, seconds=2.0).value
        91.5
    """

    epoch: int
    loss: float | None
    value: float
    seconds: float
    mode: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


def checked_curve(
    curve: Sequence[EpochResult], number: int, epochs: int
) -> tuple[EpochResult, ...]:
    """A reported learning curve with plain numbers.

    Args:
        curve: The results of all epochs so far.
        number: The number of their trial.
        epochs: The number of epochs that the trial is to have.

    Raises:
        StudyError: They are not the results of epochs 1, 2, … of that many.

    Example:
        >>> checked_curve([EpochResult(1, None, 91, 2)], number=7, epochs=2)[0].value
        91.0
    """
    rows = tuple(curve) if isinstance(curve, Sequence) else ()
    found = [getattr(row, "epoch", None) for row in rows]
    if not 1 <= len(rows) <= epochs or found != [*range(1, len(rows) + 1)]:
        raise StudyError(
            f"the curve of trial {number} must have all epochs so far, from 1 to at most {epochs}, "
            f"but has {', '.join(map(str, found)) or 'none'}"
        )
    try:
        return tuple(
            replace(
                row,
                loss=None if row.loss is None else plain_number(row.loss),
                value=plain_number(row.value),
                seconds=plain_number(row.seconds),
                metrics={name: plain_number(value) for name, value in row.metrics.items()},
            )
            for row in rows
        )
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StudyError(
            f"the curve of trial {number} must have numbers, but: {first_line(error)}"
        ) from None


def plain_number(value: Any) -> float:
    """A number, or a tensor or an array of one, as a float.

    Raises:
        TypeError, ValueError, RuntimeError: It is none; a text is none either.

    Example:
        >>> plain_number(91)
        91.0
    """
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r} is a text")
    return float(value.detach() if hasattr(value, "detach") else value)  # without importing torch
