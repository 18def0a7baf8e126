"""What a study would do, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from widthsearch.report.console import short, uncut
from widthsearch.report.tables import origin_text

if TYPE_CHECKING:
    from widthsearch.runner.dry_run import DryRun


def dry_run_tables(name: str, dry: DryRun) -> Group:
    """The planned networks, the measured epochs, and the estimated hours.

    Args:
        name: The study's name.
        dry: The result of the dry run.
    """
    base = dry.measured[0].cost
    planned = Table(title=f"{name}: trained before any network is suggested")
    for column in ("origin", "MACs", "of the base", "parameters", "widths"):
        planned.add_column(column, justify="left" if column in ("origin", "widths") else "right")
    for trial in dry.planned:
        planned.add_row(
            Text(origin_text(trial.origin)),
            short(trial.cost.macs),
            f"{trial.cost.macs / base.macs:.3f}",
            short(trial.cost.params),
            " ".join(map(str, trial.widths.vector)),
        )
    on_gpu = any(each.gpu_memory is not None for each in dry.measured)
    measured = Table(title="one epoch, by itself")
    for column in ("network", "MACs", "parameters", "seconds", "memory", *["GPU"] * on_gpu):
        measured.add_column(column, justify="left" if column == "network" else "right")
    for each in dry.measured:
        gpu = [f"{short(each.gpu_memory or 0)}B"] * on_gpu
        measured.add_row(
            each.name,
            short(each.cost.macs),
            short(each.cost.params),
            f"{each.seconds:.3g}",
            f"{short(each.memory)}B",
            *gpu,
        )
    lines = [f"not run: proposer {method}: {reason}" for method, reason in dry.skipped.items()]
    lines += [
        f"objective {name} was not reported yet: trials whose last report lacks it fail"
        for name in dry.unreported
    ]
    more = f" ({dry.mean_epochs:.3g} in the mean, with scratch_b)" * ("scratch_b" in dry.starts)
    lines.append(
        f"estimated: {_duration(dry.hours)} for {dry.trials} trials of {dry.epochs} epochs{more}, "
        f"{dry.at_once} at once, if none slows another down and none is stopped early; "
        "suggestions are taken to be as large as the networks above; the start of Ray, and half a "
        "second a trial, come on top"
    )
    if dry.limit is not None and dry.hours > dry.limit:
        fit = int(dry.trials * dry.limit / dry.hours)
        lines.append(f"about {fit} of the {dry.trials} trials fit into {dry.limit:g} hours")
    parts: list[RenderableType] = [uncut(planned), measured, *map(Text, lines)]
    return Group(*parts)


def _duration(hours: float) -> str:
    """A time in the unit that suits it."""
    if hours < 2 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 2:
        return f"{hours * 60:.2g} minutes"
    return f"{hours:.2g} hours"
