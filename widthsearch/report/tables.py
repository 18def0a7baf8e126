"""A study's front and families as tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from widthsearch.api import Study
from widthsearch.bayesopt import pareto
from widthsearch.latency.profiles import standard_error
from widthsearch.report.console import short, uncut
from widthsearch.report.forecast import Forecast
from widthsearch.study.front import gains as equal_cost_gains
from widthsearch.study.front import objective_points
from widthsearch.study.posterior import INTERVAL, AccuracyPosterior
from widthsearch.study.trial import Trial

FEW = 3
"""Fewer points than this make no front to take a volume of, and fewer comparisons no range."""


def described(origin: Mapping[str, Any]) -> str:
    """Where widths came from, in a word or two."""
    if origin.get("base"):
        return "base"
    if "confirms" in origin:
        return f"confirms {origin['confirms']}"
    if "proposer" in origin:
        return f"{origin['proposer']} ×{origin['budget']:g}"
    return str(origin.get("sampler", "given"))


def baseline(outcomes: Sequence[Trial], method: str = "uniform") -> list[Trial]:
    """A finished baseline, ``uniform`` (the bases with it) or ``random``, fewest MACs first."""

    def belongs(origin: Mapping[str, Any]) -> bool:
        if origin.get("base"):
            return method == "uniform"
        return origin.get("proposer") == method and origin.get("family") == "linear"

    found = [o for o in outcomes if o.state == "finished" and belongs(o.origin)]
    return sorted(found, key=lambda o: o.cost.macs)


def comparisons(posterior: AccuracyPosterior, outcomes: Sequence[Trial]) -> list[str]:
    """By how much what was found beats each baseline at equal cost of each kind; a line a baseline.

    The baselines themselves are not among what was found: a gain may be a loss.
    """
    found = [o for o in posterior.members if o.origin.keys().isdisjoint(("base", "baseline"))]
    lines = []
    for method in ("uniform", "random"):
        rivals = baseline(outcomes, method)
        said = []
        for cost, named in (("macs", "MACs"), ("params", "parameters"), ("latency_ms", "latency")):
            if cost not in posterior.objectives:
                continue
            gains = equal_cost_gains(found, rivals, cost, posterior.accuracy)
            if gains:
                mean, low, high = sum(gains) / len(gains), min(gains), max(gains)
                spread = f"{low:+.2f} to {high:+.2f}" if len(gains) > 1 else ""
                few = f"only {len(gains)} can be compared" if len(gains) < FEW else ""
                told = "; ".join(filter(None, (spread, few)))
                said.append(f"{mean:+.2f} points at equal {named} ({told})")
        if said:
            lines.append(
                f"Beside {method} widths ({len(rivals)} of them) the best of the other networks "
                f"have {', '.join(said)}, by believed accuracy."
            )
    return lines


def front_json(study: Study) -> dict[str, Any]:
    """The front, the base model and the uniform baseline as plain JSON values."""
    outcomes, posterior = study.trials(), study.posterior()
    base = _base(outcomes)
    return {
        "study": study.config.name,
        "objectives": list(study.config.objectives),
        "front": [_member(o, posterior) for o in posterior.front()],
        "base": None if base is None else _member(base, posterior),
        "uniform": [_member(o, posterior) for o in baseline(outcomes) if not o.origin.get("base")],
    }


def _base(outcomes: Sequence[Trial]) -> Trial | None:
    return next((o for o in outcomes if o.origin.get("base") and o.state == "finished"), None)


def _member(outcome: Trial, posterior: AccuracyPosterior) -> dict[str, Any]:
    keys = ("id", "space", "widths", "accuracy", "macs", "params", "latency_ms", "latency")
    content = outcome.to_json()
    member = {key: content[key] for key in (*keys, "origin")}
    return {**member, "believed": asdict(posterior[outcome])}


def front_csv(study: Study) -> str:
    """The front as CSV: one row a member, one column an axis."""
    posterior = study.posterior()
    front = posterior.front()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(dict.fromkeys(name for o in front for name in o.widths))
    columns = ["id", "space", "accuracy", "believed", "sd", "trainings", "dominated"]
    writer.writerow([*columns, "macs", "params", "latency_ms", "origin", *names])
    for o in front:
        estimate = posterior[o]
        writer.writerow(
            [
                *(
                    o.number,
                    o.space,
                    o.accuracy,
                    estimate.accuracy,
                    estimate.sd,
                    estimate.trainings,
                ),
                *(estimate.dominated, o.cost.macs, o.cost.params, o.latency_ms),
                described(o.origin),
                *(o.widths.get(name, "") for name in names),
            ]
        )
    return out.getvalue()


def front_tables(study: Study) -> Group:
    """The front and the uniform baseline as tables, and what is worth knowing about them."""
    outcomes, posterior = study.trials(), study.posterior()
    front, base = posterior.front(), _base(outcomes)
    states = {s: sum(o.state == s for o in outcomes) for s in ("finished", "stopped", "failed")}
    counted = ", ".join(f"{n} {state}" for state, n in states.items() if n) or "none is done"
    stand = f"{len(outcomes)} trial{'s' * (len(outcomes) != 1)}: {counted}."
    if not states["finished"]:
        return Group(
            Text(f"No trial of {study.config.name} has finished yet, so there is no front. {stand}")
        )
    rivals = baseline(outcomes)
    parts: list[RenderableType] = [
        _trial_table(f"front of {study.config.name}", front, base, posterior),
        _widths_listed(front),
    ]
    if rivals:
        parts.append(_trial_table("uniform baseline", rivals, base, posterior))
    if len(front) >= FEW:
        stand += (
            f" Hypervolume over {', '.join(posterior.objectives)}, as a share of the box that all "
            f"finished trials span: front {front_volume(front, posterior):.3f}, uniform baseline "
            f"{front_volume(rivals, posterior):.3f}."
        )
    parts.append(Text(stand))
    parts.extend(
        Text(line) for line in (*comparisons(posterior, outcomes), *_doubts(front, posterior))
    )
    parts.extend(Text(remark) for remark in remarks(front, base))
    return Group(*parts)


def _doubts(front: Sequence[Trial], posterior: AccuracyPosterior) -> list[str]:
    """How far the accuracies can be trusted."""
    lines = []
    if (surrogate := posterior.surrogate) is not None:
        lines.append(
            "Believed accuracy is over seeds, with its 90% interval; one training scatters by "
            f"{surrogate.noise:.2f} points (standard deviation). Left out, "
            f"{surrogate.coverage(0.9):.0%} of {surrogate.size} trainings lie in their 90% "
            "interval."
        )
    doubtful = [o for o in front if (posterior[o].dominated or 0.0) > 0.5]
    if doubtful:
        lines.append(
            f"Marked ?: dominated by another trained network with probability above one half "
            f"({', '.join(str(o.number) for o in doubtful)}); widthsearch confirm trains them "
            "again."
        )
    return lines


def forecast_table(expected: Sequence[Forecast]) -> Group:
    """What proposals promise at every size, and where to train next."""
    several = len({each.space for each in expected}) > 1
    table = Table(title="families, as believed", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [*(["space"] if several else []), "origin", "MACs", "believed", "beats the front"]
    _add_columns(table, columns)
    for each in sorted(expected, key=lambda e: (e.space, described(e.origin), e.cost.macs)):
        table.add_row(
            *([each.space] if several else []),
            f"{described(each.origin)} {each.origin['family']}",
            short(each.cost.macs),
            f"{each.accuracy:.2f} ±{INTERVAL * each.sd:.2f}",
            "trained" if each.trained else f"{each.beats_front:.0%}",
        )
    uncut(table)
    open_ = [each for each in expected if not each.trained]
    if not open_:
        return Group(table)
    best = max(open_, key=lambda each: each.gain)
    return Group(
        table,
        Text(
            f"Train next: {described(best.origin)} {best.origin['family']}, {dict(best.widths)}, "
            f"{best.gain:+.2f} points expected over what is trained within its MACs."
        ),
    )


def front_volume(members: Sequence[Trial], posterior: AccuracyPosterior) -> float:
    """The hypervolume of some outcomes, as a share of the box that all finished ones span.

    By believed accuracy.
    """
    if not members or not posterior.members:
        return 0.0

    def points(of: Sequence[Trial]) -> NDArray[np.float64]:
        found = objective_points(of, posterior.objectives)
        found[:, posterior.objectives.index("accuracy")] = [-posterior.accuracy(o) for o in of]
        return found

    every = points(posterior.members)
    low, high = every.min(0), every.max(0)
    span = np.where(high > low, high - low, 1.0)
    return pareto.hypervolume((points(members) - low) / span, np.ones(len(posterior.objectives)))


def _trial_table(
    title: str, outcomes: Sequence[Trial], base: Trial | None, posterior: AccuracyPosterior
) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    timed = any(o.latency is not None for o in outcomes)
    several = len({o.space for o in (*outcomes, *([base] if base else []))}) > 1
    sized = "params" in posterior.objectives
    columns = ["id", *(["space"] if several else []), "origin", "acc %"]
    columns += ["believed", "MACs", "×base", *(["params"] if sized else [])]
    columns += ["ms", "×base"] if timed else []
    _add_columns(table, columns)
    for o in outcomes:
        estimate = posterior[o]
        estimated = f"{estimate.accuracy:.2f}"
        estimated += "" if estimate.sd is None else f" ±{INTERVAL * estimate.sd:.2f}"
        estimated += f" ({estimate.trainings}×)" if estimate.trainings > 1 else ""
        estimated += " ?" if (estimate.dominated or 0.0) > 0.5 else ""
        row = [str(o.number), *([o.space] if several else []), described(o.origin)]
        row += [f"{o.accuracy:.2f}", estimated, short(o.cost.macs)]
        row += [f"{o.cost.macs / base.cost.macs:.2f}" if base else ""]
        row += [short(o.cost.params)] if sized else []
        if timed and o.latency is not None:
            row += [f"{o.latency.median_ms:.3g}", f"{o.latency.ratio:.2f}"]
        elif timed:
            row += ["", ""]
        table.add_row(*(Text(cell) for cell in row))
    return uncut(table)


def _add_columns(table: Table, columns: Sequence[str]) -> None:
    """Columns of networks; where they are of and from may wrap, but no number."""
    for column in columns:
        told = column in ("space", "origin")
        left = told or column == "believed"
        table.add_column(column, justify="left" if left else "right", no_wrap=not told)


def _widths_listed(outcomes: Sequence[Trial]) -> Text:
    """The widths of some outcomes, a line each, under the names of their axes."""
    if not outcomes:
        return Text("no finished trial has all objectives")
    digits = max(len(str(o.number)) for o in outcomes)
    lines = []
    for space in dict.fromkeys(o.space for o in outcomes):
        own = [o for o in outcomes if o.space == space]
        lines.append(f"widths of {space} by id, in the order {', '.join(own[0].widths)}:")
        lines += [f"  {o.number:>{digits}}: {' '.join(map(str, o.widths.vector))}" for o in own]
    return Text("\n".join(lines))


def remarks(front: Sequence[Trial], base: Trial | None) -> list[str]:
    """The members whose MACs fell but whose latency is not shown to have; a line a device."""
    shown: dict[str, list[str]] = {}
    for o in front:
        if base is None or o.latency is None or o.cost.macs >= base.cost.macs:
            continue
        error = 2 * standard_error(o.latency) / o.latency.base_ms
        if o.latency.ratio + error >= 1:
            share = o.cost.macs / base.cost.macs
            told = f"{o.number} ({share:.2f}: {o.latency.ratio:.2f} ± {error:.2f})"
            shown.setdefault(o.latency.hardware, []).append(told)
    return [
        f"Latency is not shown to fall, though MACs do, on {hardware} (id, share of the base's "
        f"MACs: of its latency ± two standard errors): {', '.join(members)}."
        for hardware, members in shown.items()
    ]


def write_front(study: Study) -> str:
    """Write ``front.json`` into the study's folder; returns a line that says where, or why not."""
    file = study.folder / "front.json"
    try:
        file.write_text(json.dumps(front_json(study), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        return f"not written: {file}: {error.strerror}"
    return f"written: {file}"
