"""The commands: each calls one function with its parsed options, and prints the result.

A command imports only what it needs: printing a front must not wait for torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from widthsearch.api import Study, dry_run
from widthsearch.errors import DeviceError, StudyError, writing
from widthsearch.latency.config import LatencyConfig
from widthsearch.report import space_tables, tables
from widthsearch.report.console import open_console, print_line, print_tables
from widthsearch.report.progress import LiveView
from widthsearch.study.config import StudyConfig
from widthsearch.study.posterior import MetricPosterior
from widthsearch.study.sections import ProposerConfig
from widthsearch.study.trial import unresolved_failures
from widthsearch.training.recipe import EpochResult
from widthsearch.utils.files import write_atomically
from widthsearch.widths import off_grid

if TYPE_CHECKING:
    from widthsearch.space.search_space import SearchSpace


def run(options: argparse.Namespace) -> int:
    """Run a study, or resume it, and print its front."""
    _goes_with("--json", options.json, "--dry-run", options.dry_run)
    if options.dry_run:
        _takes_no("--dry-run trains none of a study's trials", {"--retry": options.retry})
    study, console = Study.load(options.study, options.runs), open_console(stderr=options.json)
    if options.dry_run:
        return _dry_run(study, console, as_json=options.json)
    with LiveView(study.config.name, console) as view:
        study.run(view, retry=options.retry)
    posterior = _print_front(study, console)
    failed = unresolved_failures(posterior.trials)
    for trial in failed:
        print_line(console, f"failed: trial {trial.number}: {trial.error}")
    for method, reason in study.failures.items():
        print_line(console, f"failed: proposer {method}: {reason}")
    runs = "" if options.runs == "runs" else f" --runs {options.runs}"
    if posterior.front():
        print_line(console, f"next: widthsearch train {study.config.name} --pick knee{runs}")
    return 1 if failed or study.failures else 0


def _dry_run(study: Study, console: Console, *, as_json: bool) -> int:
    """Print what a run of a study would train, and what that would take."""
    from widthsearch.report.dry_run_tables import dry_run_tables

    with LiveView(study.config.name, console) as view:
        dry = dry_run(study, view)
    if as_json:
        print(json.dumps(dry.to_json(), indent=1))
    else:
        print_tables(console, dry_run_tables(study.config.name, dry))
    return 0


def space(options: argparse.Namespace) -> int:
    """Print a space, and check it on request."""
    from widthsearch.utils.devices import check_device

    _goes_with("--device", options.device, "--check", options.check)
    _, (space, *_) = _spaces(options)
    widths = None if options.widths is None else space.load_widths(options.widths, on_grid=False)
    off = None if widths is None else off_grid(space.axes, widths)
    if options.json:
        content = space_tables.space_json(space)
        if widths is not None:
            content["widths"] = widths.to_json()
            content["cost"] = asdict(space.cost(widths))
            content["on_grid"] = off is None
        print(json.dumps(content, indent=1))
    else:
        console = open_console()
        print_tables(console, space_tables.space_tables(space))
        if widths is not None:
            print_line(console, f"{options.widths}: {space_tables.cost_line(space, widths)}")
        if off is not None:
            print_line(console, f"{options.widths} is off the grid that a search stays on: {off}")
    if options.check:
        device = options.device or "cpu"
        if device != "meta":
            check_device(device)
        checked = space.check(device=device)
        print(checked, file=sys.stderr if options.json else sys.stdout)
    return 0


def propose(options: argparse.Namespace) -> int:
    """Print one method's widths at a budget beside the base's."""
    from widthsearch.data.config import TaskConfig
    from widthsearch.data.tasks import AnyTask, open_task
    from widthsearch.latency.profiles import load_profile
    from widthsearch.proposers import Setting
    from widthsearch.report import width_bars
    from widthsearch.study.job import own_task
    from widthsearch.study.proposals import propose_at_budget

    _goes_with("--folder", options.folder, "--task", options.task)
    method = ProposerConfig.of(options.method, dict(options.set))
    task: AnyTask | None = None
    classes = None
    if options.task is not None:
        task = opened = open_task(TaskConfig(options.task, options.folder), options.device)
        classes = opened.classes
    study, (space, *_) = _spaces(options, classes)
    config = StudyConfig(name="none", trials=1) if study is None else study.config
    if study is not None and options.task is None and method.reads_data() is not False:
        task = own_task(study.config) if study.config.trainer else study.task
    recipe = config.method_recipe
    epochs = recipe.epochs if options.epochs is None else options.epochs
    try:
        profile = load_profile(space, config.latency or LatencyConfig())
    except DeviceError:  # the study measures latency on a device of another machine
        profile = None
    if profile is None and getattr(method.make(method.method), "per", None) == "latency":
        given = "" if options.input is None else f" --input {'x'.join(map(str, options.input))}"
        raise StudyError(
            f"`per: latency` needs predicted latency, but {space.name!r} has no profile here: run "
            f"`widthsearch profile {options.space}{given}` first, or use `per: macs`"
        )
    amount, is_share = options.budget
    budget = amount * (space.cost(space.base).macs if is_share else 1)
    console = open_console(stderr=options.json)
    for path in (options.out, options.plot):
        if path is not None:
            _check_writable(Path(path))
    with console.status(options.method) as status:
        setting = Setting(
            config.seed if options.seed is None else options.seed,
            options.device,
            replace(recipe, epochs=epochs),
            latency=None if profile is None else profile.predicted,
            report=lambda line: status.update(f"{options.method}: {line}"),
        )
        widths, proposal = propose_at_budget(method, space, budget, task, setting)
    for line in proposal.warnings:
        print(f"{options.method}: {line}", file=sys.stderr)
    if options.json:
        print(json.dumps(space_tables.proposal_json(space, widths, proposal), indent=1))
    else:
        print_tables(console, width_bars.width_bars(space, widths))
        print_line(console, space_tables.cost_line(space, widths))
    if options.out is not None:
        _write(options.out, lambda path: space.save_widths(path, widths), console)
    if options.plot is not None:
        _write(options.plot, lambda path: width_bars.save_width_bars(space, widths, path), console)
    return 0


def profile(options: argparse.Namespace) -> int:
    """Measure networks of a space on a device, to predict the latency of all others."""
    from widthsearch.latency import profiles

    study, spaces = _spaces(options)
    config = (study and study.config.latency) or LatencyConfig()
    fields = ("device", "backend", "batch_size", "threads", "dtype", "pairs")
    given = {key: getattr(options, key) for key in fields}
    config = replace(config, **{key: value for key, value in given.items() if value is not None})
    console = open_console()
    for space in spaces:
        with console.status(f"measuring {space.name}") as status:
            model = profiles.measure_profile(
                space,
                config,
                vectors=options.vectors,
                on_progress=lambda done, all_: status.update(f"measured {done} of {all_} networks"),
            )
        print_tables(console, profiles.profile_table(model))
        print_line(console, f"written: {profiles.profile_path(space, config)}")
    return 0


def pareto(options: argparse.Namespace) -> int:
    """Print a study's front and the best baselines, and write front.json."""
    if options.json:
        _takes_no("--json prints all reported numbers", {"--show": options.show})
    if options.csv:
        others = {"--families": options.families, "--show": options.show}
        _takes_no("--csv prints the front with all reported numbers", others)
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
        print_tables(console, tables.front_tables(study, posterior, options.show))
        if forecasts is not None:
            print_tables(console, tables.forecast_table(forecasts))
    print_line(console, tables.write_front(study, posterior))
    if options.plot is not None:
        from widthsearch.report.front_plot import draw_front

        def draw(path: Path) -> None:
            figure = draw_front(study, posterior)
            write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

        _write(options.plot or study.folder / "front.png", draw, console)
    return 0


