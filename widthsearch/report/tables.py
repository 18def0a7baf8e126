"""A study's front and its families' forecast as tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from widthsearch.bayesopt import pareto
from widthsearch.report.console import short, uncut
from widthsearch.study.front import equal_cost_pairs
from widthsearch.study.posterior import ENOUGH, INTERVAL, AccuracyEstimate, AccuracyPosterior

if TYPE_CHECKING:
    from widthsearch.api import Study
    from widthsearch.report.forecast import Forecast
    from widthsearch.study.trial import Trial

FEW = 3
"""A hypervolume is printed of a front with at least so many members."""

_COSTS = {"macs": "MACs", "params": "parameters", "latency_ms": "latency"}


def origin_text(origin: Mapping[str, Any]) -> str:
    """The source of a trial's widths, in a word or two.

    Example:
        >>> origin_text({"proposer": "synflow", "family": "linear", "budget": 0.25})
        'synflow ×0.25'
        >>> origin_text({"base": True}), origin_text({"sampler": "search"})
        ('base', 'search')
    """
    if origin.get("base"):
        return "base"
    if "confirms" in origin:
        return f"confirms {origin['confirms']}"
    if "proposer" in origin:
        return f"{origin['proposer']} ×{origin['budget']:g}"
    return "search" if "sampler" in origin else "given"


def estimate_text(estimate: AccuracyEstimate) -> str:
    """An estimated accuracy with its 90% interval, each side given where 0% or 100% cuts one off.

    Example:
        >>> estimate_text(AccuracyEstimate(91.5, sd=0.4, trainings=1))
        '91.50 ±0.66'
        >>> estimate_text(AccuracyEstimate(99.5, sd=0.4, trainings=1))
        '99.50 −0.66 +0.50'
    """
    text, interval = f"{estimate.accuracy:.2f}", estimate.interval
    if interval is None or estimate.sd is None:
        return text
    below, above = estimate.accuracy - interval[0], interval[1] - estimate.accuracy
    if min(below, above) < INTERVAL * estimate.sd - 1e-9:
        return f"{text} −{below:.2f} +{above:.2f}"
    return f"{text} ±{above:.2f}"


def baseline(posterior: AccuracyPosterior, method: str = "uniform") -> list[Trial]:
    """The members of a baseline that are within the limits, fewest MACs first.

    Args:
        posterior: The posterior of a study.
        method: ``uniform``, which includes the bases, or ``random``.
    """

    def belongs(origin: Mapping[str, Any]) -> bool:
        if origin.get("base"):
            return method == "uniform"
        return origin.get("proposer") == method and origin.get("family") == "linear"

    members = posterior.members_within_limits
    return sorted((t for t in members if belongs(t.origin)), key=lambda t: t.cost.macs)


def _contents(rivals: Sequence[Trial], method: str = "uniform") -> str:
    """The networks of a baseline in words."""
    bases = sum(bool(t.origin.get("base")) for t in rivals)
    parts = [f"{method} widths"] if len(rivals) > bases else []
    return " and ".join(parts + ([f"the base{'s' * (bases > 1)}"] if bases else []))


def gain_lines(posterior: AccuracyPosterior) -> list[str]:
    """The mean gain of the other networks over each baseline at equal cost; a line a baseline.

    Each baseline network is paired with the most accurate of the other networks that costs no more,
    by estimated accuracy; networks outside the limits take no part. The 90% interval is that of the
    mean of the paired differences under the joint posterior. There is no line without a surrogate.
    """
    if posterior.surrogate is None:
        return []
    inside = posterior.members_within_limits
    found = [t for t in inside if t.origin.keys().isdisjoint(("base", "baseline"))]
    lines = []
    for method in ("uniform", "random"):
        rivals, gains = baseline(posterior, method), []
        for cost in (cost for cost in _COSTS if cost in posterior.objectives):
            pairs = equal_cost_pairs(found, rivals, cost, posterior.accuracy)
            if pairs:
                mean, sd = posterior.mean_difference(pairs)
                gains.append(
                    f"{mean:+.2f} ±{INTERVAL * sd:.2f} points at equal {_COSTS[cost]} (mean over "
                    f"{len(pairs)} of {len(rivals)})"
                )
        if gains:
            lines.append(
                f"Gain over {_contents(rivals, method)}: {', '.join(gains)}; ± is its 90% interval."
            )
    return lines


def front_json(study: Study, posterior: AccuracyPosterior) -> dict[str, Any]:
    """The front, the base model and the uniform baseline with the bases as JSON values."""
    base = posterior.base
    return {
        "study": study.config.name,
        "objectives": list(study.config.objectives),
        "front": [_trial_json(t, posterior) for t in posterior.front()],
        "base": None if base is None else _trial_json(base, posterior),
        "uniform": [_trial_json(t, posterior) for t in baseline(posterior)],
    }


def _trial_json(trial: Trial, posterior: AccuracyPosterior) -> dict[str, Any]:
    keys = ("id", "space", "widths", "accuracy", "macs", "params", "latency_ms", "latency")
    content = trial.to_json()
    chosen = {key: content[key] for key in (*keys, "origin")}
    return {**chosen, "estimated": posterior[trial].to_json()}


def front_csv(posterior: AccuracyPosterior) -> str:
    """The front as CSV: one row a member, one column an axis."""
    front = posterior.front()
    out = io.StringIO()
    names = list(dict.fromkeys(name for t in front for name in t.widths))
    columns = ["id", "space", "accuracy", "estimated", "sd", "interval_low", "interval_high"]
    columns += ["trainings", "dominated", "macs", "params", "latency_ms", "latency_ratio"]
    columns += ["origin", *names]
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for t in front:
        estimate = posterior[t]
        row = {key: value for key, value in t.to_json().items() if key in columns}
        row |= {key: getattr(estimate, key) for key in ("sd", "trainings", "dominated")}
        row |= zip(("interval_low", "interval_high"), estimate.interval or (), strict=False)
        row |= {} if t.latency is None else {"latency_ratio": t.latency.ratio}
        row |= {"estimated": estimate.accuracy, "origin": origin_text(t.origin), **t.widths}
        writer.writerow(row)
    return out.getvalue()


def front_tables(study: Study, posterior: AccuracyPosterior) -> Group:
    """The front and the uniform baseline as tables, with footnotes and the gains."""
    trials, front, base = posterior.trials, posterior.front(), posterior.base
    states = {s: sum(t.state == s for t in trials) for s in ("finished", "stopped", "failed")}
    counted = ", ".join(f"{n} {state}" for state, n in states.items() if n) or "none has ended"
    total = f"{len(trials)} trial{'s' * (len(trials) != 1)}: {counted}."
    if not states["finished"]:
        return Group(
            Text(f"No trial of {study.config.name} has finished yet, so there is no front. {total}")
        )
    uniform = baseline(posterior)
    parts: list[RenderableType] = [
        trial_table(f"front of {study.config.name}", front, base, posterior),
        _width_lines(front),
    ]
    if uniform:
        title = f"uniform baseline: {_contents(uniform)}"
        parts.append(trial_table(title, uniform, base, posterior))
    if len(front) >= FEW:
        inside = " within the limits" if study.config.limits else ""
        contents = f" ({_contents(uniform)})" if uniform else ""
        total += (
            f" Hypervolume over {', '.join(posterior.objectives)}, as a share of the box that all "
            f"finished trials{inside} span: front {front_volume(front, posterior):.3f}, uniform "
            f"baseline {front_volume(uniform, posterior):.3f}{contents}."
        )
    lines = [total, *gain_lines(posterior), *footnotes([*front, *uniform], posterior)]
    return Group(*parts, *map(Text, (*lines, *latency_remarks(front, base))))


def pick_table(study: Study, trial: Trial) -> Group:
    """A finished trial beside the base, where the study has trained it, with its widths."""
    posterior = study.posterior()
    base = posterior.base
    shown = [trial] if base in (None, trial) else [base, trial]
    return Group(
        trial_table(f"pick of {study.config.name}", shown, base, posterior),
        _width_lines([trial]),
        *map(Text, footnotes(shown, posterior)),
    )


def footnotes(shown: Sequence[Trial], posterior: AccuracyPosterior) -> list[str]:
    """The meaning of the columns and marks in a table of trials; a line each."""
    estimates = {t.number: posterior[t] for t in shown}
    lines = ["acc %: validation accuracy of one training."]
    surrogate = posterior.surrogate
    if surrogate is None:
        lines.append(
            f"estimated %: mean accuracy of the network's trainings; intervals need {ENOUGH} "
            "finished trainings."
        )
    else:
        lines.append(
            "estimated %: expected accuracy over seeds, estimated from all trainings; ± is its 90% "
            f"interval. One training varies by {surrogate.noise:.2f} points (standard deviation). "
            f"Of {surrogate.size} trainings, {surrogate.coverage(0.9):.0%} lie in the 90% interval "
            "that the others predict."
        )
    if any(t.latency is not None for t in shown):
        lines.append(
            "ms, ms/base: measured latency, and its ratio to the base's, measured in turn."
        )
    if any(estimate.trainings > 1 for estimate in estimates.values()):
        lines.append("(n×): the network was trained n times.")
    doubtful = [str(n) for n, estimate in estimates.items() if (estimate.dominated or 0.0) > 0.5]
    if doubtful:
        lines.append(
            "?: P(dominated) is above one half: the probability that another trained network costs "
            f"no more and is more accurate ({', '.join(doubtful)}). widthsearch confirm trains "
            "uncertain members of the front again."
        )
    return lines


def forecast_table(forecasts: Sequence[Forecast]) -> Group:
    """The forecast of families at every size, and the best next training."""
    several = len({each.space for each in forecasts}) > 1
    table = Table(title="forecast of the families", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [*(["space"] if several else []), "origin", "MACs", "estimated %", "P(beats front)"]
    _add_columns(table, columns)
    for each in sorted(forecasts, key=lambda e: (e.space, origin_text(e.origin), e.cost.macs)):
        table.add_row(
            *([each.space] if several else []),
            f"{origin_text(each.origin)} {each.origin['family']}",
            short(each.cost.macs),
            estimate_text(each.estimate)
            + " †" * (not each.within_limits)
            + " *" * each.extrapolated,
            "trained" if each.trained else f"{each.beats_front:.0%}",
        )
    lines = [
        "P(beats front): the probability that it is more accurate than every trained network "
        "within the limits with no more MACs."
    ]
    if any(each.extrapolated for each in forecasts):
        lines.append(
            "*: extrapolated: its MACs are outside the range of the finished trials, or a width is "
            "more than one step outside."
        )
    if not all(each.within_limits for each in forecasts):
        lines.append("†: outside the study's limits, so never advised.")
    open_ = [e for e in forecasts if e.within_limits and not (e.trained or e.extrapolated)]
    if open_:
        best = max(open_, key=lambda each: each.gain)
        lines.append(
            f"Train next: {origin_text(best.origin)} {best.origin['family']}"
            f"{f' of {best.space}' * several}, {dict(best.widths)}, expected gain "
            f"{best.gain:.2f} points over the trained networks within its MACs."
        )
    return Group(uncut(table), *map(Text, lines))


def front_volume(members: Sequence[Trial], posterior: AccuracyPosterior) -> float:
    """The hypervolume of some trials, as a share of the box that all finished ones span.

    By estimated accuracy. Networks outside the limits do not widen the box.
    """
    if not members:
        return 0.0

    every = posterior.points(posterior.members_within_limits)
    low, high = every.min(0), every.max(0)
    span = np.where(high > low, high - low, 1.0)
    return pareto.hypervolume((posterior.points(members) - low) / span, np.ones_like(low))


def trial_table(
    title: str, trials: Sequence[Trial], base: Trial | None, posterior: AccuracyPosterior
) -> Table:
    """Finished trials with their accuracy, and with their costs beside the base's."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    timed = any(t.latency is not None for t in trials)
    several = len({t.space for t in (*trials, *([base] if base else []))}) > 1
    sized = "params" in posterior.objectives
    columns = ["id", *(["space"] if several else []), "origin", "acc %"]
    columns += ["estimated %", "MACs", "MACs/base", *(["params"] if sized else [])]
    _add_columns(table, columns + (["ms", "ms/base"] if timed else []))
    for t in trials:
        estimate = posterior[t]
        text = estimate_text(estimate)
        text += f" ({estimate.trainings}×)" if estimate.trainings > 1 else ""
        text += " ?" if (estimate.dominated or 0.0) > 0.5 else ""
        row = [str(t.number), *([t.space] if several else []), origin_text(t.origin)]
        row += [f"{t.accuracy:.2f}", text, short(t.cost.macs)]
        row += [f"{t.cost.macs / base.cost.macs:.2f}" if base else ""]
        row += [short(t.cost.params)] if sized else []
        if timed and t.latency is not None:
            row += [f"{t.latency.median_ms:.3g}", f"{t.latency.ratio:.2f}"]
        table.add_row(*map(Text, row))
    return uncut(table)


