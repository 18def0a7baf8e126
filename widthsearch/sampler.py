"""The sampler: the next widths, from the outcomes so far.

Optuna's multivariate TPE, asked in a study in memory that holds the outcomes so far. So a draw is a
function of the seed and the outcomes alone: it is the same after a resume as without one, it leaves
no half-written trial in the storage when it is killed, and what TPE repeats is thrown away unseen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from widthsearch.storage import directions, distributions
from widthsearch.widths import Axis, Widths

REPEATS = 20


@dataclass(frozen=True)
class Known:
    """What the sampler knows of a trial.

    Attributes:
        widths: Its architecture.
        values: The value of each objective as a person reads it; None while it is being trained or
            when a rung stopped it, which both keep the sampler away from it.
    """

    widths: Widths
    values: tuple[float, ...] | None = None


def draw(
    axes: Sequence[Axis],
    objectives: Sequence[str],
    known: Sequence[Known],
    seen: Collection[Widths],
    seed: int,
) -> Widths | None:
    """Widths that are not among ``seen``; None when the whole grid is.

    TPE repeats itself on small grids (46 of 60 draws were distinct in one trial of it): after
    ``REPEATS`` repeats in a row the widths are drawn uniformly.
    """
    if _all_seen(axes, seen):
        return None
    names = tuple(axis.name for axis in axes)
    space = distributions(axes)
    sampler = optuna.samplers.TPESampler(multivariate=True, seed=seed)
    study = optuna.create_study(directions=directions(objectives), sampler=sampler)
    study.add_trials([_frozen(axes, trial) for trial in known if _on_grid(axes, trial.widths)])
    for _ in range(REPEATS):
        trial = study.ask(dict(space))
        widths = Widths(names, tuple(trial.params[name] for name in names))
        if widths not in seen:
            return widths
        study.tell(trial, state=TrialState.FAIL)
    rng = np.random.default_rng(seed)
    while True:
        widths = Widths(names, tuple(int(rng.choice(axis.grid)) for axis in axes))
        if widths not in seen:
            return widths


def _frozen(axes: Sequence[Axis], trial: Known) -> FrozenTrial:
    return create_trial(
        state=TrialState.PRUNED if trial.values is None else TrialState.COMPLETE,
        values=trial.values,
        params=trial.widths.to_json(),
        distributions=dict(distributions(axes)),
    )


def _on_grid(axes: Sequence[Axis], widths: Widths) -> bool:
    return all(width in axis.grid for axis, width in zip(axes, widths.vector, strict=True))


def _all_seen(axes: Sequence[Axis], seen: Collection[Widths]) -> bool:
    size = math.prod(len(axis.grid) for axis in axes)
    return size <= len(seen) and sum(_on_grid(axes, widths) for widths in seen) >= size
