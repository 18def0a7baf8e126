"""Starts Ray on this machine or joins a cluster, and checks that a trial fits one node."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import utils
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from widthsearch.errors import StudyError, one_line
from widthsearch.runner.signals import Interrupts
from widthsearch.study.config import StudyConfig
from widthsearch.study.proposals import ProgressCallback
from widthsearch.study.sections import Resources

_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: Tune prints nothing
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # no snapshots of a state that is never restored
}


@contextlib.contextmanager
def connect(
    config: StudyConfig, report: ProgressCallback, interrupts: Interrupts
) -> Iterator[bool]:
    """Connect to Ray, and disconnect at the end.

    Yields whether Ray was started or joined here. If this process was connected already, that
    connection is used and left as it is.

    Raises:
        StudyError: The cluster cannot be joined, or no node has the resources of one trial.
    """
    owned = not ray.is_initialized()
    address = config.ray_address
    if address is not None:
        _check_address(address)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_tune_environment())
        if owned:
            report("starting Ray" if address is None else f"joining the Ray cluster at {address}")
            stack.callback(ray.shutdown)
            _init(address, interrupts)
        _check_resources(config.resources)
        yield owned


def _init(address: str | None, interrupts: Interrupts) -> None:
    """Start Ray, or join the cluster at an address.

    A terminal sends Ctrl-C to every process of the driver's group. If Ray's processes handled it,
    ``ray.shutdown`` would wait a minute for them. Child processes inherit blocked signals, so Ray
    starts with SIGINT blocked. SIGTERM is deferred: the handler that ``ray.init`` sets raises at
    once, also where Python ignores exceptions, such as between a fork and its exec.

    Raises:
        StudyError: Ray does not start, or the cluster cannot be joined.
        KeyboardInterrupt: SIGINT or SIGTERM arrived meanwhile.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with interrupts.deferred(), _without_sigterm_handler():
            _connect(address)
    finally:
        interrupts.install()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if interrupts.requested:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _without_sigterm_handler() -> Iterator[None]:
    """Within this context Ray sets no handler of SIGTERM."""
    module: Any = utils
    previous, module.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        module.set_sigterm_handler = previous


def _connect(address: str | None) -> None:
    try:
        if address is not None:
            # A cluster with tokens refuses this driver at once. ray.init would take the refusal for
            # a passing fault, try for half a minute, and print a line each time. A client that is
            # to have a token and finds none would abort the process.
            ensure_token_if_auth_enabled(create_token_if_missing=False)
            GcsClient(address=address)
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.INFO,
        )
    except Exception as error:
        if address is None:
            raise StudyError(
                f"Ray must start on this machine: {one_line(error).rstrip('.')}; run again"
            ) from error
        # Ray reads RAY_AUTH_MODE while it is imported, too late to set it here. Nor can tokens be
        # the default: in a cluster without tokens no worker would start.
        raise StudyError(
            f"the Ray cluster at {address!r} cannot be joined: "
            f"{one_line(error).partition('. ')[0]}; if it was started with a token, set "
            "RAY_AUTH_MODE=token and the RAY_AUTH_TOKEN of the cluster in the environment"
        ) from error


def _check_address(address: str) -> None:
    """Open a connection: Ray itself would try for minutes, and then abort the process."""
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


def check_alive() -> None:
    """Check that a node is left: a worker that dies with the last one is no fault of its trial.

    Raises:
        StudyError: There is none.
    """
    if not any(node["Alive"] for node in ray.nodes()):  # type: ignore[no-untyped-call]
        raise StudyError(
            "Ray must have a machine to train on, but its last one has died: run again"
        )


def _check_resources(wanted: Resources) -> None:
    """Check that one node can hold a trial: else Tune would wait for ever."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes: list[tuple[float, float]] = [
        (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in alive
    ]
    if not any(cpu >= wanted.cpu and gpu >= wanted.gpu for cpu, gpu in nodes):
        raise StudyError(
            f"resources must fit one machine, but a trial takes cpu: {wanted.cpu:g} and gpu: "
            f"{wanted.gpu:g}, and the largest has {max(cpu for cpu, _ in nodes):g} CPUs and "
            f"{max(gpu for _, gpu in nodes):g} GPUs"
        )


@contextlib.contextmanager
def _tune_environment() -> Iterator[None]:
    """Set the environment variables that silence Tune, and restore the previous ones."""
    previous = {name: os.environ[name] for name in _TUNE_ENVIRONMENT if name in os.environ}
    os.environ.update(_TUNE_ENVIRONMENT)
    try:
        yield
    finally:
        for name in _TUNE_ENVIRONMENT:
            del os.environ[name]
        os.environ.update(previous)


@contextlib.contextmanager
def log_to_file(file: Path) -> Iterator[None]:
    """Send Ray's and this package's log records to a file, and none to the terminal."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("ray", "widthsearch")]
    previous = [(log, log.handlers[:], log.propagate, log.level) for log in loggers]
    for log in loggers:
        log.handlers[:] = [handler]
        log.propagate = False
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, handlers, propagate, level in previous:
            log.handlers[:] = handlers
            log.propagate = propagate
            log.setLevel(level)
        handler.close()
