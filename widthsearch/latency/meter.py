"""Inference latency, measured on a device beside the base model.

Absolute times drift with the clock, the neighbours and the process (by 5 to 12% in trials); the
ratio of two networks that take turns by 1 to 2%. So a network is timed in short blocks that
alternate with blocks of the base model. What is measured is the ratio; the time is the ratio times
the base model's time, measured once, so that all networks of a study are on one scale. Nothing else
of the study may use the device in the meantime: the caller sees to that.

A trap is met by doing so: oneDNN keeps the last 1,024 primitives it made, and going round many
candidates, a run each, makes all of them anew (+69% for 40 candidates). Here two networks take
turns, and the first run of each block, which finds the caches full of the other, does not count.

On a GPU a run is timed by CUDA events and waited for: that is latency, launches included. So a
small network is as slow as Python launches it (``eager``), unless a CUDA graph does (``graph``).
"""

from __future__ import annotations

import copy
import fcntl
import importlib
import math
import os
import platform
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from widthsearch.errors import StudyError, one_line
from widthsearch.latency.config import Backend, Latency, LatencyConfig
from widthsearch.torch_internals import BatchNormBase, tree_leaves
from widthsearch.training.cuda_graphs import WARMUP_STEPS, capture, on_capture_stream
from widthsearch.utils.devices import check_device, fixed_threads, format_name, pick_memory_format

_BLOCK_MS = 2.0  # a block runs for at least so long, well above what the clock and the loop cost
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class LatencyMeter:
    """Measures networks beside one base model.

    Args:
        base: What ratios are to; a copy is kept, the model itself is left as it is.
        input_shape: One image, (C, H, W).
        config: How to measure.
        base_ms: The base model's time where it is known already, from any latency of the same
            study; None to take it from the first measurement.

    Raises:
        DeviceError: The device is not there.
        StudyError: The backend is not installed, or cannot run the network.
    """

    def __init__(
        self,
        base: nn.Module,
        input_shape: Sequence[int],
        config: LatencyConfig,
        base_ms: float | None = None,
    ) -> None:
        self._config, self._base_ms = config, base_ms
        self._device = check_device(config.device)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(config.batch_size, *input_shape, generator=generator)
        self._images = images.to(self._device, getattr(torch, config.dtype))
        with _alone(self._device):
            self._base = self._prepared(base)

    def measure(self, model: nn.Module) -> Latency:
        """Time a network; the model that is given is left as it is (mode, device, weights).

        One measurement at a time on a device, whoever asks for it on this machine.
        """
        with _alone(self._device):
            candidate = self._prepared(model)
            blocks = self._timed(candidate)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # what trains next needs it
        if self._base_ms is None:
            self._base_ms = float(np.median(blocks[:, 0]))
        lower, ratio, upper = np.quantile(blocks[:, 1] / blocks[:, 0], (0.25, 0.5, 0.75)).tolist()
        spread = (upper - lower) / 2
        return Latency(
            median_ms=ratio * self._base_ms,
            spread_ms=spread * self._base_ms,
            ratio=ratio,
            ratio_spread=spread,
            base_ms=self._base_ms,
            device=self._config.device,
            hardware=hardware_name(self._device),
            backend=self._config.backend,
            batch_size=self._config.batch_size,
            dtype=self._config.dtype,
            memory_format=format_name(candidate.memory_format),
            threads=self._config.threads,
            pairs=self._config.pairs,
            clock_mhz=_clock(self._device),
        )

    def _timed(self, candidate: _Timed) -> NDArray[np.float64]:
        """Milliseconds a run in blocks of the base and of the candidate in turn, (pairs, 2)."""
        blocks = np.empty((self._config.pairs, 2))
        with fixed_threads(self._config.threads), torch.inference_mode():
            runs = [math.ceil(_BLOCK_MS / net.settle()) for net in (self._base, candidate)]
            for pair in blocks:
                pair[0] = self._base.block(runs[0])
                pair[1] = candidate.block(runs[1])
        return blocks

    def _prepared(self, model: nn.Module) -> _Timed:
        net = copy.deepcopy(model).to(self._device).eval()
        fold_batchnorm(net, self._images[:1].float())
        net = net.to(self._images.dtype)
        with fixed_threads(self._config.threads):
            return _Timed(net, self._images, self._config.backend)


class _Timed:
    """A network that is ready to run, with its input."""

    def __init__(self, net: nn.Module, images: Tensor, backend: Backend) -> None:
        self.memory_format = torch.contiguous_format
        if backend != "onnxruntime":  # it lays out tensors itself
            self.memory_format = pick_memory_format(net, images)
        net = net.to(memory_format=self.memory_format)
        images = images.to(memory_format=self.memory_format)
        self._call = _ready(net, images, backend)
        self._device = images.device
        if self._device.type == "cuda":
            timed = partial(torch.cuda.Event, enable_timing=True)
            self._events = timed(), timed()

    def _run(self) -> float:
        """One run in milliseconds."""
        if self._device.type == "cuda":
            before, after = self._events
            before.record(torch.cuda.current_stream(self._device))
            self._call()
            after.record(torch.cuda.current_stream(self._device))
            after.synchronize()
            return float(before.elapsed_time(after))
        started = time.perf_counter()
        self._call()
        return 1000 * (time.perf_counter() - started)

    def settle(self) -> float:
        """Run until five runs take as long as the five before, within 5%; one's time in ms."""
        before = math.inf
        for _ in range(20):
            now = float(np.median([self._run() for _ in range(5)]))
            if abs(now / before - 1) < 0.05:
                break
            before = now
        return now

    def block(self, runs: int) -> float:
        """The median time of so many runs in a row, in ms, after one that does not count."""
        self._run()
        return float(np.median([self._run() for _ in range(runs)]))


