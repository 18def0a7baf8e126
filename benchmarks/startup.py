"""Start-up time of reading commands, as a ratio to importing the libraries that they need.

    python -m benchmarks.startup STUDY [--runs runs] [--repeats 7]

Times `widthsearch pareto STUDY`, `--version` and `--help`, and a process that imports optuna,
sqlalchemy, the parts of scipy that the surrogate uses, numpy and rich. All are processes of their
own, in turn, so that other load on the machine meets all of them alike; the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

LIBRARIES = "import optuna, sqlalchemy.orm, scipy.linalg, scipy.optimize, numpy, rich.table"


def seconds(arguments: list[str]) -> float:
    """Wall time of one Python process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    command = ["-m", "widthsearch"]
    commands = {
        "importing the libraries": ["-c", LIBRARIES],
        f"pareto {options.study}": [*command, "pareto", options.study, "--runs", options.runs],
        "--help": [*command, "--help"],
        "--version": [*command, "--version"],
    }
    for arguments in commands.values():  # the first run compiles files and fills the disk cache
        seconds(arguments)
    times = {name: list[float]() for name in commands}
    for _ in range(options.repeats):
        for name, arguments in commands.items():
            times[name].append(seconds(arguments))
    base = statistics.median(times["importing the libraries"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:30} {median:6.2f} s   {median / base:5.2f} × importing the libraries")


if __name__ == "__main__":
    main()
