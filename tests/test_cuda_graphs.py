"""Captured steps: the numbers of the eager loop, and eager steps with a reason where they fail.

Without a GPU, a recorder stands in for CUDA graphs. Like a graph, it records a step's kernels with
the tensors that they read and write, and repeats them without the step's Python.
"""

from __future__ import annotations

import copy
import gc
import random
import statistics
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import digits
import numpy as np
import pytest
import torch
from digits import finish, untimed, weights
from torch import Tensor, nn

from widthsearch.data.tasks import Task
from widthsearch.torch_internals import TorchDispatchMode, tree_leaves
from widthsearch.training import cuda_graphs as capture
from widthsearch.training.cuda_graphs import WARMUP_STEPS, CudaGraphStep, find_hooks
from widthsearch.training.recipe import EpochResult, Recipe
from widthsearch.training.trainer import Trainer, fit

QUICK = Recipe(epochs=3, batch_size=32, lr=0.1)


@cache
def few() -> Task:
    """A quarter of the digits' training images, with every augmentation: 8 steps an epoch."""
    augmentation = replace(digits.few().augmentation, flip=True, cutout=2)
    return replace(digits.few(), augmentation=augmentation)


def convnet(seed: int = 0, middle: Callable[[], nn.Module] = nn.Identity) -> nn.Module:
    """A narrow network with dropout."""
    return digits.convnet(seed, width=8, dropout=0.2, middle=middle)


def with_and_without_graphs(
    task: Task, recipe: Recipe = QUICK, **options: Any
) -> list[list[EpochResult]]:
    """The curves of one training, captured and eager; the weights are the same."""
    models = [convnet(), convnet()]
    curves = [
        untimed(fit(model, task, replace(recipe, capture=on), seed=0, **options))
        for model, on in zip(models, (True, False), strict=True)
    ]
    assert weights(models[0]) == weights(models[1])
    return curves


# --- a stand-in for CUDA graphs ---


def storages(tree: Any) -> set[int]:
    """The memory addresses of a tree's tensors."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Recording(TorchDispatchMode):
    """Records kernels in order, each with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Run the kernels again, each result into the memory of the recorded one.

        A capture runs nothing, but a recording does, so the first replay does nothing.
        """
        self.replays += 1
        if self.replays == 1:
            return
        with torch.no_grad():
            for func, args, kwargs, result in self.kernels:
                if not func._schema.is_mutable and storages(result) & storages((args, kwargs)):
                    continue  # a view
                again = func(*args, **kwargs)
                given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and id(old) not in given:  # else in place
                        old.detach().copy_(new)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Replaces CUDA graphs by recordings; returns the list of recordings."""
    made: list[Recording] = []

    def record(step: Callable[[], None], device: torch.device) -> tuple[Any, str | None]:
        recording = Recording()
        try:
            with recording:
                step()
        except RuntimeError as error:
            return None, f"capture failed: {error}"
        made.append(recording)
        return recording, None

    def host(model: nn.Module) -> dict[str, Any]:
        """Without the CPU's generator, which plays the device's here."""
        return {k: v for k, v in state(model).items() if k != "torch's generator of the CPU"}

    state = capture._python_state
    monkeypatch.setattr(capture, "_python_state", host)
    monkeypatch.setattr(capture, "can_capture", lambda device: True)
    monkeypatch.setattr(capture, "capture", record)
    monkeypatch.setattr(capture, "on_capture_stream", lambda device: nullcontext())
    monkeypatch.setattr(capture, "device_waits", lambda: nullcontext([]))
    return made


