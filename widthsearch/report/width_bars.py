"""Pictures of a width vector beside the base: bars in a terminal, and a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 64
"""More axes than this share lines, stage by stage."""
BARS = 40
"""More axes than this are drawn as steps."""

_NAME, _BAR = 28, 22  # cells
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def width_bars(space: SearchSpace, widths: Widths) -> Table:
    """Each axis's width before and after, as numbers and as a bar, with the share that is kept.

    A bar is as long as the axis is wide: solid is what is there after, ``░`` what is gone, ``▓``
    what is new. Of more than :data:`LINES` axes, those of a stage (what the first part of their
    names says) with the same width before share a line: the range and the mean of what is left.
    """
    rows = list(zip(_short(space), space.base.values(), widths.values(), strict=True))
    grouped = len(rows) > LINES
    lines: dict[tuple[str, int], list[int]] = {}
    for name, before, after in rows:
        lines.setdefault((name.split(".")[0] if grouped else name, before), []).append(after)
    widest = max(max(before, after) for _, before, after in rows)
    table = Table(title=f"{space.name}: widths", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage" if grouped else "axis", no_wrap=True)
    for column in (*(["axes"] if grouped else []), "before", "after", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for (name, before), members in lines.items():
        mean, low, high = sum(members) / len(members), min(members), max(members)
        table.add_row(
            Text(_elided(name, _NAME)),
            *([str(len(members))] if grouped else []),
            str(before),
            str(low) if low == high else f"{low}–{high}",
            f"{mean / before:.0%}",
            Text(bar(before, mean, widest), style="green" if mean > before else "cyan"),
        )
    return table


def bar(before: float, after: float, widest: float, room: int = _BAR) -> str:
    """A width before and after in one line.

    Args:
        before: The width before.
        after: The width after.
        widest: The width that fills the room.
        room: In cells.
    """
    eighths = max(1, round(8 * room * min(before, after) / widest))
    solid = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    rest = round(room * max(before, after) / widest) - len(solid)
    return solid + ("░" if after < before else "▓") * rest


def save_width_bars(space: SearchSpace, widths: Widths, path: Path | str) -> None:
    """Write the same as a PNG: bars, and of more than :data:`BARS` axes steps on a log scale.

    Raises:
        OSError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(space.axes)
    size = (7.0, 1.1 + 0.24 * n) if n <= BARS else (max(9.0, 0.9 + 0.13 * n), 5.0)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    before, after = list(space.base.values()), list(widths.values())
    (_draw_bars if n <= BARS else _draw_steps)(axes, _short(space), before, after)
    macs = space.cost(widths).macs / space.cost(space.base).macs
    axes.set_title(f"{space.name}: {macs:.3g} of the base's MACs")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def _draw_bars(axes: Axes, names: list[str], before: list[int], after: list[int]) -> None:
    places = range(len(names))
    axes.barh(places, before, height=0.8, color="0.85", label="before")
    axes.barh(places, after, height=0.45, color="tab:blue", label="after")
    for y, (b, a) in enumerate(zip(before, after, strict=True)):
        axes.annotate(f" {b} → {a}" if a != b else f" {b}", (max(a, b), y), va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(*before, *after))
    axes.set_xlabel("channels")


def _draw_steps(axes: Axes, names: list[str], before: list[int], after: list[int]) -> None:
    places = range(len(names))
    axes.fill_between(places, before, after, step="mid", color="0.9")
    axes.step(places, before, where="mid", color="0.5", label="before")
    axes.step(places, after, where="mid", color="tab:blue", label="after")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(places, names, fontsize=6, rotation=90)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel("channels")
    axes.grid(alpha=0.3)


def _short(space: SearchSpace) -> list[str]:
    """The axes' names without what all begin with (``features.``)."""
    parts = [axis.name.split(".") for axis in space.axes]
    shared = 0
    while len({tuple(p[: shared + 1]) for p in parts}) == 1 and min(map(len, parts)) > shared + 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def _elided(name: str, room: int) -> str:
    """The name, without its middle where it is too long."""
    if len(name) <= room:
        return name
    return f"{name[: room // 3]}…{name[-(room - room // 3 - 1) :]}"
