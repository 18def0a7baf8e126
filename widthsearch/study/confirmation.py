"""Confirms a front: trains its members, and near members, again with fresh seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.driver_lock import DriverLock
from widthsearch.study.loop import Search
from widthsearch.study.progress import Progress
from widthsearch.study.trial import Trial

_MIN_DOUBT = 0.05
"""The least value of p (1 − p): a member of the front with p near 0 is trained again as well."""


class Confirmation(Search):
    """A search whose trials are repeated trainings of finalists.

    The finalists are the members of the front and the undecided networks, all within the limits.
    Each next trial goes to the finalist with the greatest

        max(p (1 − p), 0.05) · v / (1 + k v / n),

    where p is its probability of being dominated, v the posterior variance of its score, n the
    noise variance of one training, and k the number of its trainings that run now. The last factor
    is the variance that is left once those end: for one normal mean, precisions add,
    1 / (1 / v + k / n). So doubtful and uncertain finalists come first, and none is trained twice
    at once without need.

    Example: v = n = 1, p = 0.5. With no training running the value is 0.25 · 1; with one running it
    is 0.25 · 1 / (1 + 1) = 0.125, so another finalist with p = 0.5 and v = 0.6 comes next.

    Without a surrogate (too few finished trials), the finalist with the fewest trainings is next.

    Args:
        config: The study's configuration.
        spaces: Its spaces by name.
        driver_lock: The lock of its storage, which this process holds.
        seeds: The mean number of trainings that the members of the front are to have.
        on_progress: Called with the progress of the study.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from widthsearch.study.storage import Store
        >>> from widthsearch.training.recipe import EpochResult
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> spaces = {"net": SearchSpace.from_model(net, (3, 8, 8), name="net")}
        >>> config = StudyConfig(name="mine", trials=2, recipe={"epochs": 1})
        >>> url = f"sqlite:///{tempfile.mkdtemp()}/study.db"
        >>> store = Store.create(url, "mine", config.objectives)
        >>> with DriverLock(store) as driver_lock:
        ...     search = Search(config, spaces, driver_lock)
        ...     while (trial := search.ask()) is not None:
        ...         result = EpochResult(1, 0.1, 90.0 + trial.number, 1.0)
        ...         more = search.report(trial.number, [result])
        ...     confirmation = Confirmation(config, spaces, driver_lock, seeds=2)
        ...     confirmation.ask().origin
        {'confirms': 0}
    """

    def __init__(
        self,
        config: StudyConfig,
        spaces: Mapping[str, SearchSpace],
        driver_lock: DriverLock,
        seeds: int,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        # It repeats trainings of the study's own start, without comparisons.
        config = config.model_copy(update={"start": config.start[:1]})
        super().__init__(config, spaces, driver_lock, on_progress=on_progress)
        posterior = self.posterior
        front = posterior.front()
        missing = seeds * len(front) - sum(posterior[member].trainings for member in front)
        missing -= sum("confirms" in self.trials[number].origin for number in self.running)
        self._wanted = max(0, missing) + self._begun
        self._named = {member.number for member in (*front, *posterior.undecided)}
        if missing > 0:
            self.notify(self._plan(missing), "event")

    @property
    def _begun(self) -> int:
        return len(self.trials)

    @property
    def _total(self) -> int:
        return self._wanted

    def _plan(self, trainings: int) -> str:
        """The finalists in a line, with the reason why networks beside the front are among them."""
        front = [member.number for member in self.posterior.front()]
        near = sorted({member.number for member in self.posterior.undecided} - {*front})
        many = "s" * (trainings > 1)
        line = f"confirming with {trainings} training{many} of the front ({_ids(front)})"
        if near:
            line += (
                f" and of {len(near)} network{'s' * (len(near) > 1)} within the noise of it "
                f"({_ids(near)}), each dominated with a probability from 5% to 95%"
            )
        return line

    def _suggest(self) -> Candidate:
        posterior = self.posterior
        front = posterior.front()
        finalists = {member.number: member for member in (*front, *posterior.undecided)}
        pending = Counter(self.trials[number].architecture for number in self.running)

        def priority(member: Trial) -> tuple[float, int]:
            estimate = posterior[member]
            k = pending[member.architecture]
            if estimate.sd is None or posterior.surrogate is None:
                return -estimate.trainings - k, -member.number
            p = estimate.dominated or 0.0
            variance, noise = estimate.sd**2, posterior.surrogate.noise**2
            left = variance / (1 + k * variance / max(noise, 1e-12))
            return max(p * (1 - p), _MIN_DOUBT) * left, -member.number

        chosen = max(finalists.values(), key=priority)
        if chosen.number not in self._named:
            self._named.add(chosen.number)
            what = f"confirming trial {chosen.number} too: by the trainings so far, it is"
            self.notify(
                f"{what} {'on' if chosen in front else 'within the noise of'} the front", "event"
            )
        return Candidate(chosen.space, chosen.widths, {"confirms": chosen.number})


def _ids(numbers: Sequence[int]) -> str:
    """A few of some trials' IDs."""
    return ", ".join([*map(str, numbers[:12]), *(["…"] if len(numbers) > 12 else [])])
