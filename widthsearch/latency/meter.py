"""Inference latency on a device, measured relative to a base model.

Notation: the candidate c and the base model b run in blocks of about 2 ms that alternate,

    b_1 c_1 b_2 c_2 ... b_n c_n,    ratio = median_i(c_i / b_i),    latency = ratio × base_ms

where each b_i and c_i is the median time of the runs in a block, and ``base_ms`` is the base
model's time, measured once, so that all networks of a study have one scale.

Example: b = (1.0, 1.2, 1.1) ms and c = (0.5, 0.6, 0.55) ms on a clock that drifts by 20% give the
ratio 0.5 without any spread. With base_ms = 1.0 the latency is 0.5 ms.

Why blocks in turns: absolute times drift by 5 to 12% with the clock, other processes and the
process itself, the ratio of two networks in turns by 1 to 2%. Why only two networks: oneDNN caches
the last 1,024 primitives, and a round over many candidates, one run each, recreates all of them
(+69% with 40 candidates). The first run of each block refills caches and is discarded.

On a GPU, CUDA events time each run, and the host waits for it: this is latency, launches included.
A small network is therefore as slow as Python launches it (``eager``), unless a CUDA graph does so
(``graph``). Nothing else in the study may use the device meanwhile; the caller ensures that.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.latency.backends import BACKENDS, CHOOSE_LAYOUT
from widthsearch.latency.config import Latency, LatencyConfig
from widthsearch.latency.folding import fold_batchnorm
from widthsearch.torch_internals import tree_map
from widthsearch.tracing.inputs import Inputs, as_inputs, sample
from widthsearch.utils import devices

_BLOCK_MS = 2.0  # far above the resolution of the clock and the cost of the loop


class LatencyMeter:
    """Measures networks relative to one base model.

    Args:
        base: The base model; it is copied, not changed.
        inputs: One sample of the networks' input, without the batch: a shape such as
            ``(3, 32, 32)``, a tensor, or several of those, see :data:`~tracing.inputs.Inputs`.
            Floating-point inputs are random normal numbers; others have the tensor's values.
        config: Device, backend, batch size, threads, precision and number of pairs.
        base_ms: The base model's time, from an earlier latency in the same study; None to take it
            from the first measurement.

    Raises:
        DeviceError: The device does not exist.
        StudyError: The backend is not installed, or cannot run the network.

    Example:
        >>> base = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        >>> narrow = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
        >>> meter = LatencyMeter(base, (3, 32, 32), LatencyConfig(pairs=8))
        >>> meter.measure(narrow).ratio < meter.measure(base).ratio
        True
    """

    def __init__(
        self, base: nn.Module, inputs: Inputs, config: LatencyConfig, base_ms: float | None = None
    ) -> None:
        self._config, self._base_ms = config, base_ms
        self._device = devices.check_device(config.device)
        self._dtype = getattr(torch, config.dtype)
        generator = torch.Generator().manual_seed(0)

        def filled(blank: Tensor) -> Tensor:
            if not blank.is_floating_point():
                return blank.to(self._device)
            noise = torch.randn(blank.shape, generator=generator)
            return noise.to(self._device, self._dtype)

        self._x = tree_map(filled, sample(as_inputs(inputs), config.batch_size, "cpu"))
        with devices.measurement_lock(self._device):
            self._base = self._prepared(base)

    def measure(self, model: nn.Module) -> Latency:
        """Measure a network's latency; its mode, device and weights are unchanged.

        Waits while another process or thread on this machine measures on the same device.
        """
        with devices.measurement_lock(self._device):
            candidate = self._prepared(model)
            blocks = self._timed(candidate)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # a training needs the memory next
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
            hardware=devices.hardware_name(self._device),
            memory_format=devices.format_name(candidate.memory_format),
            clock_mhz=_clock(self._device),
            **asdict(self._config),
        )

    def _timed(self, candidate: _TimedNetwork) -> NDArray[np.float64]:
        """Times in ms of alternating blocks of the base and the candidate, shape (pairs, 2)."""
        blocks = np.empty((self._config.pairs, 2))
        with devices.fixed_threads(self._config.threads), torch.inference_mode():
            runs = [math.ceil(_BLOCK_MS / net.warmed_up_ms()) for net in (self._base, candidate)]
            for pair in blocks:
                pair[0] = self._base.block_ms(runs[0])
                pair[1] = candidate.block_ms(runs[1])
        return blocks

    def _prepared(self, model: nn.Module) -> _TimedNetwork:
        """A copy of a network as it runs at inference, with folded BatchNorms."""
        net = copy.deepcopy(model).to(self._device).eval()
        fold_batchnorm(net, tree_map(_first_in_float32, self._x))
        with devices.fixed_threads(self._config.threads):
            return _TimedNetwork(net.to(self._dtype), self._x, self._device, self._config)


def _first_in_float32(x: Tensor) -> Tensor:
    return x[:1].float() if x.is_floating_point() else x[:1]


class _TimedNetwork:
    """A network that is ready to run on its input, with a timer."""

    def __init__(self, net: nn.Module, x: Any, device: torch.device, config: LatencyConfig) -> None:
        self.memory_format = torch.contiguous_format
        if isinstance(x, Tensor) and x.ndim == 4:
            if config.backend not in CHOOSE_LAYOUT:
                self.memory_format = devices.pick_memory_format(net, x)
            net = net.to(memory_format=self.memory_format)
            x = x.to(memory_format=self.memory_format)
        self._call: Callable[[], object] = BACKENDS[config.backend](net, x)
        self._device = device
        if device.type == "cuda":
            event = partial(torch.cuda.Event, enable_timing=True)
            self._events = event(), event()

    def _run_ms(self) -> float:
        """The time of one run."""
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

    def warmed_up_ms(self) -> float:
        """Run until the medians of five runs in a row agree within 5%; the last one."""
        before = math.inf
        for _ in range(20):
            now = float(np.median([self._run_ms() for _ in range(5)]))
            if abs(now / before - 1) < 0.05:
                break
            before = now
        return now

    def block_ms(self, runs: int) -> float:
        """The median time of consecutive runs, after one run that is discarded."""
        self._run_ms()
        return float(np.median([self._run_ms() for _ in range(runs)]))


def _clock(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.clock_rate(device)
    except Exception:  # noqa: BLE001  no nvidia-ml-py, or one of NVML's own errors
        return None
