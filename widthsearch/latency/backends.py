"""The engines that run a network while its latency is measured.

A new backend is a class with :meth:`Backend.prepare`, an entry in :data:`BACKENDS`, and its name in
``config.BackendName``. What it needs of the configuration is checked in ``LatencyConfig``.
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from widthsearch.errors import StudyError, one_line
from widthsearch.latency.config import BackendName
from widthsearch.torch_internals import tree_leaves
from widthsearch.training.cuda_graphs import WARMUP_STEPS, capture, on_capture_stream


class Backend(Protocol):
    """An engine that runs networks.

    Attributes:
        chooses_layout: Whether the engine chooses the memory format of tensors itself.
    """

    chooses_layout: bool

    def prepare(self, net: nn.Module, x: Any) -> Callable[[], object]:
        """Prepare a network to run on one input; each call of the result is one run.

        Args:
            net: The network, in eval mode, on the device of the input.
            x: A tensor, a tuple of positional arguments, or a dictionary of keyword arguments.

        Raises:
            StudyError: The engine is not installed, or cannot run the network.
        """


class Eager:
    """PyTorch as it is."""

    chooses_layout = False

    def prepare(self, net: nn.Module, x: Any) -> Callable[[], object]:
        """See :class:`Backend`."""
        return _bound(net, x)


class CudaGraph:
    """One CUDA graph of the network: the kernels without the launches from Python."""

    chooses_layout = False

    def prepare(self, net: nn.Module, x: Any) -> Callable[[], object]:
        """See :class:`Backend`."""
        run, device = _bound(net, x), tree_leaves(x)[0].device
        with torch.inference_mode(), on_capture_stream(device):
            for _ in range(WARMUP_STEPS):
                run()
            graph, reason = capture(run, device)
        if graph is None:
            raise StudyError(
                f"a network cannot be timed as a CUDA graph: {reason}; set latency's backend to "
                "eager"
            )
        # A graph holds addresses only: `run` keeps the tensors alive.
        return partial(_replay, graph, run)


class Compile:
    """``torch.compile``."""

    chooses_layout = False

    def prepare(self, net: nn.Module, x: Any) -> Callable[[], object]:
        """See :class:`Backend`."""
        # Otherwise torch would run the ninth network of a class eagerly, and would search through
        # its compiled code at every call. The base model is recompiled at its next call, too.
        torch.compiler.reset()
        run = _bound(torch.compile(net, dynamic=False), x)
        try:
            with torch.inference_mode():
                run()
        except Exception as error:
            raise StudyError(
                f"torch.compile cannot run a network: {one_line(error)}; set latency's backend to "
                "eager"
            ) from error
        return run


class OnnxRuntime:
    """An ONNX Runtime session on the CPU, with as many threads as torch has when it is prepared."""

    chooses_layout = True

    def prepare(self, net: nn.Module, x: Any) -> Callable[[], object]:
        """See :class:`Backend`."""
        try:
            onnxruntime = importlib.import_module("onnxruntime")
            importlib.import_module("onnx")  # needed by the exporter
        except ImportError as error:
            raise StudyError(
                f"latency's backend 'onnxruntime' needs a package that is missing ({error.name}): "
                "python -m pip install onnxruntime onnx"
            ) from error
        if isinstance(x, dict):
            x = inspect.signature(net.forward).bind(**x).args
        inputs = x if isinstance(x, tuple) else (x,)
        names = [f"input{i}" for i in range(len(tree_leaves(inputs)))]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            file = Path(folder, "network.onnx")
            try:
                torch.onnx.export(net, inputs, file, input_names=names, dynamo=False)
            except Exception as error:
                raise StudyError(
                    f"a network cannot be exported to ONNX: {one_line(error)}; set latency's "
                    "backend to eager"
                ) from error
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(
                file, options, providers=["CPUExecutionProvider"]
            )
        arrays = [tensor.numpy() for tensor in tree_leaves(inputs)]
        return partial(session.run, None, dict(zip(names, arrays, strict=True)))


BACKENDS: Mapping[BackendName, Backend] = {
    "eager": Eager(),
    "graph": CudaGraph(),
    "compile": Compile(),
    "onnxruntime": OnnxRuntime(),
}
"""Every backend by its name in a configuration."""


def _bound(net: Callable[..., Any], x: Any) -> Callable[[], object]:
    """The call of a network on an input, without any work of its own at each run."""
    if isinstance(x, tuple):
        return partial(net, *x)
    return partial(net, **x) if isinstance(x, dict) else partial(net, x)


def _replay(graph: torch.cuda.CUDAGraph, _: object) -> None:
    graph.replay()
