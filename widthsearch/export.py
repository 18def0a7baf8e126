"""Final training: a trial's widths trained in full and tested, written to a folder that loads.

The folder holds ``widths.json``, ``weights.pt``, ``card.json`` and, where the network exports,
``model.pt2``, a program of ``torch.export`` that runs without any code of the user's. It may be
moved: it has no absolute path. The card is removed first and written last, so a folder with a card
is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import operator
import os
import platform
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic_core import to_jsonable_python
from torch import Tensor, nn

from widthsearch import __version__
from widthsearch.api import Study
from widthsearch.errors import CheckpointError, StudyError, WidthsError, first_line, writing
from widthsearch.modules.source import source_digest
from widthsearch.space.constraints import Constraints
from widthsearch.space.loading import load_space
from widthsearch.space.program import Program, write_program
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.job import study_job
from widthsearch.study.starts import BaseWeights, start_network
from widthsearch.study.trial import Trial
from widthsearch.training.job import CHECKPOINT, Job, TrainingTrial
from widthsearch.training.recipe import EpochResult, OwnRecipe, Recipe, recipe_values
from widthsearch.utils.devices import check_device, restored_generators
from widthsearch.utils.files import write_atomically
from widthsearch.utils.references import file_digest
from widthsearch.widths import Widths

_logger = logging.getLogger(__name__)

WIDTHS, WEIGHTS, CARD = "widths.json", "weights.pt", "card.json"
PROGRAM = "model.pt2"

_FORMAT = 3
"""The version of the card: a folder of another one is written anew."""

OnEpoch = Callable[[int, EpochResult], None]
"""Called with a network's number and the result of an epoch."""


def train(
    study: Study,
    trial: Trial,
    *,
    seeds: int = 3,
    epochs: int | None = None,
    device: str | None = None,
    folder: Path | str | None = None,
    base: bool = False,
    program: bool = True,
    search_data: bool = False,
    on_epoch: OnEpoch | None = None,
    on_message: Callable[[str], object] = lambda message: None,
) -> dict[str, Any]:
    """Train a trial's widths in full, once a seed, and test each network.

    The built-in trainer trains networks on the training and validation splits together, and reads
    the test split once a network, after its last epoch. A trainer of the user's own gets the data
    of ``final_data``, which has the test split in place of the validation split. A network's result
    is the metric of its last report, or there a number called ``test_`` and the metric's name. The
    card has it under ``test_<metric>``; without either of the two it is of the study's own
    validation split, and under ``validation_<metric>``. The same call resumes an interrupted one
    from its last checkpoint; a complete folder keeps no checkpoints, and the same call returns its
    card. A network of another call that was in the folder stays loadable until the new ones are
    trained.

    With ``search_data`` networks are trained and evaluated on the data of the search instead, so
    that the weights have seen no image of the validation split: those of a base that ``start:
    extract`` cuts must not have.

    Args:
        study: The study.
        trial: A finished trial of it.
        seeds: The number of networks; the weights of the first are kept, whatever its accuracy.
        epochs: Epochs of training; by default the recipe's.
        device: The device; by default the study's.
        folder: The folder to write; by default ``trained/<id>`` in the study's folder, with
            ``search_data`` ``trained/<id>-search-data``.
        base: Whether the base is trained alike, with the same seeds. The study's own figures for
            it are of the search's recipe and data, and compare with those for the trial alone.
        program: Whether to write ``model.pt2``, see :mod:`widthsearch.space.program`.
        search_data: Whether the splits are those of the search; the test split is not read then.
        on_epoch: Called with each network's number, from 0, and each epoch's result; those of the
            base come last. Without ``search_data`` there is no held-out split: its accuracy is on a
            part of the training images.
        on_message: Called with a bar, while images in files are read into memory.

    Returns:
        The content of ``card.json``, with the study's estimates for the trial and for the base.

    Raises:
        StudyError: The task has no test split, training diverged, or the folder cannot be written.
    """
    space, own = study.spaces[trial.space], study.config.trainer is not None
    task = None if own else study.task
    if task is not None and task.test is None and not search_data:
        raise StudyError(f"final training needs a test split, but task {task.name!r} has none")
    if seeds < 1:
        raise StudyError(f"`seeds >= 1` must hold, but seeds={seeds}")
    recipe = study.resolve_recipe()
    recipe = type(recipe)(**recipe_values(recipe, epochs or trial.origin.get("epochs")))
    job = study_job(study.config.model_copy(update={"recipe": recipe}), final=not search_data)
    device = device or study.config.device
    folder = Path(folder or default_folder(study, trial, search_data=search_data))
    asked = (seeds, base, program, *(("search data",) if search_data else ()))
    request = _digest(study, trial, asked, job, device)
    if (complete := _complete(folder, request)) is not None:
        return complete
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data = study.data(final=not search_data, report=on_message)
    cut_from = _cut_from(study, trial)
    place = check_device(device)
    final = _FinalTraining(study, job, data, not search_data, place, seeds, folder, cut_from)
    networks = final.train(space, trial.widths, "", on_epoch)
    of_base = None
    if base and (space, trial.widths) != (study.space, study.space.base):
        shown = on_epoch and (lambda number, result: on_epoch(number + seeds, result))
        of_base = final.train(study.space, study.space.base, "base-", shown)
    weights = {name: value.cpu() for name, value in networks[0].weights.items()}
    with writing(folder):
        _remove(folder / CARD)
        space.save_widths(folder / WIDTHS, trial.widths)
        write_atomically(folder / WEIGHTS, lambda file: torch.save(weights, file))
        (folder / PROGRAM).unlink(missing_ok=True)
        made = _write_program(space, trial, weights, folder) if program else None
        card = {
            **_card(study, trial, job, recipe, device),
            **_results(final, networks, of_base),
            "program": made and asdict(made),
            "request": request,
        }
        text = json.dumps(card, indent=1) + "\n"
        write_atomically(folder / CARD, lambda file: file.write(text.encode()))
        shutil.rmtree(folder / "checkpoints")
    return card


