"""Images in files, read into Ray's memory by a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from widthsearch.data.tasks import Task
from widthsearch.errors import StudyError, WidthsearchError, one_line
from widthsearch.runner.pickling import SharedData
from widthsearch.study.proposals import Failure, ProgressCallback, streamed

_WAIT_SECONDS = 1.0  # a signal interrupts the driver at least this often


def put(data: Any, name: str, report: ProgressCallback) -> Any:
    """Put data into Ray's memory; images in files that are to be in memory are read there.

    Args:
        data: The data.
        name: Its name in an error.
        report: Called with a bar, as images are read.

    Returns:
        A reference to the data, as :class:`SharedData`.

    Raises:
        SpaceError: The data cannot be pickled.
        WidthsearchError: As :func:`read_images`.
    """
    if isinstance(data, Task) and data.unread:
        return read_images(data, report)
    return ray.put(SharedData.of(data, name))


def read_images(task: Task, report: ProgressCallback) -> Any:
    """Read a task's images in a process on this machine, so that the driver has no copy of them.

    Args:
        task: The task.
        report: Called with a bar, as they are read.

    Returns:
        A reference to the task, as :class:`SharedData`.

    Raises:
        WidthsearchError: An image cannot be used, or the process died.
    """
    here = ray.get_runtime_context().get_node_id()
    options: Any = ray.remote  # its types lack this strategy
    remote = options(
        num_cpus=0,  # nothing else of the study runs
        num_returns="streaming",
        max_retries=0,
        max_calls=1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
    )(_reading)
    stream = remote.remote(task)
    while True:
        ready, _ = ray.wait([stream], timeout=_WAIT_SECONDS)
        if not ready:
            continue
        reference = next(stream)
        try:
            message = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise StudyError(
                "images must be read into memory, but the process that reads them died "
                f"({one_line(error)}): set `loading: stream` in the study's task"
            ) from error
        if isinstance(message, SharedData):
            return reference
        if isinstance(message, WidthsearchError):
            raise message
        if isinstance(message, Failure):
            raise StudyError(f"images must be read into memory, but failed: {message.reason}")
        report(message)


def _reading(task: Task) -> Iterator[str | SharedData | WidthsearchError | Failure]:
    """Yield a bar as a task's images are read, then the data or an error."""

    def read(report: ProgressCallback) -> SharedData | WidthsearchError | Failure:
        try:
            return SharedData.of(task.read(report), "the images")
        except WidthsearchError as error:
            return error
        except BaseException as error:  # noqa: BLE001  the loop waits for a result
            return Failure.of(error)

    yield from streamed(read)
