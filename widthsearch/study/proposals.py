"""Runs the proposers of a study, each one once, and stores their proposals.

An :data:`Engine` runs them: :func:`run_sequentially` in this process, the runner's in parallel on
Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from widthsearch.data.tasks import AnyTask, Task
from widthsearch.errors import StudyError, WidthsError, located
from widthsearch.proposers import Proposal, Proposer, Setting
from widthsearch.proposers.families import Candidate, lowest_share, scale_proposal
from widthsearch.space.search_space import SearchSpace
from widthsearch.training.trainer import check_input_shape
from widthsearch.utils.devices import fixed_threads
from widthsearch.widths import Widths, space_in

if TYPE_CHECKING:  # a worker imports this file, and neither of those
    from widthsearch.study.progress import Notify
    from widthsearch.study.sections import ProposerConfig
    from widthsearch.study.storage import Store

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProposalRequest:
    """A proposer and its arguments, apart from the data.

    Attributes:
        label: The proposer's name in messages.
        proposer: The method.
        space: The space.
        setting: The other arguments.
        threads: The number of CPU threads; None leaves torch's number.

    Example:
        >>> from torch import nn
        >>> from widthsearch.proposers.uniform import Uniform
        >>> def make_model():
        ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> space = SearchSpace.from_model(make_model, (3, 8, 8))
        >>> request = ProposalRequest("uniform", Uniform(), space, Setting())
        >>> propose(request, None, print).trajectory[-1]
        Widths({'0': 1})
    """

    label: str
    proposer: Proposer
    space: SearchSpace
    setting: Setting
    threads: int | None = None


@dataclass(frozen=True)
class Failure:
    """The reason why a proposer has no proposal, or why a candidate cannot be trained.

    Attributes:
        reason: The reason, in one line, with the file and line of the user's code.
        traceback: The traceback of the exception; empty if there was none.

    Example:
        >>> try:
        ...     raise SystemExit("no data here")
        ... except SystemExit as error:
        ...     Failure.of(error).reason
        'SystemExit: no data here'
    """

    reason: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The failure that an exception is, while it is being handled."""
        try:
            reason = located(error)
        except Exception:  # noqa: BLE001  its __str__ is the user's code, and may raise as well
            reason = type(error).__name__
        return cls(reason, traceback.format_exc())


R = TypeVar("R")
ProgressCallback = Callable[[str], None]
ProposalResult = Proposal | Failure
Engine = Callable[
    [Sequence[ProposalRequest], AnyTask | None, ProgressCallback],
    Iterator[tuple[int, ProposalResult]],
]
"""Runs proposers on a task, or on none, and passes on their messages. Yields the index of each
request with its result, in any order."""


def propose(
    request: ProposalRequest, task: AnyTask | None, report: ProgressCallback
) -> ProposalResult:
    """Run a proposer; every exception becomes a Failure, SystemExit too, but not Ctrl-C."""
    setting = replace(request.setting, report=lambda message: report(str(message)))
    try:
        with fixed_threads(request.threads):
            # None is for those that read no data.
            proposal = request.proposer(request.space, task, setting)  # type: ignore[arg-type]
        return _validated(proposal, request.space)
    except BaseException as error:
        # Ctrl-C arrives in the main thread only; in any other the proposer raised this itself.
        in_main = threading.current_thread() is threading.main_thread()
        if isinstance(error, KeyboardInterrupt) and in_main:
            raise
        return Failure.of(error)


def _validated(proposal: object, space: SearchSpace) -> Proposal:
    """Check that a method returned a proposal of this space, which can be stored."""
    if not isinstance(proposal, Proposal):
        raise StudyError(f"a proposer must return a Proposal, but returned {proposal!r}")
    for widths in (*proposal.trajectory, *filter(None, [proposal.profile])):
        if widths.names != space.names:
            raise WidthsError(f"a proposal's axes must be the space's, but are {widths.names}")
        space.widths(widths.vector)  # each on the grid
    json.dumps(proposal.to_json())  # raises TypeError for provenance that is no JSON
    return proposal


def stream_proposal(
    request: ProposalRequest, task: AnyTask | None
) -> Iterator[str | ProposalResult]:
    """Run a proposer in a thread; yield the messages that it reports, then its result."""
    yield from streamed(lambda report: propose(request, task, report))


def streamed(call: Callable[[ProgressCallback], R]) -> Iterator[str | R]:
    """Call a function in a thread; yield the messages that it reports, then its result.

    Args:
        call: It must return, no text, and raise nothing: else the loop would wait for ever.

    Example:
        >>> list(streamed(lambda report: report("half done") or 3))
        ['half done', 3]
    """
    messages: queue.Queue[str | R] = queue.Queue()
    threading.Thread(target=lambda: messages.put(call(messages.put)), daemon=True).start()
    while isinstance(message := messages.get(), str):
        yield message
    yield message


def run_sequentially(
    requests: Sequence[ProposalRequest], task: AnyTask | None, report: ProgressCallback
) -> Iterator[tuple[int, ProposalResult]]:
    """The engine without Ray: runs proposers one after the other, in this process."""
    for i, request in enumerate(requests):

        def labelled(message: str, label: str = request.label) -> None:
            report(f"{label}: {message}")

        yield i, propose(request, task, labelled)


