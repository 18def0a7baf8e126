"""The recipe of a training and the result of each epoch. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from widthsearch.utils.validation import validated_dataclass

Precision = Literal["auto", "fp32", "bf16"]
"""``bf16`` is autocast; ``auto`` is bf16 on a CUDA device that has it in hardware, else fp32."""


@validated_dataclass("recipe")
class Recipe:
    """How a network is trained: SGD with momentum on cross-entropy.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Images per step: at least 2, at most the size of the training split. Each epoch
            skips the remainder that fills no batch, different images each time.
        lr: The peak learning rate.
        momentum: The momentum of SGD.
        nesterov: Whether to use Nesterov momentum.
        weight_decay: L2 penalty of parameters with two dimensions or more; BatchNorm parameters and
            biases have none.
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
    lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    warmup_epochs: float | None = Field(default=None, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Precision = "auto"
    capture: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
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
