"""Network pruning as a search over layer widths.

A pruned network is a width vector: one integer per free width of a model. A space holds the widths
that are allowed and their exact costs; a study trains candidates from scratch and keeps the Pareto
set of accuracy and costs::

    space = widthsearch.SearchSpace.from_model(make_model, input_shape=(3, 32, 32))
    study = widthsearch.Study.load("studies/quickstart.yaml")
    study.run()
    widthsearch.train(study, study.front()[-1])

Importing the package imports neither torch nor Ray nor Optuna: each name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widthsearch.api import Study as Study
    from widthsearch.bayesopt.metric import Metric as Metric
    from widthsearch.bayesopt.optuna_sampler import WidthSampler as WidthSampler
    from widthsearch.data.config import TaskConfig as TaskConfig
    from widthsearch.data.tasks import OwnTask as OwnTask
    from widthsearch.data.tasks import Task as Task
    from widthsearch.data.tasks import load_task as load_task
    from widthsearch.errors import WidthsearchError as WidthsearchError
    from widthsearch.export import load as load
    from widthsearch.export import train as train
    from widthsearch.latency.config import Latency as Latency
    from widthsearch.latency.config import LatencyConfig as LatencyConfig
    from widthsearch.proposers import Proposal as Proposal
    from widthsearch.proposers import Setting as Setting
    from widthsearch.space.cost import Cost as Cost
    from widthsearch.space.loading import load_space as load_space
    from widthsearch.space.search_space import SearchSpace as SearchSpace
    from widthsearch.study.config import StudyConfig as StudyConfig
    from widthsearch.study.trial import Trial as Trial
    from widthsearch.study.trial import TrialState as TrialState
    from widthsearch.training.job import TrainingTrial as TrainingTrial
    from widthsearch.training.recipe import EpochResult as EpochResult
    from widthsearch.training.recipe import Recipe as Recipe
    from widthsearch.widths import Axis as Axis
    from widthsearch.widths import Widths as Widths

__version__ = "0.2.0.dev0"

_WHERE = {
    "Axis": "widths",
    "Cost": "space.cost",
    "EpochResult": "training.recipe",
    "Latency": "latency.config",
    "LatencyConfig": "latency.config",
    "Metric": "bayesopt.metric",
    "OwnTask": "data.tasks",
    "Proposal": "proposers",
    "Recipe": "training.recipe",
    "SearchSpace": "space.search_space",
    "Setting": "proposers",
    "Study": "api",
    "StudyConfig": "study.config",
    "Task": "data.tasks",
    "TaskConfig": "data.config",
    "TrainingTrial": "training.job",
    "Trial": "study.trial",
    "TrialState": "study.trial",
    "WidthSampler": "bayesopt.optuna_sampler",
    "Widths": "widths",
    "WidthsearchError": "errors",
    "load": "export",
    "load_space": "space.loading",
    "load_task": "data.tasks",
    "train": "export",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'widthsearch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"widthsearch.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
