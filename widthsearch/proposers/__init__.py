"""Pruning methods that propose width vectors: one file per published method, named in one table.

May import: ``latency``, ``training``, ``channels``, ``space`` and below. Importing this package
imports no torch; :func:`proposer_class` imports the module of one method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from widthsearch.errors import StudyError
from widthsearch.proposers.protocol import Proposal, Proposer, Setting

PROPOSERS: Mapping[str, str] = MappingProxyType(
    {
        "activation_density": "activation_density:ActivationDensity",
        "sensitivity": "sensitivity:Sensitivity",
        "synflow": "synflow:SynFlow",
        "naswot": "naswot:Naswot",
        "slimming": "slimming:Slimming",
        "filter_groups": "filter_groups.proposer:FilterGroups",
        "fisher": "fisher:Fisher",
        "magnitude": "magnitude:Magnitude",
        "taylor": "taylor:Taylor",
        "uniform": "uniform:Uniform",
        "balanced": "balanced:Balanced",
        "constant": "constant:Constant",
        "taper": "taper:Taper",
        "random": "random:Random",
    }
)
"""The class of each method, as ``module:Class`` within this package, by the name in studies."""

BASELINES = ("uniform", "balanced", "constant", "taper", "random")
"""The methods that look at nothing: gains are stated over the best of them."""

__all__ = ["BASELINES", "PROPOSERS", "Proposal", "Proposer", "Setting", "proposer_class"]


def proposer_class(name: str) -> Callable[..., Proposer]:
    """The class of a method: a frozen dataclass whose fields are the hyperparameters.

    Args:
        name: A name in :data:`PROPOSERS`.

    Raises:
        StudyError: No method has this name.

    Example:
        >>> proposer_class("uniform")(members=4)
        Uniform(members=4)
    """
    if name not in PROPOSERS:
        raise StudyError(f"a proposer must be one of {', '.join(PROPOSERS)}, but was {name!r}")
    module, _, class_name = PROPOSERS[name].partition(":")
    proposer: Callable[..., Proposer] = getattr(
        importlib.import_module(f"{__name__}.{module}"), class_name
    )
    return proposer