# --- the same numbers ---


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"precision": "bf16"},
        {"momentum": 0.0, "nesterov": False, "schedule": "one_cycle"},
        {"optimizer": "adamw", "momentum": None, "nesterov": None, "lr": 0.01, "clip_norm": 0.5},
    ],
    ids=["fp32", "bf16", "plain", "adamw"],
)
def test_a_captured_run_gives_the_numbers_of_the_plain_loop(
    recordings: list[Recording], change: dict[str, Any]
) -> None:
    """Curve, weights and statistics, bit for bit: learning rate, order, augmentation, dropout."""
    recipe = replace(QUICK, **change)
    plain, captured = convnet(), convnet()
    curve = fit(plain, few(), replace(recipe, capture=False), seed=0)
    assert not recordings
    run = Trainer(captured, few(), recipe, seed=0)
    finish(run)
    assert run.mode.endswith(", graph")
    assert untimed(run.curve) == untimed(curve)
    assert weights(captured) == weights(plain)
    steps = 3 * (len(few().train) // 32)
    assert recordings[0].replays == steps - WARMUP_STEPS


def test_an_optimizer_with_state_of_the_host_runs_eagerly(recordings: list[Recording]) -> None:
    """A graph would repeat its first rate; the mode says why there is none."""
    recipe = Recipe(epochs=2, batch_size=32, optimizer="Adagrad", lr=0.01)
    captured, plain = convnet(), convnet()
    run = Trainer(captured, few(), recipe, seed=0)
    finish(run)
    fit(plain, few(), replace(recipe, capture=False), seed=0)
    assert run.mode.endswith("eager (torch's Adagrad cannot be captured)")
    assert weights(captured) == weights(plain)


def test_evaluation_is_captured_too(recordings: list[Recording]) -> None:
    """Whole batches are replayed, and the remaining images are counted."""
    task = few()
    images = np.tile(task.validation.images, (20, 1, 1, 1))  # 7180: seven batches of 1024 and more
    labels = np.tile(task.validation.labels, 20)
    task = replace(task, validation=type(task.validation)(images, labels))
    captured, eager = with_and_without_graphs(task)
    assert captured == eager
    assert [recording.replays for recording in recordings] == [
        3 * 8 - WARMUP_STEPS,
        3 * 7 - WARMUP_STEPS,
    ]


def test_a_resumed_run_captures_again(recordings: list[Recording]) -> None:
    """A state restored in a trainer with a graph drops the graph; the numbers are the same."""
    whole = Trainer(convnet(), few(), QUICK, seed=1)
    whole.run_epoch()
    saved, curve = copy.deepcopy(whole.state()), whole.curve
    whole.run_epoch()
    model = convnet(seed=9)
    again = Trainer(model, few(), QUICK, seed=1)
    again.run_epoch()
    again.restore(saved, curve)
    again.run_epoch()
    assert untimed(again.curve) == untimed(whole.curve)
    assert weights(model) == weights(whole._model)
    assert again.mode.endswith(", graph")


def test_the_warm_up_spans_short_epochs(recordings: list[Recording]) -> None:
    """With two steps per epoch, the fourth step, in the second epoch, is captured first."""
    captured, eager = with_and_without_graphs(few(), replace(QUICK, batch_size=128))
    assert captured == eager
    assert recordings[0].replays == 3 * 2 - WARMUP_STEPS


def test_gradients_do_not_outlive_an_epoch() -> None:
    """Otherwise a trained network would keep its graph's memory."""
    model = convnet()
    fit(model, few(), replace(QUICK, epochs=1), seed=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_is_freed_with_its_last_reference(recordings: list[Recording]) -> None:
    """No reference cycle keeps a graph and the device's memory until a garbage collection."""
    run = Trainer(convnet(), few(), QUICK, seed=0)
    run.run_epoch()
    there = weakref.ref(run)
    gc.disable()
    try:
        del run
        assert there() is None
    finally:
        gc.enable()


# --- steps that cannot be captured ---


class Halved(nn.Module):
    """Halves inputs with a large mean: control flow by data."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x / 2 if x.detach().mean() > 0.4 else x


class Drawn(nn.Module):
    """Scales by a random number of the host."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x * random.uniform(0.9, 1.1)


class Counted(nn.Module):
    """Counts its runs."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        self.calls += 1
        return x


class Smoothed(nn.Module):
    """Keeps an average in a new tensor at each run; a graph would always read the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean()
        return x - self.average


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (Smoothed, "each step changes which tensor is 'average' of module '3'"),
        (Drawn, "each step changes Python's generator"),
        (Counted, "each step changes 'calls' of module '3'"),
    ],
)
def test_a_step_that_cannot_be_captured_runs_eagerly_with_a_reason(
    recordings: list[Recording], middle: type[nn.Module], reason: str
) -> None:
    """Random numbers and counts of Python would freeze; numbers are those without capture."""
    curves = []
    for on in (True, False):
        random.seed(0)
        run = Trainer(convnet(middle=middle), few(), replace(QUICK, capture=on), seed=0)
        run.run_epoch()
        run.run_epoch()
        curves.append(untimed(run.curve))
        assert run.mode == f"fp32, channels_last, eager{f' ({reason})' if on else ''}"
    assert curves[0] == curves[1]
    assert len(recordings) == 0


def test_a_capture_that_fails_costs_no_step(recordings: list[Recording]) -> None:
    """A capture is tried once; that step and all later ones run eagerly."""
    total = torch.zeros(())

    def step() -> None:
        assert total.item() >= 0
        total.add_(1)

    repeated = CudaGraphStep(nn.Identity(), torch.device("cpu"))
    repeated.run(step, 10)
    assert total.item() == 10
    assert repeated.mode == (
        "eager (capture failed: operation not permitted when stream is capturing)"
    )


