"""Asking the proposers of a study: each of them once, its answer in the storage.

Whoever computes is an :data:`Engine`: the runner's asks on Ray, side by side; :func:`in_turn` here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from widthsearch.data.tasks import Task
from widthsearch.errors import StudyError, WidthsError, one_line
from widthsearch.proposers import Proposal, Proposer, Setting
from widthsearch.proposers.families import scale_proposal
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.devices import fixed_threads
from widthsearch.widths import Widths

if TYPE_CHECKING:  # a worker imports this file, and neither of those
    from widthsearch.study.config import ProposerConfig
    from widthsearch.study.storage import Store

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProposalRequest:
    """A proposer, and what it is given beside the data.

    Attributes:
        label: What it is called in messages.
        proposer: The method.
        space: The space.
        setting: The rest.
        threads: CPU threads that it computes with; None leaves torch's number.
    """

    label: str
    proposer: Proposer
    space: SearchSpace
    setting: Setting
    threads: int | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no proposal.

    Attributes:
        reason: In one line.
        traceback: All of it.
    """

    reason: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The failure that an exception is, while it is being handled."""
        try:
            reason = one_line(error)
        except Exception:  # noqa: BLE001  its __str__ is the user's code, and may raise as well
            reason = type(error).__name__
        return cls(reason, traceback.format_exc())


ProgressCallback = Callable[[str], None]
ProposalResult = Proposal | Failure
Engine = Callable[
    [Sequence[ProposalRequest], Task, ProgressCallback], Iterator[tuple[int, ProposalResult]]
]
"""Answers questions about a task, by their index, in any order; says how far each is meanwhile."""


def propose(
    request: ProposalRequest, task: Task | None, report: ProgressCallback
) -> ProposalResult:
    """Ask a proposer; whatever it raises, except KeyboardInterrupt, becomes a Failure."""
    setting = replace(request.setting, report=lambda message: report(str(message)))
    try:
        with fixed_threads(request.threads):
            # None is for those that read no data.
            proposal = request.proposer(request.space, task, setting)  # type: ignore[arg-type]
        return _checked(proposal, request.space)
    except KeyboardInterrupt:  # the user's
        raise
    except BaseException as error:  # noqa: BLE001  SystemExit too; reported, with its traceback
        return Failure.of(error)


def _checked(proposal: object, space: SearchSpace) -> Proposal:
    """The proposal, if it is one and of this space."""
    if not isinstance(proposal, Proposal):
        raise StudyError(f"a proposer must return a Proposal, but returned {proposal!r}")
    for widths in proposal.trajectory:
        if widths.names != space.names:
            raise WidthsError(f"a proposal's axes must be the space's, but are {widths.names}")
        space.widths(widths)
    json.dumps(proposal.to_json())
    return proposal


def told(request: ProposalRequest, task: Task) -> Iterator[str | ProposalResult]:
    """Ask a proposer in a thread; yield the messages it reports, then its result.

    However the proposer ends, the thread puts a result into the queue: else the loop would wait for
    ever.
    """
    messages: queue.Queue[str | ProposalResult] = queue.Queue()

    def ask() -> None:
        try:
            result = propose(request, task, messages.put)
        except BaseException as error:  # noqa: BLE001  KeyboardInterrupt, which no user sent here
            result = Failure.of(error)
        messages.put(result)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while True:
        message = messages.get()
        yield message
        if not isinstance(message, str):
            thread.join()
            return


def in_turn(
    requests: Sequence[ProposalRequest], task: Task, say: ProgressCallback
) -> Iterator[tuple[int, ProposalResult]]:
    """The plain engine: one after the other, in this process."""
    for i, request in enumerate(requests):
        yield i, propose(request, task, partial(_labelled, say, request.label))


def _labelled(say: ProgressCallback, label: str, line: str) -> None:
    say(f"{label}: {line}")


def proposals(
    store: Store,
    asked: Sequence[tuple[ProposerConfig, ProposalRequest]],
    task: Task,
    engine: Engine,
    say: ProgressCallback,
) -> tuple[dict[str, list[Proposal]], dict[str, str]]:
    """The answer to each question: from the storage, where it was asked for networks as small.

    Args:
        store: The study's storage.
        asked: The questions, each with its proposer's configuration.
        task: The data, without a test split.
        engine: Who computes.
        say: Is told how far each is, what failed, and what is done.

    Returns:
        The proposals in the order of the questions, by the space's name, and the reasons why some
        are missing, by the question's label. A missing one is asked again by the next run.
    """
    found: dict[int, Proposal] = {}
    keys = [_key(config, request.space) for config, request in asked]
    for i, (key, (_, request)) in enumerate(zip(keys, asked, strict=True)):
        stored = store.attribute(key)
        if stored is not None and stored["lowest"] <= request.setting.lowest:
            found[i] = Proposal.from_json(stored)
    missing = [i for i in range(len(asked)) if i not in found]
    failures = {}
    begun = time.monotonic()
    for index, answer in engine([asked[i][1] for i in missing], task, say):
        i = missing[index]
        request = asked[i][1]
        if isinstance(answer, Failure):
            failures[request.label] = answer.reason
            _logger.info("proposer %s failed\n%s", request.label, answer.traceback)
            say(f"proposer {request.label} failed: {answer.reason}")
        else:
            store.set_attribute(keys[i], {**answer.to_json(), "lowest": request.setting.lowest})
            found[i] = answer
            say(f"proposer {request.label} answered after {time.monotonic() - begun:.1f} s")
    by_space: dict[str, list[Proposal]] = {request.space.name: [] for _, request in asked}
    for i in sorted(found):
        by_space[asked[i][1].space.name].append(found[i])
    return by_space, failures


def answered(
    store: Store, methods: Sequence[ProposerConfig], spaces: Iterable[SearchSpace]
) -> dict[str, list[Proposal]]:
    """The answers that a study's storage has, by the space's name; none is asked for."""
    found: dict[str, list[Proposal]] = {}
    for space in spaces:
        stored = [store.attribute(_key(config, space)) for config in methods]
        found[space.name] = [Proposal.from_json(content) for content in stored if content]
    return found


def _key(config: ProposerConfig, space: SearchSpace) -> str:
    """Where the storage has a proposer's answer."""
    content = json.dumps([config.model_dump(mode="json"), space.fingerprint], sort_keys=True)
    return f"proposal:{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def suggest(
    config: ProposerConfig,
    space: SearchSpace,
    budget: float,
    task: Task | None = None,
    setting: Setting | None = None,
) -> tuple[Widths, Proposal]:
    """One method's widths at one budget.

    Args:
        config: The method and its fields.
        space: The space.
        budget: In MACs; met from below within one step of one axis.
        task: The data; None for methods that read none (their ``reads_data`` is False), and for a
            user's own, unless its ``reads_data`` is True.
        setting: The rest; by default a :class:`Setting` down to this budget.

    Returns:
        The widths, and the proposal whose linear family they are from.

    Raises:
        StudyError: The method reads data and there is none, or it fails.
        WidthsError: The budget is below the narrowest network of the space.
    """
    proposer = config.make()
    if task is None and getattr(proposer, "reads_data", ":" not in config.method):
        raise StudyError(
            f"method {config.method!r} reads data, but no task was given: name one, e.g. digits"
        )
    if task is not None and tuple(space.input_shape) != task.input_shape:
        raise StudyError(
            f"a space must take the task's images, but {space.name!r} takes {space.input_shape} "
            f"and those of {task.name!r} are {task.input_shape}"
        )
    lowest = min(1.0, budget / space.cost(space.base).macs)
    setting = setting or Setting()
    request = ProposalRequest(config.method, proposer, space, replace(setting, lowest=lowest))
    answer = propose(request, task and task.for_search(), setting.report)
    if isinstance(answer, Failure):
        without = "; it was given no task" if task is None else ""
        raise StudyError(f"method {config.method!r} failed: {answer.reason}{without}")
    return scale_proposal(space, answer, budget), answer