def confirm(options: argparse.Namespace) -> int:
    """Train the front again with fresh seeds, where it is uncertain, and print it."""
    study, console = Study.load(options.study, options.runs), open_console()
    with LiveView(study.config.name, console) as view:
        study.confirm(options.seeds, view)
    _print_front(study, console)
    return 0


def train(options: argparse.Namespace) -> int:
    """Train a network of a study in full, test it, and write a folder that loads."""
    if options.rank_check:
        return _rank_check(options)
    from widthsearch import export

    _goes_with("--members", options.members is not None, "--rank-check", False)
    study = Study.load(options.study, options.runs)
    spec = options.pick or "knee"
    trial = study.pick(spec)
    folder = Path(
        options.out or export.default_folder(study, trial, search_data=options.search_data)
    )
    console = open_console()
    print_tables(console, tables.pick_table(study, trial, spec))

    epochs, metric, seeds = 0, study.config.metric, options.seeds
    status = console.status("reading images")
    held_out = options.search_data or study.config.trainer
    name = metric.name if held_out else f"{metric.name} on training images"

    def on_epoch(number: int, result: EpochResult) -> None:
        nonlocal epochs
        epochs += 1
        status.stop()
        loss = "" if result.loss is None else f"loss {result.loss:.4f}, "
        print_line(
            console,
            f"{'base ' * (number >= seeds)}network {number % seeds + 1}/{seeds}, epoch "
            f"{result.epoch}: {loss}{name} "
            f"{metric.text(result.value)}{metric.unit}",
        )

    def on_message(line: str) -> None:
        status.start()
        status.update(line)

    if study.config.trainer is None and study.task.loading is not None:
        print_line(console, study.task.loading.reason)
    try:
        card = export.train(
            study,
            trial,
            seeds=options.seeds,
            epochs=options.epochs,
            device=options.device,
            folder=folder,
            base=options.base,
            program=options.program,
            search_data=options.search_data,
            on_epoch=on_epoch,
            on_message=on_message,
        )
    finally:
        status.stop()
    if not epochs:
        print_line(console, f"complete: nothing is left to train; remove {folder} to train it anew")
    reference = card["space"]["reference"]
    named = reference is not None and not reference.startswith("torchvision:")
    given = (str(folder), reference) if named else (str(folder),)
    result = f"{card['split']}_{metric.name}"

    def text(figures: dict[str, Any]) -> str:
        spread = "" if seeds == 1 else f" ± {metric.text(figures['std'])}"
        return f"{metric.text(figures['mean'])}{spread}{metric.unit}"

    of = "of one seed" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"
    print_line(console, f"{result.replace('_', ' ', 1)} {text(card[result])}, {of}")
    if (alike := card["base_trained_alike"]) is not None:
        print_line(console, f"the base, trained alike: {text(alike)}")
    elif not trial.origin.get("base"):
        print_line(
            console,
            "the base's figure in the table is of the search's recipe; --base trains it alike",
        )
    print_line(
        console,
        f"written to {folder}; load it with widthsearch.load({', '.join(map(repr, given))})",
    )
    return 0