def default_folder(study: Study, trial: Trial, *, search_data: bool) -> Path:
    """The folder of a trained network; another one where it is trained on the search's data."""
    return study.folder / "trained" / f"{trial.number}{'-search-data' * search_data}"


@dataclass(frozen=True)
class _Network:
    """A network that was trained in full."""

    seed: int
    curve: Sequence[EpochResult]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class _FinalTraining:
    """What the final trainings of several networks have in common."""

    study: Study
    job: Job
    data: Any
    final: bool
    device: torch.device
    seeds: int
    folder: Path
    cut_from: BaseWeights | None

    def train(
        self, space: SearchSpace, widths: Widths, name: str, on_epoch: OnEpoch | None
    ) -> list[_Network]:
        """Train widths once a seed, from the checkpoints called ``name`` and the number."""
        networks = []
        for i in range(self.seeds):

            def on_report(result: EpochResult, number: int = i) -> bool:
                if on_epoch is not None:
                    on_epoch(number, result)
                return True

            sequence = np.random.SeedSequence((self.study.config.seed, 1, i))
            seed = int(sequence.generate_state(1)[0])
            model = start_network(space, widths, self.cut_from, seed).to(self.device)
            training: TrainingTrial[Any] = TrainingTrial(
                self.job,
                model,
                self.data,
                widths,
                seed=seed,
                folder=self.folder / "checkpoints" / f"{name}{i}",
                device=self.device,
                threads=torch.get_num_threads(),
                final=self.final,
                weights=None if self.cut_from is None else self.cut_from.digest,
                code=source_digest(model),
                on_report=on_report,
            )
            result = _train_to_the_end(self.job, model, training, i)
            if not math.isfinite(result.value):
                job = self.job
                way = f"see how {job.name!r} computes it, or lower its learning rate"
                if isinstance(job.recipe, Recipe):
                    way = f"lower the recipe's lr (now {job.recipe.lr:g})"
                raise StudyError(
                    f"training diverged in epoch {result.epoch} with seed {seed}: {job.metric} is "
                    f"{result.value} and the loss {result.loss}; {way}"
                )
            weights = model.state_dict() if i == 0 else {}
            networks.append(_Network(seed, tuple(training.curve), weights))
        return networks


def _card(
    study: Study, trial: Trial, job: Job, recipe: Recipe | OwnRecipe, device: str
) -> dict[str, Any]:
    """The part of a card that is known before the training."""
    space, config = study.spaces[trial.space], study.config.to_json()
    task = None if study.config.trainer is not None else study.task
    posterior = study.posterior()
    base = posterior.base
    return {
        "study": study.config.name,
        "trial": trial.number,
        "origin": dict(trial.origin),
        "space": {
            "reference": _portable(study.reference(space.name)),
            "input": study.config.input,
            "classes": task and task.classes,
            "constraints": config["constraints"],
            "name": space.name,
            "fingerprint": space.fingerprint,
        },
        "task": task and task.name,
        "trainer": _portable(config["trainer"]),
        "classes": (task and list(task.names)) or None,
        "preprocessing": task
        and {
            "mean": list(task.mean),
            "std": list(task.std),
            "input_shape": list(task.input_shape),
        },
        "recipe": recipe_values(recipe) | _defaults(job.recipe),
        "device": device,
        **asdict(trial.cost),
        "latency": trial.latency and trial.latency.to_json(),
        "estimated": posterior[trial].to_json(),
        "base": base
        and {
            **asdict(base.cost),
            "latency_ms": base.latency_ms,
            "estimated": posterior[base].to_json(),
        },
        "versions": versions(),
    }


