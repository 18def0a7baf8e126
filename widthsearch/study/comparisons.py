"""Which networks are trained again from another start, where a study compares starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from widthsearch.proposers.families import Candidate
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.starts import scratch_epochs
from widthsearch.study.storage import Store
from widthsearch.study.trial import Trial, TrialState


@dataclass(frozen=True)
class Comparisons:
    """The trainings that a study's networks lack, of all starts but the study's own.

    Each network that finishes is trained from each other start. Networks only begin while the
    trials that are left suffice for all comparisons, so that each one is whole.

    Attributes:
        config: The study's configuration.
        trials: Every trial by number; read anew at each call.
        superseded: Numbers of failed trials that are trained again.
        base_epochs: The epochs of the base's training, for ``scratch_b``; None where unknown.
        base_macs: The base's MACs.

    Example:
        >>> from widthsearch.space.cost import Cost
        >>> from widthsearch.training.recipe import EpochResult
        >>> from widthsearch.widths import Widths
        >>> starts = {"start": ["scratch", "extract"], "weights": "base.pt"}
        >>> config = StudyConfig(name="mine", trials=4, recipe={"epochs": 1}, **starts)
        >>> cost, curve = Cost(500, 80, 64), (EpochResult(1, 0.4, 91.5, 2.0),)
        >>> own = Trial(0, "net", Widths(("fc",), (8,)), {"base": True}, 7, cost, None, curve)
        >>> trials = {0: own}
        >>> comparisons = Comparisons(config, trials, superseded=(), base_epochs=None, base_macs=0)
        >>> comparisons.room(left=3), comparisons.next()  # while it runs
        (1, None)
        >>> trials[0] = replace(own, state=TrialState.FINISHED)
        >>> comparisons.room(left=1), comparisons.next().origin
        (0, {'compares': 0, 'start': 'extract'})
    """

    config: StudyConfig
    trials: Mapping[int, Trial]
    superseded: Collection[int]
    base_epochs: float | None
    base_macs: int

    @classmethod
    def of(
        cls,
        config: StudyConfig,
        spaces: Mapping[str, SearchSpace],
        trials: Mapping[int, Trial],
        superseded: Collection[int],
        store: Store,
    ) -> Comparisons:
        """Those of a study, whose storage keeps the epochs of the base's training."""
        base, weights = next(iter(spaces.values())), store.attribute("weights") or {}
        return cls(config, trials, superseded, weights.get("epochs"), base.cost(base.base).macs)

    def lacking(self) -> list[tuple[Trial, str]]:
        """The trials of the study's own start that run or finished, with each start they lack."""
        if not (others := self.config.start[1:]):
            return []
        begun = {
            (trial.origin.get("compares"), trial.start)
            for trial in self.trials.values()
            if trial.number not in self.superseded
        }
        return [
            (trial, start)
            for trial in self.trials.values()
            if trial.state in (TrialState.RUNNING, TrialState.FINISHED)
            and trial.origin.keys().isdisjoint(("compares", "confirms"))
            for start in others
            if (trial.number, start) not in begun
        ]

    def room(self, left: int) -> int:
        """The number of networks that may begin, with all their comparisons, in ``left`` trials."""
        return (left - len(self.lacking())) // len(self.config.start)

    def next(self) -> Candidate | None:
        """A finished trial's network, to train it from another start; None where none waits."""
        for trial, start in self.lacking():
            if trial.state != TrialState.FINISHED:
                continue
            origin: dict[str, object] = {"compares": trial.number, "start": start}
            if start == "scratch_b":
                assert self.base_epochs is not None
                of_base = self.base_epochs, self.base_macs
                epochs = scratch_epochs(self.config.recipe.epochs, *of_base, trial.cost.macs)
                origin["epochs"] = epochs
            return Candidate(trial.space, trial.widths, origin)
        return None

    def prepared(self, candidate: Candidate) -> tuple[Candidate, int]:
        """A candidate with its start, and the seed of its trial.

        A comparison has the seed of the trial that it is compared with: the two trainings have the
        same order of images and augmentation, and the same new weights where they have new ones.
        """
        origin, own = candidate.origin, self.config.start[0]
        if "compares" in origin:
            return candidate, self.trials[int(str(origin["compares"]))].seed
        if own != "scratch":
            candidate = replace(candidate, origin={**origin, "start": own})
        entropy = (self.config.seed, len(self.trials), *b"trial")
        return candidate, int(np.random.SeedSequence(entropy).generate_state(1)[0])
