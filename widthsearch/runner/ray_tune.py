"""Ray Tune: trains the trials of a search on this machine or on a cluster.

Tune starts, places and restarts processes, and nothing else. The search decides which trial comes
next, which one stops, and keeps the results, so no state of Tune's is ever restored: a restart is a
fresh Tune run over the same study. Workers train, keep their own checkpoints, and report; they
never open the storage.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from widthsearch.data.tasks import AnyTask, Task
from widthsearch.errors import StorageError, writing
from widthsearch.runner import cluster, memory_kills
from widthsearch.runner.pickling import SharedData, pickle_by_value
from widthsearch.runner.proposer_tasks import run_proposers
from widthsearch.runner.reading import put
from widthsearch.runner.signals import Interrupts
from widthsearch.runner.worker import Worker, WorkerReport
from widthsearch.study.config import StudyConfig
from widthsearch.study.hangs import HangWatch
from widthsearch.study.job import study_job
from widthsearch.study.loop import Search
from widthsearch.study.proposals import ProgressCallback, ProposalRequest, ProposalResult
from widthsearch.study.starts import BaseWeights
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial
from widthsearch.training.job import Job

RETRIES = 2
"""How often a trial is started again after its worker process died."""

NOTIFY_SECONDS = 1.0
"""Progress is reported at least this often, while Tune runs."""

_logger = logging.getLogger(__name__)


class Session:
    """A context in which a study's proposers and trials run on Ray.

    Ray starts when it is first needed and is shut down at the end, unless this process was
    connected to it before.

    Args:
        config: The study's configuration.
        folder: The study's folder, for checkpoints and logs. On a cluster all nodes must share it,
            so that a trial whose worker died can continue from its last checkpoint.

    Example, which starts Ray::

        with Session(study.config, study.folder) as session:
            with study.search(engine=session.propose) as search:
                session.train(search, study.data)
    """

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._interrupts = Interrupts()
        self._stack = contextlib.ExitStack()
        self._ray = contextlib.ExitStack()
        self._owns_ray: bool | None = None  # None while not connected
        self._task: Any = None  # the reference to the task's data, once Ray has it

    def __enter__(self) -> Session:
        self._stack.enter_context(self._interrupts)
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()
        self._stack.close()

    def _disconnect(self) -> None:
        """Disconnect from Ray, and shut it down if this session started it."""
        self._ray.close()
        self._owns_ray = self._task = None

    def propose(
        self, requests: Sequence[ProposalRequest], task: AnyTask | None, report: ProgressCallback
    ) -> Iterator[tuple[int, ProposalResult]]:
        """Run proposers in parallel, each as a Ray task with the resources of one trial."""
        if not requests:
            return
        owns_ray = self._connect(report)
        shared = self._shared(task, "the data of the proposers", report)
        try:
            yield from run_proposers(requests, shared, self._config.resources, report, owns_ray)
        except BaseException:
            self._disconnect()
            raise

    def train(
        self,
        search: Search,
        load_data: Callable[[], Any],
        weights: BaseWeights | None = None,
    ) -> None:
        """Train until the search is done, then disconnect from Ray.

        Args:
            search: The search.
            load_data: Returns the data; not called where nothing is left to train. Images in files
                that are to be in memory are read by a process of Ray's.
            weights: The weights of the base, for the start ``extract``.

        Raises:
            WidthsearchError: A fault outside the candidates, such as a full disk; once it is
                fixed, the next run continues from there.
            KeyboardInterrupt: SIGINT or SIGTERM; the next run continues from there.
        """
        if search.done:
            return
        checkpoints = (self._folder / "checkpoints").resolve()
        # A driver that was killed between a trial's end and the removal of its checkpoint left it.
        with search.driver_lock.store.fence.held(), writing(self._folder):
            checkpoints.mkdir(exist_ok=True)
            _remove_ended(checkpoints, search.driver_lock.store)
        logs = self._logs
        try:
            # With latency, this measures a whole generation: before Ray starts, on a quiet machine.
            first = search.ask()
            owns_ray = self._connect(search.notify)
            begun = deque([] if first is None else [first])
            adapter = _TuneAdapter(search, begun, checkpoints, self._interrupts, owns_ray)
            job = study_job(search.config)
            data = self._shared(load_data(), f"the data of {job.name!r}", search.notify)
            adapter.fit(job, data, weights, logs)
        finally:
            # Before the driver lock is released, so that no worker trains on without it.
            self._disconnect()
            # A worker that was frozen with a driver that was replaced may have written since.
            with contextlib.suppress(StorageError):
                _remove_ended(checkpoints, search.driver_lock.store)

    def _shared(self, data: Any, name: str, report: ProgressCallback) -> Any:
        """A reference to data in Ray's memory, where that of a task is once a run."""
        if not isinstance(data, Task):
            return put(data, name, report)
        self._task = self._task or put(data, name, report)
        return self._task

    @cached_property
    def _logs(self) -> Path:
        """The folder of the logs; from its first use on, log records are written there."""
        logs = (self._folder / "logs").resolve()
        with writing(self._folder):
            logs.mkdir(exist_ok=True)
            self._stack.enter_context(cluster.log_to_file(logs / "run.log"))
        return logs

    def _connect(self, report: ProgressCallback) -> bool:
        """Connect to Ray if that was not done; returns whether it was started or joined here."""
        if self._owns_ray is None:
            assert self._logs.is_dir()
            connection = cluster.connect(self._config, report, self._interrupts)
            self._owns_ray = self._ray.enter_context(connection)
        return self._owns_ray


