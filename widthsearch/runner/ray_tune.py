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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from widthsearch.data.tasks import Task
from widthsearch.errors import SpaceError, StorageError, StudyError, one_line
from widthsearch.runner.worker import Report, Worker
from widthsearch.study.config import StudyConfig
from widthsearch.study.loop import Search
from widthsearch.study.proposals import Failure, ProgressCallback, ProposalRequest, ProposalResult
from widthsearch.study.trial import Trial

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


class Session:
    """Ray for a study, from ``with`` to its end; it is started when first needed.

    Args:
        config: The study's configuration.
        folder: The study's folder, for checkpoints and logs; a cluster's nodes must share it for
            trials to go on from their last epoch after their worker died.
    """

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._interrupts = _Interrupts()
        self._stack = contextlib.ExitStack()
        self._ray: contextlib.ExitStack | None = None
        self._ours = False
        self._logging = False

    def __enter__(self) -> Session:
        self._stack.enter_context(self._interrupts)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._stack.close()

    def close(self) -> None:
        """Let Ray go, and shut it down if it was started here."""
        if self._ray is not None:
            self._ray.close()
            self._ray = None

    def propose(
        self, requests: Sequence[ProposalRequest], task: Task, say: ProgressCallback
    ) -> Iterator[tuple[int, ProposalResult]]:
        """Ask proposers side by side, as Ray tasks with a trial's resources each."""
        if not requests:
            return
        self._start(say)
        resources = self._config.resources
        # A process that is done would keep its GPU memory for the next one.
        run: Any = ray.remote(max_calls=1 if resources.gpu else 0)(_answering())
        options = run.options(
            num_cpus=resources.cpu,
            num_gpus=resources.gpu,
            num_returns="streaming",
            max_retries=0,
        )
        shared = ray.put(task)
        streams: dict[Any, int] = {}
        try:
            for i, request in enumerate(requests):
                asked = pickled(request, f"proposer {request.label!r}")
                streams[options.remote(asked, shared)] = i
            while streams:
                ready, _ = ray.wait(list(streams), num_returns=1, timeout=TICK_SECONDS)
                for stream in ready:
                    message = _next(stream)
                    if isinstance(message, str):
                        say(f"{requests[streams[stream]].label}: {message}")
                    else:
                        yield streams.pop(stream), message
        except BaseException:
            self.close()
            raise
        finally:
            if not self._ours:
                for stream in streams:
                    ray.cancel(stream, force=True)

    def train(self, search: Search, task: Task) -> None:
        """Train until the search is done; then Ray is let go.

        Raises:
            WidthsearchError: Something that a user can mend; running again goes on from there.
            KeyboardInterrupt: SIGINT or SIGTERM; running again goes on from there.
        """
        if search.done:
            return
        checkpoints = (self._folder / "checkpoints").resolve()
        checkpoints.mkdir(exist_ok=True)
        for left in checkpoints.iterdir():  # by a kill between a trial's end and its removal
            if left.name not in map(str, search.running):
                shutil.rmtree(left, ignore_errors=True)
        logs = self._logs()
        try:
            first = search.ask()  # its whole generation is measured before anything trains
            self._start(search.notify)
            _Joint(search, first, checkpoints, self._interrupts, self._ours).fit(task, logs)
        finally:
            self.close()  # before the lease ends: no worker of ours trains on

    def _logs(self) -> Path:
        """The folder for logs; from now on ours are there."""
        logs = (self._folder / "logs").resolve()
        if not self._logging:
            logs.mkdir(exist_ok=True)
            self._stack.enter_context(_logging_to(logs / "run.log"))
            self._logging = True
        return logs

    def _start(self, say: ProgressCallback) -> None:
        if self._ray is None:
            self._logs()
            with contextlib.ExitStack() as stack:
                stack.enter_context(_environment())
                self._ours = stack.enter_context(_ray(self._config, say, self._interrupts))
                self._ray = stack.pop_all()


def _answering() -> Callable[[bytes, Task], Iterator[str | ProposalResult]]:
    """What a task runs; made in a function for the same reason as :func:`_trainee`."""

    def answering(pickled: bytes, task: Task) -> Iterator[str | ProposalResult]:
        from widthsearch.runner.worker import answer

        yield from answer(pickled, task)

    return answering


def _next(stream: Any) -> str | ProposalResult:
    """The next message of a task; that it died is one too."""
    try:
        message: str | ProposalResult = ray.get(next(stream))
    except ray.exceptions.RayError as error:
        return Failure(f"its worker process died (killed, or out of memory?): {one_line(error)}")
    return message


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
            spaces={
                name: pickled(space, f"space {name!r}")
                for name, space in self.search.spaces.items()
            },
            recipe=config.recipe,
            device=config.device,
            threads=max(1, int(config.resources.cpu)),
            checkpoints=self.checkpoints,
            share=config.resources.gpu,
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
                    max_concurrent_trials=config.at_once,
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
            return {
                "number": trial.number,
                "space": trial.space,
                "vector": list(trial.widths.vector),
                "seed": trial.seed,
                "alone": self.search.is_alone(trial.number),
            }
        finished: Any = Searcher.FINISHED
        return finished if self.failure is not None or self.search.done else None

    def on_report(self, number: int, report: Report) -> bool:
        """Tell the search of a worker's report; returns whether the trial goes on."""
        goes_on = False
        with self.kept():
            if report.broken is not None:
                raise StorageError(f"{report.broken}: mend it and run again")
            if report.note:
                self.search.notify(report.note)
            if report.failure is not None:
                _logger.info("trial %d failed\n%s", number, report.traceback)
                if report.out_of_memory and self.search.retry_alone(number):
                    return False
                self.search.fail(number, report.failure)
            else:
                goes_on = self.search.report(number, report.curve)
        if number not in self.search.running:
            shutil.rmtree(self.checkpoints / str(number), ignore_errors=True)
        return goes_on

    def on_worker_lost(self, number: int) -> None:
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
            self._joint.on_worker_lost(self._numbers[trial_id])

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
        goes_on = self._joint.on_report(trial.config["number"], result["report"])
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
            report = self._worker.step()
            if report.lost:
                os._exit(1)  # a new process takes the trial up
            return {"report": report}

    return Trainee


def _name(trial: TuneTrial) -> str:
    return f"trial-{trial.config['number']}{'-alone' if trial.config['alone'] else ''}"


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
def _ray(config: StudyConfig, say: ProgressCallback, interrupts: _Interrupts) -> Iterator[bool]:
    """Ray, started or joined; yields whether it is ours to shut down."""
    ours = not ray.is_initialized()
    address = config.ray_address
    if address is not None:
        _check_address(address)
    try:
        if ours:
            say("starting Ray" if address is None else f"joining Ray at {address}")
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


def pickled(value: object, called: str) -> bytes:
    """A space or a question for the workers, with code of the user's own modules inside.

    A worker may be unable to import them: a file outside the path, or another machine.
    """
    installed = {Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}
    installed |= {Path(folder) for folder in sys.path if any(Path(folder).glob("*.dist-info"))}
    own = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or name.partition(".")[0] in ("__main__", "widthsearch"):
            continue
        if name != module.__name__:  # a second name of a module, which has its turn under its own
            continue
        if not any(Path(file).is_relative_to(folder) for folder in installed):
            own.append(module)
    for module in own:
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    try:
        dumped: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise SpaceError(f"{called} cannot be sent to the workers: {one_line(error)}") from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]
    return dumped


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
