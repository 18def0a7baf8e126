"""Widths from activation density: each layer as wide as the share of it that is active."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.data.tasks import Task
from widthsearch.errors import StudyError
from widthsearch.proposers.density import Counts, DensityMeter
from widthsearch.proposers.protocol import Proposal, Setting
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import Trainer
from widthsearch.widths import Widths


@dataclass(frozen=True)
class ActivationDensity:
    """Resizing in training (Foldy-Porto et al. 2020, arXiv 2002.02949): w ← round(density · w).

    The density of an axis is the share of active values in what its readers read, over an epoch's
    training data. A network trains until no density changes any more; then the smaller one takes
    its place and trains on. What is counted, :class:`~widthsearch.proposers.density.DensityMeter`
    says.

    An axis that no convolution or linear layer reads keeps its width. Where the run did not show
    which channels are an axis's (``Channels.unknown``), a phase that cuts it begins anew instead
    of inheriting. Tied axes have one density, over the readers of all.

    Attributes:
        weights: Each phase begins ``reinit``, newly initialised, as in the paper; or with
            ``inherit`` the densest channels of the last keep their weights.
        tolerance: A density has stopped changing when its range over ``patience`` epochs is within
            this share of it.
        patience: See there. The plateau's accuracy is the mean over so many epochs.
        max_epochs: The most epochs of a phase; None for the recipe's. With 1, widths follow the
            densities of a network that has learnt nothing: the ablation.
        until: Densities are near 1 from here on; once all are, it is done.
        drop: It is done, too, when accuracy is this many points below the first phase's.
        threshold: Active is what exceeds this share of the root mean square of what a reader reads;
            0 counts what is not zero. None decides for each reader by its first batch: if 1% of it
            is exactly zero, 0, else 0.05.
    """

    weights: Literal["reinit", "inherit"] = "reinit"
    tolerance: float = 0.02
    patience: int = 3
    max_epochs: int | None = None
    until: float = 0.95
    drop: float = 3.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        for field, rule, holds in (
            ("weights", "weights in ('reinit', 'inherit')", self.weights in ("reinit", "inherit")),
            ("tolerance", "0 <= tolerance < 1", 0 <= self.tolerance < 1),
            ("patience", "patience >= 1", self.patience >= 1),
            ("max_epochs", "max_epochs >= 1", self.max_epochs is None or self.max_epochs >= 1),
            ("until", "0 < until <= 1", 0 < self.until <= 1),
            ("drop", "drop >= 0", self.drop >= 0),
            ("threshold", "threshold >= 0", self.threshold is None or self.threshold >= 0),
        ):
            if not holds:
                value = getattr(self, field)
                raise StudyError(
                    f"`{rule}` must hold, but activation_density has {field}={value!r}"
                )

    def __call__(self, space: SearchSpace, task: Task, setting: Setting) -> Proposal:
        """Train, resize, train on; the trajectory is what was trained.

        Widths that would cost less than ``setting.lowest`` end the trajectory untrained. Should the
        first phase's densities move no axis by a step of its grid, their first power that does is
        the second member.

        Raises:
            StudyError: The base network's training diverges.
        """
        full = space.cost(space.base).macs
        phases: list[Phase] = []
        rules: dict[str, float] = {}
        widths, model = space.base, None
        untrained: Widths | None = None
        while True:
            seed = _seed(setting.seed, len(phases))
            inherited = model is not None
            if model is None:
                model = space.build(widths, seed=seed)
            run = _PhaseRun(self, space, task, setting, rules, f"phase {len(phases) + 1}")
            phases.append(run(widths, model, seed, inherited))
            last = phases[-1]
            smaller = narrowed(space, widths, last.densities)
            stopped = self._why_stopped(space, phases)
            if stopped is None and space.cost(smaller).macs < setting.lowest * full:
                stopped, untrained = "the next widths are below the lowest wanted", smaller
            if stopped is not None:
                break
            model = run.cut(smaller) if self.weights == "inherit" else None
            widths = smaller
        if len(phases) == 1 and untrained is None:
            untrained = first_power(space, widths, phases[0].densities)
        trajectory = [phase.widths for phase in phases] + ([untrained] if untrained else [])
        spent = training_complexity(
            [(phase.epochs, phase.macs) for phase in phases], setting.recipe.epochs, full
        )
        return Proposal(
            "activation_density",
            tuple(trajectory),
            {
                "seed": setting.seed,
                **asdict(self),
                "phases": [phase.to_json() for phase in phases],
                "stopped": stopped,
                "training_complexity": spent,
                "training_complexity_with_final": spent + phases[-1].macs / full,
                "by_relative_threshold": sorted(key for key, rule in rules.items() if rule),
            },
        )

    def _why_stopped(self, space: SearchSpace, phases: Sequence[Phase]) -> str | None:
        """Why the last phase is the last, if it is."""
        first, last = phases[0], phases[-1]
        if math.isnan(last.accuracy):
            return "training diverged"
        if last.accuracy < first.accuracy - self.drop:
            return f"accuracy is more than {self.drop:g} points below the first phase's"
        free = [
            d
            for d, w, axis in zip(last.densities, last.widths.vector, space.axes, strict=True)
            if w > axis.min_width and not math.isnan(d)
        ]
        if all(d >= self.until for d in free):
            return f"every density is {self.until:g} or more, or its axis at its least"
        if narrowed(space, last.widths, last.densities) == last.widths:
            return "no density moves its axis by a step"
        return None


@dataclass(frozen=True)
class Phase:
    """A network of the sequence, trained to its plateau.

    Attributes:
        widths: Its widths.
        macs: Its MACs.
        inherited: Whether it began with its predecessor's weights.
        epochs: For how many it trained.
        plateau: Whether the densities had stopped changing by then.
        densities: Of each axis in the last epoch; NaN where no reader is measured.
        accuracy: On the validation split in percent, mean over the plateau's epochs.
    """

    widths: Widths
    macs: int
    inherited: bool
    epochs: int
    plateau: bool
    densities: tuple[float, ...]
    accuracy: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; None for NaN."""
        return {
            **asdict(self),
            "widths": list(self.widths.vector),
            "densities": [None if math.isnan(d) else d for d in self.densities],
            "accuracy": None if math.isnan(self.accuracy) else self.accuracy,
        }


