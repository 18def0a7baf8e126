"""Proposers: what every one promises, and what each is."""

from __future__ import annotations

import re
from pathlib import Path

from conformance import ProposerConformance, small_task
from strategies import space_of

from widthsearch.proposers import PROPOSERS, Random, Setting, Uniform


class TestUniform(ProposerConformance):
    """The baseline."""

    method = "uniform"
    proposer = Uniform()


class TestRandom(ProposerConformance):
    """The other one."""

    method = "random"
    proposer = Random()


def test_every_method_conforms() -> None:
    """Each name of the mapping has a subclass of the conformance test."""
    files = Path(__file__).parent.glob("test_*.py")
    tested = re.findall(r'^    method = "(\w+)"$', "".join(f.read_text() for f in files), re.M)
    assert sorted(tested) == sorted(PROPOSERS)


def test_random_depends_on_its_seed() -> None:
    """Two seeds, two profiles."""
    space, task = space_of("Residual"), small_task()
    a, b = (Random()(space, task, Setting(seed=s)).trajectory for s in (0, 1))
    assert a != b


def test_uniform_scales_the_base() -> None:
    """Every member is a multiple of the base, snapped."""
    space = space_of("Residual")
    for widths in Uniform()(space, small_task(), Setting(seed=0)).trajectory:
        shares = [w / a.base for w, a in zip(widths.vector, space.axes, strict=True)]
        assert max(shares) - min(shares) <= 0.125
