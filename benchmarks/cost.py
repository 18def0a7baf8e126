"""Counting MACs: the quadratic form against counters that run or trace each candidate.

    python -m pip install fvcore torch-pruning
    python -m benchmarks.cost [--models resnet50,mobilenet_v2] [--candidates 8] [--vectors 1000000]

Everything is timed in one process on one thread, and printed as the ratio to the time of one
candidate in a batch of quadratic forms. Another table compares the counters on whole models.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from widthsearch import SearchSpace, load_space
from widthsearch.tracing.interpreter import no_fast_path

DISAGREE = ("resnet50", "mobilenet_v2", "densenet121", "convnext_tiny", "swin_t", "vit_b_16")


def flop_counter(net: nn.Module, shape: tuple[int, ...], device: str) -> float:
    """Half of the FLOPs that torch's own counter counts."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to(device).eval()(torch.empty(1, *shape, device=device))
    return counter.get_total_flops() / 2


def fvcore(net: nn.Module, shape: tuple[int, ...]) -> float:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(net.eval(), torch.zeros(1, *shape))
    return float(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def torch_pruning(net: nn.Module, shape: tuple[int, ...]) -> float:
    import torch_pruning as tp

    return float(tp.utils.count_ops_and_params(net.eval(), torch.zeros(1, *shape))[0])


COUNTERS: dict[str, Callable[[nn.Module, tuple[int, ...]], float]] = {
    "FlopCounterMode, meta": lambda net, shape: flop_counter(net, shape, "meta"),
    "FlopCounterMode, cpu": lambda net, shape: flop_counter(net, shape, "cpu"),
    "fvcore": fvcore,
    "torch-pruning": torch_pruning,
}


def seconds(call: Callable[[], object], times: int) -> float:
    """The median time of a call, after a first call that is left out."""
    call()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def speed(name: str, candidates: int, vectors: int) -> None:
    space = load_space(f"torchvision:{name}")
    rng = random.Random(0)
    chosen = [space.widths([rng.choice(a.grid) for a in space.axes]) for _ in range(candidates)]
    few = np.array([widths.vector for widths in chosen])
    many = np.stack([np.random.default_rng(0).choice(a.grid, vectors) for a in space.axes], 1)
    whole = seconds(lambda: space.macs(many), 3)
    ours = whole / vectors
    print(f"\n### {name}: {len(space.axes)} axes, {candidates} candidates\n")
    print("| counter | a candidate | ratio to ours in a batch | equal to ours |")
    print("| --- | ---: | ---: | --- |")
    print(f"| ours, batch of {vectors:,} ({whole:.3f} s) | {ours * 1e6:.2f} µs | 1 | |")
    single = seconds(lambda: space.cost(chosen[0]), 50)
    print(f"| ours, one at a time | {single * 1e6:.0f} µs | {single / ours:,.0f} | |")
    for counter, count in COUNTERS.items():
        taken, equal = [], 0
        for widths, macs in zip(chosen, space.macs(few), strict=True):
            net = space.build(widths, device="meta" if "meta" in counter else "cpu")
            started = time.perf_counter()
            counted = count(net, space.input_shape)
            taken.append(time.perf_counter() - started)
            equal += counted == macs
        each = statistics.median(taken)
        print(
            f"| {counter} | {each * 1e3:.1f} ms | {each / ours:,.0f} | {equal} of {candidates} |",
            flush=True,
        )


def disagreement(names: tuple[str, ...]) -> None:
    print("\n### GMACs of the models as they are, by counter\n")
    print("| model | ours |", " | ".join(COUNTERS), "|")
    print("| --- | ---: |", " | ".join("---:" for _ in COUNTERS), "|")
    for name in names:
        space = load_space(f"torchvision:{name}")
        row = [f"{space.cost(1.0).macs / 1e9:.3f}"]
        for counter, count in COUNTERS.items():
            net = space.build(1.0, device="meta" if "meta" in counter else "cpu")
            try:
                row.append(f"{count(net, space.input_shape) / 1e9:.3f}")
            except Exception as error:  # noqa: BLE001  a counter's failure is a result
                row.append(type(error).__name__)
        print(f"| {name} |", " | ".join(row), "|", flush=True)


def build_speed(name: str) -> None:
    import torchvision

    space = SearchSpace.from_model(
        lambda: torchvision.models.get_model(name, weights=None), (3, 224, 224)
    )
    constructor = seconds(lambda: torchvision.models.get_model(name, weights=None), 5)
    print(f"\n### Building {name}\n")
    print("| how | time | ratio to the constructor |")
    print("| --- | ---: | ---: |")
    for how, call in {
        "the model's own constructor": lambda: torchvision.models.get_model(name, weights=None),
        "build": lambda: space.build(1.0),
        "build, values undefined": lambda: space.build(1.0, initialise=False),
        "build on meta": lambda: space.build(1.0, device="meta"),
    }.items():
        taken = seconds(call, 5)
        print(f"| {how} | {taken * 1e3:.0f} ms | {taken / constructor:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet50,mobilenet_v2")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with no_fast_path():
        for name in options.models.split(","):
            speed(name, options.candidates, options.vectors)
        build_speed("resnet50")
        disagreement(DISAGREE)


if __name__ == "__main__":
    main()
