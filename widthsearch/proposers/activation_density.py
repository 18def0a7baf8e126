"""Widths from activation density: each layer becomes as wide as its share of active values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field
from torch import nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.data.tasks import AnyTask, steps_of_epoch
from widthsearch.errors import StudyError
from widthsearch.proposers.density import Counts, DensityMeter, Rules
from widthsearch.proposers.protocol import Count, Finite, Proposal, Setting
from widthsearch.proposers.tuning import divergence
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.recipe import Recipe
from widthsearch.training.trainer import Trainer
from widthsearch.utils.validation import validated_dataclass
from widthsearch.widths import Widths

SETTLING = 3000
"""Steps below which a phase without a plateau is warned of: on CIFAR-10 the densities of VGG-16 go
on spreading for longer (from 0.40..0.55 after 310 steps to 0.27..0.64 after 3,720)."""

_LAST = 3  # the value of a phase is the mean over so many epochs at its end


@validated_dataclass("activation_density")
class ActivationDensity:
    """Resizing in training, w ← round(density · w): Foldy-Porto et al. 2020, arXiv 2002.02949.

    The density of an axis is the share of active values in the inputs of its consumers, over the
    training data of one epoch (see :class:`~widthsearch.proposers.density.DensityMeter`). A network
    trains until the densities have settled. Then the network of the narrower widths takes its
    place. Each such network is a *phase*.

    Deviations: activations without exact zeros, such as GELU, have a relative threshold; if the
    densities of the first phase move no axis by a grid step, their first power that does gives the
    second member; phases hold the peak learning rate. An axis without a convolution or linear layer
    as consumer keeps its width. If the channels of an axis cannot be told apart, a phase that
    narrows the axis starts from new weights. Tied axes have one density, over all of their
    consumers.

    Attributes:
        weights: ``reinit`` (default, as in the paper) initialises each phase anew; with ``extract``
            the densest channels of the last phase keep their weights.
        tolerance: A density has settled if its range over ``patience`` steps is within this share
            of its maximum; default 0.02.
        patience: Training steps, in whole epochs, see ``tolerance``; default 1000. Densities move
            by so little a step that fewer steps mistake any task for settled.
        max_steps: The most steps of a phase, in whole epochs; default those of the recipe. With 1,
            widths follow the densities of an untrained network, which is an ablation.
        until: The method ends once every density is at least this value; default 0.95.
        drop: The method ends once accuracy is this many points below the first phase's, or a number
            to minimize, such as the loss of a user's own task, this many percent above it; default
            3.
        threshold: Values above this share of the root mean square of a consumer's input are active;
            0 counts values that are not zero. By default the first batch of each consumer decides:
            0 if at least 1% of the values are exactly zero, else 0.05.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> method, setting = ActivationDensity(max_steps=1), Setting(recipe=Recipe(epochs=1))
        >>> proposal = method(space, load_task("digits"), setting)
        >>> [widths.vector for widths in proposal.trajectory[:2]]  # half of the values are active
        [(8,), (4,)]
    """

    weights: Literal["reinit", "extract"] = "reinit"
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.02
    patience: Count = 1000
    max_steps: Count | None = None
    until: Annotated[float, Field(gt=0, le=1)] = 0.95
    drop: Finite = 3.0
    threshold: Finite | None = None

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Train, narrow, and repeat; the trajectory has the widths of the phases.

        Widths below ``setting.lowest`` of the base's MACs end the trajectory and are not trained.
        The provenance has a warning where phases ended before their densities could settle.

        Raises:
            StudyError: The training of the base network diverged.
        """
        full = space.cost(space.base).macs
        run = _Phases(self, space, task, setting)
        phases = run.done
        widths, model = space.base, None
        untrained: Widths | None = None
        while True:
            smaller = narrowed(space, widths, run.train(widths, model).densities)
            stopped = self._why_stopped(space, phases, task.minimized)
            if stopped is None and space.cost(smaller).macs < setting.lowest * full:
                stopped, untrained = "the next widths are below the lowest of interest", smaller
            if stopped is not None:
                break
            model = run.narrow(smaller) if self.weights == "extract" else None
            widths = smaller
        if len(phases) == 1 and untrained is None:
            untrained = first_power(space, widths, phases[0].densities)
        trajectory = [phase.widths for phase in phases] + ([untrained] if untrained else [])
        costs = [(phase.epochs, phase.macs) for phase in phases]
        spent = training_complexity(costs, setting.recipe.epochs, full)
        provenance = {
            "seed": setting.seed,
            **asdict(self),
            "phases": [phase.to_json() for phase in phases],
            "stopped": stopped,
            "training_complexity": spent,
            "training_complexity_with_final": spent + phases[-1].macs / full,
            "by_relative_threshold": sorted(key for key, rule in run.rules.items() if rule),
            "warnings": _short_phases(phases),
        }
        return Proposal("activation_density", tuple(trajectory), provenance)

    def _why_stopped(
        self, space: SearchSpace, phases: Sequence[Phase], minimized: bool
    ) -> str | None:
        """The reason to stop after these phases, if there is one."""
        first, last = phases[0], phases[-1]
        if math.isnan(last.value):
            return "training diverged"
        if minimized and last.value - first.value > self.drop / 100 * abs(first.value):
            return f"{last.measure} is more than {self.drop:g}% above the first phase's"
        if not minimized and last.value < first.value - self.drop:
            return f"{last.measure} is more than {self.drop:g} points below the first phase's"
        movable = [
            d
            for d, w, axis in zip(last.densities, last.widths.vector, space.axes, strict=True)
            if w > axis.min_width and not math.isnan(d)
        ]
        if all(d >= self.until for d in movable):
            return f"every density is {self.until:g} or more, or its axis at its smallest width"
        if narrowed(space, last.widths, last.densities) == last.widths:
            return "no density moves its axis by a step"
        return None


