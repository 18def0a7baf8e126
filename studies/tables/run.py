"""Every method, family and baseline on a table of trained networks: points over uniform widths.

Nothing is trained. From the repository's root::

    python -m studies.tables.run --table PATH --space search_spaces/channel_bench.py:resnet
    python -m studies.tables.run --table PATH --space REF --folder FOLDER --epochs 16

A table is one of `benchmarks.search`: a CSV file with columns ``width_*``, ``macs``, ``params`` and
``accuracy_*``, of networks of the space. See README.md for the estimates. Without ``--folder``
methods that read data get noise; methods that train a base network are left out without
``--epochs``. ``--json`` prints ``{"methods": {name: {"gain", "se", …}}, "best"}`` alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.search import Table
from studies.tables.accuracies import Judge, Points
from studies.tables.proposals import Proposals, Proposed, methods, narrowed, on_table, trains
from widthsearch import Recipe, TaskConfig, load_task
from widthsearch.data.tasks import Task, stratified
from widthsearch.errors import StudyError, WidthsearchError, did_you_mean
from widthsearch.proposers import Proposer, Setting
from widthsearch.proposers.families import lowest_share
from widthsearch.space.loading import load_space
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.inputs import image_shape

SHARES = (0.12, 0.8)
"""The least and the largest budget, as shares of the base's MACs."""
BANDS = (0.0, 0.2, 0.35, 0.55, np.inf)
"""The ends of the shares that the table shows together."""


def budgets(judge: Judge, base: int, count: int) -> NDArray[np.float64]:
    """So many MACs, evenly spaced in their logarithm, that uniform networks of the table span.

    Raises:
        StudyError: They span none between the shares.
    """
    spanned = np.exp(judge.uniform.log_macs[[0, -1]]) / base
    low, high = max(SHARES[0], spanned[0]), min(SHARES[1], spanned[1])
    if low >= high:
        raise StudyError(
            f"a table must have uniform networks around {SHARES[0]} to {SHARES[1]} of the base's "
            f"MACs, but has them from {spanned[0]:.3g} to {spanned[1]:.3g}; add rows, or name the "
            "space of the wider base"
        )
    return np.geomspace(low, high, count) * base * (1 + 1e-9)  # the narrowest network costs that


def images(options: argparse.Namespace, space: SearchSpace) -> Task | None:
    """The task of ``--folder``; None without it."""
    if options.folder is None:
        return None
    shape = image_shape(space.input_shape)
    if shape is None or len(shape) != 3:
        raise StudyError(
            f"`--folder` is for spaces of images, but the inputs of space {space.name!r} are "
            f"{space.input_shape}; leave it out"
        )
    task = load_task(TaskConfig("image_folder", folder=options.folder, image_size=shape[-1]))
    if task.input_shape != shape:
        raise StudyError(
            f"images must be the inputs of space {space.name!r}, {shape}, but those of "
            f"{options.folder!r} are {task.input_shape}"
        )
    if options.images and options.images < len(task.train):
        kept, _ = stratified(task.train, 1 - options.images / len(task.train), seed=0)
        task = replace(task, train=kept)
    return task.for_search()


def chosen_methods(options: argparse.Namespace) -> dict[str, Proposer]:
    """The methods of ``--methods``, or all.

    Raises:
        StudyError: There is none of a name.
    """
    known = methods()
    for name in options.methods or ():
        if name not in known:
            raise StudyError(
                f"a method must be one of {', '.join(known)}, but was {name!r}; "
                + did_you_mean(name, known, "leave `--methods` out for all of them")
            )
    return {name: known[name] for name in options.methods or known}


