"""The command line: each command parses its arguments, calls one function and prints the result.

Exit codes: 0 success; 1 some trial or proposer failed; 2 invalid input, or no trial finished (one
line names the cause); 130 interrupted (one line has the command that resumes).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from widthsearch import __version__
from widthsearch.errors import DeviceError, StudyError, WidthsearchError, writing

SHARES = 16
"""Budgets up to this are shares of the base's MACs; larger ones are MACs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: Those of the command line; by default the process's own.

    Example:
        >>> main(["space", "torchvision:resnet19"])  # one line on standard error
        2
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    again = shlex.join(["widthsearch", *arguments])
    try:
        code: int = options.command(options)
    except WidthsearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; resume with: {again}", file=sys.stderr)
        return 130
    return code


def _run(options: argparse.Namespace) -> int:
    """Run a study, or resume it, and print its front."""
    from widthsearch.api import Study
    from widthsearch.report import tables
    from widthsearch.report.console import open_console, print_line, print_tables
    from widthsearch.report.progress import LiveView
    from widthsearch.study.trial import unresolved_failures

    study = Study.load(options.study, options.runs)
    console = open_console()
    with LiveView(study.config.name, console) as view:
        study.run(view, retry=options.retry)
    posterior = study.posterior()
    print_tables(console, tables.front_tables(study, posterior))
    print_line(console, tables.write_front(study, posterior))
    failed = unresolved_failures(posterior.trials)
    for trial in failed:
        print_line(console, f"failed: trial {trial.number}: {trial.error}")
    for method, reason in study.failures.items():
        print_line(console, f"failed: proposer {method}: {reason}")
    runs = "" if options.runs == "runs" else f" --runs {options.runs}"
    print_line(console, f"next: widthsearch train {study.config.name} --pick knee{runs}")
    return 1 if failed or study.failures else 0


def _space(options: argparse.Namespace) -> int:
    """Print a space: its axes with their shares of MACs, and its pinned widths with reasons."""
    from widthsearch.api import Study
    from widthsearch.report import space_tables
    from widthsearch.report.console import open_console, print_line, print_tables
    from widthsearch.space.loading import load_space
    from widthsearch.utils.devices import check_device

    if options.space.endswith((".yaml", ".yml")) and options.input is None:
        space = Study.load(options.space).space
    else:
        space = load_space(options.space, options.input)
    widths = None if options.widths is None else space.load_widths(options.widths)
    if options.json:
        content = space_tables.space_json(space)
        if widths is not None:
            content["widths"] = widths.to_json()
            content["cost"] = asdict(space.cost(widths))
        print(json.dumps(content, indent=1))
    else:
        console = open_console()
        print_tables(console, space_tables.space_tables(space))
        if widths is not None:
            print_line(console, f"{options.widths}: {space_tables.cost_line(space, widths)}")
    if options.check:
        if options.device != "meta":
            check_device(options.device)
        checked = space.check(device=options.device)
        print(checked, file=sys.stderr if options.json else sys.stdout)
    return 0


def _propose(options: argparse.Namespace) -> int:
    """Print one method's widths at a budget beside the base's."""
    from widthsearch.api import Study
    from widthsearch.data.config import TaskConfig
    from widthsearch.data.tasks import load_task
    from widthsearch.latency.config import LatencyConfig
    from widthsearch.latency.profiles import load_profile
    from widthsearch.proposers import Setting
    from widthsearch.report import space_tables, width_bars
    from widthsearch.report.console import open_console, print_line, print_tables
    from widthsearch.space.loading import load_space
    from widthsearch.study.config import ProposerConfig
    from widthsearch.study.proposals import propose_at_budget
    from widthsearch.training.recipe import Recipe

    study = Study.load(options.space) if options.space.endswith((".yaml", ".yml")) else None
    space = load_space(options.space, options.input) if study is None else study.space
    task, recipe = None, Recipe() if study is None else study.config.recipe
    if options.task is not None:
        task = load_task(TaskConfig(options.task, options.folder))
    elif study is not None:
        task = study.task
    if options.epochs is not None:
        recipe = replace(recipe, epochs=options.epochs)
    config = ProposerConfig.of(options.method, dict(options.set))
    measured = study.config.latency if study is not None else None
    try:
        profile = load_profile(space, measured or LatencyConfig())
    except DeviceError:  # the study measures latency on a device of another machine
        profile = None
    if profile is None and getattr(config.make(config.method), "per", None) == "latency":
        given = "" if options.input is None else f" --input {'x'.join(map(str, options.input))}"
        raise StudyError(
            f"`per: latency` needs predicted latency, but {space.name!r} has no profile here: run "
            f"`widthsearch profile {options.space}{given}` first, or use `per: macs`"
        )
    base = space.cost(space.base).macs
    budget = options.budget * (base if options.budget <= SHARES else 1)
    console = open_console(stderr=options.json)
    seed = options.seed if options.seed is not None or study is None else study.config.seed
    with console.status(options.method) as status:
        setting = Setting(
            seed or 0,
            options.device,
            recipe,
            latency=None if profile is None else profile.predicted,
            report=lambda line: status.update(f"{options.method}: {line}"),
        )
        widths, proposal = propose_at_budget(config, space, budget, task, setting)
    if options.json:
        print(json.dumps(space_tables.proposal_json(space, widths, proposal), indent=1))
    else:
        print_tables(console, width_bars.width_bars(space, widths))
        print_line(console, space_tables.cost_line(space, widths))
    if options.out is not None:
        with writing(Path(options.out).parent):
            space.save_widths(options.out, widths)
        print_line(console, f"written: {options.out}")
    if options.plot is not None:
        with writing(Path(options.plot).parent):
            width_bars.save_width_bars(space, widths, options.plot)
        print_line(console, f"written: {options.plot}")
    return 0