@dataclass(frozen=True)
class Phase:
    """The result of a phase.

    Attributes:
        widths: The widths of the network.
        macs: The MACs of the network.
        extracted: Whether the network started with weights of the last phase.
        epochs: The number of epochs trained.
        steps: The number of steps in them.
        plateau: Whether the densities had settled by then.
        densities: The density of each axis in the last epoch; NaN without measured consumers.
        value: The mean over the last epochs of validation accuracy in percent, or of the validation
            loss of an own task.
        measure: The name of the value in JSON, such as ``accuracy`` or ``loss``.

    Example:
        >>> phase = Phase(Widths(("fc",), (8,)), 900, False, 3, 48, True, (math.nan,), value=91.0)
        >>> phase.to_json()["densities"]
        [None]
    """

    widths: Widths
    macs: int
    extracted: bool
    epochs: int
    steps: int
    plateau: bool
    densities: tuple[float, ...]
    value: float
    measure: str = "accuracy"

    def to_json(self) -> dict[str, Any]:
        """The phase as plain JSON values, with None for NaN."""
        values = asdict(self)
        value, measure = values.pop("value"), values.pop("measure")
        return {
            **values,
            "widths": list(self.widths.vector),
            "densities": [None if math.isnan(d) else d for d in self.densities],
            measure: None if math.isnan(value) else value,
        }


