"""Text: a small GPT on the documentation that comes with Python, in bits per character.

    widthsearch run examples/text/study.yaml
    widthsearch train text --pick knee

In each block the number of heads and the hidden features of the MLP may vary, and in all blocks
together the width of the residual stream. The input is integers: one window of characters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch import SearchSpace, TrainingTrial

CONTEXT, BATCH, STEPS = 64, 16, 48  # characters, windows a batch, batches an epoch


class Block(nn.Module):
    """Attention over the characters so far, and an MLP; both add to the residual stream."""

    def __init__(self, features: int, heads: int, of_head: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.of_head = heads, of_head
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.query, self.key, self.value = (nn.Linear(features, heads * of_head) for _ in range(3))
        self.mix = nn.Linear(heads * of_head, features)
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, T, C) to as many."""
        n, t, _ = x.shape
        y, shape = self.norm1(x), (n, t, self.heads, self.of_head)
        q, k, v = (f(y).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(y.transpose(1, 2).reshape(n, t, self.heads * self.of_head))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Two blocks; characters are bytes of ASCII."""

    def __init__(self, features: int = 64, heads: int = 4, of_head: int = 16) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, features)
        self.places = nn.Parameter(torch.randn(CONTEXT, features) * 0.02)
        self.blocks = nn.Sequential(*(Block(features, heads, of_head, 256) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Characters (N, T) to logits of the next ones (N, T, 128)."""
        x = self.characters(x) + self.places
        return self.head(self.norm(self.blocks(x)))


def gpt() -> SearchSpace:
    """The space, from one window of characters."""
    return SearchSpace.from_model(GPT, torch.zeros(CONTEXT, dtype=torch.long), name="gpt")


def data() -> tuple[Tensor, Tensor]:
    """The characters to train on, and those to validate on."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    split = 9 * len(characters) // 10
    return characters[:split], characters[split:]


def batches(split: str, seed: int) -> Iterator[Tensor]:
    """Windows (N, T + 1) at random places, or evenly spaced ones of the validation split."""
    train, validation = data()
    text = train if split == "train" else validation
    last = len(text) - CONTEXT - 1  # the last start of a window
    starts = torch.linspace(0, last, 4 * BATCH).long()
    if split == "train":
        starts = torch.randint(
            last, (STEPS * BATCH,), generator=torch.Generator().manual_seed(seed)
        )
    for start in starts.split(BATCH):
        yield text[start[:, None] + torch.arange(CONTEXT + 1)]


def loss(network: nn.Module, batch: Tensor) -> Tensor:
    """The mean cross-entropy of the next characters, in nats."""
    return F.cross_entropy(network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@dataclass(frozen=True)
class Recipe:
    """The study's recipe."""

    lr: float = 0.003


def train(network: nn.Module, trial: TrainingTrial[Recipe]) -> None:
    """Train by AdamW; each report has the bits per character."""
    optimizer = torch.optim.AdamW(network.parameters(), trial.recipe.lr)
    if (saved := trial.resume()) is not None:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
    for epoch in range(trial.epoch, trial.epochs):
        optimizer.param_groups[0]["lr"] = trial.recipe.lr * (1 - epoch / trial.epochs)
        for batch in batches("train", trial.seed + epoch):
            optimizer.zero_grad()
            loss(network, batch.to(trial.device)).backward()
            optimizer.step()
        with torch.no_grad():
            held_out = [loss(network, b.to(trial.device)).item() for b in batches("validation", 0)]
        bpc = sum(held_out) / len(held_out) / math.log(2)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        if not trial.report({"bpc": bpc}, lambda state=state: state):
            return
