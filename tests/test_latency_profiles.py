"""Latency profiles: designs, files that survive a kill, what a profile is a profile of."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import tiny
import torch
from rich.console import Console
from torch import nn

from widthsearch.errors import DeviceError, StorageError, StudyError
from widthsearch.latency import profiles as profiling
from widthsearch.latency.config import Latency, LatencyConfig
from widthsearch.latency.profiles import (
    design,
    load_profile,
    measure_profile,
    profile_path,
    profile_table,
)
from widthsearch.space.search_space import SearchSpace

CONFIG = LatencyConfig(pairs=4)


@cache
def wide() -> SearchSpace:
    """Two axes of 8 to 128 channels."""
    layers = nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3)
    return SearchSpace.from_model(nn.Sequential(*layers), (1, 8, 8), name="wide", step=1)


class Meter:
    """Returns latencies proportional to parameters, and records its measurements."""

    measured: ClassVar[list[int]] = []
    base_ms: ClassVar[list[float | None]] = []

    def __init__(self, base: nn.Module, _: Any, config: LatencyConfig, base_ms: Any) -> None:
        self.base, self.base_ms_given = base, base_ms
        type(self).base_ms.append(base_ms)

    def measure(self, model: nn.Module) -> Latency:
        """Proportional to the parameters; the base takes 2 ms."""
        size = sum(p.numel() for p in model.parameters())
        self.measured.append(size)
        ratio = (50 + size) / (50 + sum(p.numel() for p in self.base.parameters()))
        latency = tiny.latency(2 * ratio)
        return replace(latency, ratio=ratio, base_ms=2.0, spread_ms=0.01, ratio_spread=0.005)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of this test's profiles."""
    monkeypatch.setenv("WIDTHSEARCH_CACHE", str(tmp_path))
    return tmp_path / "latency"


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> type[Meter]:
    """Replaces the meter."""
    monkeypatch.setattr(profiling, "LatencyMeter", Meter)
    Meter.measured, Meter.base_ms = [], []
    return Meter


# --- the design ---


def test_a_design_has_the_base_the_extremes_and_distinct_networks_on_the_grid() -> None:
    """A smaller design is a prefix; a small space has a small design."""
    space = tiny.space()
    vectors = design(space, 20)
    assert len(set(vectors)) == len(vectors) == 20
    assert vectors[0] == space.base
    assert vectors[1].vector == tuple(axis.min_width for axis in space.axes)
    assert vectors[2].vector == tuple(axis.max_width for axis in space.axes)
    for widths in vectors:
        assert space.widths(dict(widths)) == widths
    assert design(space, 8) == vectors[:8]
    assert len(design(space.constrained(min_width=1.0, max_width=1.25), 50)) <= 4


def test_a_design_has_both_whole_blocks_and_other_widths() -> None:
    """On axes of 8 to 128 channels: multiples of 16 and odd widths, over the whole range."""
    widths = [w for vector in design(wide(), 40) for w in vector.vector]
    assert sum(w % 16 == 0 for w in widths) > len(widths) / 4
    assert sum(w % 2 for w in widths) > len(widths) / 10
    assert min(widths) < 24 and max(widths) > 96


# --- profiles ---


def test_a_profile_is_measured_once_and_loaded_afterwards(meter: type[Meter]) -> None:
    """The second call measures nothing; the predictor and its errors are the same."""
    assert load_profile(tiny.space(), CONFIG) is None
    calls: list[tuple[int, int]] = []
    model = measure_profile(
        tiny.space(), CONFIG, vectors=12, on_progress=lambda *a: calls.append(a)
    )
    assert len(meter.measured) == 12
    assert calls == [(i, 12) for i in range(12)]
    assert float(model(tiny.space().base.vector)[0]) == pytest.approx(2.0, rel=0.05)
    again = measure_profile(tiny.space(), CONFIG, vectors=12)
    loaded = load_profile(tiny.space(), CONFIG)
    assert len(meter.measured) == 12
    assert loaded is not None and loaded.errors == again.errors == model.errors
    assert again.predicted(model.vectors).tolist() == model.predicted(model.vectors).tolist()


def test_an_interrupted_profile_continues_on_the_same_scale(
    folder: Path, meter: type[Meter]
) -> None:
    """Measurements are stored, the base's time is measured once, and a profile can grow later."""

    def kill(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_profile(tiny.space(), CONFIG, vectors=9, on_progress=kill)
    killed = load_profile(tiny.space(), CONFIG)
    assert killed is not None and len(killed.ms) == len(meter.measured) == 5
    assert len(measure_profile(tiny.space(), CONFIG, vectors=9).ms) == 9
    assert len(measure_profile(tiny.space(), CONFIG, vectors=11).ms) == 11
    assert len(meter.measured) == 11
    assert meter.base_ms == [None, 2.0, 2.0]
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change", [{"batch_size": 2}, {"threads": 2}, {"dtype": "bfloat16"}, {"pairs": 8}]
)
def test_a_profile_is_of_one_way_to_measure(change: dict[str, Any]) -> None:
    """Another batch size, dtype or number of threads has another file; more pairs have not."""
    other = profile_path(tiny.space(), replace(CONFIG, **change))
    assert (other == profile_path(tiny.space(), CONFIG)) == ("pairs" in change)