class _PhaseRun:
    """One phase: a network trained to its plateau, and what is cut from it."""

    def __init__(
        self,
        method: ActivationDensity,
        space: SearchSpace,
        task: Task,
        setting: Setting,
        rules: dict[str, float],
        called: str,
    ) -> None:
        self.method, self.space, self.task = method, space, task
        self.setting, self.rules, self.called = setting, rules, called
        self.model: nn.Module
        self.channels: DependencyGraph
        self.counts: list[Counts] = []

    def __call__(self, widths: Widths, model: nn.Module, seed: int, inherited: bool) -> Phase:
        """Train to the plateau."""
        method, space, setting = self.method, self.space, self.setting
        self.model = model
        self.channels = build_dependency_graph(
            space.unconstrained.model, space.to_unconstrained(widths)
        )
        macs = space.cost(widths).macs
        share = macs / space.cost(space.base).macs
        recipe = held(setting.recipe, method.max_epochs or setting.recipe.epochs)
        run = Trainer(model, self.task, recipe, seed=seed, device=setting.device)
        history: list[tuple[float, ...]] = []
        plateau = False
        while not (run.finished or plateau):
            with DensityMeter(self.channels, model, method.threshold, self.rules) as meter:
                result = run.run_epoch()
            self.counts = meter.counts()
            history.append(density_of_axes(space, self.counts))
            plateau = plateaued(history, method.tolerance, method.patience)
            setting.report(
                f"{self.called} at {share:.2f} of the base's MACs, epoch {result.epoch} of at most "
                f"{recipe.epochs}: accuracy {result.accuracy:.1f}%"
            )
        if math.isnan(run.curve[-1].accuracy) and widths == space.base:
            raise StudyError(
                f"activation_density needs a recipe that trains, but the base network diverged in "
                f"epoch {run.epoch}; lower lr ({recipe.lr:g}), which stays at its highest here"
            )
        accuracies = [result.accuracy for result in run.curve[-method.patience :]]
        return Phase(
            widths,
            macs,
            inherited,
            run.epoch,
            plateau,
            history[-1],
            float(np.mean(accuracies)),
        )

    def cut(self, widths: Widths) -> nn.Module | None:
        """The network of those widths with the densest channels' weights, if they can be told."""
        free = self.space.unconstrained
        # Narrower than its own grid allows is what ties and bounds of the space may ask of it.
        finest = {axis.name: axis.divisor for axis in free.trace.axes}
        free = free.constrained(min_width=finest, step=finest)
        to_unconstrained = self.space.to_unconstrained(widths)
        keep: dict[str, list[int]] = {}
        for i, (axis, counts) in enumerate(zip(free.trace.axes, self.counts, strict=True)):
            if to_unconstrained[axis.name] == self.channels.widths[axis.name]:
                continue
            if i in self.channels.unknown:
                return None
            densest = np.argsort(-counts.density(), kind="stable")
            units = densest[: to_unconstrained[axis.name] // axis.divisor]
            channels = np.flatnonzero(np.isin(self.channels.group[axis.maker], units))
            keep[axis.name] = channels.tolist()
        return free.extract(self.model, keep)


def held(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe for a phase: its highest learning rate is held after its warm-up.

    A schedule that falls to zero would bring every density to rest by itself.

    Args:
        recipe: The study's.
        epochs: The most that a phase trains.
    """
    warmup = min(recipe.warmup, epochs / 2)
    return replace(recipe, schedule="constant", epochs=epochs, warmup_epochs=warmup)


def plateaued(history: ArrayLike, tolerance: float, patience: int) -> bool:
    """Whether the densities have stopped changing.

    Args:
        history: Shape (epochs, axes); axes that are NaN throughout do not count.
        tolerance: How far each may have ranged, as a share of its largest in that time.
        patience: Over how many epochs: their changes are those of patience + 1 values.
    """
    recent = np.asarray(history, np.float64)[-patience - 1 :]
    if len(recent) <= patience:
        return False
    measured = recent[:, ~np.isnan(recent[0])]
    return bool((np.ptp(measured, axis=0) <= tolerance * measured.max(axis=0)).all())


def narrowed(space: SearchSpace, widths: Widths, densities: Sequence[float]) -> Widths:
    """The widths that densities ask for: ``nearest(round(density · w))``, never wider.

    Args:
        space: The space.
        widths: Widths of it.
        densities: One per axis; at NaN the axis stays.
    """
    vector = [
        w if math.isnan(d) else min(w, axis.nearest(round(d * w)))
        for axis, w, d in zip(space.axes, widths.vector, densities, strict=True)
    ]
    return Widths(space.names, tuple(vector))


def first_power(space: SearchSpace, widths: Widths, densities: Sequence[float]) -> Widths | None:
    """The first power of the densities, each 0.99 at most, that moves an axis on its grid.

    Returns:
        None where every axis is at its least.
    """
    if all(w <= axis.min_width for w, axis in zip(widths.vector, space.axes, strict=True)):
        return None
    shares = np.clip(np.nan_to_num(np.asarray(densities), nan=1.0), 0.0, 0.99)
    powers, found = shares, widths
    while found == widths:
        found = narrowed(space, widths, powers.tolist())
        powers = powers * shares
    return found


def training_complexity(phases: Sequence[tuple[int, int]], epochs: int, macs: int) -> float:
    """Σ epochs · MACs over phases, as a share of one full training (the paper's section 3).

    Args:
        phases: The epochs and MACs of each.
        epochs: Of a full training.
        macs: Of the full network.
    """
    return sum(e * m for e, m in phases) / (epochs * macs)


def density_of_axes(space: SearchSpace, counts: Sequence[Counts]) -> tuple[float, ...]:
    """Each axis's density; tied ones' over all of their counts. NaN where nothing was counted."""
    index = {name: i for i, name in enumerate(space.unconstrained.names)}
    out = []
    for axis in space.axes:
        mine = [counts[index[name]] for name in (axis.name, *axis.tied)]
        total = sum(float(c.total.sum()) for c in mine)
        out.append(sum(float(c.active.sum()) for c in mine) / total if total else math.nan)
    return tuple(out)


def _seed(seed: int, phase: int) -> int:
    return int(np.random.SeedSequence((seed, phase)).generate_state(1)[0])
