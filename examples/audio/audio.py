"""Audio: 1-D convolutions tell the waveforms of synthetic tones apart, in percent.

    widthsearch run examples/audio/study.yaml
    widthsearch train audio --pick knee

A clip is a tenth of a second at 10,240 samples a second: a sine, a square, a sawtooth or a triangle
wave, a rising tone, or two sines, of any pitch and phase and under loud noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from widthsearch import SearchSpace, TrainingTrial

SAMPLES, CLASSES = 1024, 6


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A convolution over time with batch norm."""
    conv = nn.Conv1d(inputs, outputs, 9, stride, padding=4, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(outputs), nn.ReLU())


class Ear(nn.Module):
    """Four convolutions, each with a stride, then the mean over time."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            block(1, width, 4),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width, 2),
            block(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Clips (N, 1, T) to logits (N, classes)."""
        return self.head(self.features(x).mean(2))


def ear() -> SearchSpace:
    """The space: the widths of the four convolutions."""
    return SearchSpace.from_model(Ear, (1, SAMPLES), name="ear")


def clips(count: int, seed: int) -> TensorDataset:
    """Clips (N, 1, T) and their classes (N,)."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % CLASSES
    pitch, phase, second = torch.rand(3, count, 1, generator=generator)
    time = torch.arange(SAMPLES) / 10240
    turns = (100 * 8**pitch) * time * (1 + 5 * time * (kind == 4)[:, None]) + phase
    sine, saw = (2 * math.pi * turns).sin(), 2 * (turns % 1) - 1
    both = (sine + (2 * math.pi * turns * (1.2 + second)).sin()) / 2
    waves = torch.stack([sine, sine.sign(), saw, 2 * saw.abs() - 1, sine, both])
    chosen = waves[kind, torch.arange(count)]
    noise = torch.randn(count, SAMPLES, generator=generator)
    return TensorDataset((chosen + 0.5 * noise)[:, None], kind)


def batches(split: str, seed: int) -> Iterable[list[Tensor]]:
    """Batches of 32 of 1,536 clips in a new order, or of 256 of 768 others."""
    if split == "validation":
        return DataLoader(clips(768, seed=1), 256)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(clips(1536, seed=0), 32, shuffle=True, drop_last=True, generator=generator)


def loss(network: nn.Module, batch: list[Tensor]) -> Tensor:
    """The mean cross-entropy."""
    x, kind = batch
    return F.cross_entropy(network(x), kind)


@dataclass(frozen=True)
class Recipe:
    """The study's recipe."""

    lr: float = 0.005


def train(network: nn.Module, trial: TrainingTrial[Recipe]) -> None:
    """Train by AdamW; each report has the accuracy in percent."""
    optimizer = torch.optim.AdamW(network.parameters(), trial.recipe.lr)
    if (saved := trial.resume()) is not None:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
    for epoch in range(trial.epoch, trial.epochs):
        optimizer.param_groups[0]["lr"] = trial.recipe.lr * (1 - epoch / trial.epochs)
        for batch in batches("train", trial.seed + epoch):
            optimizer.zero_grad()
            loss(network, [part.to(trial.device) for part in batch]).backward()
            optimizer.step()
        reported = {"accuracy": accuracy(network, trial.device)}
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        if not trial.report(reported, lambda state=state: state):
            return


@torch.no_grad()
def accuracy(network: nn.Module, device: torch.device) -> float:
    """The share of validation clips whose waveform is found, in percent."""
    network.eval()
    found = [
        (network(x.to(device)).argmax(1).cpu() == kind).float().mean().item()
        for x, kind in batches("validation", 0)
    ]
    network.train()
    return 100 * sum(found) / len(found)
