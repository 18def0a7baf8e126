"""Proposers as tasks of Ray, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray

from widthsearch.errors import one_line
from widthsearch.runner import memory_kills
from widthsearch.runner.pickling import pickle_by_value
from widthsearch.runner.worker import run_proposer
from widthsearch.study.proposals import Failure, ProgressCallback, ProposalRequest, ProposalResult
from widthsearch.study.sections import Resources

POLL_SECONDS = 1.0


def run_proposers(
    requests: Sequence[ProposalRequest],
    task: Any,
    resources: Resources,
    report: ProgressCallback,
    owns_ray: bool,
) -> Iterator[tuple[int, ProposalResult]]:
    """Run proposers in parallel, each as a Ray task with the resources of one trial.

    Args:
        requests: What they are asked.
        task: A reference to the task in Ray's memory.
        resources: Those of a trial.
        report: Called with their messages.
        owns_ray: Whether Ray ends with the caller; else tasks that are left are ended here.

    Yields:
        The index of a request and its result, in the order in which they end.
    """
    remote: Any = ray.remote(
        num_cpus=resources.cpu,
        num_gpus=resources.gpu,
        num_returns="streaming",
        max_retries=0,
        # An idle process keeps its GPU memory, so with GPUs each process runs one task only.
        max_calls=1 if resources.gpu else 0,
    )(run_proposer)
    streams: dict[Any, int] = {}
    try:
        for i, request in enumerate(requests):
            pickled = pickle_by_value(request, f"proposer {request.label!r}")
            streams[remote.remote(pickled, task)] = i
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=POLL_SECONDS)
            for stream in ready:
                message = _next_message(stream)
                if isinstance(message, str):
                    report(f"{requests[streams[stream]].label}: {message}")
                else:
                    yield streams.pop(stream), message
    finally:
        if not owns_ray:
            for stream in streams:
                ray.cancel(stream, force=True)


def _next_message(stream: Any) -> str | ProposalResult:
    """The next message of a proposer's task, which is its result if its process died."""
    try:
        message: str | ProposalResult = ray.get(next(stream))
    except ray.exceptions.OutOfMemoryError as kill:
        return Failure(memory_kills.reason_of(kill))
    except ray.exceptions.RayError as error:
        return Failure(f"its worker process died (killed, or out of memory?): {one_line(error)}")
    return message