def _profile(options: argparse.Namespace) -> int:
    """Measure networks of a space on a device, to predict the latency of all others."""
    from widthsearch.api import Study
    from widthsearch.latency import profiles as profiling
    from widthsearch.latency.config import LatencyConfig
    from widthsearch.report.console import open_console, print_line, print_tables
    from widthsearch.space.loading import load_space

    config = LatencyConfig()
    if options.space.endswith((".yaml", ".yml")):
        study = Study.load(options.space)
        config = study.config.latency or config
        spaces = list(study.spaces.values())
    else:
        spaces = [load_space(options.space, options.input)]
    changes = {
        key: getattr(options, key)
        for key in ("device", "backend", "batch_size", "threads", "dtype", "pairs")
        if getattr(options, key) is not None
    }
    config = replace(config, **changes)
    console = open_console()
    for space in spaces:
        with console.status(f"measuring {space.name}") as status:
            model = profiling.measure_profile(
                space,
                config,
                vectors=options.vectors,
                on_progress=lambda done, all_: status.update(f"measured {done} of {all_} networks"),
            )
        print_tables(console, profiling.profile_table(model))
        print_line(console, f"written: {profiling.profile_path(space, config)}")
    return 0


def _pareto(options: argparse.Namespace) -> int:
    """Print a study's front and the uniform baseline, and write front.json."""
    from widthsearch.api import Study
    from widthsearch.report import tables
    from widthsearch.report.console import open_console, print_line, print_tables

    study = Study.load(options.study, options.runs)
    posterior, forecasts = study.posterior(), None
    if options.families:
        from widthsearch.report.forecast import forecast

        forecasts = forecast(study, posterior)
    console = open_console(stderr=options.json or options.csv)
    if options.json:
        content = tables.front_json(study, posterior)
        if forecasts is not None:
            content["families"] = [each.to_json() for each in forecasts]
        print(json.dumps(content, indent=1))
    elif options.csv:
        print(tables.front_csv(posterior), end="")
    else:
        print_tables(console, tables.front_tables(study, posterior))
        if forecasts is not None:
            print_tables(console, tables.forecast_table(forecasts))
    print_line(console, tables.write_front(study, posterior))
    if options.plot is not None:
        from widthsearch.report.front_plot import draw_front

        picture = Path(options.plot or study.folder / "front.png")
        with writing(picture.parent):
            draw_front(study, posterior).savefig(picture, format="png", dpi=120)
        print_line(console, f"written: {picture}")
    return 0


def _confirm(options: argparse.Namespace) -> int:
    """Train the front again with fresh seeds, where it is uncertain, and print it."""
    from widthsearch.api import Study
    from widthsearch.report import tables
    from widthsearch.report.console import open_console, print_line, print_tables
    from widthsearch.report.progress import LiveView

    study = Study.load(options.study, options.runs)
    console = open_console()
    with LiveView(study.config.name, console) as view:
        study.confirm(options.seeds, view)
    posterior = study.posterior()
    print_tables(console, tables.front_tables(study, posterior))
    print_line(console, tables.write_front(study, posterior))
    return 0


