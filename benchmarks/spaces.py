"""Traces many models and verifies their costs: one line per model, with times.

    python -m benchmarks.spaces [--source torchvision|timm] [--limit N] [--names A,B] [--seconds S]

``torchvision`` is its classification and segmentation models and its detection backbones; ``timm``
(not a dependency: ``pip install timm``) is every k-th of its models that has at most 100 million
parameters, created without weights. Each model is traced, and built at five random width vectors
(one narrower, one wider, three mixed). ``exact`` is ``yes`` where all five run forward and backward
on the meta device and cost exactly what the space predicts (MACs, parameters and activations as
torch counts them), and the narrowest also runs on real tensors. One core.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import selectors
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from widthsearch.space.search_space import SearchSpace
from widthsearch.space.verification import run_and_count
from widthsearch.tracing.tracer import trace

MOST_PARAMS = 100_000_000
SIDES = {"vit": 224, "maxvit": 224, "inception_v3": 299}
"""The inputs of torchvision models that do not take every size; the others get 96."""


def detection_backbone(name: str) -> nn.Module:
    from torchvision.models.detection import backbone_utils
    from torchvision.ops import FrozenBatchNorm2d

    options = {"weights": None, "norm_layer": FrozenBatchNorm2d}
    if name == "mobilenet_v3_large":
        return backbone_utils.mobilenet_backbone(backbone_name=name, fpn=True, **options)
    return backbone_utils.resnet_fpn_backbone(backbone_name=name, trainable_layers=3, **options)


def torchvision_model(name: str) -> tuple[Callable[[], nn.Module], tuple[int, int, int]]:
    from torchvision import models

    if name.startswith("fpn:"):
        return lambda: detection_backbone(name.removeprefix("fpn:")), (3, 96, 96)
    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
        options["num_classes"] = 21
        if not name.startswith("lraspp"):
            options["aux_loss"] = True
    side = next((side for prefix, side in SIDES.items() if name.startswith(prefix)), 96)
    return lambda: models.get_model(name, **options), (3, side, side)


def timm_model(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    import timm

    with torch.device("meta"):
        try:
            params = sum(p.numel() for p in timm.create_model(name).parameters())
        except (RuntimeError, NotImplementedError):  # its constructor needs values
            params = 0
    if params > MOST_PARAMS:
        raise ValueError("too large")
    model = timm.create_model(name)
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMS:
        raise ValueError("too large")
    return lambda: timm.create_model(name), tuple(model.default_cfg["input_size"])


MODELS = {"torchvision": torchvision_model, "timm": timm_model}


def names_of(source: str, limit: int | None) -> Iterator[list[str]]:
    """Lists of names; of each list the first model that is not too large is measured."""
    if source == "torchvision":
        from torchvision import models

        names = models.list_models(module=models)
        names += models.list_models(module=models.segmentation)
        names += ["fpn:resnet50", "fpn:mobilenet_v3_large"]
        yield from ([name] for name in names[:limit])
        return
    import timm

    names = timm.list_models()
    count = min(limit or 100, len(names))
    for i in range(count):
        yield names[i * len(names) // count : (i + 1) * len(names) // count]


def random_widths(space: SearchSpace, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.choice([w for w in axis.grid if within(w, axis.base)]) for axis in space.axes]
        for within in (operator.le, operator.ge, *[lambda _w, _b: True] * 3)
    ]


def milliseconds(function: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def measure(source: str, name: str) -> dict[str, Any]:
    """The figures of one model."""
    make, shape = MODELS[source](name)
    row: dict[str, Any] = {"name": name, "side": shape[-1]}
    model = make()
    row["params"] = sum(p.numel() for p in model.parameters())
    row["make_ms"] = milliseconds(make, 1)
    started = time.perf_counter()
    traced = trace(model, shape)
    row["trace_s"] = time.perf_counter() - started
    row["axes"], row["pinned"] = len(traced.axes), len(traced.pinned)
    del model
    space = SearchSpace.from_model(make, shape, name=name)
    base = space.base
    row["meta_ms"] = milliseconds(lambda: space.build(base, device="meta"))
    row["empty_ms"] = milliseconds(lambda: space.build(base, initialise=False))
    row["build_ms"] = milliseconds(lambda: space.build(base, seed=0), 2)
    vectors = random_widths(space, seed=len(name))
    for i, vector in enumerate(vectors):
        predicted = space.cost(vector)
        counted = run_and_count(space.build(vector, device="meta"), space.input_shape, "meta")
        if counted != predicted:
            raise AssertionError(f"network {i + 1}: predicted {predicted}, but counted {counted}")
    run_and_count(space.build(vectors[0], seed=0), space.input_shape, "cpu")
    return row


def work() -> None:
    """Reads ``source name`` lines, prints one JSON line each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = sys.stdout
    sys.stdout = sys.stderr  # models may print
    for line in sys.stdin:
        source, name = line.split()
        try:
            row: dict[str, Any] = measure(source, name) | {"exact": True}
        except Exception as error:  # noqa: BLE001 - a model's failure is a result
            first = (str(error).strip().splitlines() or [""])[0]
            row = {"name": name, "exact": False, "reason": f"{type(error).__name__}: {first}"}
        print(json.dumps(row), file=out, flush=True)


class Worker:
    """A process that measures models; it is replaced if a model kills or stalls it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, source: str, name: str, seconds: float) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "benchmarks.spaces", "--worker"]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{source} {name}\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(seconds) else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        died = self.process.poll() is not None
        self.close()
        return {"name": name, "exact": False, "reason": "died" if died else f"over {seconds:.0f} s"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", choices=MODELS, default="torchvision")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--names", help="model names, separated by commas")
    parser.add_argument("--seconds", type=float, default=300, help="the most for one model")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    if options.names:
        groups = [[name] for name in options.names.split(",")]
    else:
        groups = list(names_of(options.source, options.limit))
    print(
        "| model | input | Mparams | axes | pinned | trace s "
        "| make ms | build ms: meta | empty | full | exact |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --- |", flush=True)
    worker = Worker()
    exact = tried = 0
    for group in groups:
        row = next(
            (
                row
                for name in group
                if (row := worker.ask(options.source, name, options.seconds)).get("reason")
                != "ValueError: too large"
            ),
            None,
        )
        if row is None:
            continue
        tried += 1
        exact += row["exact"]
        if row["exact"]:
            figures = [
                row["side"],
                f"{row['params'] / 1e6:.1f}",
                row["axes"],
                row["pinned"],
                f"{row['trace_s']:.2f}",
                *(f"{row[key]:.0f}" for key in ("make_ms", "meta_ms", "empty_ms", "build_ms")),
                "yes",
            ]
            print("|", row["name"], "|", " | ".join(map(str, figures)), "|", flush=True)
        else:
            print("|", row["name"], "|" * 9, f"no: {row['reason']}", "|", flush=True)
    worker.close()
    print(f"\n{exact} of {tried} exact ({100 * exact / max(tried, 1):.0f}%)")


if __name__ == "__main__":
    main()
