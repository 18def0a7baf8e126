"""The losses of image tasks, and the numbers that an evaluation reports for each of them.

Notation::

    N    samples, K outputs of a network for each: classes, labels or target values
    z    outputs, (N, K)
    y    targets: classes int64 (N,), labels 0 or 1 and values float32 (N, K)

An evaluation keeps a *record* of each sample, batch by batch on the device, and summarises all of
them at the end: the hits of ``cross_entropy`` are counted, while the average precision of a label
needs its outputs for all samples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from widthsearch.data.config import LossName


@dataclass(frozen=True)
class Loss:
    """A loss with the record of a sample and the summary of records.

    Attributes:
        value: The mean loss of a batch, (), of outputs in float32, targets, and label smoothing.
        record: The record of each sample of a batch, (N, records), of outputs and targets.
        summary: The reported numbers by name, of all records and all targets.

    Example:
        >>> import torch
        >>> logits, labels = torch.eye(3), torch.tensor([0, 1, 1])
        >>> of = LOSSES["cross_entropy"]
        >>> of.summary(of.record(logits, labels), labels)
        {'accuracy': 66.66666666666667}
    """

    value: Callable[[Tensor, Tensor, float], Tensor]
    record: Callable[[Tensor, Tensor], Tensor]
    summary: Callable[[Tensor, Tensor], dict[str, float]]


def average_precision(scores: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """The average precision of a label: Σ_k (R_k − R_{k−1}) P_k over its distinct scores.

    P_k and R_k are precision and recall of the samples with the k highest scores or more; samples
    of equal score enter together. It is that of scikit-learn, NaN without a positive sample.

    Args:
        scores: (N,).
        positive: (N,).

    Example:
        >>> average_precision(np.float32([0.9, 0.8, 0.1]), np.array([True, False, True]))
        0.8333333333333333
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits = np.cumsum(positive[order])[ends]
    if not hits[-1]:
        return math.nan
    return float(np.diff(hits, prepend=0) @ (hits / (ends + 1)) / hits[-1])


def _hits(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(dim=1) == labels)[:, None]


def _accuracy(hits: Tensor, labels: Tensor) -> dict[str, float]:
    return {"accuracy": 100 * int(hits.sum().item()) / len(labels)}


def _label_numbers(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean average precision over the labels that occur, and the share of right labels."""
    scores, positive = outputs.cpu().numpy(), labels.cpu().numpy() > 0.5
    precisions = [average_precision(s, p) for s, p in zip(scores.T, positive.T, strict=True)]
    return {
        "map": 100 * float(np.nanmean(precisions)),
        "label_accuracy": 100 * float(((scores > 0) == positive).mean()),
    }


def _errors(outputs: Tensor, values: Tensor) -> dict[str, float]:
    """Root mean square and mean absolute error, over samples and values."""
    off = outputs.double() - values.double()
    return {"rmse": off.square().mean().sqrt().item(), "mae": off.abs().mean().item()}


def _cross_entropy(outputs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(outputs, labels, label_smoothing=smoothing)


def _as_they_are(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.float()


LOSSES: Mapping[LossName, Loss] = {
    "cross_entropy": Loss(_cross_entropy, _hits, _accuracy),
    "bce": Loss(
        lambda z, y, _: F.binary_cross_entropy_with_logits(z, y), _as_they_are, _label_numbers
    ),
    "mse": Loss(lambda z, y, _: F.mse_loss(z, y), _as_they_are, _errors),
    "l1": Loss(lambda z, y, _: F.l1_loss(z, y), _as_they_are, _errors),
}
"""The losses by name."""