def run(options: argparse.Namespace) -> None:
    """Judge the methods and print the result."""
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - started:4.0f} s  {line}", file=sys.stderr, flush=True)

    skipped: dict[str, str] = {}

    def skip(name: str, why: str) -> None:
        skipped[name] = why
        say(f"{name} is left out: {why}")

    table, full = Table.read(options.table), load_space(options.space)
    chosen = chosen_methods(options)
    space, own = on_table(full, table)
    judge = Judge(own, np.array(space.base.vector))
    base = space.cost(space.base).macs
    macs = budgets(judge, base, options.budgets)
    _, by = narrowed(space, options.narrow)
    task = images(options, space)
    for name in [name for name in chosen if trains(chosen[name])]:
        if task is None or options.epochs is None:
            skip(name, "it trains the base network: name data and epochs (--folder, --epochs)")
            del chosen[name]
    lowest = lowest_share((macs / base).tolist(), ["copycat"])
    batch = 128 if task is None else min(128, len(task.train))
    recipe = Recipe(epochs=options.epochs or 1, batch_size=batch, label_smoothing=0.1)
    proposals = Proposals(
        space,
        own,
        macs.tolist(),
        options.seeds,
        lambda seed: Setting(seed=seed, lowest=lowest, recipe=recipe),
        task,
        options.narrow,
    )
    found: dict[str, tuple[Points, Proposed]] = {}
    for name, proposed in proposals.rows(chosen, skip):
        points = judge.points(proposed.rows)
        if points is None:
            skip(name, "no network of it lies between the uniform networks of the table")
            continue
        found[name] = points, proposed
        say(f"{name}: {points.gain:+.2f} ± {points.se:.2f}")
    if not found:
        raise StudyError(
            "a table needs a method to judge, but all are left out: "
            + "; ".join(f"{name} because {why}" for name, why in skipped.items())
        )
    rows = np.concatenate([proposed.rows for _, proposed in found.values()])
    best = judge.best(macs, rows)
    if options.json:
        print(json.dumps(as_json(found, macs / base, float(np.nanmean(best)))))
        return
    top = judge.best(macs, rows, share=0.01)
    exact = np.mean([proposed.exact for _, proposed in found.values()])
    data = "noise" if task is None else f"{len(task.train)} images"
    expected = judge.expected
    print(
        f"{len(own.macs)} networks of space {space.name!r}; {len(macs)} budgets from "
        f"{macs[0] / base:.2f} to {macs[-1] / base:.2f} of {base:,} MACs; {options.seeds} seeds\n"
        f"trend: {expected.trend}; standard deviation beyond it {np.sqrt(expected.spread):.3f}, of "
        f"a row's mean by its trainings {np.sqrt(expected.noise.mean()):.3f}; "
        f"{len(judge.uniform.rows)} uniform networks\n"
        f"methods look at a network with widths / {by}, and at {data}; {exact:.0%} of their "
        "proposals are rows\n"
    )
    print(as_table(found, macs / base, {"best network": best, "best 1% of networks": top}))
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        print(f"\nleft out: {', '.join(names)}: {reason}")


def as_json(
    found: dict[str, tuple[Points, Proposed]], shares: NDArray[np.float64], best: float
) -> dict[str, dict[str, dict[str, Any]] | float]:
    """The result as plain values."""
    methods = {
        name: {
            "gain": points.gain,
            "se": points.se,
            "exact": proposed.exact,
            "se_parts": {"noise": points.noise, "seeds": points.seeds, "grid": points.grid},
            "by_share": {
                f"{share:.3f}": gain
                for share, gain in zip(shares, points.by_budget, strict=True)
                if np.isfinite(gain)
            },
        }
        for name, (points, proposed) in found.items()
    }
    return {"methods": methods, "best": best}


def as_table(
    found: dict[str, tuple[Points, Proposed]],
    shares: NDArray[np.float64],
    best: dict[str, NDArray[np.float64]],
) -> str:
    """A Markdown table: mean points with their standard errors, and the mean of each band."""
    bands = [
        (f"{max(low, shares[0]):.2g}–{min(high, shares[-1]):.2g}", inside)
        for low, high in pairwise(BANDS)
        if (inside := (shares >= low) & (shares < high)).any()
    ]
    lines = [["widths", "all", *(name for name, _ in bands)]]
    lines.append(["---", *["--:"] * (1 + len(bands))])
    named = {
        name: (f"{p.gain:+.2f} ± {p.se:.2f}", np.array(p.by_budget))
        for name, (p, _) in found.items()
    }
    named |= {name: (f"{np.nanmean(values):+.2f}", values) for name, values in best.items()}
    for name, (mean, values) in named.items():
        cells = [values[inside][np.isfinite(values[inside])] for _, inside in bands]
        lines.append([name, mean, *(f"{cell.mean():+.2f}" if len(cell) else "" for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="CSV file of trained networks")
    parser.add_argument("--space", required=True, help="package.module:function, or a file's")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--seeds", type=_positive, default=3, help="of each method (3)")
    parser.add_argument("--budgets", type=_positive, default=20, help="number of budgets (20)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument(
        "--narrow",
        type=_positive,
        metavar="K",
        help="methods look at a network with widths / K; by default the least power of two with "
        "at most 100 million MACs",
    )
    parser.add_argument("--folder", help="images, with train/<class>/ and test/<class>/")
    parser.add_argument("--images", type=_positive, help="number of training images (all)")
    parser.add_argument("--epochs", type=_positive, help="also judge methods that train the base")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except WidthsearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