def _defaults(recipe: Any) -> dict[str, Any]:
    """The fields of a trainer's own dataclass, also those that the study leaves to it."""
    if isinstance(recipe, Recipe) or not is_dataclass(recipe):
        return {}
    return cast(dict[str, Any], to_jsonable_python(recipe, fallback=str))


def _results(
    final: _FinalTraining, networks: Sequence[_Network], base: Sequence[_Network] | None
) -> dict[str, Any]:
    """The results of the networks, under the name of the split that they are of."""
    metric = final.study.config.metric.name
    split, figures = _figures(final, networks)
    curve = networks[0].curve
    return {
        "split": split,
        f"{split}_{metric}": _summary(figures),
        "base_trained_alike": None if base is None else _summary(_figures(final, base)[1]),
        "curve": [{"epoch": r.epoch, "loss": r.loss, metric: r.value} for r in curve],
    }


def _summary(figures: Mapping[int, float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(figures.values()),
        "std": statistics.stdev(figures.values()) if len(figures) > 1 else None,
        "by_seed": {str(seed): figure for seed, figure in figures.items()},
        "of_weights": next(iter(figures.values())),
    }


def _write_program(
    space: SearchSpace, trial: Trial, weights: Mapping[str, Tensor], folder: Path
) -> Program:
    """Write the program of the network of some weights."""
    model = space.build(trial.widths, initialise=False)
    model.load_state_dict(weights)
    made = write_program(space, model.eval(), folder / PROGRAM)
    if made.reason:
        what = "takes a batch of 1 alone" if made.batch else "is not written"
        _logger.warning("%s %s: torch.export: %s", PROGRAM, what, made.reason)
    return made


def _figures(final: _FinalTraining, networks: Sequence[_Network]) -> tuple[str, dict[int, float]]:
    """The split that the results of networks are of, and the results by seed."""
    last = {network.seed: network.curve[-1] for network in networks}
    config = final.study.config
    named = f"test_{config.metric.name}"
    if final.final and all(named in result.metrics for result in last.values()):
        return "test", {seed: result.metrics[named] for seed, result in last.items()}
    split = "test" if final.final and config.final_data is not None else "validation"
    return split, {seed: result.value for seed, result in last.items()}


def _digest(study: Study, trial: Trial, asked: Sequence[object], job: Job, device: str) -> str:
    """A digest of everything that decides the result of a training."""
    space, task = study.spaces[trial.space], None if study.config.trainer else study.task
    data = task and (len(task.train), len(task.validation), task.names, task.input_shape)
    network = study.reference(space.name), space.fingerprint, trial.widths.vector
    own = None if study.config.trainer is None else file_digest(job.trainer)
    code = source_digest(space.model.template), own
    cut_from = _cut_from(study, trial)
    start = cut_from and cut_from.digest
    every = data, network, code, _FORMAT, study.config.seed, *asked, job.identity, device, start
    return hashlib.sha256(repr(every).encode()).hexdigest()[:16]


def _cut_from(study: Study, trial: Trial) -> BaseWeights | None:
    """The weights that a trial's network is cut from; None for new weights."""
    return study.base_weights if trial.start == "extract" else None


def _complete(folder: Path, request: str) -> dict[str, Any] | None:
    """The card of a folder where a training with this digest is complete, if it is."""
    if not all((folder / name).exists() for name in (CARD, WIDTHS, WEIGHTS)):
        return None
    with suppress(StudyError):
        card = _read_json(folder / CARD)
        return card if card.get("request") == request else None
    return None


def _train_to_the_end(
    job: Job, model: nn.Module, training: TrainingTrial[Any], number: int
) -> EpochResult:
    """Train a network, from its last checkpoint where there is one; returns the last epoch."""
    if (training.folder / CHECKPOINT).exists():
        try:
            training.load()
        except CheckpointError as error:
            _logger.warning("network %d is trained from the start: %s", number + 1, error)
    with restored_generators(training.device):
        job.run(model, training)
    return training.curve[-1]


def _remove(path: Path) -> None:
    """Remove a file if it exists, on disk before any later write."""
    path.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(folder: str | Path, space: SearchSpace | str | None = None) -> nn.Module:
    """Load the network in a folder that :func:`train` wrote, in eval mode.

    Its input is images with values from 0 to 1, normalised by the mean and std under
    ``preprocessing`` in the card. Nothing in the folder runs code: only tensors are unpickled, and
    a function that the card names is not imported, since the folder may come from anyone.

    Args:
        folder: The folder.
        space: The space, or its reference, as in the study; None for a torchvision model.

    Raises:
        StudyError: The folder is incomplete or damaged.
        WidthsError: The space has changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StudyError(
            f"a trained folder must be one that `widthsearch train` wrote, but there is no folder "
            f"{str(folder)!r} (looked in {Path.cwd()})"
        )
    for name in (CARD, WIDTHS, WEIGHTS):
        if not (folder / name).is_file():
            raise StudyError(
                f"a trained folder must hold {WIDTHS}, {WEIGHTS} and {CARD}, but {str(folder)!r} "
                f"has no file {name}; give one that `widthsearch train` wrote, or train the pick "
                "again"
            )
    if not isinstance(space, SearchSpace | str | None):
        raise StudyError(
            "load(folder, space) takes a SearchSpace or its reference 'file.py:function', but was "
            f"given {type(space).__name__} {getattr(space, '__name__', '')!r}"
        )
    if not isinstance(space, SearchSpace):
        space = _space_of(_read_json(folder / CARD).get("space"), folder, space)
    try:
        widths = space.load_widths(folder / WIDTHS, on_grid=False)
    except WidthsError as error:
        raise WidthsError(
            f"{error}; load(folder, space=...) takes the space that it was trained in"
        ) from None
    model = space.build(widths, initialise=False)
    try:
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:
        raise StudyError(
            f"{str(folder / WEIGHTS)!r} cannot be loaded: {first_line(error).rstrip('. ')}; give "
            "the space that it was trained in, load(folder, space=...), or train the pick again"
        ) from error
    return model.eval()


def _space_of(about: Any, folder: Path, given: str | None) -> SearchSpace:
    """The space of a card, by the reference that was given, or by its own of a torchvision model.

    Any other reference runs code, and a folder may come from anyone: the caller has to name it.
    """
    card = str(folder / CARD)
    keys = ("reference", "name", "input", "classes", "constraints")
    missing = [key for key in keys if not isinstance(about, dict) or key not in about]
    if missing:
        raise StudyError(f"{card!r} lacks the space's {missing[0]!r}; train the pick again")
    reference, name, shape, classes, constraints = (about[key] for key in keys)
    if given is None and reference is None:
        raise StudyError(
            f"{str(folder)!r} was trained in a space without a reference ({name!r}): give the "
            "space, load(folder, space=...)"
        )
    try:
        asked = Constraints(**constraints)
        shape = None if shape is None else tuple(map(operator.index, shape))
        classes = None if classes is None else operator.index(classes)
        where = str.__str__(reference if given is None else given)
    except TypeError as error:
        raise StudyError(f"{card!r} is damaged ({error}); train the pick again") from None
    if given is None and not where.startswith("torchvision:"):
        raise StudyError(
            f"a card's code must be trusted before it is imported, but {card!r} names {where!r}: "
            f"if you trust that, load(folder, space={where!r})"
        )
    return load_space(where, shape, classes).with_constraints(asked)


def _portable(reference: str | None) -> str | None:
    """A reference to a file without an absolute path; any other reference unchanged."""
    where, _, function = (reference or "").rpartition(":")
    path = Path(where)
    if not where.endswith(".py") or not path.is_absolute():
        return reference
    within = path.is_relative_to(Path.cwd())
    return f"{path.relative_to(Path.cwd()) if within else path.name}:{function}"


def versions() -> dict[str, str]:
    """The versions of Python and the packages that determine the numbers, and the machine.

    Example:
        >>> sorted(versions())[:3]
        ['machine', 'numpy', 'optuna']
    """
    packages = ("torch", "torchvision", "optuna", "ray", "numpy")
    found = {"widthsearch": __version__} | {name: version(name) for name in packages}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(
            f"a trained folder must hold {WIDTHS}, {WEIGHTS} and {CARD}, but {str(path)!r} cannot "
            f"be read: {error}"
        ) from error
    return content
