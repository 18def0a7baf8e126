"""Probes of the precision and of the number of trials at once."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from digits import convnet, digits
from torch import nn

from widthsearch.errors import DeviceError
from widthsearch.space.search_space import SearchSpace
from widthsearch.training import autotune
from widthsearch.training.autotune import ConcurrencyProbe, probe_concurrency, probe_precision
from widthsearch.training.recipe import EpochResult, Recipe
from widthsearch.training.trainer import fit

RECIPE = Recipe(epochs=6, batch_size=32, lr=0.1)


# --- precision ---


class Timed:
    """A trainer whose epochs have given times, by precision."""

    seconds: dict[str, list[float]]
    finished = False

    def __init__(self, model: nn.Module, task: Any, recipe: Recipe, **_: Any) -> None:
        self.times = list(Timed.seconds[recipe.precision])
        assert len(task.train) == recipe.batch_size == 32

    def run_epoch(self) -> EpochResult:
        """The next time; the last one repeats."""
        return EpochResult(1, 1.0, 1.0, self.times.pop(0) if len(self.times) > 1 else self.times[0])


@pytest.mark.parametrize(
    ("bf16", "precision", "speedup", "pairs"),
    [
        ([5.0, 1.0], "bf16", 2.0, 5),  # the first step creates the kernels
        ([5.0, 1.9], "fp32", 2 / 1.9, 5),  # faster, but not clearly
        ([5.0, 20.0], "fp32", 0.1, 5),
        ([5.0, 1.0, 8.0, 1.0, 9.0, 1.0], "bf16", 2.0, 5),  # the median ignores slow steps
        ([20.0, 0.1], "fp32", 0.1, 0),  # a first step of ten times the time is enough
    ],
)
def test_bf16_is_taken_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bf16: list[float], precision: str, speedup: float, pairs: int
) -> None:
    """By the median of at least five pairs, unless the first step in bf16 is far slower."""
    Timed.seconds = {"fp32": [2.0], "bf16": bf16}
    monkeypatch.setattr(autotune, "Trainer", Timed)
    probe = probe_precision(convnet(), digits(), RECIPE, threads=1, seconds=0.0)
    assert (probe.precision, probe.speedup) == (precision, pytest.approx(speedup))
    assert (probe.device, probe.threads, probe.pairs) == ("cpu", 1, pairs)


def test_divergence_is_left_to_the_trials() -> None:
    """Probes ignore a learning rate that diverges, and choose fp32 for a network of NaNs."""
    task = digits()
    wild = replace(RECIPE, lr=1e8)
    found = probe_precision(convnet(), task, wild, seconds=0.05)
    assert found.pairs >= 5 or found.speedup < 1 / 3  # a slow first step ends the probe
    broken = convnet()
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(math.nan)
    assert probe_precision(broken, task, RECIPE).pairs == 0
    space = SearchSpace.from_model(convnet, (1, 8, 8))
    probe = probe_concurrency(pickle.dumps(space), task, wild, numbers=(1,), seconds=0.1)
    assert probe.candidates_per_hour[1] > 0


def test_a_probe_changes_nothing() -> None:
    """Neither the network nor torch's generator nor its threads; the result is plain JSON."""
    model = convnet()
    torch.manual_seed(5)
    before, state = torch.get_rng_state(), pickle.dumps(model.state_dict())
    probe = probe_precision(model, digits(), RECIPE, threads=2, seconds=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1
    assert pickle.dumps(model.state_dict()) == state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert json.loads(json.dumps(asdict(probe)))["precision"] in ("fp32", "bf16")
    assert probe.speedup > 0
    assert math.isfinite(probe.speedup)


@pytest.mark.slow
def test_bf16_is_as_accurate_as_fp32() -> None:
    """Over six seeds the mean accuracies are within three standard errors of each other."""
    task = digits()
    final = {
        precision: [
            fit(convnet(seed), task, replace(RECIPE, precision=precision), seed=seed)[-1].value
            for seed in range(6)
        ]
        for precision in ("fp32", "bf16")
    }
    assert min(map(min, final.values())) > 90
    means = [statistics.fmean(accuracies) for accuracies in final.values()]
    error = math.hypot(*(statistics.stdev(a) / 6**0.5 for a in final.values()))
    assert abs(means[0] - means[1]) < 3 * error


# --- concurrency ---


class Counted:
    """A process whose training speed is given, by the number of processes at once."""

    rates: ClassVar[dict[int, float]]
    alive: ClassVar[int] = 0

    def __init__(self) -> None:
        Counted.alive += 1

    def submit(self, function: Callable[..., Any], *_: Any) -> Future[float | None]:
        """Preparation fails where there is no rate; training gives the rate."""
        future: Future[float | None] = Future()
        if Counted.alive not in Counted.rates:
            future.set_exception(RuntimeError("OutOfMemoryError: CUDA out of memory"))
        else:
            rate = Counted.rates[Counted.alive]
            future.set_result(rate if function is autotune._train else None)
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        """End."""
        Counted.alive -= 1


@pytest.mark.parametrize(
    ("rates", "tried", "best", "limit"),
    [
        # digits have 1,079 images: 33 steps of 32 an epoch, 198 a candidate of six epochs
        ({1: 33.0, 2: 33.0, 4: 33.0}, {1: 600, 2: 1200, 4: 2400}, 4, None),
        ({1: 33.0, 2: 30.0, 4: 14.0}, {1: 600, 2: 60 / 55 * 1000, 4: 56 / 55 * 1000}, 2, "fewer"),
        ({1: 33.0, 2: 16.9, 4: 8.45}, {1: 600, 2: 33.8 / 33 * 600, 4: 33.8 / 33 * 600}, 1, None),
        ({1: 33.0, 2: 30.0}, {1: 600, 2: 60 / 55 * 1000}, 2, "4 at once: OutOfMemoryError: CUDA"),
    ],
)
def test_the_best_number_at_once(
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[int, float],
    tried: dict[int, float],
    best: int,
    limit: str | None,
) -> None:
    """The most candidates per hour, with as few processes as come close; memory is a limit."""
    Counted.rates = rates
    monkeypatch.setattr(autotune, "_process", Counted)
    probe = probe_concurrency(b"", digits(), RECIPE, numbers=(1, 2, 4))
    assert probe.candidates_per_hour == pytest.approx(tried)
    assert probe.best == best
    assert probe.limit is None if limit is None else limit in (probe.limit or "")
    assert Counted.alive == 0
    assert probe.to_json()["best"] == best


def test_candidates_are_counted_in_processes_of_their_own() -> None:
    """One process trains digits for a moment; another one cannot unpickle its space."""
    space = SearchSpace.from_model(convnet, (1, 8, 8))
    probe = probe_concurrency(pickle.dumps(space), digits(), RECIPE, numbers=(1,), seconds=0.1)
    assert isinstance(probe, ConcurrencyProbe)
    assert probe.candidates_per_hour[1] > 0
    with pytest.raises(DeviceError, match="cannot: 1 at once: UnpicklingError"):
        probe_concurrency(b"nothing", digits(), RECIPE, numbers=(1,))


def test_a_process_that_dies_ends_the_probe() -> None:
    """For example killed for its memory: the error is one line."""
    killed = pickle.dumps(Killed())
    with pytest.raises(DeviceError, match="cannot: 1 at once: A process in the process pool was"):
        probe_concurrency(killed, digits(), RECIPE, numbers=(1,))


class Killed:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_probe_does_not_run_the_users_script_again(tmp_path: Path) -> None:
    """A script without ``if __name__ == "__main__"`` runs once, whatever processes it starts."""
    script = tmp_path / "script.py"
    script.write_text(
        "from widthsearch.training import autotune\n"
        "print('running')\n"
        "process = autotune._process()\n"
        "print(autotune._on_each([process], abs, -3))\n"
        "process.shutdown()\n"
    )
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["running", "[3]"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_ends_with_a_killed_parent(tmp_path: Path) -> None:
    """Otherwise it would hold the device's memory for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from widthsearch.training import autotune\n"
        "autotune._on_each([autotune._process()], abs, 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The process inherits the pipe, so reading to its end waits for the process, too.
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.gpu
def test_candidates_share_a_gpu() -> None:
    """One and two at once train."""
    space = SearchSpace.from_model(convnet, (1, 8, 8))
    probe = probe_concurrency(
        pickle.dumps(space), digits(), RECIPE, device="cuda", numbers=(1, 2), seconds=1.0
    )
    assert list(probe.candidates_per_hour) == [1, 2]
    assert probe.best in (1, 2)
