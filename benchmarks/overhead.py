"""What a study costs beyond training: wall time over (training time ÷ concurrency), as a ratio.

    python -m benchmarks.overhead [STUDY]

Runs the study in a temporary folder in a process of its own, as a user would, and reads the
training time of every epoch from its outcomes. What is on top of the 1 that training alone would
take: starting Python, torch and Ray, tracing, proposals, latency measurements (which have the
machine to themselves), evaluation, checkpoints, the storage, and idle ends of generations.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

from widthsearch import Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", default="studies/quickstart.yaml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "widthsearch.cli", "run", options.study, "--runs", runs]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        study = Study.load(options.study, runs)
        outcomes = study.outcomes()
    epochs = sum(len(o.curve) for o in outcomes)
    training = sum(result.seconds for o in outcomes for result in o.curve)
    ideal = training / study.config.concurrency
    print(f"study                                   {study.config.name}")
    print(f"trials, epochs                          {len(outcomes)}, {epochs}")
    print(f"wall time                               {wall:8.1f} s")
    print(f"pure training time                      {training:8.1f} s")
    print(f"pure training time ÷ concurrency ({study.config.concurrency})      {ideal:8.1f} s")
    print(f"overhead: wall ÷ (training ÷ concurrency) {wall / ideal:6.2f}")


if __name__ == "__main__":
    main()
