"""Proposers: the two baselines, the table of methods and the checks of a proposal."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conformance import ProposerConformance, small_task
from strategies import space_of

from widthsearch.errors import StudyError
from widthsearch.proposers import PROPOSERS, Proposal, Setting, proposer_class
from widthsearch.proposers.random import Random
from widthsearch.proposers.uniform import Uniform


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


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("activation_density", "weights", "kept"),
        ("activation_density", "tolerance", -0.1),
        ("activation_density", "until", 0.0),
        ("activation_density", "threshold", -0.1),
        ("filter_groups", "temperature", 0.0),
        ("fisher", "every", 0),
        ("magnitude", "lr", 0.0),
        ("random", "lowest", 0.0),
        ("sensitivity", "floor", 1.5),
        ("slimming", "sparsity", float("inf")),
        ("synflow", "rounds", 0),
    ],
)
def test_bad_hyperparameters_are_refused(method: str, field: str, value: object) -> None:
    """The error has the field, the rule and the value."""
    with pytest.raises(StudyError, match=rf"^{method}\.{field} must .*, but was {value!r}"):
        proposer_class(method)(**{field: value})


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
