"""Traces many models, and asks of each space what a user relies on: one row a model.

    python -m benchmarks.spaces [--source torchvision|timm|transformers|monai|smp]
        [--limit N] [--names A,B] [--seconds S]

``torchvision`` is its classification and segmentation models and its detection backbones; ``timm``
is every k-th of its models that has at most 100 million parameters; ``transformers`` and ``monai``
are small configurations; ``smp`` is segmentation_models_pytorch. Nothing is downloaded, and no
source but torchvision is a dependency: ``pip install`` it first. The columns:

- *axes*, *trace s*: the free widths, and the seconds of the symbolic run.
- *exact*: at five random width vectors (one narrower, one wider, three mixed) the network runs
  forward and backward on the meta device and costs what the space predicts (MACs, parameters and
  activations as torch counts them), and the narrowest also runs on real tensors.
- *mask = cut*: at random channels of every axis whose channels are known, the masked base computes
  what the network with these channels alone computes, to 1e-5 of the largest output. The number
  of axes with unknown channels follows.
- *searchable*: the share of the base's MACs in products with a free width.
- *pinned*: the number of other widths by reason, without those of the model's inputs and outputs.

One core.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import re
import selectors
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.space_models import SOURCES
from widthsearch.space.computation import TOLERANCE, masks_off_cuts, random_channels
from widthsearch.space.search_space import SearchSpace
from widthsearch.space.verification import run_and_count
from widthsearch.tracing.polynomials import evaluate
from widthsearch.tracing.tracer import trace

# -- one function a question -------------------------------------------------------------------


def random_widths(space: SearchSpace, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.choice([w for w in axis.grid if within(w, axis.base)]) for axis in space.axes]
        for within in (operator.le, operator.ge, *[lambda _w, _b: True] * 3)
    ]


def exact(space: SearchSpace) -> str:
    """``yes``, or the first difference."""
    vectors = random_widths(space, seed=len(space.name))
    for i, vector in enumerate(vectors):
        predicted = space.cost(vector)
        network = space.build(vector, seed=0).to("meta")  # as the model's constructors make it
        counted = run_and_count(network, space.input_shape, "meta")
        if counted != predicted:
            return f"no: network {i + 1} counts {counted}, not {predicted}"
    run_and_count(space.build(vectors[0], seed=0), space.input_shape, "cpu")
    return "yes"


def mask_equals_cut(space: SearchSpace) -> str:
    """``yes``, or the largest difference of outputs; then the axes of unknown channels."""
    keep, unknown = random_channels(space, 0)
    worst = masks_off_cuts(space, keep, 0)
    answer = "yes" if worst <= TOLERANCE else f"no: {worst:.1g}"
    return f"{answer} ({unknown} unknown)" if unknown else answer


def searchable_share(space: SearchSpace) -> float:
    """The share of the base's MACs in products with at least one free width."""
    macs = space.trace.macs
    total = evaluate(macs, space.trace.variables(space.trace.base))
    return 1 - macs.get((), 0) / max(total, 1)


def pinned_reasons(space: SearchSpace) -> str:
    """Numbers of pinned widths by reason, as short as a table needs."""
    count: Counter[str] = Counter()
    for pin in space.pinned:
        if pin.reason not in ("input of the model", "output of the model"):
            count[re.sub(r" ?`.*|:\d+ .*", "", pin.reason)[:60]] += 1
    return "; ".join(f"{n} {reason}" for reason, n in count.most_common(3))


QUESTIONS: dict[str, Callable[[SearchSpace], str]] = {
    "exact": exact,
    "mask = cut": mask_equals_cut,
}
"""The columns that are answered by ``yes`` or ``no``; each is asked on its own."""


# -- rows --------------------------------------------------------------------------------------


def measure(source: str, name: str) -> dict[str, Any]:
    """The figures and answers of one model."""
    make, inputs = SOURCES[source][0](name)
    row: dict[str, Any] = {"name": name}
    torch.manual_seed(0)
    model = make()
    row["params"] = sum(p.numel() for p in model.parameters())
    started = time.perf_counter()
    trace(model, inputs)
    row["trace_s"] = time.perf_counter() - started
    del model
    space = SearchSpace.from_model(make, inputs, name=name)
    row["axes"] = len(space.axes)
    row["searchable"] = searchable_share(space)
    row["pinned"] = pinned_reasons(space)
    for question, answer in QUESTIONS.items():
        try:
            row[question] = answer(space)
        except Exception as error:  # noqa: BLE001 - a failure is an answer
            row[question] = f"no: {_first_line(error)}"
    return row


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200].replace("|", "/")


def work() -> None:
    """Reads ``source name`` lines, prints one JSON line each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = sys.stdout
    sys.stdout = sys.stderr  # models may print
    for line in sys.stdin:
        source, name = line.rstrip("\n").split(" ", 1)
        try:
            row: dict[str, Any] = measure(source, name)
        except Exception as error:  # noqa: BLE001 - a model's failure is a result
            row = {"name": name, "reason": _first_line(error)}
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
        return {"name": name, "reason": "died" if died else f"over {seconds:.0f} s"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", choices=SOURCES, default="torchvision")
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
        groups = list(SOURCES[options.source][1](options.limit))
    columns = ["model", "Mparams", "axes", "trace s", *QUESTIONS, "searchable", "pinned"]
    print("|", " | ".join(columns), "|")
    print("| --- |", "--: | " * 3, "--- | " * len(QUESTIONS), "--: | --- |", sep="", flush=True)
    worker = Worker()
    rows: list[dict[str, Any]] = []
    for group in groups:
        for name in group:
            row = worker.ask(options.source, name, options.seconds)
            if row.get("reason") != "ValueError: too large":
                rows.append(row)
                print("|", " | ".join(_cells(row)), "|", flush=True)
                break
    worker.close()
    traced = [row for row in rows if "reason" not in row]
    print(f"\n{len(traced)} of {len(rows)} traced", end="")
    for question in QUESTIONS:
        print(f", {question}: {sum(row[question].startswith('yes') for row in traced)}", end="")
    share = sum(row["searchable"] for row in traced) / max(len(traced), 1)
    print(f"; searchable MACs {share:.2%} on average")


def _cells(row: dict[str, Any]) -> list[str]:
    if "reason" in row:
        return [row["name"], "", "", "", *["" for _ in QUESTIONS], "", f"no: {row['reason']}"]
    return [
        row["name"],
        f"{row['params'] / 1e6:.2f}",
        str(row["axes"]),
        f"{row['trace_s']:.2f}",
        *(row[question] for question in QUESTIONS),
        f"{row['searchable']:.1%}",
        row["pinned"],
    ]


if __name__ == "__main__":
    main()
