"""Predicted latency: block sizes, errors, standard deviations and staircases."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from widthsearch.errors import StudyError
from widthsearch.latency.block_layers import BlockLayers
from widthsearch.latency.config import LatencyConfig
from widthsearch.latency.meter import LatencyMeter
from widthsearch.latency.predictor import LatencyPredictor
from widthsearch.space.search_space import SearchSpace


class Net(nn.Module):
    """A stem, a depthwise and a pointwise convolution, and a linear layer: two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        x = F.relu(self.pointwise(F.relu(self.depthwise(F.relu(self.stem(x))))))
        return self.fc(x.mean((2, 3)))


class Deep(nn.Module):
    """Six 3×3 convolutions at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 32, 32, 64, 64, 64]
        self.body = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 10)."""
        for i, layer in enumerate(self.body):
            x = F.relu(layer(F.max_pool2d(x, 2) if i == 3 else x))
        return self.fc(x.mean((2, 3)))


@cache
def net() -> SearchSpace:
    """The space of the small network, with every width from an eighth to twice the base."""
    return SearchSpace.from_model(Net, (3, 8, 8), step=1)


@cache
def deep() -> SearchSpace:
    """The space of the deep network: six axes, every width."""
    return SearchSpace.from_model(Deep, (3, 8, 8), step=1)


