"""Runs a repeated step as one CUDA graph, if that is possible and correct.

A step of a small network is some hundreds of kernels of a few microseconds each, which Python
launches more slowly than a GPU runs them. A CUDA graph launches all of them at once. It repeats
kernels with fixed addresses: no line of Python and no other tensor. A step therefore has neither
arguments nor a result; it reads and writes tensors that are never replaced.

Example: with ``total = torch.zeros((), device="cuda")`` the step ``total.add_(1)`` can be captured.
``total = total + 1`` cannot: each graph launch would add to the first tensor again. Neither can
``count += 1``: Python would count the capture only. :func:`run_and_check` finds such steps before
one is captured, and the reason is reported.
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

from widthsearch import torch_internals as internals
from widthsearch.errors import one_line

WARMUP_STEPS = 3
"""Eager steps before the capture: they create lazy state and load kernels."""


class CudaGraphStep:
    """Runs a step repeatedly: on a GPU, after :data:`WARMUP_STEPS` steps, as a CUDA graph.

    No step is repeated or lost: the warm-up steps count, and a capture runs nothing. Random numbers
    continue from torch's generator, with or without a graph. A graph belongs to the tensors of its
    capture; call :meth:`forget` when they are replaced.

    Args:
        model: The model that the step runs.
        device: The device of the step.
        wanted: Whether to capture at all.
        refusal: Why the step cannot be captured, where that is known.

    Example:
        >>> total = torch.zeros(())
        >>> steps = CudaGraphStep(nn.Identity(), torch.device("cpu"))
        >>> steps.run(lambda: total.add_(1), times=5)
        >>> total.item(), steps.mode
        (5.0, 'eager')
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        wanted: bool = True,
        refusal: str | None = None,
    ) -> None:
        self._model, self._device = model, device
        self._possible = wanted and can_capture(device)
        self._refusal = refusal if self._possible else None
        self.forget()

    @property
    def mode(self) -> str:
        """``eager``, ``graph``, or ``eager (reason)`` if a graph was wanted but not possible."""
        if self._refusal is not None:
            return f"eager ({self._refusal})"
        return "eager" if self._graph is None else "graph"

    def forget(self) -> None:
        """Drop the graph; the next step is the first again."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._before = 0

    def run(self, step: Callable[[], object], times: int) -> None:
        """Run the step.

        Args:
            step: The same step in every call. It is not stored, which would be a reference cycle.
            times: The number of runs.
        """
        if self._possible and self._refusal is None:
            self._refusal = find_hooks(self._model)  # at each call: hooks come and go
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
    """Whether a device has graphs."""
    return device.type == "cuda"


def capture(
    step: Callable[[], object], device: torch.device
) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
    """Capture a step without running it.

    Call it within :func:`on_capture_stream`, after steps that ran there.

    Returns:
        The graph and None; or None and the reason why there is no graph.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream, inference = torch.cuda.current_stream(device), torch.is_inference_mode_enabled()
    try:
        # "thread_local": kernels of autograd's thread are captured, and other threads cannot break
        # the capture. Inference mode is off while the graph begins and ends: all graphs share
        # tensors of the generator, which graphs outside inference mode must be able to write.
        with (
            torch.inference_mode(False),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            torch.inference_mode(inference),
        ):
            step()
    except Exception as error:  # noqa: BLE001  returned as the reason
        _abandon(graph, pool, stream)
        # The first error is the cause; the end of the capture fails as a consequence.
        return None, f"capture failed: {one_line(error.__context__ or error)}"
    return graph, None


_abandoned: list[torch.cuda.CUDAGraph] = []
"""Kept alive: torch 2.11's allocator of pinned memory still queries their captures."""


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Restore the device after a failed capture.

    If CUDA itself ended the capture, torch before 2.13 leaves the allocator and the generator in
    the capturing state (pytorch #180395, #190348): the next random numbers would raise, and no
    memory would be freed.
    """
    _abandoned.append(graph)
    with torch.inference_mode(False):
        internals.end_allocation_to_pool(stream.device_index, pool)
        graph.reset()
        # Only the end of another capture resets the generator's state.
        empty = torch.cuda.CUDAGraph()
        with torch.cuda.graph(empty, stream=stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=stream.device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Run on this process's stream for captures, ordered with the current stream.

    A graph cannot be captured on the default stream, and autograd stays on the stream of a
    parameter's first use. There is one stream for all captures, because each stream has its own
    cache of free memory.
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
    """The first hooks of a model, which a graph would skip; None without hooks."""
    for name, module in model.named_modules():
        if internals.has_hooks(module):
            return f"module {name!r} has hooks"
    for name, tensor in model.named_parameters():
        if internals.has_tensor_hooks(tensor):
            return f"parameter {name!r} has hooks"
    if internals.has_global_hooks():
        return "hooks on all modules"
    return None


def run_and_check(step: Callable[[], object], model: nn.Module) -> str | None:
    """Run a step once; the reason why a graph of it would be wrong, or None.

    A step that waits for the device may branch on a value. Numbers that Python draws or counts
    would be the same in every repetition.
    """
    before = _python_state(model)
    with device_waits() as waits:
        step()
    after = _python_state(model)
    for name, value in before.items():
        if after.get(name) != value:
            return f"each step changes {name}"
    return f"the step waits for the device: {waits[0]}" if waits else None


@contextmanager
def device_waits() -> Iterator[list[str]]:
    """The places in code that wait for the device, as far as torch reports them."""
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
    """State on the host that a step may change: generators, and attributes of modules."""
    state: dict[str, Any] = {
        "torch's generator of the CPU": torch.get_rng_state().tolist(),
        "Python's generator": random.getstate(),
        "numpy's generator": repr(np.random.get_state()),  # noqa: NPY002  whatever a model uses
    }
    for name, module in model.named_modules():
        for key, value in (*vars(module).items(), *internals.buffers_of(module).items()):
            if isinstance(value, Tensor):  # a graph always reads the tensor of its capture
                state[f"which tensor is {key!r} of module {name!r}"] = id(value)
            elif isinstance(value, bool | int | float | str):
                state[f"{key!r} of module {name!r}"] = value
    return state
