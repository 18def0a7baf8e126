"""Whether a study's short recipe ranks networks as a full one does, and at other learning rates.

Members of the front are trained anew, from fresh seeds, by the study's recipe and by the same one
with more epochs; three of them also at half and at twice the learning rate. All are compared on the
data of the search: the test split is not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from widthsearch.api import Study
from widthsearch.errors import CheckpointError, StudyError, writing
from widthsearch.modules.source import source_digest
from widthsearch.study.job import study_job
from widthsearch.study.rank_correlation import RATES, Array, RankCheck
from widthsearch.study.trial import Trial
from widthsearch.training.job import CHECKPOINT, Job, TrainingTrial
from widthsearch.training.recipe import EpochResult, recipe_values
from widthsearch.utils.devices import check_device, restored_generators
from widthsearch.utils.files import write_atomically

LEAST = 3
"""Fewer networks have no rank correlation worth the name."""


def rank_check(
    study: Study,
    epochs: int,
    *,
    members: int = 6,
    seeds: int = 3,
    device: str | None = None,
    folder: Path | str | None = None,
    on_epoch: Callable[[str, EpochResult], None] | None = None,
) -> RankCheck:
    """Train members of a study's front by its recipe, and by one of more epochs.

    The same call resumes an interrupted one from its last checkpoint, and trains nothing that is
    complete.

    Args:
        study: The study.
        epochs: The epochs of a full training.
        members: The most networks, spread evenly over the front by the log of their MACs.
        seeds: The trainings of each network by each recipe.
        device: The device; by default the study's.
        folder: The folder of results and checkpoints; by default ``rank_check`` in the study's.
        on_epoch: Called with the name of a training and the result of an epoch.

    Raises:
        StudyError: The front has too few members, or a number is too small.
    """
    recipe = study.resolve_recipe()
    if epochs <= recipe.epochs:
        raise StudyError(
            f"a rank check needs more epochs than the recipe's {recipe.epochs}, but was given "
            f"{epochs}: set --epochs"
        )
    if seeds < 1 or members < LEAST:
        raise StudyError(
            f"a rank check needs seeds >= 1 and members >= {LEAST}, but was given seeds={seeds} "
            f"and members={members}"
        )
    chosen = spread(study.front(), members)
    if len(chosen) < LEAST:
        raise StudyError(
            f"a rank check needs {LEAST} members of the front, but study {study.config.name!r} has "
            f"{len(chosen)}: train more candidates"
        )
    folder = Path(folder or study.folder / "rank_check")
    place, data = check_device(device or study.config.device), study.data()
    values = recipe_values(recipe)
    lr = values.get("lr")
    lr = float(lr) if isinstance(lr, int | float) and not isinstance(lr, bool) else None

    def trained(trials: Sequence[Trial], name: str, **changes: Any) -> Array:
        changed = type(recipe)(**{**values, **changes})
        job = study_job(study.config.model_copy(update={"recipe": changed}))
        rows = []
        for trial in trials:
            row = []
            for i in range(seeds):
                label = f"trial {trial.number}, {name}, network {i + 1}/{seeds}"

                def report(result: EpochResult, label: str = label) -> bool:
                    if on_epoch is not None:
                        on_epoch(label, result)
                    return True

                seed = int(np.random.SeedSequence((study.config.seed, 2, i)).generate_state(1)[0])
                row.append(_train(study, trial, job, data, seed, place, folder, report))
            rows.append(row)
        return np.array(rows, np.float64)

    short = trained(chosen, f"{recipe.epochs} epochs")
    full = trained(chosen, f"{epochs} epochs", epochs=epochs)
    places = [0, len(chosen) // 2, len(chosen) - 1] if lr is not None else []
    rated = [chosen[i] for i in places]
    rates = [
        short[places] if rate == 1 else trained(rated, f"lr {lr * rate:g}", lr=lr * rate)
        for rate in (RATES if lr is not None else ())
        if lr is not None
    ]
    return RankCheck(
        tuple(chosen),
        short,
        full,
        (recipe.epochs, epochs),
        tuple(rated),
        np.array(rates),
        lr,
        study.config.metric,
    )


def spread(front: Sequence[Trial], count: int) -> list[Trial]:
    """Members of a front, evenly spread over the log of their MACs; the ends are among them.

    Args:
        front: The front, fewest MACs first.
        count: The most members, 2 or more.
    """
    if len(front) <= count:
        return list(front)
    logs = np.log([trial.cost.macs for trial in front])
    left, chosen = list(range(len(front))), list[int]()
    for target in np.linspace(logs[0], logs[-1], count):
        nearest = min(left, key=lambda i: abs(logs[i] - target))
        left.remove(nearest)
        chosen.append(nearest)
    return [front[i] for i in sorted(chosen)]


def _train(
    study: Study,
    trial: Trial,
    job: Job,
    data: Any,
    seed: int,
    device: torch.device,
    folder: Path,
    report: Callable[[EpochResult], bool],
) -> float:
    """The metric of a training after its last epoch; read from the folder where it is there."""
    space = study.spaces[trial.space]
    network = space.build(trial.widths, seed=seed).to(device)
    code = source_digest(network)
    asked = (space.fingerprint, trial.widths.vector, seed, job.identity, str(device), code)
    key = hashlib.sha256(repr((*asked, job.trainer.__module__)).encode()).hexdigest()[:16]
    result, checkpoints = folder / f"{key}.json", folder / "checkpoints" / key
    if result.exists():
        value = json.loads(result.read_text(encoding="utf-8"))["value"]
        return math.nan if value is None else float(value)
    training: TrainingTrial[Any] = TrainingTrial(
        job,
        network,
        data,
        trial.widths,
        seed=seed,
        folder=checkpoints,
        device=device,
        threads=torch.get_num_threads(),
        code=code,
        on_report=report,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (checkpoints / CHECKPOINT).exists():
        try:
            training.load()
        except CheckpointError:
            shutil.rmtree(checkpoints)  # it is damaged: train from the start
    with restored_generators(device):
        job.run(network, training)
    value = training.curve[-1].value
    known = value if math.isfinite(value) else None
    content = {"trial": trial.number, "seed": seed, "epochs": job.epochs, "value": known}
    with writing(folder):
        write_atomically(result, lambda file: file.write(json.dumps(content).encode()))
        shutil.rmtree(checkpoints, ignore_errors=True)
    return value
