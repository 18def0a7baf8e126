"""Proposers: the two baselines, the table of methods and the checks of a proposal."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conformance import RECIPE, ProposerConformance, setting, small_task
from refusals import refusals
from strategies import refused, space_of

from widthsearch.errors import StudyError
from widthsearch.proposers import PROPOSERS, Proposal, Setting, proposer_class
from widthsearch.proposers.random import Random
from widthsearch.proposers.uniform import Uniform

WILD = replace(RECIPE, lr=1e30)


class TestUniform(ProposerConformance):
    """The baseline."""

    method = "uniform"
    proposer = Uniform()


class TestRandom(ProposerConformance):
    """The other baseline."""

    method = "random"
    proposer = Random()


def test_every_method_conforms() -> None:
    """Each name of the mapping has a subclass of the conformance test."""
    files = Path(__file__).parent.glob("test_*.py")
    tested = re.findall(r'^    method = "(\w+)"$', "".join(f.read_text() for f in files), re.M)
    assert sorted(tested) == sorted(PROPOSERS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "a proposal must have a member, but that of 'mine' has none"),
        ([(4, 4), (2, 6)], "no axis may grow along a proposal's trajectory"),
    ],
)
def test_an_invalid_proposal_is_refused(path: list[tuple[int, int]], message: str) -> None:
    """The error names the method, which may be a user's own."""
    with pytest.raises(StudyError, match=message):
        Proposal("mine", tuple(tiny.widths(*vector) for vector in path), {})


def test_the_table_of_methods_needs_no_torch() -> None:
    """Importing the package, its protocol and its table imports neither torch nor a method."""
    code = """if True:
        import sys
        from widthsearch.proposers import PROPOSERS, Proposal, Setting
        Setting()
        loaded = [m for m in sys.modules if m.startswith("widthsearch.proposers.")]
        assert loaded == ["widthsearch.proposers.protocol"], loaded
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_are_found_by_name() -> None:
    """Each reference of the table names a class; an unknown name is refused in one line."""
    for name in PROPOSERS:
        assert dataclasses.is_dataclass(proposer_class(name))
    with pytest.raises(StudyError, match=r"a proposer must be one of .*uniform.*, but was 'sense'"):
        proposer_class("sense")


@refusals("proposer")
def test_bad_hyperparameters_are_refused(values: dict[str, Any], message: str) -> None:
    """The error has the field, the rule and the value."""
    fields = {**values}
    with refused(StudyError, message):
        proposer_class(fields.pop("method"))(**fields)


@pytest.mark.parametrize(
    ("method", "hyperparameters", "message"),
    [
        ("fisher", {"every": 5, "lr": 1e30}, r"fine-tuning .* lr=1e\+30"),
        ("magnitude", {"every": 5, "pretrain": WILD}, r"base network .* lr=1e\+30"),
        ("slimming", {"recipe": WILD}, r"base network .* lr=1e\+30"),
        ("filter_groups", {"penalty": 1e30}, r"group learning .* penalty=1e\+30"),
    ],
)
def test_divergence_is_an_error(method: str, hyperparameters: Any, message: str) -> None:
    """The message names the hyperparameter to lower."""
    with pytest.raises(StudyError, match=message), np.errstate(all="ignore"):
        proposer_class(method)(**hyperparameters)(space_of("Residual"), small_task(), setting())


@pytest.mark.parametrize(
    "method", ["fisher", "magnitude", "sensitivity", "slimming", "synflow", "taylor"]
)
def test_unknown_latency_is_refused_before_training(method: str) -> None:
    """With the way out; no progress is reported before the error."""
    lines: list[str] = []
    reporting = replace(setting(), report=lines.append)
    with pytest.raises(StudyError, match=r"needs predicted latency.*per: macs"):
        proposer_class(method)(per="latency")(space_of("Residual"), small_task(), reporting)
    assert not lines


def test_random_depends_on_its_seed() -> None:
    """Two seeds give two profiles."""
    space, task = space_of("Residual"), small_task()
    a, b = (Random()(space, task, Setting(seed=s)).trajectory for s in (0, 1))
    assert a != b


def test_uniform_scales_the_base() -> None:
    """Every member is a multiple of the base, rounded to the grid."""
    space = space_of("Residual")
    for widths in Uniform()(space, small_task(), Setting(seed=0)).trajectory:
        shares = [w / a.base for w, a in zip(widths.vector, space.axes, strict=True)]
        assert max(shares) - min(shares) <= 0.125
