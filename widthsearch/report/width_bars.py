"""Pictures of a width vector beside the base: bars in a terminal, and a PNG."""

from __future__ import annotations

from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from widthsearch.report.console import uncut

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from widthsearch.space.search_space import SearchSpace
    from widthsearch.widths import Widths

LINES = 64
"""More axes than this share lines, stage by stage."""
BARS = 40
"""More axes than this are drawn as steps."""

_BAR = 22  # cells
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def width_bars(space: SearchSpace, widths: Widths) -> Table:
    """Each axis's width before and after, as numbers and as a bar, with the share that is kept.

    A bar is as long as the axis is wide: solid is the width after, ``░`` the removed and ``▓`` the
    added part. A space of more than :data:`LINES` axes has one line for each stage and width
    before: the number of its axes, and the range and the mean of their widths after. A stage is the
    set of axes whose names begin alike, shown as a glob that constraints accept (``layer1.*``).

    Example:
        >>> from rich.console import Console
        >>> from torch import nn
        >>> from widthsearch import SearchSpace
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 10, 3))
        >>> space = SearchSpace.from_model(model, (3, 8, 8), name="plain")
        >>> table = width_bars(space, space.widths([8, 32]))
        >>> Console(width=60).print(table)  # doctest: +NORMALIZE_WHITESPACE
                                 plain: widths
        <BLANKLINE>
         axis   before   after   kept   width
         ─────────────────────────────────────────────────────
         0          16       8    50%   █████▌░░░░░
         1          32      32   100%   ██████████████████████
        <BLANKLINE>
    """
    names = space.names
    rows = list(zip(names, space.base.values(), widths.values(), strict=True))
    grouped = len(rows) > LINES
    parents = [name.split(".")[:-1] for name in names]
    shared = len(commonprefix(parents))  # noqa: RUF071  of lists: it compares whole parts
    lines: dict[tuple[str, int], list[int]] = {}
    for name, before, after in rows:
        parts = name.split(".")
        stage = ".".join(parts[: shared + 1]) + (".*" if len(parts) > shared + 1 else "")
        lines.setdefault((stage if grouped else name, before), []).append(after)
    widest = max(max(before, after) for _, before, after in rows)
    table = Table(title=f"{space.name}: widths", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage" if grouped else "axis", no_wrap=True)
    for column in (*(["axes"] if grouped else []), "before", "after", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("width", no_wrap=True)
    for (name, before), members in lines.items():
        mean, low, high = sum(members) / len(members), min(members), max(members)
        table.add_row(
            Text(name),
            *([str(len(members))] if grouped else []),
            str(before),
            str(low) if low == high else f"{low}–{high}",
            f"{mean / before:.0%}",
            Text(bar(before, mean, widest), style="green" if mean > before else "cyan"),
        )
    return uncut(table)


def bar(before: float, after: float, widest: float, room: int = _BAR) -> str:
    """A width before and after in one line.

    Args:
        before: The width before.
        after: The width after.
        widest: The width that fills the room.
        room: In cells.

    Example:
        >>> bar(8, 4, 8, room=8), bar(8, 12, 16, room=8)
        ('████░░░░', '████▓▓')
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
    from matplotlib.figure import Figure

    n = len(space.axes)
    size = (7.0, 1.1 + 0.24 * n) if n <= BARS else (max(9.0, 0.9 + 0.13 * n), 5.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    before, after = list(space.base.values()), list(widths.values())
    (_draw_bars if n <= BARS else _draw_steps)(axes, list(space.names), before, after)
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