def _rank_check(options: argparse.Namespace) -> int:
    """Print whether the study's recipe ranks networks as one of more epochs does."""
    from widthsearch.rank_check import rank_check
    from widthsearch.report.rank_tables import rank_tables

    others = {
        "--pick": options.pick,
        "--base": options.base,
        "--no-program": not options.program,
        "--search-data": options.search_data,
    }
    _takes_no("--rank-check trains members of the front on the search's data", others)
    study, console = Study.load(options.study, options.runs), open_console()
    metric, epochs = study.config.metric, study.config.recipe.epochs
    if options.epochs is None:
        raise StudyError(
            f"--rank-check needs --epochs, those of a full training, more than the {epochs} of the "
            f"study's recipe: --epochs {4 * epochs}, say"
        )

    def on_epoch(training: str, result: EpochResult) -> None:
        value = f"{metric.name} {metric.text(result.value)}{metric.unit}"
        print_line(console, f"{training}, epoch {result.epoch}: {value}")

    check = rank_check(
        study,
        options.epochs,
        members=6 if options.members is None else options.members,
        seeds=options.seeds,
        device=options.device,
        folder=options.out,
        on_epoch=on_epoch,
    )
    print_tables(console, rank_tables(study.config.name, check))
    return 0


def _goes_with(option: str, given: object, other: str, there: object) -> None:
    """Refuse an option that does nothing without another one."""
    if given and not there:
        raise StudyError(f"{option} is for {other}: add it, or leave {option} out")


def _takes_no(rule: str, others: Mapping[str, object]) -> None:
    """Refuse options that would do nothing beside the one of a rule."""
    if given := [name for name, value in others.items() if value]:
        raise StudyError(f"{rule}, and takes no {' and no '.join(given)}: leave one of the two out")


def _spaces(
    options: argparse.Namespace, classes: int | None = None
) -> tuple[Study | None, list[SearchSpace]]:
    """The study that the options name, if they name one, and its spaces or the one they name.

    A torchvision model that they name has so many classes.
    """
    from widthsearch.space.loading import load_space

    if options.space.endswith((".yaml", ".yml")) and options.input is None:
        study = Study.load(options.space)
        return study, list(study.spaces.values())
    return None, [load_space(options.space, options.input, classes)]


def _print_front(study: Study, console: Console) -> MetricPosterior:
    """Print a study's front, and write front.json."""
    posterior = study.posterior()
    print_tables(console, tables.front_tables(study, posterior))
    print_line(console, tables.write_front(study, posterior))
    return posterior


def _check_writable(path: Path) -> None:
    """Check that a file can be written, before the work whose result it is to hold."""
    existed = path.exists()
    with writing(path.parent):
        path.open("ab").close()
    if not existed:
        path.unlink()


def _write(path: str | Path, write: Callable[[Path], object], console: Console) -> None:
    """Write a file that the user named."""
    with writing(Path(path).parent):
        write(Path(path))
    print_line(console, f"written: {path}")
