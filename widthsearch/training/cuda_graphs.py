"""A step that is repeated: as one CUDA graph, where it can be one.

A small network's step is some hundreds of kernels of a few microseconds each, which Python launches
more slowly than a GPU runs them. A CUDA graph is launched once for all of them. What it repeats
are the kernels with their addresses: no line of Python, no other tensor. So the step takes and
gives nothing; it reads and writes tensors that stay where they are. What would be wrong in a graph
is looked for before one is made, and the reason is kept.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widthsearch.errors import one_line
from widthsearch.torch_internals import buffers_of, has_global_hooks, has_hooks, has_tensor_hooks

WARMUP_STEPS = 3
"""How many steps are run before one is captured: lazy state is made, kernels are loaded."""


class CudaGraphStep:
    """Runs a step again and again: on a GPU, after :data:`WARMUP_STEPS` times, as a CUDA graph.

    No step is run twice or left out: the first ones are steps as any other, and capturing runs
    nothing. Random numbers go on from where torch's generator is, captured or not. A graph belongs
    to the tensors it was captured with; :meth:`forget` it when they are replaced.

    Args:
        model: What runs in the step.
        device: Where.
        wanted: Whether to capture at all.
    """

    def __init__(self, model: nn.Module, device: torch.device, wanted: bool = True) -> None:
        self._model, self._device = model, device
        self._possible = wanted and can_capture(device)
        self._refusal: str | None = None
        self.forget()

    @property
    def mode(self) -> str:
        """How steps are run: ``eager``, ``graph``, or ``eager (why not as a graph)``."""
        if self._refusal is not None:
            return f"eager ({self._refusal})"
        return "eager" if self._graph is None else "graph"

    def forget(self) -> None:
        """Drop the graph; the next step is the first again."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._before = 0

    def run(self, step: Callable[[], None], times: int) -> None:
        """Run the step so often. It is not kept: every call gets the same one."""
        if self._possible and self._refusal is None:
            self._refusal = find_hooks(self._model)  # each time: they come and go between epochs
        if not self._possible or self._refusal is not None:
            self._graph = None
            for _ in range(times):
                step()
            return
        with on_capture_stream(self._device):
            for _ in range(times):
                if self._graph is None and self._refusal is None and self._before >= WARMUP_STEPS:
                    self._graph, self._refusal = capture(step, self._device)
                if self._graph is not None:
                    self._graph.replay()
                elif self._before == WARMUP_STEPS - 1:
                    self._refusal = run_and_check(step, self._model)
                else:
                    step()
                self._before += 1


def can_capture(device: torch.device) -> bool:
    """Whether the device has graphs."""
    return device.type == "cuda"


def capture(
    step: Callable[[], object], device: torch.device
) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
    """The step as a graph, or why it cannot be one; in neither case has it been run.

    Call it within :func:`on_capture_stream`, after steps that ran there.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream, inference = torch.cuda.current_stream(device), torch.is_inference_mode_enabled()
    try:
        # What autograd's thread launches is captured; what other threads do must not end it. All
        # graphs share tensors of the generator, which those outside inference mode must fill.
        with (
            torch.inference_mode(False),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            torch.inference_mode(inference),
        ):
            step()
    except Exception as error:  # noqa: BLE001  kept as the reason
        _abandon(graph, pool, stream)
        # The first error is the cause; ending the capture fails only in its wake.
        return None, f"capture failed: {one_line(error.__context__ or error)}"
    return graph, None


_abandoned: list[torch.cuda.CUDAGraph] = []
"""Kept: torch 2.11's allocator of pinned memory goes on asking them what they capture."""


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Bring the device in order after a capture that failed.

    Where CUDA itself ended it, torch before 2.13 leaves the allocator and the generator capturing
    (pytorch #180395, #190348): the next random numbers would raise, and no memory would be freed.
    """
    _abandoned.append(graph)
    with torch.inference_mode(False):
        try:
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        except RuntimeError:
            pass  # it had been ended
        else:
            torch._C._cuda_releasePool(stream.device_index, pool)
        graph.reset()
        # Only the end of a capture takes the generator out of capturing.
        empty = torch.cuda.CUDAGraph()
        with torch.cuda.graph(empty, stream=stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=stream.device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Run on the one stream of this process for captured work, in turn with the current one.

    Graphs cannot be captured on the default stream, and autograd stays on the stream of a
    parameter's first use. One stream for all, since each has its own cache of free memory.
    """
    stream, outer = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def find_hooks(model: nn.Module) -> str | None:
    """Why a model with hooks cannot be captured: they would run once, whatever they count."""
    for name, module in model.named_modules():
        if has_hooks(module):
            return f"module {name!r} has hooks"
    for name, tensor in model.named_parameters():
        if has_tensor_hooks(tensor):
            return f"parameter {name!r} has hooks"
    if has_global_hooks():
        return "hooks on all modules"
    return None


def run_and_check(step: Callable[[], None], model: nn.Module) -> str | None:
    """Run the step once, and say why it cannot be captured.

    A step that waits for the device may branch on what it reads; what Python draws or counts would
    be the same in every repetition.
    """
    before = _python_state(model)
    with device_waits() as waits:
        step()
    after = _python_state(model)
    for what, value in before.items():
        if after.get(what) != value:
            return f"each step changes {what}"
    return f"the step waits for the device: {waits[0]}" if waits else None


@contextmanager
def device_waits() -> Iterator[list[str]]:
    """Where host code waits for the device, as torch knows it: a line for each wait."""
    lines: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            lines.append(f"{warning.filename}:{warning.lineno}")


def _python_state(model: nn.Module) -> dict[str, Any]:
    """What host code may change: generators, and what modules keep beside parameters."""
    state: dict[str, Any] = {
        "torch's generator of the CPU": torch.get_rng_state().tolist(),
        "Python's generator": random.getstate(),
        "numpy's generator": repr(np.random.get_state()),  # noqa: NPY002  whatever a model uses
    }
    for name, module in model.named_modules():
        for key, value in (*vars(module).items(), *buffers_of(module).items()):
            if isinstance(value, Tensor):  # a graph goes on reading the one that it was shown
                state[f"which tensor is {key!r} of module {name!r}"] = id(value)
            elif isinstance(value, bool | int | float | str):
                state[f"{key!r} of module {name!r}"] = value
    return state
