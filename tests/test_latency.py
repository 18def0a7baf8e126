"""The latency meter, its backends, its lock, and the folding of BatchNorms."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import pytest
import tiny
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.errors import DeviceError, StudyError
from widthsearch.latency.backends import BACKENDS
from widthsearch.latency.config import BackendName, Latency, LatencyConfig
from widthsearch.latency.folding import fold_batchnorm
from widthsearch.latency.meter import LatencyMeter
from widthsearch.utils.devices import measurement_lock

SHAPE = (3, 16, 16)


def convnet(width: int) -> nn.Module:
    """Two convolutions with BatchNorm and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def randomise_statistics(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and weights that matter."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            shape = (module.num_features,)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(shape, generator=generator) / 5)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            if module.affine:
                module.weight.data = torch.rand(shape, generator=generator) + 0.5
                module.bias.data = torch.randn(shape, generator=generator) / 5
    return model


# --- measuring ---


def test_the_base_relative_to_itself_has_a_ratio_near_one() -> None:
    """Even on a busy machine, although the meter and the candidate have different copies."""
    base = convnet(32)
    latency = LatencyMeter(base, SHAPE, LatencyConfig(pairs=20)).measure(base)
    assert 0.5 < latency.ratio < 2
    assert latency.median_ms == latency.ratio * latency.base_ms > 0
    assert latency.spread_ms == latency.ratio_spread * latency.base_ms >= 0


def test_a_much_wider_network_is_slower_and_one_meter_has_one_scale() -> None:
    """Sixteen times the channels take more than twice the time; the base's time is reused."""
    meter = LatencyMeter(convnet(16), SHAPE, LatencyConfig(pairs=8))
    wide, narrow = meter.measure(convnet(256)), meter.measure(convnet(16))
    assert wide.ratio > 2
    assert narrow.ratio < wide.ratio / 2
    assert narrow.base_ms == wide.base_ms
    given = LatencyMeter(convnet(16), SHAPE, LatencyConfig(pairs=4), base_ms=7.0)
    latency = given.measure(convnet(16))
    assert latency.base_ms == 7.0
    assert latency.median_ms == latency.ratio * 7.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_latency_records_its_conditions(dtype: str) -> None:
    """Device, hardware, backend, batch, dtype, layout, threads and pairs; JSON and back."""
    config = LatencyConfig(batch_size=3, threads=2, dtype=dtype, pairs=4)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    latency = LatencyMeter(convnet(8), SHAPE, config).measure(convnet(8))
    assert torch.get_num_threads() == threads
    assert (latency.device, latency.backend, latency.dtype) == ("cpu", "eager", dtype)
    assert (latency.batch_size, latency.threads, latency.pairs) == (3, 2, 4)
    assert latency.memory_format == "channels_last"
    assert latency.hardware
    assert Latency.from_json(json.loads(json.dumps(latency.to_json()))) == latency


def test_a_copy_runs_as_at_inference() -> None:
    """In eval and inference mode, with the given threads and batch; the model is unchanged."""
    seen = set()

    class Watched(nn.Sequential):
        """Records the conditions of each run; its copies share the record."""

        def forward(self, x: Tensor) -> Tensor:
            """(N, 3, H, W) to (N, 10)."""
            if torch.is_inference_mode_enabled():
                seen.add((id(self), self.training, torch.get_num_threads(), tuple(x.shape)))
            return super().forward(x)

    model = Watched(*convnet(8))
    before = copy.deepcopy(model.state_dict())
    config = LatencyConfig(batch_size=2, threads=2, pairs=4)
    LatencyMeter(convnet(8), SHAPE, config).measure(model)
    ((ran, training, threads, shape),) = seen
    assert ran != id(model)
    assert (training, threads, shape) == (False, 2, (2, *SHAPE))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model[0]._forward_hooks


@pytest.mark.gpu
def test_latency_on_cuda() -> None:
    """A much wider network is slower on a GPU, too."""
    meter = LatencyMeter(convnet(16), (3, 64, 64), LatencyConfig("cuda", batch_size=64, pairs=8))
    assert meter.measure(convnet(512)).ratio > 1.5
    assert meter.measure(convnet(16)).hardware == torch.cuda.get_device_name()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_graph_is_faster_than_eager_launches(dtype: str, batch_size: int) -> None:
    """In both precisions, with one image and with a larger batch."""
    times = {}
    for backend in ("eager", "graph"):
        config = LatencyConfig(
            "cuda",
            backend,  # type: ignore[arg-type]
            batch_size,
            dtype=dtype,  # type: ignore[arg-type]
            pairs=8,
        )
        latency = LatencyMeter(convnet(16), SHAPE, config).measure(convnet(16))
        assert (latency.backend, latency.dtype, latency.batch_size) == (backend, dtype, batch_size)
        assert 0.5 < latency.ratio < 2
        assert latency.clock_mhz is None or latency.clock_mhz > 0
        times[backend] = latency.base_ms
    assert times["graph"] < times["eager"]


@pytest.mark.gpu
def test_a_network_that_branches_on_values_has_no_graph() -> None:
    """The error is one line with the way out; the eager backend can measure it."""

    class Branching(nn.Sequential):
        """Control flow by data."""

        def forward(self, x: Tensor) -> Tensor:
            """(N, 3, H, W) to (N, 10)."""
            return super().forward(x if x.mean() > 0 else -x)

    branching = Branching(*convnet(8))
    config = LatencyConfig("cuda", "graph", pairs=4)
    meter = LatencyMeter(convnet(8), SHAPE, config)
    with pytest.raises(StudyError, match=r"as a CUDA graph: .*; set latency's backend to eager"):
        meter.measure(branching)
    eager = LatencyConfig("cuda", pairs=4)
    assert LatencyMeter(convnet(8), SHAPE, eager).measure(branching).ratio > 0


def test_the_standard_error_of_a_median() -> None:
    """By hand: σ is 1 where half the interquartile range is 0.6745."""
    latency = replace(tiny.latency(2.0), spread_ms=0.6745, pairs=4)
    assert latency.standard_error_ms == pytest.approx(math.sqrt(math.pi / 2) / 2)


# --- inputs ---


class Tokens(nn.Module):
    """An embedding and a linear layer: integers, with an optional second input of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        """(N, T), (N, 8) to (N, 3)."""
        mean = self.embed(ids).mean(1)
        return self.head(mean if scale is None else mean * scale)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.full((6,), 4),
        (torch.zeros(6, dtype=torch.long), (8,)),
        {"scale": (8,), "ids": torch.zeros(6, dtype=torch.long)},
    ],
    ids=["tensor", "positional", "keyword"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_input_is_measured(inputs: Any, dtype: Any) -> None:
    """A sample tensor of integers, several inputs by position, and several by name."""
    config = LatencyConfig(batch_size=2, dtype=dtype, pairs=4)
    latency = LatencyMeter(Tokens(), inputs, config).measure(Tokens())
    assert latency.median_ms > 0
    assert latency.memory_format == "contiguous"


def test_sequences_are_measured() -> None:
    """A shape without channels_last."""
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
    latency = LatencyMeter(net, (3, 9), LatencyConfig(pairs=4)).measure(net)
    assert latency.memory_format == "contiguous"


# --- other backends ---


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's own
def test_compiled_networks_are_timed_as_such() -> None:
    """Nine networks of one class, one more than torch's limit of compiled variants."""
    config = LatencyConfig(backend="compile", pairs=4)
    meter = LatencyMeter(convnet(8), SHAPE, config)
    for _ in range(9):
        latency = meter.measure(convnet(8))
        assert latency.backend == "compile"
        assert 0.3 < latency.ratio < 3


def test_every_backend_has_a_function() -> None:
    """The names in the configuration are those of the mapping."""
    assert get_args(BackendName) == tuple(BACKENDS)


@pytest.mark.filterwarnings("default")  # the exporter's
def test_onnx_runtime_is_timed_or_asked_for() -> None:
    """Without the packages, the error says what to install."""
    config = LatencyConfig(backend="onnxruntime", pairs=4, batch_size=2)
    if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")):
        with pytest.raises(StudyError, match=r"missing \(onnx\w*\): python -m pip install onnxr"):
            LatencyMeter(convnet(8), SHAPE, config)
        return
    meter = LatencyMeter(convnet(8), SHAPE, config)
    wide, same = meter.measure(convnet(128)), meter.measure(convnet(8))
    assert (wide.backend, wide.memory_format) == ("onnxruntime", "contiguous")
    assert wide.ratio > 2 * same.ratio
    inputs = {"scale": (8,), "ids": torch.zeros(6, dtype=torch.long)}
    assert LatencyMeter(Tokens(), inputs, config).measure(Tokens()).backend == "onnxruntime"


def test_one_measurement_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second meter waits for the lock of the device."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    running, together = 0, 0

    class Watched(nn.Module):
        """Records whether two networks run at once."""

        def forward(self, x: Tensor) -> Tensor:
            """The same."""
            nonlocal running, together
            if torch.is_inference_mode_enabled():
                running += 1
                together = max(together, running)
                time.sleep(0.001)
                running -= 1
            return x

    def measure() -> None:
        meter = LatencyMeter(Watched(), SHAPE, LatencyConfig(pairs=4))
        meter.measure(Watched())

    threads = [threading.Thread(target=measure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == 1
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o666 == 0o666  # other users of the machine share the lock


def test_a_gpu_has_one_lock_whatever_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes with different ``CUDA_VISIBLE_DEVICES`` lock the same GPU by its UUID."""
    uuids = {0: "aaaa", 1: "bbbb"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: Mock(uuid=uuids[device.index])
    )
    devices = [torch.device("cuda", index) for index in (0, 1)]
    first, second = (measurement_lock(device).lock_file for device in devices)
    assert first != second
    uuids[0] = "bbbb"  # now hidden behind another index
    assert measurement_lock(devices[0]).lock_file == second


def test_the_meter_needs_no_fcntl() -> None:
    """Windows has no such module."""
    code = "import sys; sys.modules['fcntl'] = None; import widthsearch.latency.meter"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- folding ---


def folds(model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> int:
    """The number of BatchNorms that fold: they return their input, and the outputs are the same."""
    randomise_statistics(model).eval().to(x.dtype)
    with torch.no_grad():
        expected = model(x)
        largest = max(float(output.abs().max()) for output in expected)
        fold_batchnorm(model, x)
        result = model(x)
    atol = tolerance * min(largest, 1.0)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=atol)
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("resnet18", 20),
        ("mobilenet_v2", 52),
        # A dense layer is norm, conv, norm, conv: only the second norm follows a convolution.
        ("densenet121", 59),
    ],
)
def test_folding_gives_the_same_outputs(name: str, folded: int) -> None:
    """Every BatchNorm after a convolution folds; outputs agree up to rounding."""
    model = torchvision.models.get_model(name, weights=None)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert folds(model, images.double(), tolerance=1e-9) == folded


class Branches(nn.Module):
    """One convolution and one BatchNorm, combined by a given function."""

    def __init__(self, wire: Callable[[Branches, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.wire = wire

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 3, H, W)."""
        return self.wire(self, x)


def _also_added(net: Branches, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(y) + y


def _changed_in_place(net: Branches, x: Tensor) -> Tensor:
    y = net.conv(x)
    F.relu(y, inplace=True)
    return net.bn(y)


def _two_results(net: Branches, x: Tensor) -> list[Tensor]:
    y = net.conv(x)
    return [net.bn(y), y]


@pytest.mark.parametrize(
    ("wire", "folded"),
    [
        (lambda net, x: net.bn(net.conv(x)), 1),
        (lambda net, x: net.bn(net.conv(x)).relu_() + len(x), 1),
        (lambda net, x: net.bn(F.relu(net.conv(x))), 0),
        (lambda net, x: net.conv(net.bn(x)), 0),
        (lambda net, x: net.bn(net.conv(net.bn(net.conv(x)))), 0),
        (lambda net, x: net.bn(net.conv(x)) + net.conv(2 * x), 0),
        (_also_added, 0),
        (_changed_in_place, 0),
        (_two_results, 0),
    ],
)
def test_only_a_single_consumer_folds(
    wire: Callable[[Branches, Tensor], Tensor], folded: int
) -> None:
    """Modules used twice, changed outputs and the reverse order stay, with the same outputs."""
    torch.manual_seed(0)
    assert folds(Branches(wire), torch.randn(2, *SHAPE)) == folded


@pytest.mark.parametrize(
    ("convolution", "batchnorm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6, affine=False), (2, 4, 9)),
        (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    ],
)
def test_other_convolutions_fold_too(
    convolution: nn.Module, batchnorm: nn.Module, shape: tuple[int, ...]
) -> None:
    """One and three dimensions, groups, transposed, and a BatchNorm without weights."""
    assert folds(nn.Sequential(convolution, batchnorm), torch.randn(shape)) == 1


def test_a_batchnorm_without_statistics_does_not_fold() -> None:
    """It normalises with the statistics of the batch even in eval mode."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    fold_batchnorm(model, torch.randn(2, *SHAPE))
    assert not any("forward" in vars(module) for module in model)


# --- errors ---


def test_a_missing_device_is_refused() -> None:
    """The error lists the existing devices."""
    with pytest.raises(DeviceError, match="'cuda:99' does not; this machine has cpu"):
        LatencyMeter(convnet(8), SHAPE, LatencyConfig(device="cuda:99"))
