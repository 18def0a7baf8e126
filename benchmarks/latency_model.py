"""Predicted latency of networks that the predictor has not seen, against measurements.

    python -m benchmarks.latency_model [--spaces REFERENCE …] [--networks 80] [--batch-size 8]

Networks are measured on this machine relative to the base: a designed set, as in ``widthsearch
profile``, and as many random networks on the grid. The predictor learns from the first 10, 20, 40,
… designed networks and predicts all random ones. Baselines: ``a + b · MACs`` fitted to the same
networks, and the repeatability, the median difference of two measurements of a network.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from scipy.stats import kendalltau

from widthsearch import load_space
from widthsearch.latency.config import LatencyConfig
from widthsearch.latency.meter import LatencyMeter
from widthsearch.latency.predictor import LatencyPredictor, line_of_macs
from widthsearch.latency.profiles import design
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths


def measured(
    space: SearchSpace, meter: LatencyMeter, networks: list[Widths]
) -> tuple[np.ndarray, np.ndarray]:
    """Ratios to the base with standard errors; in random order, because the machine drifts."""
    ratio, error = np.empty((2, len(networks)))
    for i in np.random.default_rng(0).permutation(len(networks)):
        latency = meter.measure(space.build(networks[i], seed=0))
        ratio[i], error[i] = latency.ratio, latency.standard_error_ms / latency.base_ms
    return ratio, error


def compare(reference: str, options: argparse.Namespace) -> None:
    space = load_space(reference).constrained(step=options.step)
    config = LatencyConfig(
        device=options.device,
        batch_size=options.batch_size,
        dtype=options.dtype,
        pairs=options.pairs,
    )
    meter = LatencyMeter(space.build(space.base, seed=0), space.input_shape, config)
    rng = np.random.default_rng(1)
    train = design(space, options.networks)
    test = [
        space.nearest([a.base * np.exp(rng.uniform(-1.5, 0.6)) for a in space.axes])
        for _ in range(options.networks)
    ]
    started = time.perf_counter()
    some = test[: options.networks // 4]
    every, errors = measured(space, meter, [*train, *test, *some])
    taken = (time.perf_counter() - started) / len(every)
    ms, truth, again = np.split(every, [len(train), len(train) + len(test)])
    sd, noise, _ = np.split(errors, [len(train), len(train) + len(test)])
    repeat = float(np.median(np.abs(again / truth[: len(again)] - 1)))
    vectors, held = (np.array([w.vector for w in part]) for part in (train, test))
    tau = kendalltau(space.macs(held), truth)[0]
    print(f"\n### {space.name}, {config.dtype}, batch {config.batch_size}, {config.device}\n")
    print(
        f"{len(space.axes)} axes; {taken:.2f} s a measurement of {config.pairs} pairs; measured "
        f"again, a network differs by {repeat:.1%} (median); τ of MACs {tau:.2f}\n"
    )
    print(
        "| networks | median error | MACs alone | τ | inside 90% | cross-validated | blocks | fit |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
    for count in (n for n in (5, 10, 20, 40, 80, 160) if n <= len(train)):
        started = time.perf_counter()
        model = LatencyPredictor.fit(space, vectors[:count], ms[:count], sd[:count])
        fitted = time.perf_counter() - started
        mean, spread = model(held)
        macs_alone = line_of_macs(space, vectors[:count], ms[:count])(held)
        inside = np.abs(mean - truth) < 1.645 * np.hypot(spread, noise)
        blocks = ", ".join(f"{block} ({p:.0%})" for block, p in model.blocks.items())
        print(
            f"| {count} | {np.median(np.abs(mean / truth - 1)):.1%} | "
            f"{np.median(np.abs(macs_alone / truth - 1)):.1%} | {kendalltau(mean, truth)[0]:.2f} | "
            f"{inside.mean():.0%} | {model.errors.median:.1%} | {blocks} | {fitted:.2f} s |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--spaces", nargs="+", default=["search_spaces/quickstart.py:digits_resnet"]
    )
    parser.add_argument("--networks", type=int, default=80)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--step", type=int, default=1, help="the grid's, in channels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for reference in options.spaces:
        compare(reference, options)


if __name__ == "__main__":
    main()
