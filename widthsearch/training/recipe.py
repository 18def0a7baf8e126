"""What is asked of a training, and what each of its epochs reports. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from widthsearch.errors import StudyError

Precision = Literal["auto", "fp32", "bf16"]
"""``bf16`` is autocast; ``auto`` is bf16 on a CUDA device that has it in hardware, else fp32."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD on cross-entropy.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Images per step: at least 2, at most the size of the training split. Each epoch
            skips the remainder that fills no batch, different images each time.
        lr: The highest learning rate.
        momentum: SGD's momentum.
        nesterov: Whether the momentum looks ahead.
        weight_decay: L2 penalty of parameters with two dimensions or more; BatchNorm and biases
            have none.
        schedule: After the linear warm-up the learning rate falls to zero, along half a cosine
            (``cosine``) or a line (``one_cycle``; the momentum stays), or stays (``constant``).
        warmup_epochs: Length of the warm-up; None for three tenths of the epochs with
            ``one_cycle`` and a tenth with the others.
        label_smoothing: Share of each label that is spread over all classes.
        precision: ``bf16`` is autocast; ``auto`` is bf16 on a CUDA device that has it in hardware,
            else fp32; a study on a CPU tries which is faster, once (``autotune.py``).
        capture: Whether a step is run as one CUDA graph, on a GPU and where the network allows it.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    warmup_epochs: float | None = None
    label_smoothing: float = 0.0
    precision: Precision = "auto"
    capture: bool = True

    def __post_init__(self) -> None:
        for field, rule, holds in (
            ("epochs", "epochs >= 1", self.epochs >= 1),
            ("batch_size", "batch_size >= 2", self.batch_size >= 2),
            ("lr", "0 < lr < inf", 0 < self.lr < math.inf),
            ("momentum", "0 <= momentum < 1", 0 <= self.momentum < 1),
            ("momentum", "momentum > 0 (for nesterov)", self.momentum > 0 or not self.nesterov),
            ("weight_decay", "0 <= weight_decay < inf", 0 <= self.weight_decay < math.inf),
            (
                "schedule",
                "schedule in ('cosine', 'one_cycle', 'constant')",
                self.schedule in ("cosine", "one_cycle", "constant"),
            ),
            ("warmup_epochs", "0 <= warmup_epochs < epochs", 0 <= self.warmup < self.epochs),
            ("label_smoothing", "0 <= label_smoothing < 1", 0 <= self.label_smoothing < 1),
            (
                "precision",
                "precision in ('auto', 'fp32', 'bf16')",
                self.precision in ("auto", "fp32", "bf16"),
            ),
        ):
            if not holds:
                value = getattr(self, field)
                raise StudyError(f"`{rule}` must hold, but the recipe has {field}={value!r}")

    @property
    def warmup(self) -> float:
        """The length of the warm-up in epochs."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return self.epochs * (0.3 if self.schedule == "one_cycle" else 0.1)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run.

        With W steps of warm-up it is ``lr (step + 1) / (W + 1)`` before step W, ``lr`` at step W,
        and falls from there to the 0 that the step after the last would have, or stays.
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


@dataclass(frozen=True)
class EpochResult:
    """What an epoch came to.

    Attributes:
        epoch: Its number, from 1.
        loss: Mean training loss, label smoothing included.
        accuracy: Top-1 on the validation split after it, in percent; NaN once training diverged.
        seconds: Wall time of training, without evaluation.
        mode: How it was trained, see :attr:`Trainer.mode`; empty where that is not known.
    """

    epoch: int
    loss: float
    accuracy: float
    seconds: float
    mode: str = ""
