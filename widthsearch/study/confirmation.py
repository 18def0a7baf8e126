"""Trains finalists of a study again, where that decides most about its front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.loop import Search
from widthsearch.study.progress import Progress
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial
from widthsearch.widths import Widths

_DECIDED = 0.05
"""What the doubt about a finalist, p (1 − p), counts at least, so that each is trained again."""


class Confirmation(Search):
    """The search whose trials are trainings of networks that were trained before.

    Each next one goes to the finalist (on the front, or perhaps on it) where doubt about its being
    dominated times the variance of its believed accuracy is greatest; what is in training already
    counts as if it had come out as believed.

    Args:
        config: The study's configuration.
        spaces: Its spaces by name.
        store: Its storage.
        lease: The right to drive it.
        seeds: How many trainings the front's members are to have in the mean.
        on_progress: Is told where it stands.
    """

    def __init__(
        self,
        config: StudyConfig,
        spaces: Mapping[str, SearchSpace],
        store: Store,
        driver_lock: DriverLock,
        seeds: int,
        *,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        super().__init__(config, spaces, store, driver_lock, on_progress=on_progress)
        posterior = self.posterior
        front = posterior.front()
        missing = seeds * len(front) - sum(posterior[member].trainings for member in front)
        missing -= sum("confirms" in self.trials[number].origin for number in self.running)
        self._wanted = max(0, missing) + self._begun

    @property
    def _begun(self) -> int:
        return len(self.trials)

    @property
    def _total(self) -> int:
        return self._wanted

    def _drawn(self) -> Candidate:
        posterior = self.posterior
        front = posterior.front()
        finalists = {member.number: member for member in (*front, *posterior.undecided)}
        pending: Counter[tuple[str, Widths]] = Counter(
            (self.trials[number].space, self.trials[number].widths) for number in self.running
        )

        def worth(member: Trial) -> tuple[float, int]:
            estimate = posterior[member]
            waiting = pending[member.space, member.widths]
            if estimate.sd is None or posterior.surrogate is None:  # whoever was trained least
                return -estimate.trainings - waiting, -member.number
            p = estimate.dominated or 0.0
            variance, noise = estimate.sd**2, posterior.surrogate.noise**2
            left = variance / (1 + waiting * variance / max(noise, 1e-12))
            return max(p * (1 - p), _DECIDED) * left, -member.number

        chosen = max(finalists.values(), key=worth)
        return Candidate(chosen.space, chosen.widths, {"confirms": chosen.number})

    def _begin(self, candidate: Candidate) -> Trial:
        trial = super()._begin(candidate)
        latency = self.trials[int(str(candidate.origin["confirms"]))].latency
        if latency is not None:  # it does not depend on the seed
            self._store.record_latency(trial.number, latency)
            trial = self.trials[trial.number] = replace(trial, latency=latency)
        return trial
