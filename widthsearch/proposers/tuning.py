"""Prune-and-tune: channels leave a trained network, which is fine-tuned in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.channels.extraction import extract
from widthsearch.data.loaders import DeviceLoader
from widthsearch.data.tasks import Task
from widthsearch.errors import SpaceError, StudyError
from widthsearch.proposers.importance import Per, Removal
from widthsearch.proposers.protocol import Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.sgd import SgdSteps, StepHook
from widthsearch.training.trainer import evaluate, fit
from widthsearch.utils.devices import (
    check_device,
    deterministic_cudnn,
    pick_memory_format,
    seeded,
)
from widthsearch.widths import Widths


class Tuning:
    """A network of a space that is fine-tuned at a constant learning rate, and cut in between.

    Args:
        space: The space.
        model: A trained network of it.
        channels: Where the units lie in ``model``.
        task: The data.
        recipe: Whose batches, momentum, weight decay, label smoothing and precision to use.
        every: Steps of a stretch.
        lr: The learning rate.
        seed: For the order of images, augmentation and dropout.
        device: Where it trains.

    Attributes:
        model: The network as it is now.
        channels: Where each axis's units lie in it.
        batch_size: Images in the batch of a step.
    """

    def __init__(
        self,
        space: SearchSpace,
        model: nn.Module,
        channels: DependencyGraph,
        task: Task,
        recipe: Recipe,
        *,
        every: int,
        lr: float,
        seed: int,
        device: str,
    ) -> None:
        self.model = model
        self.channels = channels
        self._space, self._task, self._recipe = space, task, recipe
        self._every, self._lr, self._seed, self._stretch = every, lr, seed, 0
        self._device = check_device(device)
        blank = torch.zeros(2, *task.input_shape, device=self._device)
        self._layout = pick_memory_format(model, blank)
        self._loader = DeviceLoader(task.train, task, recipe.batch_size, self._device, self._layout)
        self.batch_size = self._loader.batch_size

    def train(self, hook: StepHook | None = None) -> None:
        """Fine-tune for a stretch, with momentum that starts anew.

        Args:
            hook: Replaces the plain step, see :mod:`widthsearch.training.sgd`.

        Raises:
            StudyError: The loss is no longer finite.
        """
        sgd = SgdSteps(
            self.model, self._loader, self._recipe, self._device, steps=self._every, hook=hook
        )
        self._stretch += 1
        with seeded(self._seed, self._stretch, self._device) as generator, deterministic_cudnn():
            loss = sgd.run(generator, [self._lr] * self._every)
        if not math.isfinite(loss):
            raise StudyError(
                f"fine-tuning must keep a finite loss, but with lr={self._lr} it diverged; lower it"
            )

    def accuracy(self) -> float:
        """Top-1 on the validation split in percent."""
        return evaluate(
            self.model, self._task, "validation", str(self._device), self._recipe.precision
        )

    def cut(self, axis: int, units: NDArray[np.intp]) -> None:
        """Go on with a narrower network, without those units of an axis.

        Args:
            axis: The axis, by index.
            units: Units of the network as it is now.
        """
        of_channel = self.channels.group[self._space.trace.axes[axis].maker]
        keep = np.flatnonzero(~np.isin(of_channel, units)).tolist()
        narrow = extract(
            self._space.model, self.model, {self._space.names[axis]: keep}, self.channels
        )
        self.model = narrow.to(memory_format=self._layout)
        self.channels = without(self.channels, axis, units)


def without(channels: DependencyGraph, axis: int, units: NDArray[np.intp]) -> DependencyGraph:
    """Where units lie in a network from which those units of an axis were cut."""
    left = np.ones(channels.groups[axis], bool)
    left[units] = False
    number = np.cumsum(left) - 1
    axes, unit = {}, {}
    for where, of_position in channels.axis.items():
        mine, of_axis = of_position == axis, channels.group[where].copy()
        stays = ~mine
        stays[mine] = left[of_axis[mine]]
        of_axis[mine] = number[of_axis[mine]]
        axes[where], unit[where] = of_position[stays], of_axis[stays]
    counts = list(channels.groups)
    each = channels.widths.vector[axis] // counts[axis]
    counts[axis] = int(left.sum())
    vector = list(channels.widths.vector)
    vector[axis] = each * counts[axis]
    widths = Widths(channels.widths.names, tuple(vector))
    return replace(channels, widths=widths, groups=tuple(counts), axis=axes, group=unit)


def check_rate(lr: float) -> None:
    """Raise :class:`StudyError` unless it is a learning rate."""
    if not 0 < lr < math.inf:
        raise StudyError(f"`0 < lr < inf` must hold, but fine-tuning has lr={lr!r}")


def trained_base(
    space: SearchSpace, task: Task, recipe: Recipe, setting: Setting
) -> tuple[nn.Module, float]:
    """A space's base network, trained, and its validation accuracy in percent.

    Raises:
        StudyError: Training diverged.
    """
    model = space.build(space.base, seed=setting.seed)
    curve = fit(
        model,
        task,
        recipe,
        seed=setting.seed,
        device=setting.device,
        on_epoch=lambda e: setting.report(
            f"base: epoch {e.epoch} of {recipe.epochs}, {e.accuracy:.1f}%"
        ),
    )
    if math.isnan(curve[-1].accuracy):
        raise StudyError(
            f"the base network must train before it is pruned, but with lr={recipe.lr} it "
            "diverged; lower it"
        )
    return model, curve[-1].accuracy


def prune_and_tune(
    space: SearchSpace,
    task: Task,
    setting: Setting,
    score: Callable[[Tuning], list[Tensor]],
    *,
    every: int,
    lr: float,
    per: Per,
    pretrain: Recipe,
) -> tuple[tuple[Widths, ...], dict[str, Any]]:
    """Train the base; then, by turns, score channels while fine-tuning, and remove one grid step.

    It ends at ``setting.lowest`` of the base's MACs, or when nothing may go. Every network on the
    way really is the narrower one, and is fine-tuned for a stretch before it is measured. Axes
    whose channels cannot be cut alone keep their base width; of axes that a user tied, units of the
    same number go together.

    Args:
        space: The space.
        task: The data.
        setting: The seed, the device, the smallest network.
        score: Fine-tunes for a stretch and says, per axis, what each unit is worth; inf for axes
            that it cannot score, which keep their base width.
        every: Fine-tuning steps of a stretch.
        lr: Their learning rate.
        per: What scores are divided by.
        pretrain: How the base is trained; also fine-tuning's batches and regularisation.

    Returns:
        The trajectory, and for provenance ``members``: for each of the trajectory's its ``macs``,
        its ``accuracy`` (pruned and tuned, top-1 on the validation split in percent), and the
        ``epochs`` of training that it took so far, in epochs of the base network by MACs.

    Raises:
        StudyError: Training diverged, or predicted latency is wanted but not known.
        SpaceError: No axis can be cut.
    """
    base = space.cost(space.base).macs
    whole = build_dependency_graph(space.model, space.base)
    removal = Removal(space, per=per, latency=setting.latency, kept=whole.unknown)
    # How many units make a step of each axis.
    counts = [axis.step // t.divisor for axis, t in zip(space.axes, space.trace.axes, strict=True)]
    if not removal.possible.any():
        raise _nothing_to_cut(space)
    model, _ = trained_base(space, task, pretrain, setting)
    tuning = Tuning(
        space,
        model,
        whole,
        task,
        pretrain,
        every=every,
        lr=lr,
        seed=setting.seed,
        device=setting.device,
    )
    epochs = float(pretrain.epochs)
    members = []
    while True:
        scores = [of_axis.double().cpu().numpy() for of_axis in score(tuning)]
        macs = space.cost(tuning.channels.widths).macs
        epochs += every * tuning.batch_size / len(task.train) * macs / base
        members.append({"macs": macs, "accuracy": tuning.accuracy(), "epochs": epochs})
        setting.report(f"{macs / base:.2f} of the base's MACs: {members[-1]['accuracy']:.1f}%")
        if macs <= setting.lowest * base:
            break
        weakest = [np.argsort(s, kind="stable")[:n] for s, n in zip(scores, counts, strict=True)]
        losses = [s[units].sum() for s, units in zip(scores, weakest, strict=True)]
        axis = removal.weakest(np.array(losses))
        if axis is None:
            break
        removal.remove(axis)
        tuning.cut(axis, weakest[axis])
    if macs == base > setting.lowest * base:
        raise _nothing_to_cut(space)
    trajectory = tuple(Widths(space.names, tuple(int(w) for w in step)) for step in removal.path)
    return trajectory, {"members": members}


def _nothing_to_cut(space: SearchSpace) -> SpaceError:
    return SpaceError(
        f"some axis of space {space.name!r} must have channels that can be cut alone, and be above "
        "its `least`, but none is; use a method that cuts nothing, such as `sensitivity`"
    )