@dataclass(eq=False)
class _Phases:
    """Trains the network of each phase until its densities settle, and narrows it.

    Attributes:
        method: The hyperparameters.
        space: The space.
        task: The data.
        setting: The circumstances of the proposal.
        rules: The rules of consumers, shared by all phases.
        done: The phases so far.
        model: The network of the last phase.
        graph: Its dependency graph.
        counts: The counts of each axis in its last epoch.
    """

    method: ActivationDensity
    space: SearchSpace
    task: AnyTask
    setting: Setting
    rules: Rules = field(default_factory=dict)
    done: list[Phase] = field(default_factory=list)
    model: nn.Module = field(init=False)
    graph: DependencyGraph = field(init=False)
    counts: list[Counts] = field(init=False)

    def train(self, widths: Widths, extracted: nn.Module | None) -> Phase:
        """Train the extracted network, or a new one, of these widths until its densities settle."""
        method, space, setting = self.method, self.space, self.setting
        seed = int(np.random.SeedSequence((setting.seed, len(self.done))).generate_state(1)[0])
        self.model = space.build(widths, seed=seed) if extracted is None else extracted
        plain = space.to_unconstrained(widths)
        self.graph = build_dependency_graph(space.unconstrained.model, plain)
        macs = space.cost(widths).macs
        share = macs / space.cost(space.base).macs
        steps = steps_of_epoch(self.task, setting.recipe.batch_size)
        patience = math.ceil(method.patience / steps)  # in epochs
        most = method.max_steps or setting.recipe.epochs * steps
        recipe = held(setting.recipe, math.ceil(most / steps))
        trainer = Trainer(self.model, self.task, recipe, seed=seed, device=setting.device)
        history: list[tuple[float, ...]] = []
        plateau = False
        while not (trainer.finished or plateau):
            with DensityMeter(self.graph, self.model, method.threshold, self.rules) as meter:
                result = trainer.run_epoch()
            self.counts = meter.counts()
            history.append(density_of_axes(space, self.counts))
            plateau = plateaued(history, method.tolerance, patience)
            setting.report(
                f"phase {len(self.done) + 1} at {share:.2f} of the base's MACs, epoch "
                f"{result.epoch} of at most {recipe.epochs}: {self.task.shown(result.value)}"
            )
        if math.isnan(trainer.curve[-1].value) and widths == space.base:
            raise StudyError(
                "activation_density needs a recipe that trains the base network, with its peak lr "
                f"held, but {divergence(trainer.curve[-1], recipe)}"
            )
        value = float(np.mean([each.value for each in trainer.curve[-_LAST:]]))
        trained = extracted is not None, trainer.epoch, trainer.epoch * steps, plateau
        phase = Phase(widths, macs, *trained, history[-1], value, self.task.measure)
        self.done.append(phase)
        return phase

    def narrow(self, widths: Widths) -> nn.Module | None:
        """Extract the network of narrower widths with the densest channels.

        Returns:
            None if the channels of a narrowed axis cannot be told apart.
        """
        unconstrained = self.space.unconstrained
        # Ties and bounds of the space may ask for widths off the unconstrained space's own grid.
        finest = {axis.name: axis.divisor for axis in unconstrained.trace.axes}
        unconstrained = unconstrained.constrained(min_width=finest, step=finest)
        wanted = self.space.to_unconstrained(widths)
        keep: dict[str, list[int]] = {}
        for i, (axis, counts) in enumerate(zip(unconstrained.trace.axes, self.counts, strict=True)):
            if wanted[axis.name] == self.graph.widths[axis.name]:
                continue
            if i in self.graph.unknown:
                return None
            densest = np.argsort(-counts.density(), kind="stable")
            groups = densest[: wanted[axis.name] // axis.divisor]
            channels = np.flatnonzero(np.isin(self.graph.channels[i], groups))
            keep[axis.name] = channels.tolist()
        return unconstrained.extract(self.model, keep)


def _short_phases(phases: Sequence[Phase]) -> list[str]:
    """A warning if phases ended before their densities could settle, else none."""
    short = [phase.steps for phase in phases if not phase.plateau and phase.steps < SETTLING]
    if not short:
        return []
    return [
        f"{len(short)} of {len(phases)} phases ended after {min(short):,} to {max(short):,} steps "
        "without a plateau, when densities have hardly left those of an untrained network; raise "
        f"max_steps, for example to {SETTLING:,}"
    ]


def held(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe of a phase: the peak learning rate is held after the warm-up.

    A schedule that decays to zero would settle every density by itself.

    Args:
        recipe: The study's recipe.
        epochs: The most epochs of the phase.
    """
    warmup = min(recipe.warmup, epochs / 2)
    return replace(recipe, schedule="constant", epochs=epochs, warmup_epochs=warmup)


def plateaued(history: ArrayLike, tolerance: float, patience: int) -> bool:
    """Whether the densities have settled.

    Args:
        history: The densities, shape (epochs, axes); axes of NaN are left out.
        tolerance: The largest range of a density, as a share of its maximum.
        patience: The number of changes, between patience + 1 epochs, that the range is taken over.
    """
    recent = np.asarray(history, np.float64)[-patience - 1 :]
    if len(recent) <= patience:
        return False
    measured = recent[:, ~np.isnan(recent[0])]
    return bool((np.ptp(measured, axis=0) <= tolerance * measured.max(axis=0)).all())


def narrowed(space: SearchSpace, widths: Widths, densities: Sequence[float]) -> Widths:
    """Narrow widths by densities: ``nearest(round(density · w))``, never wider than w.

    Args:
        space: The space.
        widths: Widths w of the space.
        densities: One density per axis; an axis of NaN keeps its width.
    """
    vector = [
        w if math.isnan(d) else min(w, axis.nearest(round(d * w)))
        for axis, w, d in zip(space.axes, widths.vector, densities, strict=True)
    ]
    return Widths(space.names, tuple(vector))


def first_power(space: SearchSpace, widths: Widths, densities: Sequence[float]) -> Widths | None:
    """Narrow widths by the first power of the densities, each at most 0.99, that moves an axis.

    Returns:
        None if every axis has its smallest width.
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
    """Σ epochs · MACs over phases, as a share of one full training (section 3 of the paper).

    Args:
        phases: The epochs and MACs of each phase.
        epochs: The epochs of a full training.
        macs: The MACs of the full network.
    """
    return sum(e * m for e, m in phases) / (epochs * macs)


def density_of_axes(space: SearchSpace, counts: Sequence[Counts]) -> tuple[float, ...]:
    """The density of each axis, over all counts of tied axes; NaN where nothing was counted."""
    index = {name: i for i, name in enumerate(space.unconstrained.names)}
    out = []
    for axis in space.axes:
        mine = [counts[index[name]] for name in (axis.name, *axis.tied)]
        total = sum(float(c.total.sum()) for c in mine)
        out.append(sum(float(c.active.sum()) for c in mine) / total if total else math.nan)
    return tuple(out)
