"""Ray Tune: trains a search's trials on this machine or on a cluster.

Tune owns the processes and nothing else. What comes next, what stops and what is known is the
search's, so no state of Tune's is ever restored: a restart is a fresh run over the same study.
Workers train, keep their own checkpoints, and report; they never open the storage.

Tune wraps or swallows what its callbacks raise. So an error is kept, and Tune is left from one safe
place, the end of a step of its loop; an interrupt goes the same way.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from widthsearch.data import Task
from widthsearch.errors import SpaceError, StorageError, StudyError
from widthsearch.search import Search
from widthsearch.space import SearchSpace
from widthsearch.storage import Trial
from widthsearch.worker import Report, Worker, one_line

RETRIES = 2
"""How often a trial whose worker died is started again."""

TICK_SECONDS = 1.0

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: Tune prints nothing
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # no snapshots of a state that is never restored
}

_logger = logging.getLogger(__name__)


def run(search: Search, task: Task, folder: Path) -> None:
    """Train until the search is done.

    Args:
        search: Which trials there are.
        task: The data.
        folder: The study's folder, for checkpoints and logs; a cluster's nodes must share it for
            trials to go on from their last epoch after their worker died.

    Raises:
        WidthsearchError: Something that a user can mend; running again goes on from there.
        KeyboardInterrupt: SIGINT or SIGTERM; running again goes on from there.
    """
    if search.done:
        return
    logs = (folder / "logs").resolve()
    logs.mkdir(exist_ok=True)
    checkpoints = (folder / "checkpoints").resolve()
    checkpoints.mkdir(exist_ok=True)
    for left in checkpoints.iterdir():  # by a kill between a trial's end and its removal
        if left.name not in map(str, search.running):
            shutil.rmtree(left, ignore_errors=True)
    with _logging_to(logs / "run.log"), _environment(), _Interrupts() as interrupts:
        first = search.ask()  # its whole generation is measured before Ray wakes the machine up
        with _ray(search, interrupts) as ours:
            _Joint(search, first, checkpoints, interrupts, ours).fit(task, logs)


class _Joint:
    """What joins Tune's searcher, scheduler and callback to the search."""

    def __init__(
        self,
        search: Search,
        first: Trial | None,
        checkpoints: Path,
        interrupts: _Interrupts,
        ours: bool,
    ) -> None:
        self.search = search
        self.first = first
        self.checkpoints = checkpoints
        self.interrupts = interrupts
        self.ours = ours
        self.failure: BaseException | None = None
        self.told = time.monotonic()

    def fit(self, task: Task, logs: Path) -> None:
        config = self.search.config
        trainee = tune.with_parameters(
            _trainee(),
            task=task.for_search(),
            space=_pickled(self.search.space),
            recipe=config.recipe,
            device=config.device,
            threads=max(1, int(config.resources.cpu)),
            checkpoints=self.checkpoints,
        )
        shutil.rmtree(logs / "tune", ignore_errors=True)
        try:
            with self.interrupts.held():
                tune.run(
                    tune.with_resources(trainee, config.resources.model_dump()),
                    name="tune",
                    storage_path=str(logs),
                    search_alg=_Searcher(self),
                    scheduler=_Rungs(self),
                    callbacks=[_Watch(self)],
                    num_samples=-1,
                    max_concurrent_trials=config.concurrency,
                    reuse_actors=True,
                    max_failures=RETRIES,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    trial_name_creator=_name,
                    trial_dirname_creator=_name,
                    raise_on_failed_trial=False,
                    verbose=0,
                )
        except (_Left, _LeftGently):
            pass
        except Exception as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            self.failure = StorageError(f"{os.strerror(errno.ENOSPC)}: free some and run again")
        if self.failure is not None:
            raise self.failure
        if self.interrupts.requested:
            raise KeyboardInterrupt
        assert self.search.done

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep an error from Tune, which would wrap or swallow it."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  raised again by fit
            self.failure = self.failure or error

    def next(self) -> dict[str, Any] | None:
        """The next trial's configuration; None for now, or Tune's word for the end."""
        trial, self.first = self.first, None
        # Latency may be measured here, for long, and nothing else runs: interrupts may come in.
        with self.kept(), self.interrupts.let_through():
            trial = trial or self.search.ask()
        if trial is not None:
            vector = list(trial.widths.vector)
            return {"number": trial.number, "vector": vector, "seed": trial.seed}
        finished: Any = Searcher.FINISHED
        return finished if self.failure is not None or self.search.done else None

    def hear(self, number: int, report: Report) -> bool:
        """Tell the search of a worker's report; returns whether the trial goes on."""
        goes_on = False
        with self.kept():
            if report.broken is not None:
                raise StorageError(f"{report.broken}: mend it and run again")
            if report.note:
                self.search.notify(report.note)
            if report.failure is not None:
                _logger.info("trial %d failed\n%s", number, report.traceback)
                self.search.fail(number, report.failure)
            else:
                goes_on = self.search.report(number, report.curve)
        if number not in self.search.running:
            shutil.rmtree(self.checkpoints / str(number), ignore_errors=True)
        return goes_on

    def lose(self, number: int) -> None:
        """Give up a trial whose worker died again and again."""
        if self.interrupts.requested:
            return  # a terminal's Ctrl-C reaches the workers too: the trial is innocent
        with self.kept():
            self.search.fail(
                number,
                f"its worker process died {RETRIES + 1} times (killed, or out of memory?); see "
                "logs/run.log",
            )
        shutil.rmtree(self.checkpoints / str(number), ignore_errors=True)

    def step(self) -> None:
        """The one place from which Tune is left before its end."""
        over = self.search.done and self.ours
        if over or self.failure is not None or self.interrupts.requested:
            # Ray of ours is shut down next, so Tune need not wait for its actors to end.
            raise _Left if self.ours else _LeftGently
        if time.monotonic() - self.told > TICK_SECONDS:
            self.told = time.monotonic()
            with self.kept():
                self.search.notify()