def _ready(net: nn.Module, images: Tensor, backend: Backend) -> Callable[[], object]:
    """What runs the network on the images once.

    Raises:
        StudyError: The backend is not installed, or cannot run the network.
    """
    if backend == "eager":
        return partial(net, images)
    if backend == "onnxruntime":
        return _onnxruntime(net, images)
    with torch.inference_mode():
        if backend == "compile":
            # Anew each time (the base too, when next called): torch runs the ninth network of a
            # class eagerly, and looks through what it has compiled at every call.
            torch.compiler.reset()
            compiled = torch.compile(net, dynamic=False)
            try:
                compiled(images)
            except Exception as error:
                raise StudyError(
                    f"torch.compile cannot run a network: {one_line(error)}; set latency's backend "
                    "to eager"
                ) from error
            return partial(compiled, images)
        with on_capture_stream(images.device):
            for _ in range(WARMUP_STEPS):
                net(images)
            graph, reason = capture(lambda: net(images), images.device)
    if graph is None:
        raise StudyError(
            f"a network cannot be timed as a CUDA graph: {reason}; set latency's backend to eager"
        )
    # The graph knows addresses alone: the tensors live as long as it does.
    return partial(_replay, graph, net, images)


def _replay(graph: torch.cuda.CUDAGraph, *_: object) -> None:
    graph.replay()


def _onnxruntime(net: nn.Module, images: Tensor) -> Callable[[], object]:
    """A session that runs the network with as many threads as torch has now."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        importlib.import_module("onnx")  # the exporter's
    except ImportError as error:
        raise StudyError(
            f"latency's backend 'onnxruntime' needs a package that is missing ({error.name}): "
            "python -m pip install onnxruntime onnx"
        ) from error
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        file = Path(folder, "network.onnx")
        try:
            torch.onnx.export(net, (images,), file, input_names=["images"], dynamo=False)
        except Exception as error:
            raise StudyError(f"a network cannot be exported to ONNX: {one_line(error)}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"images": images.numpy()})


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Hold the machine's lock for measurements on a device; the kernel lets go of it with us."""
    name = f"widthsearch-{os.getuid()}-latency-{device}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clock(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.clock_rate(device)
    except Exception:  # noqa: BLE001  no nvidia-ml-py, or NVML refuses with an error of its own
        return None


def fold_batchnorm(model: nn.Module, images: Tensor) -> None:
    """Fold BatchNorms into the convolutions before them, in place; the model is in eval mode.

    One run tells which: a BatchNorm folds where its input is the output of a convolution, nobody
    else takes that output, and each of the two runs once. It then passes its input on. The model's
    outputs stay the same up to rounding.
    """
    assert not model.training
    uses = _Uses()
    made: dict[int, tuple[Tensor, nn.Module]] = {}
    pairs: list[tuple[Any, Any, Tensor]] = []
    calls: Counter[nn.Module] = Counter()

    def convolution_ran(module: nn.Module, _: Any, output: Tensor) -> None:
        calls[module] += 1
        made[id(output)] = output, module  # held, so that no other tensor gets its id
        uses.count[id(output)] = 0

    def batchnorm_ran(module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        calls[module] += 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][1], module, inputs[0]))

    hooks = []
    for module in model.modules():
        if type(module) in _CONVOLUTIONS:  # exactly: a parametrised one is of a class of its own
            hooks.append(module.register_forward_hook(convolution_ran))
        elif isinstance(module, BatchNormBase) and module.running_mean is not None:
            hooks.append(module.register_forward_hook(batchnorm_ran))
    with torch.no_grad(), uses:
        uses.saw(model(images))
    for hook in hooks:
        hook.remove()
    for convolution, batchnorm, output in pairs:
        if uses.count[id(output)] == calls[convolution] == calls[batchnorm] == 1:
            transposed = isinstance(convolution, _CONVOLUTIONS[3:])
            folded = fuse_conv_bn_eval(convolution, batchnorm, transposed)
            convolution.weight, convolution.bias = folded.weight, folded.bias
            batchnorm.forward = _pass_on


def _pass_on(x: Tensor) -> Tensor:
    return x


class _Uses(TorchFunctionMode):
    """Counts how many operations that give tensors take each tensor, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # a size is no use
            self.saw((args, kwargs))
        return result

    def saw(self, tree: Any) -> None:
        """Count what the tree holds."""
        self.count.update(id(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or "x86_64" on Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