def _train(options: argparse.Namespace) -> int:
    """Train a network of a study in full, test it, and write a folder that loads."""
    from widthsearch import export
    from widthsearch.api import Study
    from widthsearch.report import tables
    from widthsearch.report.console import open_console, print_line, print_tables
    from widthsearch.training.recipe import EpochResult

    study = Study.load(options.study, options.runs)
    trial = study.pick(options.pick)
    folder = Path(options.out) if options.out else study.folder / "trained" / str(trial.number)
    console = open_console()
    print_tables(console, tables.pick_table(study, trial))

    def on_epoch(number: int, result: EpochResult) -> None:
        print_line(
            console,
            f"network {number + 1}/{options.seeds}, epoch {result.epoch}: loss {result.loss:.4f}, "
            f"accuracy on training images {result.accuracy:.2f}%",
        )

    card = export.train(
        study,
        trial,
        seeds=options.seeds,
        epochs=options.epochs,
        device=options.device,
        folder=folder,
        on_epoch=on_epoch,
    )
    test = card["test_accuracy"]
    of = "one seed"
    if options.seeds > 1:
        of = f"mean of {options.seeds} seeds (standard deviation {test['std']:.2f})"
    print_line(
        console,
        f"test accuracy {test['mean']:.2f}%, {of}; written to {folder}; load it with "
        f"widthsearch.load({str(folder)!r})",
    )
    return 0


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"an input shape is like 3x224x224, not {text!r}")
    return shape


def _budget(text: str) -> float:
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget < math.inf:
        raise argparse.ArgumentTypeError(
            f"a budget is a share of the base's MACs such as 0.5, or MACs such as 4e6, not {text!r}"
        )
    return budget


def _field(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"a field is like batch_size=64, not {text!r}")
    import yaml

    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"a field's value is YAML, not {value!r}") from None


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all errors of the package."""

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="widthsearch", description="Network pruning as a search over layer widths."
    )
    parser.add_argument("--version", action="version", version=f"widthsearch {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: object, about: str) -> argparse.ArgumentParser:
        line = str(function.__doc__).splitlines()[0]
        made = commands.add_parser(name, help=line, description=line)
        made.set_defaults(command=function)
        if about == "study":
            made.add_argument("study", help="a study's name, its folder or its YAML file")
            made.add_argument(
                "--runs", default="runs", help="the folder of the studies (default: runs)"
            )
        else:
            made.add_argument(
                "space",
                help="torchvision:NAME, package.module:function, path/to/file.py:function, or a "
                "study's YAML file",
            )
            made.add_argument("--input", type=_shape, help="the shape of one sample: 3x224x224")
        return made

    add = command("run", _run, "study").add_argument
    add("--retry", action="store_true", help="train the failed trials again")

    add = command("space", _space, "space").add_argument
    add("--widths", metavar="FILE", help="print the costs of a widths file too")
    add(
        "--check",
        action="store_true",
        help="build and run the narrowest, the widest and random networks, and compare their costs",
    )
    add("--device", default="cpu", help="device of --check; meta computes shapes (default: cpu)")
    add("--json", action="store_true", help="print JSON")

    add = command("propose", _propose, "space").add_argument
    add("--method", required=True, help="a proposer such as sensitivity, or your own: module:name")
    add(
        "--budget",
        type=_budget,
        required=True,
        help=f"a share of the base's MACs (up to {SHARES}), or MACs: 0.5 or 4e6",
    )
    add("--task", help="the data: digits, cifar10, image_folder, or your own as module:function")
    add("--folder", help="the folder of the task's data")
    add(
        "--set",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the method, such as batch_size=64",
    )
    add("--epochs", type=int, help="epochs of a method that trains (default: the recipe's)")
    add("--seed", type=int, help="seed of the method (default: the study's, or 0)")
    add("--device", default="cpu", help="device of the method (default: cpu)")
    add("--json", action="store_true", help="print JSON")
    add("--out", metavar="FILE", help="write the widths as JSON")
    add("--plot", metavar="FILE", help="draw the widths beside the base as a PNG")

    add = command("profile", _profile, "space").add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cpu, or the study's)")
    add("--backend", help="eager, graph, compile or onnxruntime (default: eager)")
    add("--batch-size", type=int, help="images in a batch (default: 1)")
    add("--threads", type=int, help="CPU threads (default: 1)")
    add("--dtype", help="float32 or bfloat16 (default: float32)")
    add("--pairs", type=int, help="blocks of each network, in turn with the base (default: 40)")
    add("--vectors", type=int, default=40, help="networks in the profile (default: 40)")

    pareto = command("pareto", _pareto, "study")
    add, form = pareto.add_argument, pareto.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    add("--families", action="store_true", help="forecast each proposal's family at every size")
    add(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw the front as a PNG (default: front.png in the study's folder)",
    )

    add = command("confirm", _confirm, "study").add_argument
    add("--seeds", type=int, default=3, help="mean trainings of a member of the front (default: 3)")

    add = command("train", _train, "study").add_argument
    add(
        "--pick",
        default="knee",
        help="the ID of a finished trial, or from the front: best, knee, or the most accurate "
        "within a limit such as 'macs<=2e6' (default: knee)",
    )
    add("--seeds", type=int, default=3, help="networks to train (default: 3)")
    add("--epochs", type=int, help="epochs of training (default: the recipe's)")
    add("--device", help="device of training, such as cuda:0 (default: the study's)")
    add("--out", help="the folder to write (default: trained/ID in the study's folder)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
