"""Traces many models, and asks of each space what a user relies on: one row a model.

    python -m benchmarks.spaces [--source torchvision|timm|transformers|monai|smp]
        [--limit N] [--names A,B] [--seconds S] [--rows FILE]

``torchvision`` is its classification and segmentation models and its detection backbones; ``timm``
is every k-th of its models, of each k the first with at most 50 million parameters, and of every
tenth k the last; ``transformers`` and ``monai`` are small configurations; ``smp`` is
segmentation_models_pytorch. Nothing is downloaded, and no source but torchvision is a dependency:
``pip install`` it first. ``--rows`` keeps the rows in a
file; models that have one there are not measured again. The columns:

- *axes*, *space s*: the free widths, and the seconds that making the space takes.
- *exact*: at three random width vectors (one narrower, one wider, one mixed) the network runs
  forward and backward on the meta device and costs what the space predicts (MACs, parameters and
  activations as torch counts them), and the narrowest also runs on real tensors. Width vectors
  that the model's constructors refuse are counted apart, and others are drawn.
- *start and output*: for the same seed the network that is built equals, tensor by tensor and in
  its outputs, what the model's own function makes. ``base``: at the base's widths. ``yes``: at
  other widths too, with the constructor's arguments that were changed
  (:mod:`benchmarks.reconstruction`). Else the first difference.
- *by replay*: of the modules with a free width, how many the model's own constructors make at other
  widths. The others are copies that are filled by rules.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reconstruction import alternatives
from benchmarks.space_models import SOURCES
from widthsearch.channels.extraction import widths_of
from widthsearch.errors import SpaceError, WidthsError
from widthsearch.modules.probing import flags_of
from widthsearch.modules.source import names_in_forward
from widthsearch.modules.tree import clone, join, sizes_in, tensors_of
from widthsearch.space.computation import (
    TOLERANCE,
    largest_difference,
    masks_off_cuts,
    outputs,
    random_channels,
    random_inputs,
)
from widthsearch.space.search_space import SearchSpace
from widthsearch.space.verification import run_and_count
from widthsearch.tracing.constructor import to_meta
from widthsearch.tracing.polynomials import as_constant, evaluate

SEED = 3
ALTERNATIVES_SECONDS = 30
MOST_REFUSED = 20


# -- one function a question -------------------------------------------------------------------


def exact(space: SearchSpace) -> str:
    """``yes``, or the first difference; then how many width vectors the model's class refuses."""
    rng = random.Random(len(space.name))
    refused = 0
    for i, within in enumerate((operator.le, operator.ge, lambda _w, _b: True)):
        network = None
        while network is None:
            grids = ([w for w in axis.grid if within(w, axis.base)] for axis in space.axes)
            vector = [rng.choice(grid) for grid in grids]
            try:
                network = space.build(vector, seed=0)  # as the model's constructors make it
            except SpaceError:
                refused += 1
                if refused == MOST_REFUSED:
                    raise
        predicted = space.cost(vector)
        meta = clone(network, {id(t): to_meta(t) for *_, t in tensors_of(network)})
        counted = run_and_count(meta, space.input_shape, "meta")
        if counted != predicted:
            return f"no: network {i + 1} counts {counted}, not {predicted}"
        if i == 0:
            run_and_count(network, space.input_shape, "cpu")
    return f"yes ({refused} refused)" if refused else "yes"


def start_and_output(space: SearchSpace) -> str:
    """``yes`` or ``base``, or the first difference from what the model's function makes."""
    calls = space.model.constructor
    if calls is None:
        return "no: the function makes modules of which it makes no others"
    make = calls.recording.make_model
    if difference := _difference(space, space.build(space.base, seed=SEED), make):
        return f"no: {difference}"
    started = time.perf_counter()
    for arguments, make_other in alternatives(make, space.model.template):
        if time.perf_counter() - started > ALTERNATIVES_SECONDS:
            break
        constructed = _sketched(make_other)
        if constructed is None:  # the constructor does not take these arguments
            continue
        vector, decisions = _vector_of(space, constructed), _decisions(constructed)
        del constructed
        if vector is not None and vector != space.base.vector:
            built = space.model.build(vector, seed=SEED)
            if _decisions(built) != decisions:
                continue  # such as other numbers of heads, or a shortcut where widths are equal
            difference = _difference(space, built, make_other)
            return f"no: {difference} ({arguments})" if difference else f"yes ({arguments})"
    return "base"


def _sketched(make: Callable[[], torch.nn.Module]) -> torch.nn.Module | None:
    """A function's model, on the meta device if it needs no values."""
    for device in ("meta", "cpu"):
        with suppress(Exception), torch.random.fork_rng(), torch.device(device):
            return make()
    return None


def _decisions(network: torch.nn.Module) -> list[tuple[str, int]]:
    """What forward reads of the numbers and sizes of heads, and of a constructor's decisions."""
    return [
        (name, value)
        for module in network.modules()
        for name, value in (*sizes_in(module), *flags_of(module).items())
        if name != "training" and name in names_in_forward(module)
        if isinstance(value, bool) or "head" in name
    ]