def _remove_ended(checkpoints: Path, store: Store) -> None:
    """Remove the checkpoints of the trials that have ended."""
    found = {path.name for path in checkpoints.iterdir()}  # first: another driver may begin trials
    for name in found - {*map(str, store.running())}:
        shutil.rmtree(checkpoints / name, ignore_errors=True)


@dataclass(eq=False)
class _TuneAdapter(tune.Callback):
    """Drives a search by Tune: Tune's searcher, scheduler and callback all call this object.

    Tune wraps or swallows exceptions of its callbacks. So an exception is kept in ``error``, and
    Tune is left from one safe place, the end of a step of its loop, where nothing is half done.

    Attributes:
        search: The search.
        begun: Trials to start before the next one is asked for: the first, which was asked for
            before Ray started, and those whose worker process died.
        checkpoints: The folder with one folder per trial.
        interrupts: The handler of SIGINT and SIGTERM.
        owns_ray: Whether Ray is shut down after the run.
        error: The first exception of a callback.
    """

    search: Search
    begun: deque[Trial]
    checkpoints: Path
    interrupts: Interrupts
    owns_ray: bool
    error: BaseException | None = None
    _notified: float = field(default_factory=time.monotonic)
    _actors: dict[int, Any] = field(default_factory=dict)
    _deaths: Counter[int] = field(default_factory=Counter)
    _hung: dict[int, str] = field(default_factory=dict)
    _kills: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._watch = HangWatch(self.search.config.timeout)

    def fit(self, job: Job, data: Any, weights: BaseWeights | None, logs: Path) -> None:
        """Run Tune until the search is done; the data is a reference to :class:`SharedData`."""
        config = self.search.config
        trainable = tune.with_parameters(
            _trainable(),
            data=[data],
            spaces={
                name: pickle_by_value(space, f"space {name!r}")
                for name, space in self.search.spaces.items()
            },
            job=pickle_by_value(job, f"trainer {job.name!r}"),
            device=config.device,
            threads=max(1, int(config.resources.cpu)),
            checkpoints=self.checkpoints,
            gpu_share=config.resources.gpu,
            weights=weights and SharedData.of(weights, "the base's weights"),
            paths=[str(Path(path).resolve()) for path in sys.path],
        )
        shutil.rmtree(logs / "tune", ignore_errors=True)
        try:
            with self.interrupts.deferred(), memory_kills.handled_by_tune() as self._kills:
                tune.run(
                    tune.with_resources(trainable, asdict(config.resources)),
                    name="tune",
                    storage_path=str(logs),
                    search_alg=_TuneSearcher(self),
                    scheduler=_TuneScheduler(self),
                    callbacks=[self],
                    num_samples=-1,
                    max_concurrent_trials=config.at_once,
                    reuse_actors=True,
                    max_failures=0,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    trial_name_creator=_trial_name,
                    trial_dirname_creator=_trial_name,
                    raise_on_failed_trial=False,
                    verbose=0,
                )
        except (_AbortTune, _StopTune):
            pass
        except Exception as error:
            reasons = map(os.strerror, (errno.ENOSPC, errno.EROFS, errno.EACCES))
            reason = next((each for each in reasons if each in str(error)), None)
            if reason is None:
                raise
            raise StorageError(f"{reason} in {str(logs)!r}: fix this and run again") from error
        if self.error is not None:
            raise self.error
        if self.interrupts.requested:
            raise KeyboardInterrupt
        assert self.search.done

    @contextlib.contextmanager
    def keep_error(self) -> Iterator[None]:
        """Keep the first exception from Tune; :meth:`fit` raises it again."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  raised again by fit
            self.error = self.error or error

    def next_config(self) -> dict[str, Any] | None:
        """The next trial's configuration; None if it must wait, or FINISHED after the last one."""
        trial = self.begun.popleft() if self.begun else None
        # The search may measure latency here, for minutes and with no trial running: nothing is
        # half done, so a signal may interrupt it at once.
        with self.keep_error(), self.interrupts.immediate():
            trial = trial or self.search.ask()
        if trial is not None:
            return {
                "number": trial.number,
                "space": trial.space,
                "vector": list(trial.widths.vector),
                "seed": trial.seed,
                "alone": self.search.is_alone(trial.number),
                "reported": len(self.search.trials[trial.number].curve),
                "start": trial.start,
                "epochs": trial.epochs(self.search.config.recipe.epochs),
            }
        finished: Any = Searcher.FINISHED
        return finished if self.error is not None or self.search.done else None

    def on_report(self, number: int, report: WorkerReport) -> bool:
        """Pass a worker's report to the search; returns whether the trial continues."""
        continues = False
        with self.keep_error():
            if report.machine_error is not None:
                raise StorageError(report.machine_error)
            if report.note:
                self.search.notify(report.note, "warning")
            if report.failure is not None:
                _logger.info("trial %d failed\n%s", number, report.failure.traceback)
                if report.out_of_memory and self.search.retry_alone(number):
                    return False
                self.search.fail(number, report.failure.reason)
            else:
                continues = not report.curve or self.search.report(number, report.curve)
        self._watch.stop(number)
        if continues:
            self._watch.start(number)
        self._remove_checkpoint(number)
        return continues

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Note that a process begins a trial, or goes on with it."""
        number = trial.config["number"]
        self._actors[number] = trial.temporary_state.ray_actor
        self._watch.start(number)

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Start a trial anew whose worker process died, or fail it after all its retries."""
        if self.interrupts.requested:
            return  # a terminal sends Ctrl-C to the workers too: the trial has no fault
        number = trial.config["number"]
        self._watch.stop(number)
        with self.keep_error():
            cluster.check_alive()
            self._end_or_restart(number)
        self._remove_checkpoint(number)

    def _remove_checkpoint(self, number: int) -> None:
        """Remove the checkpoint of a trial that has ended.

        A trial runs on if its end could not be stored: it may be another driver's by now.
        """
        if number not in self.search.running:
            shutil.rmtree(self.checkpoints / str(number), ignore_errors=True)

    def _end_or_restart(self, number: int) -> None:
        if number in self._hung:
            self.search.fail(number, self._hung[number])
        elif self._kills:
            if self.search.retry_alone(number):
                self.search.notify(f"trial {number}: {self._kills[0]}", "warning")
            else:
                self.search.fail(number, self._kills[0])
        elif self._deaths[number] == RETRIES:
            died = f"its worker process died {RETRIES + 1} times (killed, or out of memory?)"
            self.search.fail(number, f"{died}; see logs/run.log")
        else:
            self._deaths[number] += 1
            self.begun.append(self.search.trials[number])
            self._notify_restart(number)

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Pass on that Tune itself starts a trial anew, as it does where a node is preempted."""
        number = trial.config["number"]
        self._watch.stop(number)
        with self.keep_error():
            cluster.check_alive()
            self._notify_restart(number)

    def _notify_restart(self, number: int) -> None:
        self.search.notify(
            f"trial {number}: its worker process died; a new one continues from its last "
            "checkpoint",
            "warning",
        )

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Leave Tune where there is a reason to: the one place where that is safe."""
        over = self.search.done and self.owns_ray
        if over or self.error is not None or self.interrupts.requested:
            # Our own Ray is shut down next, with all actors: Tune need not wait for their end.
            raise _AbortTune if self.owns_ray else _StopTune
        if time.monotonic() - self._notified > NOTIFY_SECONDS:
            self._notified = time.monotonic()
            with self.keep_error():
                self.search.notify()
                self._end_hung()

    def _end_hung(self) -> None:
        """Report the trainings that seem to hang, and kill the processes of those that do."""
        for warning in self._watch.check(self.search.trials):
            self.search.notify(warning, "warning")
        for number in self._watch.hung():
            self._watch.stop(number)
            timeout = self.search.config.timeout
            self._hung[number] = f"it made no report within its timeout of {timeout:g} s"
            ray.kill(self._actors[number])


