"""Kills by Ray's memory monitor, which ends worker processes while a node is low on memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

from widthsearch.errors import first_line


def reason_of(kill: OutOfMemoryError) -> str:
    """Why a process was killed, in one line: the node, its memory in use, and its limit."""
    return f"Ray killed its worker process: {first_line(kill)}"


@contextlib.contextmanager
def handled_by_tune() -> Iterator[list[str]]:
    """Within this context Tune handles such a kill like any death of a worker process.

    Tune knows a death as RayActorError only. Of an OutOfMemoryError it makes a RuntimeError, which
    ends the whole run (Ray 2.60).

    Yields:
        A list. While Tune handles such a kill, and calls back, it holds the reason.
    """
    reasons: list[str] = []

    def translating(handle: Callable[..., None]) -> Callable[..., None]:
        def handle_error(*manager: Any, exception: Exception, **of: Any) -> None:
            with contextlib.ExitStack() as stack:
                if isinstance(exception, OutOfMemoryError):
                    reasons.append(reason_of(exception))
                    stack.callback(reasons.clear)
                    exception = RayActorError(error_msg=str(exception))
                handle(*manager, exception=exception, **of)

        return handle_error

    with contextlib.ExitStack() as stack:
        for name in ("_actor_start_failed", "_actor_task_failed"):
            handle = getattr(RayActorManager, name)
            stack.callback(setattr, RayActorManager, name, handle)
            setattr(RayActorManager, name, translating(handle))
        yield reasons