def collect_proposals(
    store: Store,
    requests: Sequence[tuple[str, ProposalRequest]],
    task: AnyTask | None,
    engine: Engine,
    report: Notify,
) -> tuple[dict[str, list[Proposal]], dict[str, str]]:
    """The proposals of all requests: stored ones, and new ones of the proposers that lack one.

    A proposer runs again if its stored proposal was made for larger networks than are wanted now
    (``Setting.lowest``), or if it failed before.

    Args:
        store: The study's storage.
        requests: The requests, each with the :func:`proposal_key` of its result.
        task: The data, without a test split; None for methods that read none.
        engine: Runs the proposers.
        report: Called with the proposers' messages, and as each one finishes or fails.

    Returns:
        The proposals in the order of the requests, by the space's name, and the reasons of the
        failures, by the request's label.
    """
    found: dict[str, Proposal] = {}
    for key, request in requests:
        stored = store.attribute(key)
        if stored is not None and stored["lowest"] <= request.setting.lowest:
            found[key] = Proposal.from_json(stored)
    missing = [(key, request) for key, request in requests if key not in found]
    failures = {}
    begun = time.monotonic()
    for index, result in engine([request for _, request in missing], task, report):
        key, request = missing[index]
        if isinstance(result, Failure):
            failures[request.label] = result.reason
            _logger.info("proposer %s failed\n%s", request.label, result.traceback)
            report(f"proposer {request.label} failed: {result.reason}", "warning")
        else:
            store.set_attribute(key, {**result.to_json(), "lowest": request.setting.lowest})
            found[key] = result
            elapsed = time.monotonic() - begun
            report(f"proposer {request.label} finished after {elapsed:.1f} s", "event")
            for line in result.warnings:
                report(f"proposer {request.label}: {line}", "warning")
    by_space: dict[str, list[Proposal]] = {request.space.name: [] for _, request in requests}
    for key, request in requests:
        if key in found:
            by_space[request.space.name].append(found[key])
    return by_space, failures


def stored_proposals(
    store: Store, methods: Sequence[ProposerConfig], spaces: Iterable[SearchSpace]
) -> dict[str, list[Proposal]]:
    """The proposals in a study's storage, by the space's name; no proposer runs."""
    found: dict[str, list[Proposal]] = {}
    for space in spaces:
        stored = [store.attribute(proposal_key(config, space)) for config in methods]
        found[space.name] = [Proposal.from_json(content) for content in stored if content]
    return found


def given_candidates(spaces: Mapping[str, SearchSpace], paths: Iterable[str]) -> list[Candidate]:
    """The networks in widths files, each in the space that its file names, also off its grid.

    Args:
        spaces: The spaces of the study by name.
        paths: The files.

    Raises:
        WidthsError: A file cannot be read, is of none of the spaces, or has a width above its
            axis's bound, up to which costs are checked.
    """
    found = []
    for path in paths:
        space = spaces.get(space_in(Path(path)), next(iter(spaces.values())))
        widths = space.load_widths(path, on_grid=False)
        for axis in space.axes:
            if (width := widths[axis.name]) > axis.max_width:
                enough = math.ceil(width / axis.step) * axis.step
                raise WidthsError(
                    f"a study trains widths up to its bounds, but {path!r} has {width} channels of "
                    f"axis {axis.name!r}, whose bound is {axis.max_width}: leave the file out, "
                    f"or raise the bound, `constraints: {{max: {{{axis.name!r}: {enough}}}}}`"
                )
        found.append(Candidate(space.name, widths, {"given": path}))
    return found


def proposal_key(config: ProposerConfig, space: SearchSpace) -> str:
    """The attribute of the storage that holds a proposer's proposal."""
    content = json.dumps([config.model_dump(mode="json"), space.fingerprint], sort_keys=True)
    return f"proposal:{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def propose_at_budget(
    config: ProposerConfig,
    space: SearchSpace,
    budget: float,
    task: AnyTask | None = None,
    setting: Setting | None = None,
) -> tuple[Widths, Proposal]:
    """Run one method, and scale its proposal to one budget.

    Args:
        config: The method and its hyperparameters.
        space: The space.
        budget: In MACs; met from below within one step of one axis.
        task: The data; images in files are read where the method may need them. It may be None for
            a method that reads none: a built-in one whose ``reads_data`` is False, or a user's own
            whose ``reads_data`` is not True.
        setting: The other arguments; its ``lowest`` is replaced by this budget's.

    Returns:
        The widths, and the proposal whose linear family has them.

    Raises:
        StudyError: The method reads data and there is none, or it fails.
        DataError: The space was traced at another shape than that of the task's images.
        WidthsError: The budget is below the narrowest network of the space.
    """
    proposer = config.make(config.method)
    if task is None and config.reads_data():
        raise StudyError(
            f"method {config.method!r} reads data, but no task was given: name one, e.g. digits, "
            "or a study with `loss` and `batches`"
        )
    if isinstance(task, Task):
        check_input_shape(space, task)
    lowest = lowest_share([budget / space.cost(space.base).macs], ["linear"])
    setting = setting or Setting()
    request = ProposalRequest(config.method, proposer, space, replace(setting, lowest=lowest))
    if isinstance(task, Task):
        task = task.for_search()
        if config.reads_data() is not False:
            task = task.read(setting.report)
    result = propose(request, task, setting.report)
    if isinstance(result, Failure):
        without = "; it was given no task" if task is None else ""
        raise StudyError(f"method {config.method!r} failed: {result.reason}{without}")
    return scale_proposal(space, result, budget), result