class _AbortTune(BaseException):
    """Leaves Tune at once: Tune cleans up only after an Exception."""


class _StopTune(Exception):  # noqa: N818  not an error
    """Leaves Tune after it has ended its actors."""


class _TuneSearcher(Searcher):
    """Gives Tune the trials of a search."""

    def __init__(self, adapter: _TuneAdapter) -> None:
        super().__init__()
        self._adapter = adapter

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        return self._adapter.next_config()

    def on_trial_complete(self, trial_id: str, *args: object, **kwargs: object) -> None:
        """Do nothing: the search knows from the last report, or from ``on_trial_error``."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study's storage has the whole state."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: no run of Tune's is restored."""


class _TuneScheduler(FIFOScheduler):
    """Stops the trials that the search stops."""

    def __init__(self, adapter: _TuneAdapter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._adapter = adapter

    def on_trial_result(
        self, tune_controller: object, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        continues = self._adapter.on_report(trial.config["number"], result["report"])
        decision: str = TrialScheduler.CONTINUE if continues else TrialScheduler.STOP
        return decision


def _trainable() -> type[tune.Trainable]:
    """The class that Tune runs in its worker processes.

    A local class is pickled by value, so a worker process imports ``runner.worker`` alone, and not
    this file with Optuna and the rest (0.7 s of 3.9 s).
    """

    class Trainable(tune.Trainable):
        def setup(self, config: dict[str, Any], **shared: Any) -> None:
            self._worker = Worker(ray.get(shared.pop("data")[0]), **shared)
            self.reset_config(config)

        def reset_config(self, config: dict[str, Any]) -> bool:
            self._worker.start_trial(**config)
            return True

        def step(self) -> dict[str, Any]:
            report = self._worker.step()
            if report.process_unusable:
                os._exit(1)  # Tune starts a new process, which continues the trial
            return {"report": report}

    return Trainable


def _trial_name(trial: TuneTrial) -> str:
    return f"trial-{trial.config['number']}{'-alone' if trial.config['alone'] else ''}"
