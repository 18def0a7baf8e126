"""The engines that run a network while its latency is measured.

A new backend is a function of the type :data:`Backend`, an entry in :data:`BACKENDS`, and its name
in ``config.BackendName``. What it needs of the configuration is checked in ``LatencyConfig``.
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widthsearch.errors import StudyError, one_line
from widthsearch.latency.config import BackendName
from widthsearch.torch_internals import tree_leaves
from widthsearch.training.cuda_graphs import WARMUP_STEPS, capture, on_capture_stream

Backend = Callable[[nn.Module, Any], Callable[[], object]]
"""Prepares a network to run on one input; each call of the result is one run.

The network is in eval mode, on the device of the input: a tensor, a tuple of positional arguments
or a dictionary of keyword arguments. A backend raises ``StudyError`` where the engine is not
installed or cannot run the network.
"""


def eager(net: Callable[..., Any], x: Any) -> Callable[[], object]:
    """PyTorch as it is: the call of a network, without any work of its own at each run."""
    if isinstance(x, tuple):
        return partial(net, *x)
    return partial(net, **x) if isinstance(x, dict) else partial(net, x)


def cuda_graph(net: nn.Module, x: Any) -> Callable[[], object]:
    """One CUDA graph of the network: the kernels without the launches from Python."""
    run, device = eager(net, x), tree_leaves(x)[0].device
    with torch.inference_mode(), on_capture_stream(device):
        for _ in range(WARMUP_STEPS):
            run()
        graph, reason = capture(run, device)
    if graph is None:
        raise StudyError(
            f"a network cannot be timed as a CUDA graph: {reason}; set latency's backend to eager"
        )
    # A graph holds addresses only: `run` keeps the tensors alive.
    return partial(_replay, graph, run)


def compiled(net: nn.Module, x: Any) -> Callable[[], object]:
    """``torch.compile``."""
    # Otherwise torch would run the ninth network of a class eagerly, and would search through
    # its compiled code at every call. The base model is recompiled at its next call, too.
    torch.compiler.reset()
    run = eager(torch.compile(net, dynamic=False), x)
    try:
        with torch.inference_mode():
            run()
    except Exception as error:
        raise StudyError(
            f"torch.compile cannot run a network: {one_line(error)}; set latency's backend to eager"
        ) from error
    return run


def onnx_runtime(net: nn.Module, x: Any) -> Callable[[], object]:
    """An ONNX Runtime session on the CPU, with as many threads as torch has when it is prepared."""
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
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    arrays = [tensor.numpy() for tensor in tree_leaves(inputs)]
    return partial(session.run, None, dict(zip(names, arrays, strict=True)))


BACKENDS: Mapping[BackendName, Backend] = {
    "eager": eager,
    "graph": cuda_graph,
    "compile": compiled,
    "onnxruntime": onnx_runtime,
}
"""Every backend by its name in a configuration."""

CHOOSE_LAYOUT = ("onnxruntime",)
"""The backends that choose the memory format of tensors themselves."""


def _replay(graph: torch.cuda.CUDAGraph, _: object) -> None:
    graph.replay()