class _Left(BaseException):
    """Leaves Tune at once: it only cleans up after an Exception."""


class _LeftGently(Exception):  # noqa: N818  not an error
    """Leaves Tune after its actors have ended."""


class _Searcher(Searcher):
    """Asks the search."""

    def __init__(self, joint: _Joint) -> None:
        super().__init__()
        self._joint = joint
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        config = self._joint.next()
        if isinstance(config, dict):
            self._numbers[trial_id] = config["number"]
        return config

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            self._joint.lose(self._numbers[trial_id])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the storage has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: never called."""


class _Rungs(FIFOScheduler):
    """Stops what the search stops."""

    def __init__(self, joint: _Joint) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._joint = joint

    def on_trial_result(
        self, tune_controller: object, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        goes_on = self._joint.hear(trial.config["number"], result["report"])
        decision: str = TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP
        return decision


class _Watch(tune.Callback):
    """Tune's loop, as it turns."""

    def __init__(self, joint: _Joint) -> None:
        self._joint = joint

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._joint.step()

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        with self._joint.kept():
            self._joint.search.notify(
                f"trial {trial.config['number']}: its worker process died; another one goes on "
                "from the last epoch"
            )


def _trainee() -> type[tune.Trainable]:
    """A worker as Tune knows it.

    Made in a function, so that processes get it by value: they then import the worker alone, not
    this file with Optuna and all (0.7 s of 3.9 s).
    """

    class Trainee(tune.Trainable):
        def setup(self, config: dict[str, Any], **shared: Any) -> None:
            self._worker = Worker(**shared)
            self.reset_config(config)

        def reset_config(self, config: dict[str, Any]) -> bool:
            self._worker.take(**config)
            return True

        def step(self) -> dict[str, Any]:
            return {"report": self._worker.step()}

    return Trainee


