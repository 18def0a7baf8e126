"""Methods that propose width vectors: one file a method, named in one mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from widthsearch.proposers.protocol import Proposal, Proposer, Setting
from widthsearch.proposers.random import Random
from widthsearch.proposers.sensitivity import Sensitivity
from widthsearch.proposers.uniform import Uniform

PROPOSERS: Mapping[str, Callable[..., Proposer]] = MappingProxyType(
    {"sensitivity": Sensitivity, "uniform": Uniform, "random": Random}
)
"""Every method by the name that studies use; its fields are its hyperparameters."""

__all__ = ["PROPOSERS", "Proposal", "Proposer", "Random", "Sensitivity", "Setting", "Uniform"]