def test_a_step_that_waits_for_the_device_is_not_captured(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reports the place; no capture is tried."""
    monkeypatch.setattr(capture, "device_waits", lambda: nullcontext(["net.py:7"]))
    run = Trainer(convnet(), few(), QUICK, seed=0)
    run.run_epoch()
    assert run.mode.endswith("eager (the step waits for the device: net.py:7)")
    assert not recordings


def test_a_new_hook_ends_a_graph(recordings: list[Recording]) -> None:
    """A graph would skip the hook's Python code."""
    model = convnet()
    run = Trainer(model, few(), QUICK, seed=0)
    run.run_epoch()
    assert run.mode.endswith("graph")
    seen: list[bool] = []
    model[2].register_forward_hook(lambda module, *_: seen.append(module.training))
    run.run_epoch()
    assert seen.count(True) == 8
    assert run.mode.endswith("eager (module '2' has hooks)")


def test_every_kind_of_hook_is_found() -> None:
    """Of modules, of parameters, and of all modules."""
    assert find_hooks(convnet()) is None
    for register, reason in (
        (lambda net: net[4].register_forward_pre_hook(print), "module '4' has hooks"),
        (lambda net: net[4].register_full_backward_hook(print), "module '4' has hooks"),
        (lambda net: net[4].weight.register_hook(print), "parameter '4.weight' has hooks"),
        (
            lambda net: net[5].bias.register_post_accumulate_grad_hook(print),
            "parameter '5.bias' has hooks",
        ),
    ):
        model = convnet()
        register(model)
        assert find_hooks(model) == reason
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert find_hooks(convnet()) == "hooks on all modules"
    finally:
        handle.remove()


# --- on a GPU ---


@pytest.mark.gpu
def test_a_graph_trains_as_the_eager_loop_does() -> None:
    """Over five seeds the mean accuracies are within three standard errors of each other."""
    task, recipe = digits.digits(), replace(QUICK, epochs=8)
    final: dict[bool, list[float]] = {True: [], False: []}
    for on, accuracies in final.items():
        for seed in range(5):
            run = Trainer(
                convnet(seed), task, replace(recipe, capture=on), seed=seed, device="cuda"
            )
            finish(run)
            assert run.mode.endswith("graph" if on else "eager"), run.mode
            accuracies.append(run.curve[-1].value)
    assert min(final[True]) > 90
    means = [statistics.fmean(accuracies) for accuracies in final.values()]
    errors = [statistics.stdev(accuracies) / 5**0.5 for accuracies in final.values()]
    assert abs(means[0] - means[1]) <= 3 * max(sum(e * e for e in errors) ** 0.5, 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_repeats_its_numbers(precision: Any) -> None:
    """Same seed, same numbers, bit for bit, dropout and augmentation included."""
    recipe = replace(QUICK, precision=precision)
    models = [convnet(), convnet()]
    curves = [fit(model, few(), recipe, seed=3, device="cuda") for model in models]
    assert untimed(curves[0]) == untimed(curves[1])
    assert weights(models[0]) == weights(models[1])


@pytest.mark.gpu
def test_a_graph_gives_the_numbers_of_eager_steps() -> None:
    """The kernels are the same, so a run can resume exactly with eager steps."""
    captured, eager = with_and_without_graphs(few(), device="cuda")
    assert captured == eager


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("middle", "reason"), [(Halved, "the step waits for the device"), (Drawn, "Python's generator")]
)
def test_a_model_with_control_flow_by_data_trains_eagerly_on_cuda(
    middle: type[nn.Module], reason: str
) -> None:
    """The mode has the reason, the model learns, and the next model is captured."""
    run = Trainer(convnet(middle=middle), few(), QUICK, seed=0, device="cuda")
    finish(run)
    assert reason in run.mode
    assert run.curve[-1].loss < run.curve[0].loss
    after = Trainer(convnet(), few(), QUICK, seed=0, device="cuda")
    after.run_epoch()
    assert after.mode.endswith("graph"), after.mode


@pytest.mark.gpu
def test_a_failed_capture_leaves_a_working_device() -> None:
    """A step fails only in the capture: the mode has the reason, and eager dropout works."""
    device = torch.device("cuda", torch.cuda.current_device())
    dropout, x = nn.Dropout(0.5), torch.ones(1000, device=device)
    total = torch.zeros((), device=device)

    def step() -> None:
        total.add_(dropout(x).sum())
        if torch.cuda.is_current_stream_capturing():
            total.item()

    repeated = CudaGraphStep(dropout, device)
    repeated.run(step, 10)
    assert repeated.mode.startswith("eager (capture failed: ")
    assert 10 * 1000 * 0.8 < total.item() < 10 * 1000 * 1.2
    # The next graph works.
    total.zero_()
    repeated = CudaGraphStep(dropout, device)
    repeated.run(lambda: total.add_(dropout(x).sum()), 10)
    assert repeated.mode == "graph"
    assert 10 * 1000 * 0.8 < total.item() < 10 * 1000 * 1.2


@pytest.mark.gpu
def test_a_graph_launches_faster_than_python() -> None:
    """A step of many small kernels takes less time as a graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(16, device=device)

    def step() -> None:
        for _ in range(500):
            x.add_(1)

    seconds = {}
    for wanted in (True, False):
        repeated = CudaGraphStep(nn.Identity(), device, wanted)
        repeated.run(step, 5)
        torch.cuda.synchronize()
        started = time.perf_counter()
        repeated.run(step, 20)
        torch.cuda.synchronize()
        seconds[wanted] = time.perf_counter() - started
    assert seconds[True] < 0.8 * seconds[False]
    assert x.tolist() == [2 * 25 * 500] * 16