def test_a_profile_is_of_one_space() -> None:
    """Other bounds and steps share a profile; other pins and another cost do not."""
    space = tiny.space()
    path = profile_path(space, CONFIG)
    assert profile_path(space.constrained(min_width=0.5), CONFIG) == path
    assert profile_path(space.constrained(pin=["first"]), CONFIG) != path
    larger = SearchSpace.from_model(tiny.Net, (1, 8, 8), name="tiny", min_width=0.25, step=2)
    assert profile_path(larger, CONFIG) != path


def test_profiles_lie_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``WIDTHSEARCH_CACHE``, else ``XDG_CACHE_HOME``, else ``~/.cache``; safe file names."""
    space = tiny.space("package.module:function")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("WIDTHSEARCH_CACHE", raising=False)
    path = profile_path(space, CONFIG)
    assert path.parent == tmp_path / "xdg" / "widthsearch" / "latency"
    assert path.name.startswith("package.module-function-")
    monkeypatch.setenv("WIDTHSEARCH_CACHE", str(tmp_path / "own"))
    assert profile_path(space, CONFIG).parent == tmp_path / "own" / "latency"
    monkeypatch.delenv("WIDTHSEARCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert profile_path(space, CONFIG).parent == Path.home() / ".cache/widthsearch/latency"


def test_a_profile_that_cannot_be_kept_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, meter: type[Meter]
) -> None:
    """Without a cache, or with one that cannot be written, the error precedes any measurement."""
    monkeypatch.setenv("WIDTHSEARCH_CACHE", "")
    with pytest.raises(StudyError, match=r"WIDTHSEARCH_CACHE is empty, .*: unset it"):
        measure_profile(tiny.space(), CONFIG, vectors=4)
    assert load_profile(tiny.space(), CONFIG) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WIDTHSEARCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"file/latency' must be writable, but .*name another"):
        measure_profile(tiny.space(), CONFIG, vectors=4)
    monkeypatch.setenv("WIDTHSEARCH_CACHE", str(tmp_path / "own"))
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "own"))
    monkeypatch.setattr(profiling, "TemporaryFile", Mock(side_effect=read_only))
    with pytest.raises(StorageError, match=r"latency' must be writable, but .*own is not: Read"):
        measure_profile(tiny.space(), CONFIG, vectors=4)
    assert meter.measured == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"vectors": []}', '{"vectors": [[2, 2]]}'])
def test_a_damaged_profile_is_named(content: str) -> None:
    """It is neither overwritten nor ignored."""
    path = profile_path(tiny.space(), CONFIG)
    path.parent.mkdir()
    path.write_text(content)
    for read in (load_profile, measure_profile):
        with pytest.raises(StudyError, match=r"cannot be read .*: remove it"):
            read(tiny.space(), CONFIG)
    assert path.read_text() == content


def test_an_empty_profile_and_a_missing_device_are_refused() -> None:
    """The message has the rule and the value."""
    with pytest.raises(StudyError, match="`vectors >= 1` must hold"):
        measure_profile(tiny.space(), CONFIG, vectors=0)
    with pytest.raises(DeviceError, match="cuda:99"):
        load_profile(tiny.space(), replace(CONFIG, device="cuda:99"))


def test_a_real_profile_of_a_tiny_space(folder: Path) -> None:
    """Six networks on this machine; the file is plain JSON."""
    model = measure_profile(tiny.space(), CONFIG, vectors=6)
    (file,) = folder.iterdir()
    content = json.loads(file.read_text())
    assert content["setting"]["batch_size"] == 1
    assert content["base_ms"] > 0 and min(content["ms"]) > 0
    assert model.errors.networks == 6


def test_a_space_of_a_sample_tensor_has_a_profile() -> None:
    """Its networks take token ids, so the meter makes integers; the file is found again."""
    net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    space = SearchSpace.from_model(net, torch.zeros(6, dtype=torch.long), name="tokens")
    model = measure_profile(space, CONFIG, vectors=3)
    assert len(model.ms) == 3
    assert load_profile(space, CONFIG) is not None


# --- the table ---


def test_the_table_names_axes_blocks_and_errors(meter: type[Meter]) -> None:
    """Errors out of sample are in the caption, if there are enough networks."""
    model = measure_profile(tiny.space(), CONFIG, vectors=12)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(profile_table(model))
    text = capture.get()
    shown = ("predicted latency 2", "blocks of", "first", "second", "12 networks", "Kendall τ: 1")
    assert [each for each in shown if each not in text] == []
    single = measure_profile(tiny.space(), replace(CONFIG, threads=2), vectors=1)
    assert str(profile_table(single).caption).startswith("Blocks: ")
