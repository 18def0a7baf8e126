"""What a study would train, how long that takes, and the memory it needs; nothing is kept."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from widthsearch.bayesopt.metric import COSTS
from widthsearch.errors import StudyError, printable
from widthsearch.runner.one_epoch import REQUEST, RESULT, EpochRequest
from widthsearch.runner.pickling import SharedData, pickle_by_value
from widthsearch.space.cost import Cost
from widthsearch.study.job import study_job
from widthsearch.study.loop import Search, fault
from widthsearch.study.starts import scratch_epochs
from widthsearch.study.trial import Trial
from widthsearch.training.recipe import EpochResult
from widthsearch.widths import Widths


@dataclass(frozen=True)
class MeasuredEpoch:
    """An epoch of one network, trained by itself in a process of its own.

    Attributes:
        name: ``base`` or ``narrowest``.
        cost: The network's costs.
        seconds: The time of the epoch, with evaluation and checkpoint.
        memory: The peak of the process's memory, in bytes.
        gpu_memory: The peak of the GPU's, in bytes; None without one.

    Example:
        >>> MeasuredEpoch("base", Cost(900, 80, 64), 2.0, 4 * 10**8, None).seconds
        2.0
    """

    name: str
    cost: Cost
    seconds: float
    memory: int
    gpu_memory: int | None


@dataclass(frozen=True)
class DryRun:
    """What a run of a study would do.

    Attributes:
        planned: The networks that are trained before any is suggested.
        skipped: Why a proposer was not run, by its method: it trains, or it failed.
        measured: The base and the narrowest network, trained for an epoch.
        trials: The trials that are left.
        epochs: The epochs of each.
        at_once: The number of trials at once.
        limit: The study's hours; None for no bound.
        starts: The starts that each network is trained from.
        base_epochs: The epochs of the base's training, for ``scratch_b``.
        unreported: The objectives that the base's training has not reported yet.

    Example:
        >>> base = Trial(0, "net", Widths(("a",), (8,)), {"base": True}, 0, Cost(800, 80, 64))
        >>> ends = [("base", 800, 36.0), ("narrowest", 200, 18.0)]
        >>> measured = [MeasuredEpoch(n, Cost(m, 9, 9), s, 10**8, None) for n, m, s in ends]
        >>> dry = DryRun((base,), {}, tuple(measured), trials=40, epochs=5, at_once=2, limit=None)
        >>> dry.hours  # 40 · 5 · 36 s / 2
        1.0
    """

    planned: tuple[Trial, ...]
    skipped: dict[str, str]
    measured: tuple[MeasuredEpoch, ...]
    trials: int
    epochs: int
    at_once: int
    limit: float | None
    starts: tuple[str, ...] = ("scratch",)
    base_epochs: float | None = None
    unreported: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        """The time of all trials, each trained to its end.

        An epoch's time is linear in MACs between the two measured networks, suggestions are as
        large as the planned networks on average, and trials at once do not slow each other down.
        Each network is trained from every start, from ``scratch_b`` for more epochs.
        """
        sizes = [trial.cost.macs for trial in self.planned]
        seconds = fmean(self._mean_epochs(macs) * self._seconds(macs) for macs in sizes)
        return self.trials * seconds / self.at_once / 3600

    @property
    def mean_epochs(self) -> float:
        """The mean epochs of a trial: more than ``epochs`` with ``scratch_b`` alone."""
        return fmean(self._mean_epochs(trial.cost.macs) for trial in self.planned)

    def _mean_epochs(self, macs: int) -> float:
        """The mean epochs of the trainings of a network, over the starts."""
        if "scratch_b" not in self.starts:
            return self.epochs
        assert self.base_epochs is not None
        longer = scratch_epochs(self.epochs, self.base_epochs, self.measured[0].cost.macs, macs)
        return fmean(longer if start == "scratch_b" else self.epochs for start in self.starts)

    def _seconds(self, macs: int) -> float:
        base, narrowest = self.measured
        spread = max(1, base.cost.macs - narrowest.cost.macs)
        slope = max(0.0, base.seconds - narrowest.seconds) / spread
        return base.seconds + slope * (macs - base.cost.macs)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "planned": [
                {"space": t.space, "origin": dict(t.origin), "widths": dict(t.widths)}
                | asdict(t.cost)
                for t in self.planned
            ],
            "skipped": self.skipped,
            "unreported": list(self.unreported),
            "measured": [asdict(each) for each in self.measured],
            **{
                key: getattr(self, key)
                for key in ("trials", "epochs", "mean_epochs", "at_once", "hours")
            },
        }


def measure(
    search: Search,
    data: Any,
    folder: Path,
    *,
    begun: int,
    hours: float | None,
    base_epochs: float | None,
    skipped: dict[str, str],
    report: Callable[[str], None],
) -> DryRun:
    """Take the planned networks from a search, and train two for an epoch.

    Args:
        search: A search in a scratch storage, without measured latency.
        data: The data of the trainer.
        folder: A scratch folder.
        begun: The trials of the study that have begun.
        hours: The study's hours.
        base_epochs: The epochs of the base's training, for ``scratch_b``.
        skipped: Why a proposer was not run, by its method.
        report: Called with a line of progress.

    Raises:
        StudyError: A network cannot be trained, or its first epochs are what fails a trial.
    """
    config, spaces, planned = search.config, search.spaces, list[Trial]()
    while (trial := search.ask()) is not None and "sampler" not in trial.origin:
        planned.append(trial)
    first = next(iter(spaces.values()))
    ends = [(space, tuple(a.min_width for a in space.axes)) for space in spaces.values()]
    narrowest = min(ends, key=lambda end: int(end[0].macs(end[1])))
    job = study_job(config)
    shared = SharedData.of(data, f"the data of {job.name!r}")
    measured = list[MeasuredEpoch]()
    for name, (space, vector) in (
        ("base", (first, first.base.vector)),
        ("narrowest", narrowest),
    ):
        report(f"training the {name} network for an epoch")
        request = EpochRequest(
            shared,
            {space.name: pickle_by_value(space, f"space {space.name!r}")},
            pickle_by_value(job, f"trainer {job.name!r}"),
            config.device,
            max(1, int(config.resources.cpu)),
            space.name,
            vector,
            config.seed,
            config.recipe.epochs,
            [str(Path(path).resolve()) for path in sys.path],
        )
        (folder / name).mkdir()
        result = _in_a_process(request, folder / name)
        if "error" in result:
            raise StudyError(f"a network must train for an epoch, but cannot: {result['error']}")
        widths = Widths(space.names, vector)
        last, cost = EpochResult(**result.pop("last")), space.cost(widths)
        trial = Trial(0, space.name, widths, {}, config.seed, cost, curve=(last,))
        if (reason := fault(trial, config)) is not None:
            raise StudyError(f"a network must train for an epoch, but cannot: {reason}")
        if not measured:
            known = (config.metric.name, *COSTS, "loss" * (last.loss is not None), *last.metrics)
            unreported = tuple(name for name in config.objectives if name not in known)
        measured.append(MeasuredEpoch(name, cost, **result))
    return DryRun(
        tuple(planned),
        skipped,
        tuple(measured),
        trials=max(0, config.trials - begun),
        epochs=config.recipe.epochs,
        at_once=config.at_once,
        limit=hours,
        starts=tuple(config.start),
        base_epochs=base_epochs,
        unreported=unreported,
    )


def _in_a_process(request: EpochRequest, folder: Path) -> dict[str, Any]:
    with (folder / REQUEST).open("wb") as file:
        pickle.dump(request, file, protocol=5)
    command: Sequence[str] = [sys.executable, "-m", "widthsearch.runner.one_epoch", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if not (folder / RESULT).exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StudyError(
            f"a network must train for an epoch, but its process ended with {done.returncode}: "
            f"{printable(last)}"
        )
    result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return result
