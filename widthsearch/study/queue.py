"""The queue of a study: the candidates to train before any network is suggested."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from widthsearch.proposers.families import Candidate
from widthsearch.study.config import StudyConfig
from widthsearch.study.front import Limits, is_within_limits
from widthsearch.study.trial import (
    Architecture,
    Trial,
    TrialState,
    count_begun,
    unresolved_failures,
)


class CandidateQueue:
    """Candidates that are still to begin, each network once.

    Args:
        trials: The trials that have begun before.
        candidates: The candidates in their order; those that have begun are left out.
        limits: The study's limits, for failed trials that come again.
        retry: Whether failed trials come again, before the candidates.

    Attributes:
        proposed: All candidates, also those that have begun before.
        seen: The networks that have begun, each with its space's name.
        superseded: The numbers of failed trials that have a repetition, or will have one.

    Example:
        >>> from widthsearch.widths import Widths
        >>> wide, narrow = (Candidate("net", Widths(("conv1",), (w,)), {}) for w in (16, 8))
        >>> queue = CandidateQueue([], [wide, narrow, wide], {}, retry=False)
        >>> len(queue), queue.pop() is wide, queue.pop() is narrow, queue.pop()
        (2, True, True, None)
    """

    def __init__(
        self,
        trials: Collection[Trial],
        candidates: Iterable[Candidate],
        limits: Limits,
        *,
        retry: bool,
    ) -> None:
        failed = unresolved_failures(trials)
        retried = [t for t in failed if retry and may_be_retried(t, limits)]
        again = {t.number: Candidate(t.space, t.widths, t.origin) for t in retried}
        unresolved = {trial.number for trial in failed} - again.keys()
        failures = {trial.number for trial in trials if trial.state == TrialState.FAILED}
        self.superseded = failures - unresolved
        self.seen = {t.architecture for t in trials if t.number not in again}
        proposed: dict[Architecture, Candidate] = {}
        for candidate in (*again.values(), *candidates):
            if "compares" in candidate.origin:
                continue  # those are :class:`~widthsearch.study.comparisons.Comparisons`' own
            proposed.setdefault((candidate.space, candidate.widths), candidate)
        self.proposed = tuple(proposed.values())
        self._waiting = deque(c for key, c in proposed.items() if key not in self.seen)

    def __len__(self) -> int:
        return len(self._waiting)

    def pop(self) -> Candidate | None:
        """Remove and return the next candidate; None where none is left."""
        return self._waiting.popleft() if self._waiting else None


def may_be_retried(trial: Trial, limits: Limits) -> bool:
    """Whether a failed trial may come again: its costs are within the limits, or it is a base."""
    return bool(trial.origin.get("base")) or is_within_limits(trial.cost, limits)


def given_without_trials(
    candidates: Iterable[Candidate],
    trials: Collection[Trial],
    config: StudyConfig,
    late: str | None,
) -> str | None:
    """A line on the networks of widths files that a study will not train; None where it trains all.

    Args:
        candidates: The study's candidates in their order.
        trials: Its trials that have begun.
        config: Its configuration.
        late: Why no further trial begins; None where some may.
    """
    queue = CandidateQueue(trials, candidates, {}, retry=False)
    begun = count_begun([trial for trial in trials if not trial.is_comparison])
    starts = len(config.start)
    room = 0 if late else config.trials // starts - begun
    left = {n: c for n in range(1, len(queue) + 1) if (c := queue.pop()) and n > room}
    given = {n: str(c.origin["given"]) for n, c in left.items() if "given" in c.origin}
    if not given:
        return None
    needed = starts * (begun + max(given))
    reason = f"{late}; give it more `hours`"
    if late is None:
        reason = f"its {config.trials} trials are too few; set `trials: {needed}` or more"
    return f"the study does not train the widths in {', '.join(given.values())}: {reason}"