def _name(trial: TuneTrial) -> str:
    return f"trial-{trial.config['number']}"


class _Interrupts:
    """SIGINT and SIGTERM: at once where that is safe, else at the end of Tune's step.

    A second one is at once anywhere.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():  # else signals are not ours
            self._before = {number: signal.getsignal(number) for number in self._SIGNALS}
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Set the handlers, again where Ray has set its own."""
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        again, self.requested = self.requested, True
        if again or not self._held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep interrupts for the end of Tune's step."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """Let interrupts in at once, within ``held``."""
        self._held = False
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._held = True


@contextlib.contextmanager
def _ray(search: Search, interrupts: _Interrupts) -> Iterator[bool]:
    """Ray, started or joined; yields whether it is ours to shut down."""
    config = search.config
    ours = not ray.is_initialized()
    address = config.ray_address
    if address is not None:
        _check_address(address)
    try:
        if ours:
            search.notify("starting Ray" if address is None else f"joining Ray at {address}")
            # A terminal sends Ctrl-C to all processes of the driver's group. Were Ray's among them,
            # leaving it would wait a minute for them; so they are born with SIGINT blocked.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                ray.init(
                    address=address or "local",
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level=logging.INFO,
                )
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                if address is None:
                    raise
                # Ray reads its mode as it is imported: too late to set it here. And token mode
                # cannot be the default: in a cluster without tokens no worker would come up.
                raise StudyError(
                    f"the Ray cluster at {address!r} cannot be joined: {one_line(error)}; if it "
                    "was started with a token, set RAY_AUTH_MODE=token in the environment"
                ) from error
            finally:
                interrupts.install()
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _check_resources(config.resources.cpu, config.resources.gpu)
        yield ours
    finally:
        if ours:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Knock at the cluster: Ray itself would try for minutes, and then abort the process."""
    host, _, port = address.rpartition(":")
    if address.startswith("ray://") or not (host and port.isdecimal()):
        raise StudyError(
            f"ray_address must be a cluster's own address such as 10.0.0.1:6379, but was "
            f"{address!r} (Ray Client, ray://, would run the driver inside the cluster)"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise StudyError(
            f"the Ray cluster at {address!r} cannot be reached: {error.strerror or error}; is it "
            "running?"
        ) from None


def _check_resources(cpu: float, gpu: float) -> None:
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes: Sequence[dict[str, float]] = [node["Resources"] for node in alive]
    if not any(node.get("CPU", 0) >= cpu and node.get("GPU", 0) >= gpu for node in nodes):
        raise StudyError(
            f"resources must fit one machine, but a trial takes cpu: {cpu:g} and gpu: {gpu:g}, and "
            f"the largest has {max(node.get('CPU', 0) for node in nodes):g} CPUs and "
            f"{max(node.get('GPU', 0) for node in nodes):g} GPUs"
        )


def _pickled(space: SearchSpace) -> bytes:
    """The space for the workers, with code of the user's own modules inside.

    A worker may be unable to import them: a file outside the path, or another machine.
    """
    installed = {Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}
    own = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or name.partition(".")[0] in ("__main__", "widthsearch"):
            continue
        if not any(Path(file).is_relative_to(folder) for folder in installed):
            own.append(module)
    for module in own:
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    try:
        pickled: bytes = cloudpickle.dumps(space)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise SpaceError(
            f"space {space.name!r} cannot be sent to the workers: {one_line(error)}"
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]
    return pickled


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Ray's and our own messages into a file, none of them to the terminal."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("ray", "widthsearch")]
    before = [(log, log.handlers[:], log.propagate, log.level) for log in loggers]
    for log in loggers:
        log.handlers[:] = [handler]
        log.propagate = False
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, handlers, propagate, level in before:
            log.handlers[:] = handlers
            log.propagate = propagate
            log.setLevel(level)
        handler.close()
