"""The spaces of the tables by formulas in `benchmarks.tables`: chains of 3×3 convolutions.

python -m benchmarks.tables FOLDER
python -m studies.tables.run --table FOLDER/rough.csv --space studies.tables.chains:rough
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import tables
from widthsearch import SearchSpace


class Chain(nn.Module):
    """Convolutions with batch norm and ReLU, an average over positions, and a linear layer.

    Args:
        widths: The channels of each convolution.
        sides: The side of each one's output, in pixels; that of the input is the first.
    """

    def __init__(self, widths: Sequence[int], sides: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        inputs, before = 3, sides[0]
        for outputs, side in zip(widths, sides, strict=True):
            conv = nn.Conv2d(inputs, outputs, 3, before // side, padding=1, bias=False)
            self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU()))
            inputs, before = outputs, side
        self.fc = nn.Linear(inputs, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, side, side) to logits (N, 10)."""
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1))


def _space(name: str) -> SearchSpace:
    widths, sides, _ = tables.TABLES[name]()
    base = widths.max(axis=0).tolist()
    return SearchSpace.from_model(
        lambda: Chain(base, sides), (3, sides[0], sides[0]), name=f"chain_{name}"
    )


def additive() -> SearchSpace:
    """The widest network of the table ``additive``, and all narrower ones."""
    return _space("additive")


def bottleneck() -> SearchSpace:
    """Likewise of ``bottleneck``."""
    return _space("bottleneck")


def nonmono() -> SearchSpace:
    """Likewise of ``nonmono``."""
    return _space("nonmono")


def capacity() -> SearchSpace:
    """Likewise of ``capacity``."""
    return _space("capacity")


def rough() -> SearchSpace:
    """Likewise of ``rough``."""
    return _space("rough")
