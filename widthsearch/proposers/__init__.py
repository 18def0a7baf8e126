"""Methods that propose width vectors: one file a method, named in one mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from widthsearch.proposers.activation_density import ActivationDensity
from widthsearch.proposers.filter_groups.proposer import FilterGroups
from widthsearch.proposers.fisher import Fisher
from widthsearch.proposers.magnitude import Magnitude
from widthsearch.proposers.protocol import Proposal, Proposer, Setting
from widthsearch.proposers.random import Random
from widthsearch.proposers.sensitivity import Sensitivity
from widthsearch.proposers.slimming import Slimming
from widthsearch.proposers.synflow import SynFlow
from widthsearch.proposers.uniform import Uniform

PROPOSERS: Mapping[str, Callable[..., Proposer]] = MappingProxyType(
    {
        "activation_density": ActivationDensity,
        "sensitivity": Sensitivity,
        "synflow": SynFlow,
        "slimming": Slimming,
        "filter_groups": FilterGroups,
        "fisher": Fisher,
        "magnitude": Magnitude,
        "uniform": Uniform,
        "random": Random,
    }
)
"""Every method by the name that studies use; its fields are its hyperparameters."""

__all__ = [
    "PROPOSERS",
    "ActivationDensity",
    "FilterGroups",
    "Fisher",
    "Magnitude",
    "Proposal",
    "Proposer",
    "Random",
    "Sensitivity",
    "Setting",
    "Slimming",
    "SynFlow",
    "Uniform",
]
