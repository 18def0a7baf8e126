"""The live view of a run: a table in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from widthsearch.report.console import open_console, print_line
from widthsearch.study.progress import OnProgress, Progress


class LiveView:
    """Shows a run: a live table in a terminal, one line per ended trial elsewhere.

    Events and warnings stay on the screen, above the table.

    Example:
        >>> import sys
        >>> console = Console(file=sys.stdout)
        >>> with LiveView("mine", console) as view:
        ...     view(Progress(2, 1, 8, 91.25, 2, elapsed=75.0, remaining=600.0))
        2/8 trials, best 91.25%, front 2, 1:15 elapsed, 10:00 left
    """

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._shown = -1

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show the progress of the study."""
        if progress.level != "status":
            style = "yellow" if progress.level == "warning" else ""
            print_line(self._console, progress.message, style)
        if self._console.is_terminal:
            self._live.update(progress_table(self._name, progress), refresh=True)
        elif progress.done != self._shown:
            self._shown = progress.done
            print_line(self._console, progress_line(progress))


@contextmanager
def showing(
    name: str, on_progress: OnProgress | None = None, *, quiet: bool = False
) -> Iterator[OnProgress | None]:
    """What shows the progress of a study: a function that is given, or a view on standard error.

    Args:
        name: The study's name.
        on_progress: Shows the progress in place of the view.
        quiet: Whether there is no view.

    Example:
        >>> with showing("mine", quiet=True) as shown:
        ...     print(shown)
        None
    """
    if on_progress is not None or quiet:
        yield on_progress
    else:
        with LiveView(name, open_console(stderr=True)) as view:
            yield view


def progress_line(progress: Progress) -> str:
    """The progress of a study in one line, with its message if it is a status."""
    parts = [f"{progress.done}/{progress.total} trials"]
    metric = progress.metric
    if progress.best_value is not None:
        best = f"{metric.text(progress.best_value)}{metric.unit}"
        name = "" if metric.unit else f"{metric.name} "
        parts.append(f"{'estimated ' * progress.estimated}best {name}{best}")
        parts.append(f"front {progress.front_size}")
    parts.append(f"{_clock(progress.elapsed)} elapsed")
    if progress.remaining is not None:
        parts.append(f"{_clock(progress.remaining)} left")
    if progress.level == "status" and progress.message:
        parts.append(progress.message)
    return ", ".join(parts)


def progress_table(name: str, progress: Progress) -> Table:
    """The progress of a study as a table, with its message if it is a status."""
    table = Table(title=name)
    metric, best = progress.metric, progress.best_value
    best_column = f"{'estimated ' * progress.estimated}best {metric.unit or metric.name}"
    for column in ("trials", "running", best_column, "front", "elapsed", "left", "done"):
        table.add_column(column, justify="right")
    left = progress.remaining
    table.add_row(
        f"{progress.done}/{progress.total}",
        str(progress.running),
        "" if best is None else metric.text(best),
        str(progress.front_size),
        _clock(progress.elapsed),
        "" if left is None else _clock(left),
        ProgressBar(total=progress.total, completed=progress.done, width=24),
    )
    if progress.level == "status":
        table.caption = Text(progress.message)
    return table


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
