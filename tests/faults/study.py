"""The study that is hit: its model appends a line to a witness log at every training step.

The functions are named by the study's YAML, as a user's own file.
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from widthsearch.space.search_space import SearchSpace

WITNESS = "WIDTHSEARCH_FAULTS_WITNESS"
"""The environment variable with the path of the witness log."""


class Net(nn.Module):
    """Two convolutions, two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 4) to (N, 4)."""
        witness = os.environ.get(WITNESS)
        if witness and self.training and torch.is_grad_enabled() and len(x) > 2:
            widths = (self.first.out_channels, self.second.out_channels)
            line = (time.monotonic(), os.getpid(), os.getsid(0), *widths)
            # One write to a file opened for appending: lines of several processes never mix.
            log = os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(log, (" ".join(map(str, line)) + "\n").encode())
            os.close(log)
        return self.fc(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def space() -> SearchSpace:
    """A grid of 8 × 8 widths: 2, 4, ... 16 on both axes."""
    return SearchSpace.from_model(
        Net, (1, 4, 4), name="faults", min_width=0.25, max_width=2.0, step=2
    )


def data() -> tuple[TensorDataset, TensorDataset]:
    """Four classes of 4 × 4 images that a tiny network learns: 80 for training, 40 for the test."""
    random = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorDataset:
        labels = torch.arange(count) % 4
        images = torch.randint(0, 128, (count, 1, 4, 4), generator=random)
        return TensorDataset((images + labels[:, None, None, None] * 32).to(torch.uint8), labels)

    return split(80), split(40)