def vectors(space: SearchSpace, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Random widths; every second vector has multiples of 8."""
    rng = np.random.default_rng(seed)
    out = np.stack([rng.integers(a.min_width, a.max_width + 1, count) for a in space.axes], 1)
    out[::2] = np.maximum(out[::2] // 8 * 8, 8)
    return out


def device(step: int, noise: float = 0.02) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """A synthetic device for :func:`deep`: 0.1 ms, plus each layer's time at widths rounded up, at
    the layer's own speed."""
    rng = np.random.default_rng(step)
    speeds = np.exp(rng.normal(0, 0.3, 6))

    def measure(widths: NDArray[np.int64]) -> NDArray[np.float64]:
        up = np.ceil(widths / step) * step
        pairs = [(np.full(len(up), 3.0), up[:, 0])] + [(up[:, i], up[:, i + 1]) for i in range(5)]
        ms = np.full(len(up), 0.1)
        for i, (inputs, outputs) in enumerate(pairs):
            places = 64 if i < 3 else 16
            ms += speeds[i] * 1e-6 * 9 * places * inputs * outputs + 1e-5 * places * outputs
        return ms * np.exp(rng.normal(0, noise, len(up)))

    return measure


# --- layers ---


def test_macs_of_layers_at_rounded_widths_by_hand() -> None:
    """Widths (17, 33) in blocks of 16 count as (32, 48); in blocks of 1 they count exactly."""
    layers = BlockLayers(net())
    base = 64 * (27 * 32 + 9 * 32 + 32 * 64) + 64 * 10
    macs, elements, off = layers([17, 33], 16)
    expected = np.array([64 * 27 * 32, 64 * 9 * 32, 64 * 32 * 48, 48 * 10]) / base
    np.testing.assert_allclose(macs[0], expected)
    outputs = np.array([64 * 32, 64 * 32, 64 * 48, 10]) / (64 * (32 + 32 + 64) + 10)
    np.testing.assert_allclose(elements[0], outputs)
    assert off[0].tolist() == [1, 1, 2, 1]
    exact, _, none = layers([17, 33], 1)
    assert exact.sum() * base == pytest.approx(int(net().macs([17, 33])))
    assert none.sum() == 0


def test_layers_without_a_weight_count_by_their_macs() -> None:
    """The MACs of attention are no product of one weight's dims; the sum is still exact."""
    space = SearchSpace.from_model(
        lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (5, 16), step=2
    )
    widths = np.array([axis.min_width for axis in space.axes])
    macs, _, _ = BlockLayers(space)(widths, 1)
    whole = space.cost(space.base).macs
    assert macs.sum() * whole == pytest.approx(int(space.macs(widths)))


# --- learning ---


@pytest.mark.parametrize("step", [1, 8, 16])
def test_the_block_size_of_a_device_is_found(step: int) -> None:
    """From 60 networks with 2% noise, on a synthetic device.

    The median error of other networks is close to the noise's 1.35%, and far below that of MACs.
    """
    train, test = vectors(deep(), 60), vectors(deep(), 200, seed=1)
    measure = device(step)
    model = LatencyPredictor.fit(deep(), train, measure(train))
    assert model.blocks[step] > 0.9
    errors = np.abs(model.predicted(test) / measure(test) - 1)
    assert np.median(errors) < 0.025
    assert model.errors.median < 0.025 < model.errors.median_macs
    assert model.errors.tau > max(0.9, model.errors.tau_macs)
    assert 0.8 <= model.errors.coverage <= 1


def test_standard_deviations_are_calibrated() -> None:
    """About 90% of the true latencies are inside the 90% intervals."""
    train, test = vectors(deep(), 25), vectors(deep(), 400, seed=1)
    model = LatencyPredictor.fit(deep(), train, device(8)(train))
    mean, sd = model(test)
    inside = np.abs(mean - device(8, noise=0)(test)) < 1.645 * sd
    assert 0.8 < inside.mean() <= 1


def test_outliers_hardly_count() -> None:
    """Three of 40 measurements that are five times too slow leave the predictions unchanged."""
    train, test = vectors(deep(), 40), vectors(deep(), 100, seed=1)
    ms = device(8)(train)
    clean = LatencyPredictor.fit(deep(), train, ms).predicted(test)
    ms[[3, 17, 30]] *= 5
    disturbed = LatencyPredictor.fit(deep(), train, ms).predicted(test)
    assert np.median(np.abs(disturbed / clean - 1)) < 0.03


def test_standard_errors_weight_measurements() -> None:
    """Of two measurements of one network, the one with the smaller error decides."""
    base = deep().base.vector
    model = LatencyPredictor.fit(deep(), [base, base], [1.0, 2.0], [0.01, 1.0])
    assert float(model(base)[0]) == pytest.approx(1.0, rel=0.1)


def test_few_networks_predict_like_macs_with_a_larger_deviation() -> None:
    """10 uniform networks give useful predictions, and twice the deviation of 60 mixed ones."""
    uniform = np.array([deep().widths(m / 8).vector for m in range(2, 12)])
    test = vectors(deep(), 100, seed=1)
    few = LatencyPredictor.fit(deep(), uniform, device(16)(uniform))
    many = LatencyPredictor.fit(deep(), vectors(deep(), 60), device(16)(vectors(deep(), 60)))
    mean, sd = few(test)
    truth = device(16, noise=0)(test)
    assert np.median(np.abs(mean / truth - 1)) < 0.3
    assert np.mean(np.abs(mean - truth) < 1.645 * sd) > 0.8
    assert np.median(sd / mean) > 2 * np.median(many(test)[1] / many(test)[0])


def test_one_network_sets_the_scale_and_unseen_blocks_stay_equally_likely() -> None:
    """One measurement is reproduced; multiples of 8 do not tell blocks of 1 and 8 apart."""
    base = deep().base.vector
    one = LatencyPredictor.fit(deep(), [base], [3.0])
    assert float(one(base)[0]) == pytest.approx(3.0, rel=0.05)
    whole = vectors(deep(), 40) // 8 * 8 + 8
    model = LatencyPredictor.fit(deep(), whole, device(8)(whole))
    assert model.blocks[1] == pytest.approx(model.blocks[8])
    assert sum(model.blocks.values()) == pytest.approx(1)


def test_predictions_are_positive_and_batched() -> None:
    """One vector gives scalars, many vectors the same numbers in arrays."""
    train = vectors(deep(), 30)
    model = LatencyPredictor.fit(deep(), train, device(8)(train))
    least = np.array([axis.min_width for axis in deep().axes])
    mean, sd = model(np.stack([least, train[0]]))
    assert (mean > 0).all() and (sd > 0).all()
    assert float(model(train[0])[0]) == pytest.approx(mean[1])
    np.testing.assert_array_equal(model.predicted(np.stack([least, train[0]])), mean)


# --- staircases ---


def test_stairs_name_the_widths_of_equal_latency() -> None:
    """In blocks of 16, the widths 17 to 32 have one latency."""
    train = vectors(deep(), 80)
    model = LatencyPredictor.fit(deep(), train, device(16, noise=0.001)(train))
    on = deep().base
    stair = model.stairs(on)[1]
    assert (stair.name, stair.width) == (deep().axes[1].name, 32)
    assert stair.more_ms is not None and stair.more_ms > 1.05 * stair.ms
    assert (stair.flat_from, stair.flat_to) == (17, 32)
    off = deep().widths({stair.name: 25})
    stair = model.stairs(off)[1]
    assert (stair.flat_from, stair.flat_to) == (17, 32)
    least = model.stairs(deep().widths([axis.min_width for axis in deep().axes]))[0]
    most = model.stairs(deep().widths([axis.max_width for axis in deep().axes]))[0]
    assert least.less_ms is None and most.more_ms is None
    assert least.flat_from == least.width and most.flat_to == most.width


# --- files and errors ---


def test_stored_measurements_predict_the_same() -> None:
    """They are fitted again, with the errors that are stored; another space's are refused."""
    train = vectors(deep(), 20)
    model = LatencyPredictor.fit(deep(), train, device(8)(train), np.full(20, 0.01))
    content = {"fingerprint": deep().fingerprint, "errors": asdict(model.errors)}
    for name in ("vectors", "ms", "sd"):
        content[name] = getattr(model, name).tolist()
    content = json.loads(json.dumps(content))
    again = LatencyPredictor.from_json(deep(), content)
    np.testing.assert_array_equal(again.predicted(train), model.predicted(train))
    assert again.errors == model.errors
    with pytest.raises(StudyError, match="must be of its space"):
        LatencyPredictor.from_json(net(), content)


def test_errors_need_three_networks() -> None:
    """Two networks, however often measured, leave none out."""
    base, other = deep().base.vector, deep().widths(0.5).vector
    model = LatencyPredictor.fit(deep(), [base, other, base], [1.0, 0.5, 1.1])
    with pytest.raises(StudyError, match="need 3 different networks, but 2"):
        _ = model.errors


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf])
def test_invalid_measurements_are_refused(ms: float) -> None:
    """The message names the network."""
    with pytest.raises(StudyError, match=r"network \[32, 32"):
        LatencyPredictor.fit(deep(), [deep().base.vector], [ms])


def test_invalid_shapes_are_refused() -> None:
    """No measurements, or vectors of another length."""
    for widths, ms in (([], []), ([[1, 2]], [1.0])):
        with pytest.raises(StudyError, match="needs vectors"):
            LatencyPredictor.fit(deep(), widths, ms)


# --- a real device ---


@pytest.mark.slow
def test_real_latency_is_ordered() -> None:
    """Measured on this machine: predictions of left-out networks correlate with measurements."""
    meter = LatencyMeter(deep().build(1.0, seed=0), (3, 8, 8), LatencyConfig(pairs=8))
    train = vectors(deep(), 24)
    ms = [meter.measure(deep().build(row.tolist(), seed=0)).median_ms for row in train]
    assert LatencyPredictor.fit(deep(), train, ms).errors.tau > 0.4