def _add_columns(table: Table, columns: Sequence[str]) -> None:
    """Columns of networks: spaces and origins may wrap, numbers may not."""
    for column in columns:
        words = column in ("space", "origin")
        left = words or column == "estimated %"
        table.add_column(column, justify="left" if left else "right", no_wrap=not words)


def _width_lines(trials: Sequence[Trial]) -> Text:
    """The widths of some trials, a line each, below the names of their axes."""
    if not trials:
        return Text("no finished trial has all objectives and is within the limits")
    digits = max(len(str(t.number)) for t in trials)
    lines = []
    for space in dict.fromkeys(t.space for t in trials):
        own = [t for t in trials if t.space == space]
        lines.append(f"widths of {space} by id, in the order {', '.join(own[0].widths)}:")
        lines += [f"  {t.number:>{digits}}: {' '.join(map(str, t.widths.vector))}" for t in own]
    return Text("\n".join(lines))


def latency_remarks(front: Sequence[Trial], base: Trial | None) -> list[str]:
    """The members with fewer MACs but no significantly lower latency; a line a device."""
    shown: dict[str, list[str]] = {}
    for t in front:
        if base is None or t.latency is None or t.cost.macs >= base.cost.macs:
            continue
        error = 2 * t.latency.standard_error_ms / t.latency.base_ms
        if t.latency.ratio + error >= 1:
            share = t.cost.macs / base.cost.macs
            text = f"{t.number} ({share:.2f}: {t.latency.ratio:.2f} ± {error:.2f})"
            shown.setdefault(t.latency.hardware, []).append(text)
    return [
        f"Fewer MACs, but no significantly lower latency on {hardware} (id, MACs/base: ms/base ± "
        f"two standard errors): {', '.join(members)}."
        for hardware, members in shown.items()
    ]


def write_front(study: Study, posterior: AccuracyPosterior) -> str:
    """Write ``front.json`` into the study's folder; returns a line that says where, or why not."""
    file = study.folder / "front.json"
    try:
        file.write_text(json.dumps(front_json(study, posterior), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        return f"not written: {file}: {error.strerror}"
    return f"written: {file}"
