"""The overhead of a study beyond training: as a ratio, and in seconds per trial.

    python -m benchmarks.overhead [STUDY] [--trials 12 28] [--own]

Runs the study in a temporary folder in a process of its own, as a user would, and reads the
training time of every epoch from its trials. The overhead consists of starting Python, torch and
Ray, tracing, proposals, latency measurements (which have the machine to themselves), evaluation,
checkpoints, the storage, and idle workers at the ends of generations.

With two numbers of ``--trials`` the study runs twice, one trial at a time and without latency. The
difference of the times, minus the difference of the training times, is the overhead of the
additional trials: asking the sampler, starting, evaluation, checkpoints, reports.

With ``--own`` the built-in trainer is given as users give their own, with its data
as a function: the same training, through ``trainer:`` and ``data:``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from widthsearch import Study, Task, load_task
from widthsearch.study.config import StudyConfig
from widthsearch.study.trial import Trial


def digits() -> Task:
    """The data of ``--own``."""
    return load_task("digits").for_search()


def with_own_trainer(config: StudyConfig) -> StudyConfig:
    """The same study, with the built-in trainer as a user's own."""
    values = config.to_json()
    assert values["task"]["name"] == "digits", "--own needs a study of the digits"
    proposers = [method.method for method in config.proposers if not method.reads_data()]
    changes = {
        "task": None,
        "trainer": "widthsearch.training.trainer:train_classifier",
        "data": "benchmarks.overhead:digits",
        "proposers": proposers or ["synflow"],
        "concurrency": config.concurrency if config.concurrency != "auto" else 1,
    }
    return StudyConfig(**values | changes)


def timed(config: StudyConfig) -> tuple[float, list[Trial]]:
    """Seconds of `widthsearch run`, and what came of it."""
    with tempfile.TemporaryDirectory() as runs:
        file = Path(runs, "study.yaml")
        file.write_text(config.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "widthsearch", "run", str(file), "--runs", runs]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        return wall, Study.load(config.name, runs).trials()


def trained(trials: list[Trial]) -> float:
    """Seconds of pure training."""
    return sum(result.seconds for trial in trials for result in trial.curve)


def whole(config: StudyConfig) -> None:
    wall, trials = timed(config)
    ideal = trained(trials) / config.at_once
    print(f"study                                   {config.name}")
    print(
        f"trials, epochs                          {len(trials)}, "
        f"{sum(len(trial.curve) for trial in trials)}"
    )
    print(f"wall time                               {wall:8.1f} s")
    print(f"pure training time                      {trained(trials):8.1f} s")
    print(f"pure training time ÷ concurrency ({config.at_once})      {ideal:8.1f} s")
    print(f"overhead: wall ÷ (training ÷ concurrency) {wall / ideal:6.2f}")


def per_trial(config: StudyConfig, few: int, many: int) -> None:
    objectives = tuple(name for name in config.objectives if name != "latency_ms")
    changes = {"objectives": objectives, "latency": None, "concurrency": 1, "limits": {}}
    runs = [
        timed(config.model_copy(update={**changes, "trials": trials})) for trials in (few, many)
    ]
    (short, first), (long, second) = runs
    more = len(second) - len(first)
    training = trained(second) - trained(first)
    overhead = (long - short - training) / more
    print(f"{more} trials more: {long - short:.1f} s, of which training {training:.1f} s")
    print(f"overhead of a trial: {overhead:.2f} s, {overhead / 30:.1%} of a 30-second trial")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", type=Path, default=Path("studies/quickstart.yaml"))
    parser.add_argument("--trials", type=int, nargs=2, metavar=("FEW", "MANY"))
    parser.add_argument("--own", action="store_true")
    options = parser.parse_args()
    config = StudyConfig.from_yaml(options.study)
    if options.own:
        config = with_own_trainer(config)
    if options.trials:
        per_trial(config, *options.trials)
    else:
        whole(config)


if __name__ == "__main__":
    main()
