"""BoTorch's qLogNEHVI on a table of trained networks, for `benchmarks.search`.

Noisy expected hypervolume improvement (Daulton, Balandat and Bakshy, NeurIPS 2021) in its
logarithmic form (Ament et al., NeurIPS 2023). Accuracy is a `SingleTaskGP` with default priors over
log widths scaled to 0 .. 1, its outcomes standardised; log MACs are a deterministic second
objective. The first networks are random. Then the acquisition function is evaluated on random rows
and on the nearest neighbours of each member of the front, which is that by posterior mean.

It needs `python -m pip install 'widthsearch[benchmark]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.model import ModelList
from botorch.models.transforms.input import FilterFeatures
from botorch.models.transforms.outcome import Standardize
from botorch.sampling.get_sampler import get_sampler
from gpytorch.mlls import ExactMarginalLogLikelihood
from numpy.typing import NDArray

from widthsearch.bayesopt import pareto

if TYPE_CHECKING:
    from benchmarks.search import Table

_FIRST = 8
_RANDOM = 1500
_NEIGHBOURS = 120
_DRAWS = 64
_BATCH = 512


class BotorchSearch:
    """A `benchmarks.search.Search`.

    A network is a point of log widths scaled to 0 .. 1 and, in the last column, scaled log MACs:
    the Gaussian process sees the former, the second objective is the latter.
    """

    def __init__(self, table: Table, seed: int) -> None:
        self.seed, self.cost = seed, table.log_cost
        logs = np.log(table.widths)
        self.unit = (logs - logs.min(axis=0)) / np.maximum(np.ptp(logs, axis=0), 1e-12)
        self.points = torch.tensor(np.column_stack([self.unit, table.log_cost]))
        self.trained: list[int] = []
        self.seen: list[float] = []
        self.fitted: tuple[int, SingleTaskGP] | None = None

    def ask(self) -> int:
        rng = np.random.default_rng((self.seed, len(self.trained)))
        left = np.setdiff1d(np.arange(len(self.points)), self.trained)
        if len(self.trained) < _FIRST:
            return int(rng.choice(left))
        candidates = [rng.permutation(left)[:_RANDOM]]
        for row in self._front():
            distance = ((self.unit[left] - self.unit[row]) ** 2).sum(axis=1)
            candidates.append(left[np.argsort(distance, kind="stable")[:_NEIGHBOURS]])
        pool = np.unique(np.concatenate(candidates))
        values = self._acquisition(pool)
        return int(pool[values.argmax()])

    def tell(self, row: int, accuracy: float) -> None:
        self.trained.append(row)
        self.seen.append(accuracy)

    def estimates(self, rows: Sequence[int], seen: Sequence[float]) -> Sequence[float]:
        model = self._model()
        with torch.no_grad():
            mean: list[float] = model.posterior(self.points[list(rows)]).mean[:, 0].tolist()
        return mean

    def _front(self) -> NDArray[np.intp]:
        mean = np.array(self.estimates(self.trained, self.seen))
        rows = np.array(self.trained)
        front: NDArray[np.intp] = rows[
            pareto.non_dominated(np.column_stack([self.cost[rows], -mean]))
        ]
        return front

    def _model(self) -> SingleTaskGP:
        if self.fitted is None or self.fitted[0] != len(self.seen):
            axes = self.unit.shape[1]
            model = SingleTaskGP(
                self.points[self.trained],
                torch.tensor(self.seen, dtype=torch.float64)[:, None],
                outcome_transform=Standardize(m=1),
                input_transform=FilterFeatures(torch.arange(axes)),
            )
            torch.manual_seed(self.seed)  # of a second try of the fit
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            self.fitted = len(self.seen), model
        return self.fitted[1]

    def _acquisition(self, pool: NDArray[np.intp]) -> NDArray[np.float64]:
        """log of the expected improvement by each row, (N,)."""
        model = ModelList(self._model(), GenericDeterministicModel(lambda x: -x[..., -1:]))
        reference = torch.tensor([min(self.seen), -1.0], dtype=torch.float64)
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model=model,
            ref_point=reference,
            X_baseline=self.points[self.trained],
            sampler=get_sampler(
                model.posterior(self.points[:1]), torch.Size([_DRAWS]), seed=self.seed
            ),
            prune_baseline=True,
            cache_root=False,  # a deterministic model has no root
        )
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = [acquisition(x[:, None]) for x in self.points[pool].split(_BATCH)]
        found: NDArray[np.float64] = torch.cat(values).numpy()
        return found
