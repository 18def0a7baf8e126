"""Prune-and-tune: a trained network is fine-tuned, and loses channels in between."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.channels.extraction import extract, widths_of
from widthsearch.data.tasks import AnyTask
from widthsearch.errors import SpaceError, StudyError, one_line
from widthsearch.proposers.importance import GreedyRemoval, Per
from widthsearch.proposers.protocol import Checkpoint, Count, LearningRate, Proposal, Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import EpochResult, Recipe
from widthsearch.training.sgd import SgdSteps, StepHook
from widthsearch.training.trainer import evaluate, fit, placed
from widthsearch.utils.devices import check_device, deterministic_cudnn, seeded
from widthsearch.widths import Widths


class FineTuner:
    """Fine-tunes a network of a space at a constant learning rate, and removes channels from it.

    Args:
        method: The steps of a stretch of fine-tuning, and the learning rate.
        space: The space.
        model: A trained network of the space.
        graph: The dependency graph of the network.
        task: The data.
        recipe: Batch size, momentum, weight decay, label smoothing and precision.
        setting: The seed (of the order of images, augmentation and dropout) and the device.

    Attributes:
        model: The present network.
        graph: The dependency graph of the present network.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> from widthsearch.proposers.magnitude import Magnitude
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> model, graph = space.build(space.base), build_dependency_graph(space.model, space.base)
        >>> method, recipe = Magnitude(every=2), Recipe(batch_size=32)
        >>> tuner = FineTuner(method, space, model, graph, load_task("digits"), recipe, Setting())
        >>> tuner.tune()
        >>> tuner.remove(0, np.array([1, 5]))
        >>> tuner.model[1]
        Linear(in_features=64, out_features=6, bias=True)
    """

    def __init__(
        self,
        method: PruneAndTune,
        space: SearchSpace,
        model: nn.Module,
        graph: DependencyGraph,
        task: AnyTask,
        recipe: Recipe,
        setting: Setting,
    ) -> None:
        self.model, self.graph = model, graph
        self._method, self._space, self._task, self._recipe = method, space, task, recipe
        self._seed, self._stretch = setting.seed, 0
        self._device = check_device(setting.device)
        self._loader, self._layout = placed(model, task, recipe, self._device)

    @property
    def batch_size(self) -> int:
        """The number of samples in a step; where batches differ, in the last one."""
        return self._loader.batch_size

    def passes(self, steps: int) -> float:
        """The share of the training split that so many steps read."""
        return self._loader.passes(steps)

    def tune(self, hook: StepHook | None = None) -> None:
        """Fine-tune for a stretch; the momentum starts at zero.

        Args:
            hook: Replaces the plain step, see :mod:`widthsearch.training.sgd`.

        Raises:
            StudyError: The loss is not finite.
        """
        steps, lr = self._method.every, self._method.lr
        sgd = SgdSteps(self.model, self._loader, self._recipe, self._device, steps=steps, hook=hook)
        self._stretch += 1
        with seeded(self._seed, self._stretch, self._device) as generator, deterministic_cudnn():
            loss = sgd.run(generator, [lr] * steps)
        if not math.isfinite(loss):
            raise StudyError(
                f"fine-tuning must keep a finite loss, but with lr={lr} it diverged; lower it"
            )

    def value(self) -> float:
        """On the validation split, top-1 accuracy in percent, or the loss of an own task."""
        return evaluate(
            self.model, self._task, "validation", str(self._device), self._recipe.precision
        )

    def remove(self, axis: int, groups: NDArray[np.intp]) -> None:
        """Continue with the narrower network without some channel groups of an axis.

        Args:
            axis: The index of the axis.
            groups: Groups of the present network.
        """
        of_channel = self.graph.channels[axis]
        keep = np.flatnonzero(~np.isin(of_channel, groups)).tolist()
        narrow = extract(self._space.model, self.model, {self._space.names[axis]: keep}, self.graph)
        self.model = narrow.to(memory_format=self._layout)
        widths = widths_of(self._space.model, self.model)
        self.graph = build_dependency_graph(self._space.model, widths)


def base_network(
    space: SearchSpace, task: AnyTask, recipe: Recipe, setting: Setting, weights: str | None
) -> nn.Module:
    """A space's base network, trained by a recipe, or with the weights of a checkpoint.

    Raises:
        StudyError: Training diverged, or the checkpoint is not of this network.
    """
    model = space.build(space.base, seed=setting.seed)
    if weights is not None:
        load_weights(model, weights)
        return model
    train_base(model, task, recipe, setting)
    return model


def load_weights(
    model: nn.Module,
    path: str,
    otherwise: str = "save this model's, or leave `weights` out to train the base",
) -> None:
    """Load a checkpoint of tensors, such as that of ``torch.save(model.state_dict(), path)``.

    The path may also be that of a ``.safetensors`` file, or of a folder of ``widthsearch train``.
    Names may have a prefix ``module.``, and the state may be under ``state_dict`` or ``model``.

    Args:
        model: The network.
        path: The path.
        otherwise: What to do where they are of another network.

    Raises:
        StudyError: The file cannot be read as tensors only, or lacks a tensor of the network.
    """
    file = Path(path) / "weights.pt" if Path(path).is_dir() else Path(path)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  torch's unpickler raises any kind
        raise StudyError(
            f"weights must be a checkpoint of tensors, but {path!r} cannot be read: "
            f"{one_line(error)}; write it with `torch.save(model.state_dict(), path)`"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise StudyError(
            f"weights must hold tensors by name, but {path!r} holds a {type(content).__name__}; "
            "write it with `torch.save(model.state_dict(), path)`"
        )
    state = {str(name).removeprefix("module."): value for name, value in content.items()}
    for name, tensor in model.state_dict().items():
        value = state.get(name)
        if name.endswith("num_batches_tracked") and value is None:
            state[name] = tensor
        elif not isinstance(value, Tensor) or value.shape != tensor.shape:
            there = (
                f"has the shape {tuple(value.shape)}" if isinstance(value, Tensor) else "is none"
            )
            raise StudyError(
                f"weights must be of the space's base network, whose {name!r} has the shape "
                f"{tuple(tensor.shape)}, but {there} in {path!r}; {otherwise}"
            )
    model.load_state_dict({name: state[name] for name in model.state_dict()})


def train_base(
    model: nn.Module, task: AnyTask, recipe: Recipe, setting: Setting, hook: StepHook | None = None
) -> float:
    """Train a space's base network; returns its validation accuracy in percent, or own loss.

    Raises:
        StudyError: Training diverged.
    """
    curve = fit(
        model,
        task,
        recipe,
        seed=setting.seed,
        device=setting.device,
        on_epoch=lambda e: setting.report(
            f"base: epoch {e.epoch} of {recipe.epochs}, {task.shown(e.value)}"
        ),
        hook=hook,
    )
    if math.isnan(curve[-1].value):
        raise StudyError(
            f"the base network must train before it is pruned, but {divergence(curve[-1], recipe)}"
        )
    return curve[-1].value


def divergence(last: EpochResult, recipe: Recipe) -> str:
    """What the last epoch of a training that diverged shows, and the way out.

    Example:
        >>> divergence(EpochResult(3, math.inf, math.nan, 1.0), Recipe(lr=0.1))
        'with lr=0.1 it diverged in epoch 3; lower it'
        >>> divergence(EpochResult(3, 0.25, math.nan, 1.0), Recipe(lr=0.1))
        "in epoch 3 its loss was 0.25 on 'train' and not finite on 'validation'; see that split, \
or lower lr (0.1)"
    """
    if last.loss is not None and math.isfinite(last.loss):
        return (
            f"in epoch {last.epoch} its loss was {last.loss:.4g} on 'train' and not finite on "
            f"'validation'; see that split, or lower lr ({recipe.lr:g})"
        )
    return f"with lr={recipe.lr:g} it diverged in epoch {last.epoch}; lower it"


@dataclass(frozen=True)
class PruneAndTune(ABC):
    """A method that trains the base network, then alternates: fine-tune and score, remove a step.

    It ends at ``setting.lowest`` of the base's MACs, or if no axis can be narrowed. Each network on
    the way is a real narrower network, and is fine-tuned for a stretch before it is measured. Axes
    whose channels cannot be told apart keep their base width; in axes that a user tied, groups of
    the same number are removed together.

    Attributes:
        every: Fine-tuning steps between two removals; default 100.
        lr: The constant learning rate of fine-tuning; default 8e-4.
        per: The cost that scores are divided by: ``macs`` (default), ``params``, predicted
            ``latency``, or ``channel`` (none).
        pretrain: The recipe of the base network; default the study's recipe. Fine-tuning uses its
            batches and regularisation.
        weights: A checkpoint of the base network in place of its training: a file of tensors, see
            :func:`load_weights`.
        name: The name of the method in studies.

    Example:
        >>> class LastFirst(PruneAndTune):  # removes channels from the last one on
        ...     name = "last_first"
        ...     def score(self, tuner):
        ...         tuner.tune()
        ...         return [-torch.arange(w) for w in tuner.graph.widths.vector]
        >>> import torch
        >>> from widthsearch.data.tasks import load_task
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
        >>> space = SearchSpace.from_model(net, (1, 8, 8), step=2)
        >>> setting = Setting(recipe=Recipe(epochs=1))
        >>> proposal = LastFirst(every=2)(space, load_task("digits"), setting)
        >>> [widths.vector for widths in proposal.trajectory]
        [(4,), (2,)]
    """

    every: Count = 100
    lr: LearningRate = 8e-4
    per: Per = "macs"
    pretrain: Recipe | None = None
    weights: Checkpoint | None = None
    name: ClassVar[str]

    @abstractmethod
    def score(self, tuner: FineTuner) -> list[Tensor]:
        """Fine-tune for a stretch and score the channels.

        Returns:
            Per axis, the score of each channel group, shape (groups,); axes with infinite scores
            keep their width.
        """

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Train the base network, then remove channels while it is fine-tuned.

        Returns:
            The proposal; its provenance has ``members``: for each member of the trajectory
            ``macs``, ``accuracy`` (fine-tuned, top-1 on the validation split in percent; with an
            own task ``loss`` instead), and ``epochs``, the training so far in epochs of the base
            network by MACs, without that of a checkpoint.

        Raises:
            StudyError: Training diverged, the checkpoint is not of the base network, or the
                predicted latency is unknown.
            SpaceError: No axis can be narrowed.
        """
        base = space.cost(space.base).macs
        graph = build_dependency_graph(space.model, space.base)
        removal = GreedyRemoval(space, per=self.per, latency=setting.latency, kept=graph.unknown)
        # Channel groups per grid step of each axis.
        counts = [a.step // t.divisor for a, t in zip(space.axes, space.trace.axes, strict=True)]
        if not removal.possible.any():
            raise _nothing_to_remove(space)
        recipe = self.pretrain or setting.recipe
        model = base_network(space, task, recipe, setting, self.weights)
        tuner = FineTuner(self, space, model, graph, task, recipe, setting)
        epochs = 0.0 if self.weights else float(recipe.epochs)
        members = []
        while True:
            scores = [of_axis.double().cpu().numpy() for of_axis in self.score(tuner)]
            macs = space.cost(tuner.graph.widths).macs
            epochs += tuner.passes(self.every) * macs / base
            value = tuner.value()
            members.append({"macs": macs, task.measure: value, "epochs": epochs})
            setting.report(f"{macs / base:.2f} of the base's MACs: {task.shown(value)}")
            if macs <= setting.lowest * base:
                break
            weakest = [
                np.argsort(s, kind="stable")[:n] for s, n in zip(scores, counts, strict=True)
            ]
            losses = [s[groups].sum() for s, groups in zip(scores, weakest, strict=True)]
            axis = removal.weakest(np.array(losses))
            if axis is None:
                break
            removal.remove(axis)
            tuner.remove(axis, weakest[axis])
        if macs == base > setting.lowest * base:
            raise _nothing_to_remove(space)
        trajectory = tuple(Widths(space.names, tuple(step.tolist())) for step in removal.path)
        provenance = {"seed": setting.seed, **asdict(self), "members": members}
        return Proposal(self.name, trajectory, provenance)


def _nothing_to_remove(space: SearchSpace) -> SpaceError:
    return SpaceError(
        f"some axis of space {space.name!r} must be above its smallest width and have channels "
        "that can be told apart, but none is; use a method that only scores, such as `sensitivity`"
    )