def _vector_of(space: SearchSpace, constructed: torch.nn.Module) -> tuple[int, ...] | None:
    """The widths of a network; None if it is not in the space."""
    shapes = {join(layer, name): tuple(t.shape) for _, layer, name, t in tensors_of(constructed)}
    if shapes.keys() != space.trace.shapes.keys():
        return None
    try:
        vector = widths_of(space.model, constructed).vector
    except WidthsError:  # such as another number of groups
        return None
    x = space.trace.variables(vector)
    predicted = {
        key: tuple(evaluate(n, x) for n in shape) for key, shape in space.trace.shapes.items()
    }
    return vector if predicted == shapes else None


def _difference(
    space: SearchSpace, built: torch.nn.Module, make: Callable[[], torch.nn.Module]
) -> str:
    """The first difference between a network that is built and one that is constructed."""

    def constructed() -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return make()

    expected = constructed()
    found = {join(layer, name): t for _, layer, name, t in tensors_of(built)}
    wanted = {join(layer, name): t for _, layer, name, t in tensors_of(expected)}
    if found.keys() != wanted.keys():
        return f"{min(found.keys() ^ wanted.keys())} is in one network only"
    unlike = [key for key, t in wanted.items() if not _equal(found[key], t)]
    if unlike:  # memory that no constructor writes to differs between two runs of the function
        again = {join(layer, name): t for _, layer, name, t in tensors_of(constructed())}
        written = [key for key in unlike if _equal(wanted[key], again[key])]
        if written:
            return f"{written[0]}, {len(written)} of {len(wanted)} tensors"
        built.load_state_dict(expected.state_dict())
    x = random_inputs(space, 1, SEED)
    worst = largest_difference(outputs(built.eval(), x), outputs(expected.eval(), x))
    return f"outputs by {worst:.1g}" if worst > TOLERANCE else ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def by_replay(space: SearchSpace) -> str:
    """Modules with a free width that constructors make, and all of them."""
    shapes = space.trace.shapes
    free = [key for key, s in shapes.items() if any(as_constant(n) is None for n in s)]
    modules = {key.rpartition(".")[0] for key in free}
    replay = space.model.constructor.replay if space.model.constructor else None
    if replay is None:
        return f"0/{len(modules)}"
    return f"{len(modules - {key.rpartition('.')[0] for key in replay.unexplained})}/{len(modules)}"


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
    "start and output": start_and_output,
    "mask = cut": mask_equals_cut,
}
"""The columns that are answered by ``yes`` or ``no``; each is asked on its own."""


# -- rows --------------------------------------------------------------------------------------


def measure(source: str, name: str) -> dict[str, Any]:
    """The figures and answers of one model."""
    make, inputs = SOURCES[source][0](name)
    row: dict[str, Any] = {"name": name}
    started = time.perf_counter()
    space = SearchSpace.from_model(make, inputs, name=name)
    row["space_s"] = time.perf_counter() - started
    row["params"] = space.cost(space.base).params
    row["axes"] = len(space.axes)
    row["searchable"] = searchable_share(space)
    row["pinned"] = pinned_reasons(space)
    row["by replay"] = by_replay(space)
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
    parser.add_argument("--rows", type=Path, help="a file that keeps the rows, one JSON a line")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    if options.names:
        groups = [[name] for name in options.names.split(",")]
    else:
        groups = list(SOURCES[options.source][1](options.limit))
    columns = [
        "model",
        "Mparams",
        "axes",
        "space s",
        *QUESTIONS,
        "by replay",
        "searchable",
        "pinned",
    ]
    print("|", " | ".join(columns), "|")
    print(
        "| --- |", "--: | " * 3, "--- | " * len(QUESTIONS), "--: | --: | --- |", sep="", flush=True
    )
    kept: dict[str, dict[str, Any]] = {}
    if options.rows and options.rows.exists():
        lines = options.rows.read_text().splitlines()
        kept = {row["name"]: row for row in map(json.loads, lines)}
    worker = Worker()
    rows: list[dict[str, Any]] = []
    for group in groups:
        for name in group:
            row = kept.get(name) or worker.ask(options.source, name, options.seconds)
            if options.rows and name not in kept:
                with options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if row.get("reason") != "ValueError: too large":
                rows.append(row)
                print("|", " | ".join(_cells(row)), "|", flush=True)
                break
    worker.close()
    traced = [row for row in rows if "reason" not in row]
    print(f"\n{len(traced)} of {len(rows)} traced", end="")
    for question in QUESTIONS:
        answers = Counter(re.split(r"[ :]", row[question])[0] for row in traced)
        print(f"; {question}: " + ", ".join(f"{n} {a}" for a, n in answers.most_common()), end="")
    made = [
        sum(map(int, n)) for n in zip(*(r["by replay"].split("/") for r in traced), strict=True)
    ]
    print(f"; modules by replay: {' of '.join(map(str, made))}", end="")
    share = sum(row["searchable"] for row in traced) / max(len(traced), 1)
    print(f"; searchable MACs {share:.2%} on average")


def _cells(row: dict[str, Any]) -> list[str]:
    if "reason" in row:
        return [row["name"], "", "", "", *["" for _ in QUESTIONS], "", "", f"no: {row['reason']}"]
    return [
        row["name"],
        f"{row['params'] / 1e6:.2f}",
        str(row["axes"]),
        f"{row['space_s']:.2f}",
        *(row[question] for question in QUESTIONS),
        row["by replay"],
        f"{row['searchable']:.1%}",
        row["pinned"],
    ]


if __name__ == "__main__":
    main()
