"""A study's front and its families' forecast as tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from widthsearch.bayesopt import pareto
from widthsearch.bayesopt.metric import ACCURACY, EXACT_COSTS, Metric
from widthsearch.errors import StudyError
from widthsearch.proposers import BASELINES
from widthsearch.report import starts
from widthsearch.report.console import short, uncut
from widthsearch.study.front import cost_value, objective_value, pick_limits
from widthsearch.study.gains import baselines, best_baselines, gains
from widthsearch.study.posterior import ENOUGH, Estimate, MetricPosterior
from widthsearch.utils.files import write_atomically

if TYPE_CHECKING:
    from widthsearch.api import Study
    from widthsearch.report.forecast import Forecast
    from widthsearch.study.trial import Trial

FEW = 3
"""A hypervolume is printed of a front with at least so many members."""

COST_NAMES = {"macs": "MACs", "params": "parameters", "latency_ms": "latency"}
"""The costs in words; others are called by their own names."""


def origin_text(origin: Mapping[str, Any]) -> str:
    """The source of a trial's widths, in a word or two.

    Example:
        >>> origin_text({"proposer": "synflow", "family": "linear", "budget": 0.25})
        'synflow ×0.25'
        >>> origin_text({"proposer": "synflow", "family": "copycat", "budget": 0.25})
        'synflow copycat ×0.25'
        >>> origin_text({"base": True}), origin_text({"sampler": "search"})
        ('base', 'search')
        >>> origin_text({"given": "pruned/half.json"})
        'half.json'
    """
    if origin.get("base"):
        return "base"
    if "compares" in origin:
        return f"{origin['start']} of {origin['compares']}"
    if "confirms" in origin:
        return f"confirms {origin['confirms']}"
    if "proposer" in origin:
        slope = f" {origin['slope']:+g}" if "slope" in origin else ""
        family = origin.get("family", "linear")
        named = "" if family == "linear" else f" {family}"
        return f"{origin['proposer']}{slope}{named} ×{origin['budget']:g}"
    return "search" if "sampler" in origin else PurePath(origin.get("given", "given")).name


def estimate_text(estimate: Estimate) -> str:
    """An estimated value with its 90% interval, each side given where they differ.

    Example:
        >>> estimate_text(Estimate(91.5, sd=0.4, trainings=1))
        '91.50 ±0.66'
        >>> estimate_text(Estimate(99.5, sd=0.4, trainings=1))
        '99.50 −0.66 +0.50'
    """
    value, interval, digits = estimate.value, estimate.interval, estimate.metric.decimals
    text, places = estimate.metric.text(value), digits(value)
    if interval is None:
        return text
    below, above = f"{value - interval[0]:.{places}f}", f"{interval[1] - value:.{places}f}"
    return f"{text} ±{above}" if below == above else f"{text} −{below} +{above}"


def _contents(members: Sequence[Trial]) -> str:
    """The kinds of some baselines in words."""
    bases = sum(bool(t.origin.get("base")) for t in members)
    seen = {t.origin.get("proposer") for t in members}
    kinds = [name for name in BASELINES if name in seen]
    *most, last = kinds or [""]
    text = f"{', '.join(most)} and {last} widths" if most else f"{last} widths" if last else ""
    named = f"the base{'s' * (bases > 1)}" if bases else ""
    return " and ".join(filter(None, (text, named)))


def gain_lines(posterior: MetricPosterior) -> list[str]:
    """A line with the mean gain over the best baselines at equal cost, see :func:`gains`.

    A gain is positive where the other networks are better, also for a metric to minimize. There is
    no line without a surrogate.
    """
    found, metric = gains(posterior), posterior.metric
    if not found:
        return []
    rivals = baselines(posterior)
    places = metric.decimals(posterior.value(rivals[0]))
    texts = [
        f"{gain.mean:+.{places}f} ±{gain.half_width:.{places}f} {metric.points} at equal "
        f"{COST_NAMES.get(gain.cost, gain.cost)} (mean over {gain.pairs} of {gain.rivals})"
        for gain in found
    ]
    lower = "; a gain above 0 is a lower value" if metric.goal == "minimize" else ""
    return [
        f"Gain over the best of {_contents(rivals)}: {', '.join(texts)}{lower}; ± is its 90% "
        "interval."
    ]


def prior_lines(posterior: MetricPosterior) -> list[str]:
    """A line for each earlier study, with the correlation that the surrogate has learned."""
    return [
        f"Learned from {study.size} trials of {study.name}: correlation {correlation:.2f}."
        for study, correlation in zip(posterior.earlier, posterior.correlations, strict=True)
        if correlation is not None
    ]


def front_json(study: Study, posterior: MetricPosterior) -> dict[str, Any]:
    """The front, the base model, all baselines with the bases, and the gains as JSON values."""
    base = posterior.base
    return {
        "study": study.config.name,
        "metric": study.config.to_json()["metric"],
        "objectives": list(study.config.objectives),
        "front": [_trial_json(t, posterior) for t in posterior.front()],
        "base": None if base is None else _trial_json(base, posterior),
        "baselines": [_trial_json(t, posterior) for t in baselines(posterior)],
        "gains": [gain.to_json() for gain in gains(posterior)],
        "prior": [
            {"study": study.name, "trials": study.size, "correlation": correlation}
            for study, correlation in zip(posterior.earlier, posterior.correlations, strict=True)
        ],
        "starts": starts.starts_json(starts.compared(posterior.trials), posterior.metric),
    }


def _trial_json(trial: Trial, posterior: MetricPosterior) -> dict[str, Any]:
    name = posterior.metric.name
    keys = ["id", "space", "widths", name, "macs", "params", "latency_ms", "latency"]
    keys += [cost for cost in EXACT_COSTS if cost in posterior.objectives and cost not in keys]
    content = trial.to_json(name)
    chosen = {key: content[key] for key in (*keys, "origin")}
    return {**chosen, "reported": trial.reported, "estimated": posterior[trial].to_json()}


def front_csv(posterior: MetricPosterior) -> str:
    """The front as CSV: one row a member, one column an axis."""
    front = posterior.front()
    out = io.StringIO()
    names = list(dict.fromkeys(name for t in front for name in t.widths))
    metric, others = posterior.metric.name, posterior.others
    columns = ["id", "space", metric, "estimated", "interval_low", "interval_high"]
    columns += ["trainings", "dominated", "macs", "params", "latency_ms", "latency_ratio"]
    columns += [name for name in posterior.objectives if name in EXACT_COSTS[2:]]
    columns += [*others, "origin", *names]
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for t in front:
        estimate = posterior[t]
        row = {key: value for key, value in t.to_json(metric).items() if key in columns}
        row |= {key: t.reported.get(key) for key in others}
        row |= {key: getattr(estimate, key) for key in ("trainings", "dominated")}
        row |= zip(("interval_low", "interval_high"), estimate.interval or (), strict=False)
        row |= {} if t.latency is None else {"latency_ratio": t.latency.ratio}
        row |= {"estimated": estimate.value, "origin": origin_text(t.origin), **t.widths}
        writer.writerow(row)
    return out.getvalue()


def front_tables(study: Study, posterior: MetricPosterior, show: Sequence[str] = ()) -> Group:
    """The front and the best baselines as tables, with footnotes and the gains.

    Args:
        study: The study.
        posterior: Its posterior.
        show: Names of further columns: costs, or numbers that the trainings reported.

    Raises:
        StudyError: There is no such number.
    """
    for name in set(show) - {*EXACT_COSTS, *posterior.others}:
        known = ", ".join((*EXACT_COSTS, *posterior.others))
        raise StudyError(f"a number to show must be one of {known}, but was {name!r}")
    trials, front, base = posterior.trials, posterior.front(), posterior.base
    states = {s: sum(t.state == s for t in trials) for s in ("finished", "stopped", "failed")}
    counted = ", ".join(f"{n} {state}" for state, n in states.items() if n) or "none has ended"
    total = f"{len(trials)} trial{'s' * (len(trials) != 1)}: {counted}."
    if not states["finished"]:
        return Group(
            Text(f"No trial of {study.config.name} has finished yet, so there is no front. {total}")
        )
    costs = [name for name in posterior.objectives if name != posterior.metric.name]
    rivals = best_baselines(posterior, *costs)
    parts: list[RenderableType] = [
        trial_table(f"front of {study.config.name}", front, base, posterior, show),
        _width_lines(front),
    ]
    if rivals:
        title = f"best of {_contents(baselines(posterior))}"
        parts.append(trial_table(title, rivals, base, posterior, show))
    shown = [*front, *rivals]
    if near := confirmed_beside(posterior, shown):
        title = "beside the front: trained again by confirm, to decide whether they are on it"
        parts.append(trial_table(title, near, base, posterior, show))
    if len(front) >= FEW:
        inside = " within the limits" if study.config.limits else ""
        total += (
            f" Hypervolume over {', '.join(posterior.objectives)}, as a share of the box that all "
            f"finished trials{inside} span: front {front_volume(front, posterior):.3f}, "
            f"baselines {front_volume(rivals, posterior):.3f}."
        )
    lines = [total, *gain_lines(posterior), *prior_lines(posterior)]
    if compared := starts.compared(trials):
        metric, macs = posterior.metric, None if base is None else base.cost.macs
        parts.append(starts.starts_table(compared, metric))
        lines += starts.start_lines(compared, metric, starts.base_epochs(study), macs)
    lines += footnotes([*shown, *near], posterior)
    return Group(*parts, *map(Text, (*lines, *latency_remarks(front, base))))


def confirmed_beside(posterior: MetricPosterior, shown: Sequence[Trial]) -> list[Trial]:
    """The networks that ``confirm`` has trained and no other table shows, fewest MACs first."""
    again = {int(t.origin["confirms"]) for t in posterior.trials if "confirms" in t.origin}
    known = {t.architecture for t in shown}
    found = [t for t in posterior.members if t.number in again and t.architecture not in known]
    return sorted(found, key=lambda t: (t.cost.macs, t.number))


def pick_table(study: Study, trial: Trial, spec: str = "") -> Group:
    """A finished trial beside the base, where the study has trained it, with its widths.

    Args:
        study: The study.
        trial: The trial.
        spec: How it was picked; limits on the metric get a line.
    """
    posterior = study.posterior()
    base = posterior.base
    shown = [trial] if base in (None, trial) else [base, trial]
    return Group(
        trial_table(f"pick of {study.config.name}", shown, base, posterior),
        _width_lines([trial]),
        *map(Text, (*limit_lines(posterior, trial, spec), *footnotes(shown, posterior))),
    )


def limit_lines(posterior: MetricPosterior, trial: Trial, spec: str) -> list[str]:
    """What the estimate of a pick says of each limit on the metric; a line a limit."""
    metric, estimate = posterior.metric, posterior[trial]
    lines = []
    for limit in pick_limits(posterior, spec) if spec else ():
        if limit.name != metric.name:
            continue
        line = f"{limit}: by the estimate, {estimate_text(estimate)}{metric.unit}"
        if estimate.interval is not None:
            low, high = map(metric.text, estimate.interval)
            beyond = estimate.interval[0] < limit.value < estimate.interval[1]
            line += f", whose 90% interval, {low} to {high}, "
            line += "reaches beyond the limit" if beyond else "is within the limit"
        lines.append(f"{line}.")
    return lines


def footnotes(shown: Sequence[Trial], posterior: MetricPosterior) -> list[str]:
    """The meaning of the columns and marks in a table of trials; a line each."""
    estimates = {t.number: posterior[t] for t in shown}
    metric = posterior.metric
    lines = [f"{_column(metric)}: validation {metric.name} of one training."]
    surrogate = posterior.surrogate
    if surrogate is None:
        lines.append(
            f"{_estimated(metric)}: mean {metric.name} of the network's trainings; intervals"
            f"{' and what earlier studies tell' * bool(posterior.earlier)} need {ENOUGH} finished "
            "trainings."
        )
    else:
        lines.append(
            f"{_estimated(metric)}: {'expected' if metric.kind == 'linear' else 'median'} "
            f"{metric.name} over seeds, estimated from all trainings; ± is its 90% interval. One "
            f"training varies by {_noise(posterior)} (standard deviation). Of {surrogate.size} "
            f"trainings, {surrogate.coverage(0.9):.0%} lie in the 90% interval that the others "
            "predict."
        )
    if any(t.latency is not None for t in shown):
        lines.append(
            "ms, ms/base: measured latency, and its ratio to the base's, measured in turn."
        )
    if any(estimate.trainings > 1 for estimate in estimates.values()):
        lines.append("(n×): the network was trained n times.")
    doubtful = [str(n) for n, estimate in estimates.items() if estimate.doubtful]
    if doubtful:
        lines.append(
            "?: P(dominated) is above one half: the probability that another trained network costs "
            f"no more and is better ({', '.join(doubtful)}). widthsearch confirm trains uncertain "
            "members of the front again."
        )
    return lines


def _column(metric: Metric) -> str:
    """The head of the column of single trainings."""
    return "acc %" if metric.unit else metric.name


def _estimated(metric: Metric) -> str:
    """The head of the column of estimates."""
    return f"estimated {metric.unit}".rstrip()


def _noise(posterior: MetricPosterior) -> str:
    """The noise of one training."""
    metric, noise = posterior.metric, posterior.noise or 0.0
    places = metric.decimals(posterior.value(posterior.members[0]))
    at = "" if metric.kind == "linear" else " at the median network"
    return f"{noise:.{places}f} {metric.points}{at}"


def forecast_table(forecasts: Sequence[Forecast]) -> Group:
    """The forecast of families at every size, and the best next training."""
    several = len({each.space for each in forecasts}) > 1
    table = Table(title="forecast of the families", box=box.SIMPLE_HEAD, pad_edge=False)
    metric = forecasts[0].estimate.metric if forecasts else ACCURACY
    columns = [*(["space"] if several else []), "origin", "MACs", _estimated(metric)]
    columns += ["P(beats front)"]
    _add_columns(table, columns)
    for each in sorted(forecasts, key=lambda e: (e.space, origin_text(e.origin), e.cost.macs)):
        table.add_row(
            *([each.space] if several else []),
            origin_text(each.origin),
            short(each.cost.macs),
            estimate_text(each.estimate)
            + " †" * (not each.within_limits)
            + " *" * each.extrapolated,
            "trained" if each.trained else f"{each.beats_front:.0%}",
        )
    lines = [
        "P(beats front): the probability that it is better than every trained network within the "
        "limits with no more MACs."
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
            f"Train next: {origin_text(best.origin)}"
            f"{f' of {best.space}' * several}, {dict(best.widths)}, expected gain "
            f"{best.gain:.{metric.decimals(best.estimate.value)}f} {metric.points} over the "
            "trained networks within its MACs."
        )
    return Group(uncut(table), *map(Text, lines))


def front_volume(members: Sequence[Trial], posterior: MetricPosterior) -> float:
    """The hypervolume of some trials, as a share of the box that all finished ones span.

    By estimated value. Networks outside the limits do not widen the box.
    """
    if not members:
        return 0.0

    every = posterior.points(posterior.members_within_limits)
    low, high = every.min(0), every.max(0)
    span = np.where(high > low, high - low, 1.0)
    return pareto.hypervolume((posterior.points(members) - low) / span, np.ones_like(low))


def trial_table(
    title: str,
    trials: Sequence[Trial],
    base: Trial | None,
    posterior: MetricPosterior,
    show: Sequence[str] = (),
) -> Table:
    """Finished trials with their value of the metric, and with their costs beside the base's."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    timed = any(t.latency is not None for t in trials)
    several = len({t.space for t in (*trials, *([base] if base else []))}) > 1
    metric = posterior.metric
    further = [
        name
        for name in dict.fromkeys((*posterior.objectives, *show))
        if name not in (metric.name, "macs", "latency_ms")
    ]
    columns = ["id", *(["space"] if several else []), "origin", _column(metric)]
    columns += [_estimated(metric), "MACs", "MACs/base", *further]
    _add_columns(table, columns + (["ms", "ms/base"] if timed else []))
    for t in trials:
        estimate = posterior[t]
        text = estimate_text(estimate)
        text += f" ({estimate.trainings}×)" if estimate.trainings > 1 else ""
        text += " ?" if estimate.doubtful else ""
        row = [str(t.number), *([t.space] if several else []), origin_text(t.origin)]
        row += [metric.text(objective_value(t, metric.name, metric)), text, short(t.cost.macs)]
        row += [f"{t.cost.macs / base.cost.macs:.2f}" if base else ""]
        row += ["" if math.isnan(v := cost_value(t, name)) else short(v) for name in further]
        if timed and t.latency is not None:
            row += [f"{t.latency.median_ms:.3g}", f"{t.latency.ratio:.2f}"]
        table.add_row(*map(Text, row))
    return uncut(table)


def _add_columns(table: Table, columns: Sequence[str]) -> None:
    """Columns of networks: spaces and origins may wrap, numbers may not."""
    for column in columns:
        words = column in ("space", "origin")
        left = words or column.startswith("estimated")
        table.add_column(column, justify="left" if left else "right", no_wrap=not words)


def _width_lines(trials: Sequence[Trial]) -> Text:
    """The widths of some trials, a line each, below the names of their axes."""
    if not trials:
        return Text(
            "no finished trial has all objectives and is within the limits: train more, or change "
            "`limits`"
        )
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


def write_front(study: Study, posterior: MetricPosterior) -> str:
    """Write ``front.json`` into the study's folder; returns a line that says where, or why not."""
    file = study.folder / "front.json"
    text = json.dumps(front_json(study, posterior), indent=1) + "\n"
    try:
        write_atomically(file, lambda opened: opened.write(text.encode()))
    except OSError as error:
        return f"not written: {file}: {error.strerror}"
    return f"written: {file}"
